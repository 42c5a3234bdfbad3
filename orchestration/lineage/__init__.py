"""Lineage of columns, from the field in the message to the column in the mart.

    dbt manifest + compiled SQL + feed declarations -> graph -> commands, page, OpenLineage, Dagster, the policy

`graph` is the data structure, `sql` reads one statement, `compiled` asks dbt for the statements (no server needed),
`build` joins them; everything else is a view of that one graph. Nothing here imports Dagster.
"""

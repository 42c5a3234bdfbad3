"""The loaders: Kafka topics and REST APIs -> decoded against the declared contract -> raw tables in Postgres.

Imports neither dagster nor orchestration, so that a loader runs wherever Python and dlt do.
"""

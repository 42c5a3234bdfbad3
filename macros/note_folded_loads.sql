{#
    On-run-end: which load of each feed the models that were built now have folded in (`ops.model_loads`), whoever ran
    dbt: what was committed when the run began, for a model that reads a feed; what its parents had, for one that reads
    models. The age of a table follows from it (orchestration/ages.py). Never too new: a load committed while the run
    was going may be in the models already, and counts from the next build.
#}
{% macro note_folded_loads(results) -%}
    {%- if not execute or flags.WHICH not in ('build', 'run')
        or adapter.get_relation(database=target.database, schema='ops', identifier='model_loads') is none -%}
        {{ return('') }}
    {%- endif -%}
    {%- set statements = [] -%}
    {#- In the order they ended, so parents stand before what reads them. -#}
    {%- for result in results if result.node.resource_type == 'model' and result.status == 'success' -%}
        {%- set parts = [] -%}
        {%- for parent in result.node.depends_on.nodes -%}
            {%- if parent in graph.sources -%}
                {%- set source = graph.sources[parent] -%}
                {%- if source.meta.feed is defined -%}
                    {%- set feed = source.source_name ~ '.' ~ source.name -%}
                    {%- do parts.append(
                        "select '" ~ feed ~ "' as feed, coalesce((select load_id from ops.builds_begun where invocation_id = '"
                        ~ invocation_id ~ "' and feed = '" ~ feed ~ "'), '') as load_id"
                    ) -%}
                {%- endif -%}
            {%- elif graph.nodes[parent].resource_type == 'model' -%}
                {%- set node = graph.nodes[parent] -%}
                {%- do parts.append(
                    "select feed, load_id from ops.model_loads where model = '" ~ node.schema ~ '.' ~ (node.alias or node.name)
                    ~ "'"
                ) -%}
            {%- endif -%}
        {%- endfor -%}
        {%- if parts -%}
            {%- do statements.append(
                "insert into ops.model_loads (model, feed, load_id, built_at) select '" ~ result.node.schema ~ '.'
                ~ result.node.alias ~ "', feed, min(load_id), clock_timestamp() from (" ~ parts | join(' union all ')
                ~ ") as inputs group by feed on conflict (model, feed)"
                ~ " do update set load_id = excluded.load_id, built_at = excluded.built_at"
            ) -%}
        {%- endif -%}
    {%- endfor -%}
    {%- do statements.append(
        "delete from ops.builds_begun where invocation_id = '" ~ invocation_id
        ~ "' or begun_at < clock_timestamp() - interval '7 days'"
    ) -%}
    {{ return(statements | join(';\n')) }}
{%- endmacro %}

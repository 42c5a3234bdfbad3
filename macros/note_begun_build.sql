{#
    On-run-start: the last committed load of each feed. Whatever this run builds from the raw tables has at least that:
    see macros/note_folded_loads.sql.
#}
{% macro note_begun_build() -%}
    {%- if execute and flags.WHICH in ('build', 'run')
        and adapter.get_relation(database=target.database, schema='ops', identifier='builds_begun') is not none -%}
        {{ return(
            "insert into ops.builds_begun (invocation_id, feed, load_id) select '" ~ invocation_id
            ~ "', feed, max(load_id) from ops.loads group by feed"
        ) }}
    {%- endif -%}
    {{ return('') }}
{%- endmacro %}

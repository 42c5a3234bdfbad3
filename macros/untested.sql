{#
    What of a relation no data test has passed yet, as a condition: tests of big tables look at what loads brought since
    (a new key cannot equal an old one, indexes see to that). `true`, which is all of it, when

        - var `full_tests` is set: `dbt test --vars 'full_tests: true'`, once a day, finds what was changed by hand
        - the build is a full refresh
        - nothing is known of it: see `note_tested_loads` for what is noted, and what is forgotten
#}
{% macro untested(relation) -%}
    {%- set table = adapter.get_relation(
        database=target.database, schema=generate_schema_name('audit', none), identifier='tested_loads'
    ) -%}
    {%- if not execute or flags.FULL_REFRESH or var('full_tests') or table is none -%}
        {{ return('true') }}
    {%- endif -%}
    {%- set marks = run_query(
        "select load_column, load_id from " ~ table
        ~ " where relation = '" ~ relation.schema ~ "." ~ relation.identifier ~ "'"
    ) -%}
    {%- set conditions = [] -%}
    {%- for column, load_id in marks.rows -%}
        {%- do conditions.append(column ~ " > '" ~ load_id ~ "'") -%}
    {%- endfor -%}
    {{ return('(' ~ conditions | join(' or ') ~ ')' if conditions else 'true') }}
{%- endmacro %}

{#
    Whether this model may count on from what it holds by what changed in `relation` alone. Not when it cannot know what
    it counted of a changed row: the row took in more than one build since (its `_previous_load_id` lies above this
    model's mark), left its key or went back in time (it has none, and is not new), or rows came back to the raw table
    (see `restored_loads`). Then everything is counted again.

    relation:           has `_first_load_id`, `_last_load_id`, and `_previous_load_id`, the `_last_load_id` of the
                        version a row replaced.
    source_name, table_name: the feed it is made of.
#}
{% macro follows_changes(relation, source_name, table_name) -%}
    {%- if not (execute and is_incremental()) or restored_loads(source_name, table_name) -%}
        {{ return(false) }}
    {%- endif -%}
    {%- set mark = high_water_mark() -%}
    {%- set unknown = run_query(
        "select 1 from " ~ relation ~ " where _last_load_id > " ~ mark
        ~ " and not coalesce(_previous_load_id <= " ~ mark ~ ", _first_load_id > " ~ mark ~ ") limit 1"
    ) -%}
    {{ return(unknown.rows | length == 0) }}
{%- endmacro %}

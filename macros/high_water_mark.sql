{#
    The greatest load this model has taken in, as a quoted literal. Read before the query and written into it as a
    literal, because a subselect hides the value from the planner, which then reads all of the table.

    Load ids of a feed only grow (the commit point refuses others), so "greater than the mark" is "not seen yet". A
    mark on event time would lose what comes late.

    column: the column that holds the load; on another relation than the model itself, give that too.
#}
{% macro high_water_mark(column='_last_load_id', relation=none) -%}
    {%- set mark = namespace(value='') -%}
    {%- if execute -%}
        {%- set found = run_query('select max(' ~ column ~ ') from ' ~ (relation or this)) -%}
        {%- if found.rows and found.rows[0][0] is not none -%}
            {%- set mark.value = found.rows[0][0] -%}
        {%- endif -%}
    {%- endif -%}
    '{{ mark.value }}'
{%- endmacro %}

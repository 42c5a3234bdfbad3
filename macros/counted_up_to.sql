{#
    Feed -> the greatest load that a model over several feeds has counted, quoted; one that is missing is counted from
    its first load on. Each feed has a mark of its own, because a load of one may be committed after a later one of
    another. Arguments as for `feeds_to_recount`.
#}
{% macro counted_up_to(column, counted) -%}
    {%- set marks = {} -%}
    {%- if execute and is_incremental() -%}
        {%- set anew = feeds_to_recount(column, counted) -%}
        {%- set found = run_query(
            "select feed, max(" ~ column ~ ") from " ~ this ~ " where " ~ counted ~ " group by feed"
        ) -%}
        {%- for row in found.rows if row[0] not in anew -%}
            {%- do marks.update({row[0]: "'" ~ row[1] ~ "'"}) -%}
        {%- endfor -%}
    {%- endif -%}
    {{ return(marks) }}
{%- endmacro %}

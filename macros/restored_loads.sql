{#
    Loads this model has not taken in that brought rows back: rows that had landed, were gone from the raw table and
    were read again (`warehouse replay`). A model that counts what it folds may have counted such a row before it was
    gone, and its count cannot tell: the keys of these loads are folded anew from their raw rows.

    The var `restored_loads` names loads that are not there yet, for a forecast. Gives a list, empty in a full refresh.
#}
{% macro restored_loads(source_name, table_name) -%}
    {%- set loads = [] -%}
    {%- if execute and is_incremental() -%}
        {%- set found = run_query(
            "select distinct _dlt_load_id from " ~ source_name ~ "._ledger"
            ~ " where feed = '" ~ source_name ~ "." ~ table_name ~ "' and restored > 0"
            ~ " and _dlt_load_id > " ~ high_water_mark()
            ~ " and _dlt_load_id in " ~ committed_loads(source_name)
        ) -%}
        {%- for row in found.rows -%}
            {%- do loads.append(row[0]) -%}
        {%- endfor -%}
        {%- do loads.extend(var('restored_loads', [])) -%}
    {%- endif -%}
    {{ return(loads) }}
{%- endmacro %}

{#
    Load ids of a raw schema that are committed, as a subquery for `in`. Never a join: dlt may write the row of one
    load twice when it is killed at the wrong moment.
#}
{% macro committed_loads(source_name) -%}
    (select load_id from {{ source_name }}._dlt_loads)
{%- endmacro %}

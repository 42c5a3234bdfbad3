{# Pre-hook: the rows of feeds that are counted anew go. Arguments as for `feeds_to_recount`. #}
{% macro forget_feeds(column, counted) -%}
    {%- set feeds = feeds_to_recount(column, counted) -%}
    {%- if feeds -%}
        delete from {{ this }} where feed in ('{{ feeds | join("', '") }}')
    {%- endif -%}
{%- endmacro %}

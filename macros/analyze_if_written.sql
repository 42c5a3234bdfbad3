{#
    Post-hook: fresh statistics for the planner where the model was written to. Without them a join over a table just
    filled takes minutes; with nothing written there is nothing to learn.
#}
{% macro analyze_if_written() -%}
    {%- set written = load_result('main') -%}
    {%- if written and written['response'].rows_affected != 0 -%}
        analyze {{ this }}
    {%- endif -%}
{%- endmacro %}

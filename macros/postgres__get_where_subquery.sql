{# What generic tests read: dbt calls this for each of them. #}
{% macro postgres__get_where_subquery(relation) -%}
    {%- set conditions = [untested(relation)] -%}
    {%- if config.get('where') -%}
        {%- do conditions.append('(' ~ config.get('where') ~ ')') -%}
    {%- endif -%}
    {%- if conditions == ['true'] -%}
        {{ return(relation) }}
    {%- endif -%}
    {{ return('(select * from ' ~ relation ~ ' where ' ~ conditions | join(' and ') ~ ') as dbt_subquery') }}
{%- endmacro %}

{# The day a moment falls on in UTC, whatever the time zone of the session. #}
{% macro utc_date(moment) -%}
    cast({{ moment }} at time zone 'UTC' as date)
{%- endmacro %}

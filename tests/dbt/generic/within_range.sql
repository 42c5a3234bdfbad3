{#
    Rows whose value lies outside the range. Both ends belong to it; an end left out is open. The loader enforces the
    same rule on each record before it lands.
#}
{% test within_range(model, column_name, min_value=none, max_value=none) %}
    {%- set ends = [] -%}
    {%- for value, operator in [(min_value, '<'), (max_value, '>')] if value is not none -%}
        {%- set literal = value if value is number else "'" ~ value ~ "'" -%}
        {%- do ends.append(column_name ~ ' ' ~ operator ~ ' ' ~ literal) -%}
    {%- endfor -%}
    {%- if not ends -%}
        {{ exceptions.raise_compiler_error('within_range needs min_value, max_value or both: ' ~ model) }}
    {%- endif %}
    select {{ column_name }}
    from {{ model }}
    where {{ ends | join(' or ') }}
{% endtest %}

{# Minor units (1234) to major units (12.34), exact, with as many decimals as the currency has. #}
{% macro to_major_units(amount_minor, exponent) -%}
    round({{ amount_minor }} / power(cast(10 as numeric), {{ exponent }}), {{ exponent }})
{%- endmacro %}

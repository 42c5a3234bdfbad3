{#
    Major units (12.34) to minor units (1234). The exponent comes from the currencies seed: 0 for JPY, 3 for KWD.
    Exact: what does not fit the currency was refused at the door, and the conservation tests compare unrounded sums.
#}
{% macro to_minor_units(amount, exponent) -%}
    cast({{ amount }} * power(cast(10 as numeric), {{ exponent }}) as bigint)
{%- endmacro %}

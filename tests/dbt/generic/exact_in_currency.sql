{#
    Rows whose amount, in major units, has more decimals than its currency (12.345 USD, 0.5 JPY), or whose currency
    is not in the currencies seed. The loader enforces the same rule on each record before it lands.
#}
{% test exact_in_currency(model, column_name, currency_column) %}
    with amounts as (
        select * from {{ model }}
    )

    select
        amounts.{{ currency_column }},
        amounts.{{ column_name }}
    from amounts
    left join {{ ref('currencies') }} as currencies
        on amounts.{{ currency_column }} = currencies.currency_code
    where
        currencies.currency_code is null
        or amounts.{{ column_name }} <> trunc(amounts.{{ column_name }}, currencies.minor_unit_exponent)
{% endtest %}

{{ config(unique_key='currency_code') }}

with currencies as (
    select * from {{ ref('currencies') }}
),

final as (
    select
        currency_code,
        currency_name,
        minor_unit_exponent,
        currency_code = '{{ var("reporting_currency") }}' as is_reporting_currency
    from currencies
)

select * from final

{{ config(unique_key=['revenue_date', 'currency_code', 'country_code']) }}

with totals as (
    select * from {{ ref('int_payments__daily_totals') }}
),

currencies as (
    select * from {{ ref('dim_currencies') }}
),

revenue as (
    select
        occurred_date as revenue_date,
        currency_code,
        country_code,
        reporting_currency_code,
        transaction_count,
        unconverted_count,
        amount_minor as revenue_minor,
        reporting_amount_minor as reporting_revenue_minor
    from totals
    where status = 'completed'
),

final as (
    select
        revenue.revenue_date,
        revenue.currency_code,
        revenue.country_code,
        revenue.reporting_currency_code,

        revenue.transaction_count,
        revenue.unconverted_count,

        revenue.revenue_minor,
        cast(
            {{ to_major_units('revenue.revenue_minor', 'currencies.minor_unit_exponent') }} as numeric(38, 4)
        ) as revenue_major,
        revenue.reporting_revenue_minor,
        cast(
            {{ to_major_units('revenue.reporting_revenue_minor', 'reporting_currency.minor_unit_exponent') }}
            as numeric(38, 4)
        ) as reporting_revenue_major
    from revenue
    left join currencies on revenue.currency_code = currencies.currency_code
    left join currencies as reporting_currency
        on revenue.reporting_currency_code = reporting_currency.currency_code
)

select * from final

-- Every published rate stands on its own day at the price published, and on no other day where one was published.
with priced_days as (
    select distinct rate_date from {{ ref('stg_fx__daily_rates') }}
    -- Without a price of the reporting currency on the day nothing can be crossed.
    where '{{ var("reporting_currency") }}' in (quote_currency_code, base_currency_code)
),

published as (
    select
        rate_date,
        quote_currency_code as currency_code,
        nullif(rate, 0) as currency_per_base
    from {{ ref('stg_fx__daily_rates') }}
    where
        base_currency_code = '{{ var("fx_base_currency") }}'
        and rate_date in (select priced_days.rate_date from priced_days)
),

filled as (
    select * from {{ ref('int_fx__daily_rates_filled') }}
)

select
    published.rate_date,
    published.currency_code,
    published.currency_per_base as published_rate,
    filled.currency_per_base as filled_rate,
    filled.rate_as_of_date
from published
left join filled
    on published.rate_date = filled.rate_date and published.currency_code = filled.currency_code
where
    filled.rate_as_of_date is distinct from published.rate_date
    or filled.currency_per_base is distinct from published.currency_per_base

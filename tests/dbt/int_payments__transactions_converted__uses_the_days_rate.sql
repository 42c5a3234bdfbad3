-- The rate on each row is the one that stands on its day now, also after a rate came late or was corrected, and the
-- converted amount is within one minor unit of amount times rate.
with converted as (
    select * from {{ ref('int_payments__transactions_converted') }}
    where
        currency_code <> reporting_currency_code
        and {{ untested(ref('int_payments__transactions_converted')) }}
),

rates as (
    select * from {{ ref('int_fx__daily_rates_filled') }}
),

currencies as (
    select * from {{ ref('currencies') }}
)

select
    converted.transaction_id,
    converted.fx_rate,
    rates.rate,
    converted.fx_rate_date,
    rates.rate_as_of_date
from converted
left join rates
    on converted.occurred_date = rates.rate_date and converted.currency_code = rates.currency_code
left join currencies on converted.currency_code = currencies.currency_code
left join currencies as reporting on converted.reporting_currency_code = reporting.currency_code
where
    converted.fx_rate is distinct from rates.rate
    or converted.fx_rate_date is distinct from rates.rate_as_of_date
    or converted._fx_load_id is distinct from rates._fx_load_id
    or converted.has_fx_rate <> (rates.rate is not null)
    or converted.has_fx_rate <> (converted.reporting_amount_minor is not null)
    or abs(
        converted.reporting_amount_minor
        - converted.amount_minor
        * converted.fx_rate
        * power(cast(10 as numeric), reporting.minor_unit_exponent - currencies.minor_unit_exponent)
    ) > 1

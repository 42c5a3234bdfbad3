-- By quote currency, staging holds every committed version and, of each day, the rate of the latest load.
with mark as (
    select max(_last_load_id) as load_id from {{ ref('stg_fx__daily_rates') }}
),

versions as (
    select
        *,
        lead(_dlt_load_id) over (
            partition by rate_date, base_currency, quote_currency
            order by _dlt_load_id, _stream_id, _api_window_from, _api_page, _api_item
        ) is null as is_latest
    from {{ from_raw('raw_fx', 'daily_rates', up_to='(select load_id from mark)') }} as raw
),

landed as (
    select
        quote_currency as quote_currency_code,
        count(*) as versions,
        sum(rate) filter (where is_latest) as rates
    from versions
    group by quote_currency
),

staged as (
    select
        quote_currency_code,
        sum(version_count) as versions,
        sum(rate) as rates
    from {{ ref('stg_fx__daily_rates') }}
    group by quote_currency_code
)

select
    coalesce(landed.quote_currency_code, staged.quote_currency_code) as quote_currency_code,
    landed.versions as landed_versions,
    staged.versions as staged_versions,
    landed.rates as landed_rates,
    staged.rates as staged_rates
from landed
full outer join staged on landed.quote_currency_code = staged.quote_currency_code
where
    landed.versions is distinct from staged.versions
    or landed.rates is distinct from staged.rates

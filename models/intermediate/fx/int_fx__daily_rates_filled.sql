{{
    config(
        materialized='incremental',
        incremental_strategy='difference',
        unique_key=['rate_date', 'currency_code'],
        on_schema_change='fail',
        indexes=[
            {'columns': ['rate_date', 'currency_code'], 'unique': True},
            {'columns': ['_fx_load_id']},
        ],
        post_hook='{{ analyze_if_written() }}',
    )
}}

{%- set reporting_currency = var('reporting_currency') -%}
{%- set base_currency = var('fx_base_currency') %}

with rates as (
    select * from {{ ref('stg_fx__daily_rates') }}
),

published as (
    select
        rate_date,
        quote_currency_code as currency_code,
        -- A rate of zero prices nothing: no conversion until the next one is published.
        nullif(rate, 0) as currency_per_base,
        _last_load_id
    from rates
    where base_currency_code = '{{ base_currency }}' and quote_currency_code <> '{{ base_currency }}'
),

-- The feed does not list its base, which is worth one of itself on every day something was published.
priced as (
    select * from published
    union all
    select distinct
        rate_date,
        '{{ base_currency }}' as currency_code,
        cast(1 as numeric(24, 12)) as currency_per_base,
        cast(null as text) as _last_load_id
    from published
),

reporting as (
    select
        rate_date,
        currency_per_base as reporting_per_base,
        _last_load_id
    from priced
    where currency_code = '{{ reporting_currency }}'
),

-- Both legs of a rate are of one day: a cross of two days' prices was never quoted by anyone.
crossed as (
    select
        priced.rate_date,
        priced.currency_code,
        reporting.reporting_per_base,
        priced.currency_per_base,
        case
            when priced.currency_code <> '{{ reporting_currency }}'
                then greatest(priced._last_load_id, reporting._last_load_id)
        end as _fx_load_id
    from priced
    inner join reporting on priced.rate_date = reporting.rate_date
),

bounded as (
    select
        *,
        least(
            {{ var('max_rate_age_days') }},
            lead(rate_date) over (partition by currency_code order by rate_date) - rate_date - 1
        ) as days_good_for
    from crossed
),

-- Filled by what was published and not up to today: the same rates give the same rows on any day of building.
final as (
    select
        bounded.rate_date + ages.age_days as rate_date,
        bounded.currency_code,
        cast(
            round(cast(bounded.reporting_per_base as numeric(38, 18)) / bounded.currency_per_base, 18)
            as numeric(38, 18)
        ) as rate,
        bounded.reporting_per_base,
        bounded.currency_per_base,
        bounded.rate_date as rate_as_of_date,
        ages.age_days as rate_age_days,
        bounded._fx_load_id
    from bounded
    cross join lateral generate_series(0, bounded.days_good_for) as ages (age_days)
)

select * from final

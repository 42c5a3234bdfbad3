{{
    config(
        materialized='incremental',
        incremental_strategy='merge',
        unique_key='transaction_id',
        on_schema_change='fail',
        indexes=[
            {'columns': ['transaction_id'], 'unique': True},
            {'columns': ['occurred_date']},
            {'columns': ['_last_load_id']},
            {'columns': ['_fx_load_id']},
        ],
        post_hook='{{ analyze_if_written() }}',
    )
}}

{%- set reporting_currency = var('reporting_currency') %}

-- Not materialized: read twice and more, and an incremental run must find the touched rows by index.
with transactions as not materialized (
    select * from {{ ref('stg_payments__transactions') }}
),

rates as not materialized (
    select * from {{ ref('int_fx__daily_rates_filled') }}
),

currencies as (
    select * from {{ ref('currencies') }}
),

{% if is_incremental() %}
    -- Two marks, because a transaction changes by its own events and by the rate of its day. No day ever falls back
    -- to an older load's rate, so whatever rate is not taken in yet is of a load above the greatest one in use.
    touched as (
        select transaction_id from transactions
        where _last_load_id > {{ high_water_mark('_last_load_id') }}
        union
        select transactions.transaction_id
        from transactions
        inner join rates
            on
                transactions.occurred_date = rates.rate_date
                and transactions.currency_code = rates.currency_code
        where rates._fx_load_id > {{ high_water_mark('_fx_load_id') }}
    ),
{% endif %}

{% if is_incremental() %}
    before as (
        select * from {{ this }}
        where transaction_id in (select touched.transaction_id from touched)
    ),
{% endif %}

scoped as (
    select * from transactions
    {% if is_incremental() %}
        where transaction_id in (select touched.transaction_id from touched)
    {% endif %}
),

-- The reporting currency is worth one of itself on any day, published or not.
joined as (
    select
        scoped.*,
        currencies.minor_unit_exponent,
        reporting_currency.currency_code as reporting_currency_code,
        reporting_currency.minor_unit_exponent as reporting_exponent,
        scoped.currency_code = reporting_currency.currency_code as is_reporting_currency,
        rates.rate,
        rates.reporting_per_base,
        rates.currency_per_base,
        rates.rate_as_of_date,
        rates._fx_load_id
    from scoped
    left join currencies on scoped.currency_code = currencies.currency_code
    left join currencies as reporting_currency on reporting_currency.currency_code = '{{ reporting_currency }}'
    left join rates
        on
            scoped.occurred_date = rates.rate_date
            and scoped.currency_code = rates.currency_code
),

-- Divided once and rounded once, by the prices as published: rounding the quotient first would lose a minor unit
-- where the exact result lies on a half.
converted as (
    select
        transaction_id,
        user_id,
        merchant_id,
        currency_code,
        country_code,
        status,
        amount_minor,
        reporting_currency_code,
        case
            when is_reporting_currency then amount_minor
            else cast(
                round(
                    {{ to_major_units('amount_minor', 'minor_unit_exponent') }}
                    * reporting_per_base * power(cast(10 as numeric), reporting_exponent)
                    / currency_per_base
                )
                as bigint
            )
        end as reporting_amount_minor,
        case when is_reporting_currency then cast(1 as numeric(38, 18)) else rate end as fx_rate,
        case when is_reporting_currency then occurred_date else rate_as_of_date end as fx_rate_date,
        is_reporting_currency or rate is not null as has_fx_rate,
        occurred_at,
        occurred_date,
        first_occurred_at,
        received_at,
        event_count,
        _loaded_at,
        _dlt_load_id,
        _first_load_id,
        _last_load_id,
        case when not is_reporting_currency then _fx_load_id end as _fx_load_id
    from joined
),

-- What the row said before, for models that count on instead of counting again (see macros/follows_changes.sql): it
-- stayed with its parties and only grew in time. A new rate alone is no new version.
final as (
    select
        converted.*,
        {% if is_incremental() -%}
            case
                when converted._last_load_id = before._last_load_id then before._previous_status
                else before.status
            end as _previous_status,
            case
                when converted._last_load_id = before._last_load_id then before._previous_load_id
                when
                    converted.user_id = before.user_id
                    and converted.merchant_id = before.merchant_id
                    and converted.occurred_at >= before.occurred_at
                    and converted.first_occurred_at <= before.first_occurred_at
                    then before._last_load_id
            end as _previous_load_id
        {%- else -%}
            cast(null as text) as _previous_status,
            cast(null as text) as _previous_load_id
        {%- endif %}
    from converted
    {% if is_incremental() -%}
        left join before on converted.transaction_id = before.transaction_id
    {%- endif %}
)

select * from final

{{
    config(
        materialized='incremental',
        incremental_strategy='difference',
        unique_key=['occurred_date', 'currency_code', 'country_code', 'status'],
        on_schema_change='fail',
        indexes=[
            {'columns': ['occurred_date', 'currency_code', 'country_code', 'status'], 'unique': True},
        ],
        post_hook='{{ analyze_if_written() }}',
    )
}}

{%- set only_changes = follows_changes(
    ref('int_payments__transactions_converted'), 'raw_payments', 'transaction_created'
) %}

-- Not materialized: read twice, and an incremental run must find the days' transactions by index.
with transactions as not materialized (
    select * from {{ ref('int_payments__transactions_converted') }}
),

{% if only_changes %}
    {%- set changed -%}
        _last_load_id > {{ high_water_mark('_last_load_id') }} or _fx_load_id > {{ high_water_mark('_fx_load_id') }}
    {%- endset %}
    days as (
        select {{ days_touched('transactions', changed) }} as touched
    ),
{% endif %}

totals as (
    select
        occurred_date,
        currency_code,
        country_code,
        status,
        reporting_currency_code,
        count(*) as transaction_count,
        cast(sum(event_count) as bigint) as event_count,
        count(*) filter (where not has_fx_rate) as unconverted_count,
        cast(sum(amount_minor) as bigint) as amount_minor,
        -- Nothing converted is not nothing earned: without a rate the converted amount is unknown, not zero.
        cast(sum(reporting_amount_minor) as bigint) as reporting_amount_minor,
        max(_last_load_id) as _last_load_id,
        max(_fx_load_id) as _fx_load_id
    from transactions
    {% if only_changes %}
        where occurred_date = any(cast((select days.touched from days) as date[]))
    {% endif %}
    group by occurred_date, currency_code, country_code, status, reporting_currency_code
),

final as (
    select * from totals
    {% if only_changes %}
        union all
        select * from {{ this }}
        where occurred_date <> all(cast((select days.touched from days) as date[]))
    {% endif %}
)

select * from final

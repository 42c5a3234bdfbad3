{{
    config(
        incremental_strategy='merge',
        unique_key='transaction_id',
        indexes=[
            {'columns': ['occurred_date']},
            {'columns': ['_last_load_id']},
            {'columns': ['_fx_load_id']},
        ],
        post_hook='{{ analyze_if_written() }}',
    )
}}

with transactions as (
    select * from {{ ref('int_payments__transactions_converted') }}
    {% if is_incremental() %}
        where
            _last_load_id > {{ high_water_mark('_last_load_id') }}
            or _fx_load_id > {{ high_water_mark('_fx_load_id') }}
    {% endif %}
),

final as (
    select
        transaction_id,
        {{ token('user_id') }} as user_key,
        {{ surrogate_key(['merchant_id']) }} as merchant_key,
        merchant_id,
        currency_code,
        country_code,
        reporting_currency_code,
        status,

        occurred_at,
        occurred_date,
        first_occurred_at,
        received_at,
        fx_rate_date,

        amount_minor,
        reporting_amount_minor,
        fx_rate,

        status = 'completed' as is_completed,
        status = 'failed' as is_failed,
        status = 'pending' as is_pending,
        has_fx_rate,

        event_count,
        _loaded_at,
        _last_load_id,
        _fx_load_id
    from transactions
)

select * from final

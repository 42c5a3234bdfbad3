{{ config(unique_key='merchant_key') }}

-- A merchant is known by its payments only; the country is that of the first one, ties broken by id.
with merchants as (
    select * from {{ ref('int_payments__merchant_totals') }}
),

final as (
    select
        {{ surrogate_key(['merchant_id']) }} as merchant_key,
        merchant_id,
        first_country_code,

        first_transaction_at,
        last_transaction_at,

        transaction_count,
        completed_transaction_count
    from merchants
)

select * from final

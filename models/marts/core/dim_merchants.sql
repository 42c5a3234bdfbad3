{{ config(unique_key='merchant_key') }}

with transactions as (
    select * from {{ ref('int_payments__transactions_converted') }}
),

-- A merchant is known by its payments only; the country is that of the first one, ties broken by id.
merchants as (
    select
        merchant_id,
        (array_agg(country_code order by first_occurred_at, transaction_id))[1] as first_country_code,
        min(first_occurred_at) as first_transaction_at,
        max(occurred_at) as last_transaction_at,
        count(*) as transaction_count,
        count(*) filter (where status = 'completed') as completed_transaction_count
    from transactions
    group by merchant_id
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

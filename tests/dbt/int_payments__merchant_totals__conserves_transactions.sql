-- Every transaction belongs to exactly one merchant: as many as the days hold, which are counted in another way.
with merchants as (
    select
        coalesce(sum(transaction_count), 0) as transactions,
        coalesce(sum(completed_transaction_count), 0) as completed
    from {{ ref('int_payments__merchant_totals') }}
),

days as (
    select
        coalesce(sum(transaction_count), 0) as transactions,
        coalesce(sum(transaction_count) filter (where status = 'completed'), 0) as completed
    from {{ ref('int_payments__daily_totals') }}
)

select * from merchants
except
select * from days

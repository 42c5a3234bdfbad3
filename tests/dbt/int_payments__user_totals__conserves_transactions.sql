-- Every transaction belongs to exactly one user: as many as the days hold, which are counted in another way.
with users as (
    select
        coalesce(sum(transaction_count), 0) as transactions,
        coalesce(sum(completed_transaction_count), 0) as completed
    from {{ ref('int_payments__user_totals') }}
),

days as (
    select
        coalesce(sum(transaction_count), 0) as transactions,
        coalesce(sum(transaction_count) filter (where status = 'completed'), 0) as completed
    from {{ ref('int_payments__daily_totals') }}
)

select * from users
except
select * from days

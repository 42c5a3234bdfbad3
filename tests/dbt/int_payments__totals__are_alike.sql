-- Summed up by day, by user and by merchant, the transactions are as many: the days are counted again, the others on.
with counts as (
    select
        'day' as summed_up_by,
        coalesce(sum(transaction_count), 0) as transactions,
        coalesce(sum(transaction_count) filter (where status = 'completed'), 0) as completed
    from {{ ref('int_payments__daily_totals') }}
    union all
    select
        'user' as summed_up_by,
        coalesce(sum(transaction_count), 0) as transactions,
        coalesce(sum(completed_transaction_count), 0) as completed
    from {{ ref('int_payments__user_totals') }}
    union all
    select
        'merchant' as summed_up_by,
        coalesce(sum(transaction_count), 0) as transactions,
        coalesce(sum(completed_transaction_count), 0) as completed
    from {{ ref('int_payments__merchant_totals') }}
)

select
    one.summed_up_by,
    one.transactions,
    one.completed,
    other.summed_up_by as other_summed_up_by,
    other.transactions as other_transactions,
    other.completed as other_completed
from counts as one
inner join counts as other on one.summed_up_by < other.summed_up_by
where one.transactions <> other.transactions or one.completed <> other.completed

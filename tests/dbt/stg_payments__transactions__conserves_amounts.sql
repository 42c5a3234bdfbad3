-- By currency and status, staging holds what the latest committed events say. Latest is found here without the
-- deduplication macro, and amounts are compared unrounded, in major units.
{% call unless_tested(ref('stg_payments__transactions')) %}

with mark as (
    select max(_last_load_id) as load_id from {{ ref('stg_payments__transactions') }}
),

latest as (
    select distinct on (transaction_id)
        currency,
        status,
        amount
    from {{ from_raw('raw_payments', 'transaction_created', up_to='(select load_id from mark)') }} as raw
    order by
        transaction_id asc,
        created_at desc,
        _kafka_timestamp desc nulls last,
        _dlt_load_id desc,
        _stream_id desc,
        _kafka_partition desc,
        _kafka_offset desc
),

landed as (
    select
        currency as currency_code,
        status,
        count(*) as transactions,
        sum(amount) as amount
    from latest
    group by currency, status
),

staged as (
    select
        transactions.currency_code,
        transactions.status,
        count(*) as transactions,
        sum(transactions.amount_minor) / power(cast(10 as numeric), min(currencies.minor_unit_exponent)) as amount
    from {{ ref('stg_payments__transactions') }} as transactions
    left join {{ ref('currencies') }} as currencies on transactions.currency_code = currencies.currency_code
    group by transactions.currency_code, transactions.status
)

select
    coalesce(landed.currency_code, staged.currency_code) as currency_code,
    coalesce(landed.status, staged.status) as status,
    landed.transactions as landed_transactions,
    staged.transactions as staged_transactions,
    landed.amount as landed_amount,
    staged.amount as staged_amount
from landed
full outer join staged
    on landed.currency_code = staged.currency_code and landed.status = staged.status
where
    landed.transactions is distinct from staged.transactions
    or landed.amount is distinct from staged.amount

{% endcall %}

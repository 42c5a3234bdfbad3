-- By currency and status, conversion neither loses nor adds a transaction, an event or an amount.
{% set measures %}
    currency_code,
    status,
    count(*) as transactions,
    sum(event_count) as events,
    sum(amount_minor) as amount_minor
{% endset %}

with staged as (
    select {{ measures }}
    from {{ ref('stg_payments__transactions') }}
    group by currency_code, status
),

converted as (
    select {{ measures }}
    from {{ ref('int_payments__transactions_converted') }}
    group by currency_code, status
)

(
    select * from staged
    except
    select * from converted
)
union all
(
    select * from converted
    except
    select * from staged
)

-- By currency, status and day, the fact holds the transactions, events and amounts of the intermediate model.
{% set measures %}
    occurred_date,
    currency_code,
    status,
    count(*) as transactions,
    count(*) filter (where has_fx_rate) as converted,
    sum(event_count) as events,
    sum(amount_minor) as amount_minor,
    sum(reporting_amount_minor) as reporting_amount_minor
{% endset %}

with converted as (
    select {{ measures }}
    from {{ ref('int_payments__transactions_converted') }}
    group by occurred_date, currency_code, status
),

facts as (
    select {{ measures }}
    from {{ ref('fct_transactions') }}
    group by occurred_date, currency_code, status
)

(
    select * from converted
    except
    select * from facts
)
union all
(
    select * from facts
    except
    select * from converted
)

-- By day, currency, country and status, the sums are those of the transactions.
{%- set changed = untested(ref('int_payments__transactions_converted')) %}
{%- set days -%}
    {%- if changed == 'true' -%}
        true
    {%- else -%}
        occurred_date = any({{ days_touched(ref('int_payments__transactions_converted'), changed) }})
    {%- endif -%}
{%- endset %}

with transactions as (
    select
        occurred_date,
        currency_code,
        country_code,
        status,
        count(*) as transaction_count,
        sum(event_count) as event_count,
        count(*) - count(reporting_amount_minor) as unconverted_count,
        sum(amount_minor) as amount_minor,
        sum(reporting_amount_minor) as reporting_amount_minor
    from {{ ref('int_payments__transactions_converted') }}
    where {{ days }}
    group by occurred_date, currency_code, country_code, status
),

totals as (
    select
        occurred_date,
        currency_code,
        country_code,
        status,
        transaction_count,
        event_count,
        unconverted_count,
        amount_minor,
        reporting_amount_minor
    from {{ ref('int_payments__daily_totals') }}
    where {{ days }}
)

(
    select * from transactions
    except
    select * from totals
)
union all
(
    select * from totals
    except
    select * from transactions
)

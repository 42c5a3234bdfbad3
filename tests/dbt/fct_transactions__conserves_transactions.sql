-- Each transaction of the intermediate model is in the fact, with its amounts, and no other.
{% set measures = [
    'occurred_date',
    'currency_code',
    'status',
    'has_fx_rate',
    'event_count',
    'amount_minor',
    'reporting_amount_minor',
] %}

with converted as (
    select * from {{ ref('int_payments__transactions_converted') }}
    where {{ untested(ref('int_payments__transactions_converted')) }}
),

facts as (
    select * from {{ ref('fct_transactions') }}
    where {{ untested(ref('fct_transactions')) }}
)

select converted.transaction_id
from converted
left join {{ ref('fct_transactions') }} as same on converted.transaction_id = same.transaction_id
where
    same.transaction_id is null
    {%- for measure in measures %}
        or converted.{{ measure }} is distinct from same.{{ measure }}
    {%- endfor %}
union all
select facts.transaction_id
from facts
left join {{ ref('int_payments__transactions_converted') }} as same on facts.transaction_id = same.transaction_id
where same.transaction_id is null

-- Each transaction of staging is converted, with its state, and no other.
{% set measures = ['currency_code', 'status', 'event_count', 'amount_minor'] %}

with staged as (
    select * from {{ ref('stg_payments__transactions') }}
    where {{ untested(ref('stg_payments__transactions')) }}
),

converted as (
    select * from {{ ref('int_payments__transactions_converted') }}
    where {{ untested(ref('int_payments__transactions_converted')) }}
)

select staged.transaction_id
from staged
left join {{ ref('int_payments__transactions_converted') }} as same on staged.transaction_id = same.transaction_id
where
    same.transaction_id is null
    {%- for measure in measures %}
        or staged.{{ measure }} is distinct from same.{{ measure }}
    {%- endfor %}
union all
select converted.transaction_id
from converted
left join {{ ref('stg_payments__transactions') }} as same on converted.transaction_id = same.transaction_id
where same.transaction_id is null

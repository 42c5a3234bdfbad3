-- Every committed event up to staging's own high-water mark is folded into exactly one transaction. What a loader
-- commits meanwhile lies above the mark and raises no alarm.
{% call unless_tested(ref('stg_payments__transactions')) %}

with staged as (
    select
        coalesce(sum(event_count), 0) as events,
        max(_last_load_id) as mark
    from {{ ref('stg_payments__transactions') }}
),

landed as (
    select count(*) as events
    from {{ from_raw('raw_payments', 'transaction_created', up_to='(select mark from staged)') }} as raw
)

select
    landed.events as landed_events,
    staged.events as staged_events
from landed
cross join staged
where landed.events <> staged.events

{% endcall %}

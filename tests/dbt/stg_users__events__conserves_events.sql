-- Every committed event up to staging's own high-water mark is folded into exactly one row, and none is missing.
{% call unless_tested(ref('stg_users__events')) %}

with mark as (
    select max(_last_load_id) as load_id from {{ ref('stg_users__events') }}
),

landed as (
    select
        count(*) as events,
        count(distinct event_id) as distinct_events
    from {{ from_raw('raw_users', 'user_events', up_to='(select load_id from mark)') }} as raw
),

staged as (
    select
        coalesce(sum(event_count), 0) as events,
        count(*) as distinct_events
    from {{ ref('stg_users__events') }}
)

select
    landed.events as landed_events,
    staged.events as staged_events,
    landed.distinct_events as landed_distinct_events,
    staged.distinct_events as staged_distinct_events
from landed
cross join staged
where
    landed.events <> staged.events
    or landed.distinct_events <> staged.distinct_events

{% endcall %}

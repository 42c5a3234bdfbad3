-- Every event landed is counted once in the transactions: as many as the loads brought, which are counted load by load.
with counted as (
    select
        coalesce(sum(event_count), 0) as events,
        max(_last_load_id) as mark
    from {{ ref('int_payments__daily_totals') }}
),

landed as (
    select coalesce(sum(loads.raw_rows), 0) as events
    from {{ ref('audit_loads') }} as loads
    inner join counted on loads.load_id <= counted.mark
    where loads.feed = 'raw_payments.transaction_created'
)

select
    landed.events as landed_events,
    counted.events as counted_events
from landed
cross join counted
where landed.events <> counted.events

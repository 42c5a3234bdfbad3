-- A feed has the depths of the last tick it was measured at, and no more than one row.
select
    depths.feed,
    max(depths.measured_at) as measured_at,
    max(queues.measured_at) as shown_at
from {{ source('ops', 'queue_depths') }} as depths
left join {{ ref('rpt_ops__queues') }} as queues on depths.feed = queues.feed
where depths.measured_at >= current_timestamp - make_interval(days => {{ var('sla_days') }})
group by depths.feed
having max(depths.measured_at) is distinct from max(queues.measured_at)

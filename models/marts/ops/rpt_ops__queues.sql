with depths as (
    select * from {{ source('ops', 'queue_depths') }}
    where measured_at >= current_timestamp - make_interval(days => {{ var('sla_days') }})
),

newest as (
    select
        feed,
        max(measured_at) as measured_at,
        max(lag) as greatest_lag
    from depths
    group by feed
),

final as (
    select
        depths.feed,
        depths.measured_at,
        depths.lag as lag_records,
        newest.greatest_lag as greatest_lag_records,
        depths.open_dead_letters,
        cast(extract(epoch from depths.measured_at - depths.oldest_dead_letter_at) as double precision)
            as oldest_dead_letter_seconds
    from newest
    inner join depths on newest.feed = depths.feed and newest.measured_at = depths.measured_at
)

select * from final

with measured as (
    select * from {{ source('ops', 'table_ages') }}
    where measured_at >= current_timestamp - make_interval(days => {{ var('sla_days') }})
),

-- A tick without an age says nothing about the budget.
counted as (
    select
        table_name,
        max(measured_at) as measured_at,
        count(*) filter (where error_after is not null and age is not null) as tick_count,
        count(*) filter (where state = 'error') as late_tick_count
    from measured
    group by table_name
),

final as (
    select
        measured.table_name,
        measured.measured_at,
        measured.state,
        cast(extract(epoch from measured.age) as double precision) as age_seconds,
        cast(extract(epoch from measured.warn_after) as double precision) as warn_after_seconds,
        cast(extract(epoch from measured.error_after) as double precision) as error_after_seconds,
        measured.hop,
        measured.held_by,
        counted.tick_count,
        counted.late_tick_count,
        cast(
            1 - counted.late_tick_count / (nullif(counted.tick_count, 0) * (1 - {{ var('sla_objective') }}))
            as double precision
        ) as error_budget_left
    from counted
    inner join measured
        on counted.table_name = measured.table_name and counted.measured_at = measured.measured_at
)

select * from final

with executions as (
    select * from {{ executions(with_models=true) }} as executions
    where started_at >= current_timestamp - make_interval(days => {{ var('sla_days') }})
),

final as (
    select
        pipeline_kind,
        pipeline,

        count(*) as run_count,
        count(*) filter (where outcome = 'failed') as failed_count,
        cast(100.0 * count(*) filter (where outcome = 'failed') / count(*) as double precision)
            as failures_per_hundred_runs,

        percentile_cont(0.5) within group (order by seconds) filter (where outcome = 'success') as p50_seconds,
        percentile_cont(0.95) within group (order by seconds) filter (where outcome = 'success') as p95_seconds,
        percentile_cont(0.99) within group (order by seconds) filter (where outcome = 'success') as p99_seconds,

        max(started_at) as last_started_at,
        max(started_at) filter (where outcome = 'success') as last_success_started_at
    from executions
    group by pipeline_kind, pipeline
)

select * from final

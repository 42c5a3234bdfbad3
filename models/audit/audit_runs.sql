with runs as (
    select * from {{ source('ops', 'runs') }}
),

run_steps as (
    select * from {{ source('ops', 'run_steps') }}
),

steps as (
    select
        run_id,
        count(*) as step_count,
        count(*) filter (where outcome = 'failed') as failed_step_count,
        cast(sum(rows) filter (where step = 'ingest') as bigint) as landed_rows,
        cast(sum(dead) filter (where step = 'ingest') as bigint) as dead_letters
    from run_steps
    group by run_id
),

final as (
    select
        runs.run_id,
        runs.command,
        runs.trigger,
        runs.outcome,
        runs.error_class,
        runs.message,

        runs.started_at,
        runs.heartbeat_at,
        runs.finished_at,
        extract(epoch from coalesce(runs.finished_at, runs.heartbeat_at) - runs.started_at) as duration_seconds,

        coalesce(steps.step_count, 0) as step_count,
        coalesce(steps.failed_step_count, 0) as failed_step_count,
        coalesce(steps.landed_rows, 0) as landed_rows,
        coalesce(steps.dead_letters, 0) as dead_letters,
        runs.code_version
    from runs
    left join steps on runs.run_id = steps.run_id
)

select * from final

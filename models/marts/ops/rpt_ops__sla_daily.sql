with executions as (
    select
        *,
        {{ utc_date('started_at') }} as started_date
    from {{ executions() }} as executions
    where started_at >= current_timestamp - make_interval(days => {{ var('sla_days') }})
),

measured as (
    select
        *,
        {{ utc_date('measured_at') }} as measured_date,
        lag(state) over (partition by table_name order by measured_at) as state_before
    from {{ source('ops', 'table_ages') }}
    where measured_at >= current_timestamp - make_interval(days => {{ var('sla_days') }})
),

ran as (
    select
        pipeline_kind,
        pipeline,
        started_date as day,
        count(*) as run_count,
        count(*) filter (where outcome = 'failed') as failed_count,
        percentile_cont(0.5) within group (order by seconds) filter (where outcome = 'success') as p50_seconds,
        percentile_cont(0.95) within group (order by seconds) filter (where outcome = 'success') as p95_seconds,
        percentile_cont(0.99) within group (order by seconds) filter (where outcome = 'success') as p99_seconds
    from executions
    group by pipeline_kind, pipeline, started_date
),

-- A miss is the pipeline's that held the table back: the feed, or the build where a model was left behind. Names of
-- feeds have a dot, names of models have none. It counts on the day it begins.
blamed as (
    select
        table_name,
        measured_date as day,
        case when hop like '%.%' then 'feed' else 'step' end as pipeline_kind,
        case when hop like '%.%' then hop else 'build' end as pipeline,
        coalesce(state_before, '') <> 'error' as begins
    from measured
    where state = 'error'
),

missed as (
    select
        pipeline_kind,
        pipeline,
        day,
        count(*) filter (where begins) as miss_count,
        count(distinct table_name) as late_table_count
    from blamed
    group by pipeline_kind, pipeline, day
),

final as (
    select
        coalesce(ran.day, missed.day) as day,
        coalesce(ran.pipeline_kind, missed.pipeline_kind) as pipeline_kind,
        coalesce(ran.pipeline, missed.pipeline) as pipeline,
        coalesce(ran.run_count, 0) as run_count,
        coalesce(ran.failed_count, 0) as failed_count,
        coalesce(missed.miss_count, 0) as miss_count,
        coalesce(missed.late_table_count, 0) as late_table_count,
        ran.p50_seconds,
        ran.p95_seconds,
        ran.p99_seconds
    from ran
    full outer join missed
        on
            ran.pipeline_kind = missed.pipeline_kind
            and ran.pipeline = missed.pipeline
            and ran.day = missed.day
)

select * from final

-- The days of a pipeline add up to what all of them together say.
with days as (
    select
        pipeline_kind,
        pipeline,
        sum(run_count) as run_count,
        sum(failed_count) as failed_count
    from {{ ref('rpt_ops__sla_daily') }}
    group by pipeline_kind, pipeline
    having sum(run_count) > 0
)

select
    coalesce(days.pipeline, pipelines.pipeline) as pipeline,
    days.run_count as of_days,
    pipelines.run_count as of_all
from days
full outer join {{ ref('rpt_ops__pipelines') }} as pipelines
    on days.pipeline_kind = pipelines.pipeline_kind and days.pipeline = pipelines.pipeline
where
    coalesce(pipelines.pipeline_kind, '') not in ('model', 'seed')
    and (
        days.run_count is distinct from pipelines.run_count
        or days.failed_count is distinct from pipelines.failed_count
    )

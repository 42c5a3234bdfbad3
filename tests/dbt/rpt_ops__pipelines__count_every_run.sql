-- Each run that came to an end is counted once, in the pipeline of its command.
select
    runs.command,
    count(*) as runs_that_ended,
    max(pipelines.run_count) as runs_counted
from {{ source('ops', 'runs') }} as runs
left join {{ ref('rpt_ops__pipelines') }} as pipelines
    on pipelines.pipeline_kind = 'run' and runs.command = pipelines.pipeline
where
    runs.outcome <> 'running'
    and runs.finished_at is not null
    and runs.started_at >= current_timestamp - make_interval(days => {{ var('sla_days') }})
group by runs.command
having count(*) is distinct from max(pipelines.run_count)

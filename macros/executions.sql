{#
    What ran and came to an end, one row each: whole runs by their command, steps by name, feeds as they were read.

    with_models: each model and seed of a build as well.
#}
{% macro executions(with_models=false) -%}
    (
        select
            'run' as pipeline_kind,
            command as pipeline,
            started_at,
            outcome,
            cast(extract(epoch from finished_at - started_at) as double precision) as seconds
        from {{ source('ops', 'runs') }}
        where outcome <> 'running' and finished_at is not null
        union all
        select
            case when feed = '' then 'step' else 'feed' end as pipeline_kind,
            case when feed = '' then step else feed end as pipeline,
            started_at,
            outcome,
            cast(extract(epoch from finished_at - started_at) as double precision) as seconds
        from {{ source('ops', 'run_steps') }}
        where outcome <> 'running' and finished_at is not null
        {%- if with_models %}
        union all
        select
            kind as pipeline_kind,
            node as pipeline,
            finished_at - make_interval(secs => seconds) as started_at,
            case when status = 'success' then 'success' else 'failed' end as outcome,
            seconds
        from {{ source('ops', 'run_nodes') }}
        where kind in ('model', 'seed') and status in ('success', 'error')
        {%- endif %}
    )
{%- endmacro %}

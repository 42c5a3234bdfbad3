{{
    config(
        materialized='incremental',
        incremental_strategy='difference',
        unique_key='user_id',
        on_schema_change='fail',
        indexes=[
            {'columns': ['user_id'], 'unique': True},
        ],
        post_hook='{{ analyze_if_written() }}',
    )
}}

{%- set newest_first = [
    'occurred_at desc',
    'received_at desc nulls last',
    '_dlt_load_id desc',
    '_stream_id desc',
    '_kafka_partition desc',
    '_kafka_offset desc',
] | join(', ') %}

{%- set only_changes = follows_changes(ref('stg_users__events'), 'raw_users', 'user_events') %}

-- Not materialized: read twice, and an incremental run must find the users' events by index.
with events as not materialized (
    select * from {{ ref('stg_users__events') }}
),

{% if only_changes %}
    changed as (
        select distinct user_id from events
        where _last_load_id > {{ high_water_mark() }}
    ),
{% endif %}

latest as (
    select
        user_id,
        {% for attribute in ['email', 'full_name', 'phone', 'ip_address', 'country_code'] -%}
            (
                array_agg({{ attribute }} order by {{ newest_first }})
                filter (where {{ attribute }} is not null)
            )[1] as {{ attribute }},
        {% endfor -%}
        min(occurred_at) filter (where event_type = 'signed_up') as signed_up_at,
        max(occurred_at) filter (where event_type = 'signed_in') as last_signed_in_at,
        max(occurred_at) filter (where event_type = 'closed') as closed_at,
        coalesce(
            max(occurred_at) filter (where event_type = 'closed')
            >= max(occurred_at) filter (where event_type in ('closed', 'signed_up')),
            false
        ) as is_closed,
        min(occurred_at) as first_event_at,
        max(occurred_at) as last_event_at,
        count(*) as event_count,
        cast(sum(event_count) as bigint) as delivery_count,
        max(_last_load_id) as _last_load_id
    from events
    {% if only_changes %}
        -- An array, which the planner looks up by index.
        where user_id = any(array(select changed.user_id from changed))
    {% endif %}
    group by user_id
),

final as (
    select * from latest
    {% if only_changes %}
        union all
        select * from {{ this }}
        where user_id not in (select changed.user_id from changed)
    {% endif %}
)

select * from final

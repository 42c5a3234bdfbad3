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

with events as (
    select * from {{ ref('stg_users__events') }}
),

-- From all events each time: a redelivery may name another user than the event did before, and the first one's row
-- would not hear of it from the new loads alone.
final as (
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
    group by user_id
)

select * from final

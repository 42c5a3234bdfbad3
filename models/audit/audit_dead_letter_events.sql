-- Reasons and coordinates only: the record stays with its dead letter.
with events as (
    select * from {{ source('ops', 'dead_letter_events') }}
),

dead_letters as (
    select * from {{ source('ops', 'dead_letters') }}
),

final as (
    select
        {{ surrogate_key(['events.source_name', 'events.event_id']) }} as event_key,
        events.dead_letter_id,
        events.feed,
        events.load_id,

        events.action,
        events.acted_at,
        events.acted_by,
        events.because,

        events.reason,
        events.path,

        dead_letters.reason as first_reason,
        dead_letters.failed_at,
        dead_letters.status,

        events.contract_version,
        events.loader_version
    from events
    inner join dead_letters on events.dead_letter_id = dead_letters.dead_letter_id
)

select * from final

-- A letter that was replayed or discarded has one event that says so, its last; one that is open has none.
with closing as (
    select
        dead_letter_id,
        count(*) as events,
        max(action) as action,
        max(acted_at) as acted_at,
        max(acted_by) as acted_by
    from {{ ref('audit_dead_letter_events') }}
    where action in ('replayed', 'discarded')
    group by dead_letter_id
),

tries as (
    select
        dead_letter_id,
        count(*) as events,
        max(acted_at) as acted_at
    from {{ ref('audit_dead_letter_events') }}
    where action in ('replayed', 'failed_again')
    group by dead_letter_id
)

select
    letters.dead_letter_id,
    letters.status,
    closing.action,
    closing.events,
    letters.attempts,
    tries.events as tries
from {{ ref('audit_dead_letters') }} as letters
left join closing on letters.dead_letter_id = closing.dead_letter_id
left join tries on letters.dead_letter_id = tries.dead_letter_id
where
    letters.status <> coalesce(closing.action, 'open')
    or closing.events > 1
    or letters.resolved_by is distinct from closing.acted_by
    or letters.attempts <> 1 + coalesce(tries.events, 0)
    or tries.acted_at > closing.acted_at

{{ config(unique_key='user_key') }}

with profiles as (
    select * from {{ ref('int_users__latest') }}
),

paying_users as (
    select * from {{ ref('int_payments__user_totals') }}
),

-- Neither feed waits for the other: a payment may come before the sign-up, or without one.
joined as (
    select
        coalesce(profiles.user_id, paying_users.user_id) as user_id,
        profiles.country_code,
        profiles.signed_up_at,
        profiles.last_signed_in_at,
        profiles.closed_at,
        profiles.first_event_at,
        profiles.last_event_at,
        paying_users.first_transaction_at,
        paying_users.last_transaction_at,
        profiles.user_id is not null as has_profile,
        coalesce(profiles.is_closed, false) as is_closed,
        coalesce(profiles.event_count, 0) as event_count,
        coalesce(paying_users.transaction_count, 0) as transaction_count,
        coalesce(paying_users.completed_transaction_count, 0) as completed_transaction_count
    from profiles
    full outer join paying_users on profiles.user_id = paying_users.user_id
),

final as (
    select
        {{ token('user_id') }} as user_key,
        country_code,

        signed_up_at,
        last_signed_in_at,
        closed_at,
        first_event_at,
        last_event_at,
        first_transaction_at,
        last_transaction_at,

        has_profile,
        is_closed,

        event_count,
        transaction_count,
        completed_transaction_count
    from joined
)

select * from final

-- Every event belongs to exactly one user.
{% call unless_tested(ref('stg_users__events')) %}

with events as (
    select
        count(*) as events,
        coalesce(sum(event_count), 0) as deliveries,
        count(distinct user_id) as users
    from {{ ref('stg_users__events') }}
),

users as (
    select
        coalesce(sum(event_count), 0) as events,
        coalesce(sum(delivery_count), 0) as deliveries,
        count(*) as users
    from {{ ref('int_users__latest') }}
)

select * from events
except
select * from users

{% endcall %}

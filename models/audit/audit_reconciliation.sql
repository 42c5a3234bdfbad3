{{ config(materialized='table') }}

{#- Each feed with the staging model that takes it in and the column that says how many raw rows a row stands for. -#}
{%- set hops = [
    {'source': 'raw_fx', 'table': 'daily_rates', 'staging': 'stg_fx__daily_rates', 'folded': 'version_count'},
    {'source': 'raw_payments', 'table': 'transaction_created', 'staging': 'stg_payments__transactions',
        'folded': 'event_count'},
    {'source': 'raw_users', 'table': 'user_events', 'staging': 'stg_users__events', 'folded': 'event_count'},
] %}

with ledger as (
    select * from {{ source('ops', 'ledger') }}
),

dead_letters as (
    select * from {{ source('ops', 'dead_letters') }}
),

accounted as (
    select
        feed,
        cast(sum(offered) as bigint) as offered,
        cast(sum(landed) as bigint) as landed,
        cast(sum(dead) as bigint) as dead,
        cast(sum(tombstones) as bigint) as tombstones,
        cast(sum(unchanged) as bigint) as unchanged,
        cast(sum(lost) as bigint) as lost,
        cast(sum(drifted) as bigint) as drifted
    from ledger
    group by feed
),

dead_rows as (
    select
        feed,
        -- A replayed one is counted among the landed.
        count(*) filter (where status <> 'replayed') as dead_letter_rows,
        count(*) filter (where status = 'replayed') as replayed_rows
    from dead_letters
    group by feed
),

staged as (
    {%- for hop in hops %}
        select
            '{{ hop.source }}.{{ hop.table }}' as feed,
            max(_last_load_id) as staged_load_id,
            coalesce(cast(sum({{ hop.folded }}) as bigint), 0) as staged_rows
        from {{ ref(hop.staging) }}
        {%- if not loop.last %}
            union all
        {%- endif %}
    {%- endfor %}
),

-- What landed after staging was built is waiting, not missing.
landed as (
    {%- for hop in hops %}
        select
            '{{ hop.source }}.{{ hop.table }}' as feed,
            count(raw._dlt_load_id) as raw_rows,
            count(raw._dlt_load_id) filter (
                where raw._dlt_load_id > coalesce(staged.staged_load_id, '')
            ) as waiting_rows
        from staged
        left join {{ from_raw(hop.source, hop.table) }} as raw on true
        where staged.feed = '{{ hop.source }}.{{ hop.table }}'
        {%- if not loop.last %}
            union all
        {%- endif %}
    {%- endfor %}
),

feeds as (
    select feed from accounted
    union
    select feed from staged
),

final as (
    select
        feeds.feed,
        coalesce(accounted.offered, 0) as offered,
        coalesce(accounted.landed, 0) as landed,
        coalesce(accounted.dead, 0) as dead,
        coalesce(accounted.tombstones, 0) as tombstones,
        coalesce(accounted.unchanged, 0) as unchanged,
        coalesce(accounted.lost, 0) as lost,
        coalesce(accounted.drifted, 0) as drifted,
        coalesce(dead_rows.dead_letter_rows, 0) as dead_letter_rows,
        coalesce(dead_rows.replayed_rows, 0) as replayed_rows,
        landed.raw_rows,
        landed.waiting_rows,
        staged.staged_rows,
        staged.staged_load_id
    from feeds
    left join accounted on feeds.feed = accounted.feed
    left join dead_rows on feeds.feed = dead_rows.feed
    left join landed on feeds.feed = landed.feed
    left join staged on feeds.feed = staged.feed
)

select * from final

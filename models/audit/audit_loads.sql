{{
    config(
        materialized='incremental',
        incremental_strategy='merge',
        unique_key=['feed', 'load_id'],
        on_schema_change='fail',
        indexes=[
            {'columns': ['feed', 'load_id'], 'unique': True},
        ],
        pre_hook="{{ forget_feeds('load_id', 'not is_waiting') }}",
        post_hook='{{ analyze_if_written() }}',
    )
}}

{%- set marks = counted_up_to('load_id', 'not is_waiting') %}

with loads as (
    select * from {{ source('ops', 'loads') }}
),

ledger as (
    select * from {{ source('ops', 'ledger') }}
),

dead_letters as not materialized (
    select * from {{ source('ops', 'dead_letters') }}
),

-- What is counted of a load never changes once staging has it; one that waits is counted again.
marks as (
    select
        cast(null as text) as feed,
        cast(null as text) as load_id
    where false
    {%- for feed, load_id in marks.items() %}
        union all
        select
            '{{ feed }}' as feed,
            {{ load_id }} as load_id
    {%- endfor %}
),

taken_in as (
    {%- for hop in reconciled_feeds() %}
        select
            '{{ hop.source }}.{{ hop.table }}' as feed,
            coalesce(max(_last_load_id), '') as load_id
        from {{ ref(hop.staging) }}
        {%- if not loop.last %}
            union all
        {%- endif %}
    {%- endfor %}
),

-- Not those of somebody else's pipeline in the same schema.
new_loads as (
    select
        loads.feed,
        loads.load_id,
        loads.committed_at
    from loads
    left join marks on loads.feed = marks.feed
    where
        loads.load_id > coalesce(marks.load_id, '')
        and (
            loads.feed in (select taken_in.feed from taken_in)
            or loads.feed in (select ledger.feed from ledger)
        )
),

-- A raw row is in staging when the row of its record there has taken in its load.
raw_rows as (
    {%- for hop in reconciled_feeds() %}
        {%- set feed = hop.source ~ '.' ~ hop.table %}
        {%- set same_record = [] %}
        {%- for name, raw_name in hop.key.items() %}
            {%- do same_record.append('raw.' ~ raw_name ~ ' = staged.' ~ name) %}
        {%- endfor %}
        select
            '{{ feed }}' as feed,
            raw._dlt_load_id as load_id,
            min(raw._loaded_at) as loaded_at,
            count(*) as raw_rows,
            count(staged._last_load_id) as staged_rows
        from {{ from_raw(hop.source, hop.table, after=marks.get(feed, "''")) }} as raw
        left join {{ ref(hop.staging) }} as staged
            on
                raw._dlt_load_id <= staged._last_load_id
                and {{ same_record | join(' and ') }}
        group by raw._dlt_load_id
        {%- if not loop.last %}
            union all
        {%- endif %}
    {%- endfor %}
),

-- Feed by feed with a literal, so that the index on the load serves; the join is for feeds nobody takes in any more.
dead_rows as (
    {%- for hop in reconciled_feeds() %}
        {%- set feed = hop.source ~ '.' ~ hop.table %}
        select
            feed,
            load_id,
            min(failed_at) as loaded_at,
            count(*) as dead_letter_rows
        from dead_letters
        where source_name = '{{ hop.source }}' and feed = '{{ feed }}' and load_id > {{ marks.get(feed, "''") }}
        group by feed, load_id
        union all
    {%- endfor %}
    select
        dead_letters.feed,
        dead_letters.load_id,
        min(dead_letters.failed_at) as loaded_at,
        count(*) as dead_letter_rows
    from dead_letters
    inner join new_loads on dead_letters.feed = new_loads.feed and dead_letters.load_id = new_loads.load_id
    where new_loads.feed not in (select taken_in.feed from taken_in)
    group by dead_letters.feed, dead_letters.load_id
),

replaying_loads as (
    select distinct
        feed,
        load_id
    from ledger
    where kind = 'replay'
),

replayed_rows as (
    select
        dead_letters.feed,
        dead_letters.replay_load_id as load_id,
        count(*) as replayed_letter_rows
    from dead_letters
    inner join new_loads on dead_letters.feed = new_loads.feed and dead_letters.replay_load_id = new_loads.load_id
    inner join replaying_loads
        on new_loads.feed = replaying_loads.feed and new_loads.load_id = replaying_loads.load_id
    group by dead_letters.feed, dead_letters.replay_load_id
),

final as (
    select
        new_loads.feed,
        new_loads.load_id,

        coalesce(raw_rows.loaded_at, dead_rows.loaded_at, new_loads.committed_at) as loaded_at,

        case when taken_in.feed is not null then coalesce(raw_rows.raw_rows, 0) end as raw_rows,
        case when taken_in.feed is not null then coalesce(raw_rows.staged_rows, 0) end as staged_rows,
        coalesce(dead_rows.dead_letter_rows, 0) as dead_letter_rows,
        coalesce(replayed_rows.replayed_letter_rows, 0) as replayed_letter_rows,

        coalesce(new_loads.load_id > taken_in.load_id, false) as is_waiting
    from new_loads
    left join taken_in on new_loads.feed = taken_in.feed
    left join raw_rows on new_loads.feed = raw_rows.feed and new_loads.load_id = raw_rows.load_id
    left join dead_rows on new_loads.feed = dead_rows.feed and new_loads.load_id = dead_rows.load_id
    left join replayed_rows on new_loads.feed = replayed_rows.feed and new_loads.load_id = replayed_rows.load_id
)

select * from final

{{
    config(
        materialized='incremental',
        incremental_strategy='difference',
        unique_key=['feed', 'loaded_date'],
        on_schema_change='fail',
        indexes=[
            {'columns': ['feed', 'loaded_date'], 'unique': True},
        ],
    )
}}

{%- set ledger_counts = [
    'offered', 'landed', 'restored', 'dead', 'replayed', 'tombstones', 'unchanged', 'lost', 'drifted',
] %}
{%- set letter_counts = ['dead_letter_rows', 'replayed_letter_rows'] %}
{%- set row_counts = ['raw_rows', 'missing_rows', 'staged_rows', 'waiting_rows'] %}
{%- set feeds = [] %}
{%- set money_feeds = [] %}
{%- for hop in reconciled_feeds() %}
    {%- do feeds.append(hop.source ~ '.' ~ hop.table) %}
    {%- if hop.money is defined %}
        {%- do money_feeds.append(feeds[-1]) %}
    {%- endif %}
{%- endfor %}

with ledger as (
    select * from {{ source('ops', 'ledger') }}
),

loads as (
    select * from {{ ref('audit_loads') }}
),

amounts as (
    select * from {{ ref('audit_reconciliation_amounts') }}
),

ledger_by_load as (
    select
        feed,
        load_id,
        min(loaded_at) as loaded_at,
        {% for count in ledger_counts if count not in ('dead', 'replayed') -%}
            sum({{ count }}) as {{ count }},
        {% endfor -%}
        sum(dead) filter (where kind <> 'replay') as dead,
        -sum(dead) filter (where kind = 'replay') as replayed
    from ledger
    group by feed, load_id
),

counted_up_to as (
    select
        feed,
        max(load_id) as load_id
    from loads
    group by feed
),

-- A load on one side only stands here too. What a loader commits meanwhile lies above the last load counted.
by_load as (
    select
        coalesce(loads.feed, ledger_by_load.feed) as feed,
        {{ utc_date('coalesce(ledger_by_load.loaded_at, loads.loaded_at)') }} as loaded_date,
        {% for count in ledger_counts -%}
            coalesce(ledger_by_load.{{ count }}, 0) as {{ count }},
        {% endfor -%}
        {% for count in letter_counts -%}
            coalesce(loads.{{ count }}, 0) as {{ count }},
        {% endfor -%}
        loads.raw_rows,
        loads.staged_rows,
        case when loads.is_waiting then loads.raw_rows else 0 end as waiting_rows,
        coalesce(loads.feed, ledger_by_load.feed) in (
            {% for feed in feeds -%}
                '{{ feed }}'{% if not loop.last %}, {% endif %}
            {%- endfor %}
        ) as is_taken_in
    from ledger_by_load
    full outer join loads on ledger_by_load.feed = loads.feed and ledger_by_load.load_id = loads.load_id
    left join counted_up_to on ledger_by_load.feed = counted_up_to.feed
    where loads.feed is not null or ledger_by_load.load_id <= counted_up_to.load_id
),

-- Load by load, so that no surplus makes up for what is missing elsewhere.
checked as (
    select
        *,
        case when is_taken_in then greatest(landed + restored - coalesce(raw_rows, 0), 0) end as missing_rows,
        (
            offered + replayed = landed + dead + tombstones + unchanged
            and dead = dead_letter_rows
            and replayed = replayed_letter_rows
            and (
                not is_taken_in
                or coalesce(raw_rows <= landed + restored and raw_rows = staged_rows + waiting_rows, false)
            )
        ) as adds_up
    from by_load
),

by_day as (
    select
        feed,
        loaded_date,
        {% for count in ledger_counts + letter_counts + row_counts -%}
            cast(sum({{ count }}) as bigint) as {{ count }},
        {% endfor -%}
        bool_and(adds_up) as adds_up
    from checked
    group by feed, loaded_date
),

amounts_by_day as (
    select
        feed,
        loaded_date,
        cast(sum(raw_rows) as bigint) as raw_rows,
        cast(sum(superseded_rows) as bigint) as superseded_rows,
        cast(sum(standing_rows) as bigint) as standing_rows,
        cast(sum(mart_rows) as bigint) as mart_rows,
        bool_and(adds_up) as adds_up
    from amounts
    group by feed, loaded_date
),

final as (
    select
        coalesce(by_day.feed, amounts_by_day.feed) as feed,
        coalesce(by_day.loaded_date, amounts_by_day.loaded_date) as loaded_date,

        {% for count in ledger_counts + letter_counts -%}
            coalesce(by_day.{{ count }}, 0) as {{ count }},
        {% endfor -%}
        {% for count in row_counts -%}
            by_day.{{ count }},
        {% endfor -%}
        amounts_by_day.superseded_rows,
        amounts_by_day.standing_rows,
        amounts_by_day.mart_rows,

        coalesce(
            by_day.adds_up
            -- A row that was gone and came back is missing on its first day and restored on a later one.
            and (
                by_day.missing_rows is null
                or by_day.missing_rows = 0
                or sum(by_day.missing_rows) over feed_days = sum(by_day.restored) over feed_days
            )
            and (
                by_day.feed not in ('{{ money_feeds | join("', '") }}')
                or (
                    by_day.staged_rows = coalesce(amounts_by_day.raw_rows, 0)
                    and coalesce(amounts_by_day.adds_up, true)
                )
            ),
            false
        ) as adds_up
    from by_day
    full outer join amounts_by_day
        on by_day.feed = amounts_by_day.feed and by_day.loaded_date = amounts_by_day.loaded_date
    window feed_days as (partition by by_day.feed)
)

select * from final

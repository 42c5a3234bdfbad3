{{
    config(
        materialized='incremental',
        incremental_strategy='delete+insert',
        unique_key='entry_key',
        on_schema_change='fail',
        indexes=[
            {'columns': ['entry_key'], 'unique': True},
        ],
        pre_hook="{{ forget_feeds('_last_load_id', 'is_sum') }}",
        post_hook=[
            '{% if not is_incremental() %}create index on {{ this }} (feed, loaded_date) where is_sum{% endif %}',
            '{{ analyze_if_written() }}',
        ],
    )
}}

{#- A new event takes a transaction away from the day and the currency it stood on. Which those were only the run before
    knew: its entries are kept, so that sums follow what changed and no day is summed up again. -#}
{%- set marks = counted_up_to('_last_load_id', 'is_sum') -%}
{%- set hops = reconciled_feeds() | selectattr('money', 'defined') | list -%}
{%- set measures = ['raw', 'standing', 'staged', 'mart'] %}

with currencies as (
    select * from {{ ref('currencies') }}
),

{% for hop in hops -%}
    {%- set mark = marks.get(hop.source ~ '.' ~ hop.table, "''") -%}
    {#- To compile it must not have been built yet. -#}
    {%- set staging = load_relation(ref(hop.staging)) -%}
    {%- set reached = high_water_mark('_last_load_id', staging) if staging else "''" -%}

    raw_{{ loop.index }} as (
        select
            raw.*,
            {{ utc_date('raw._loaded_at') }} as loaded_date,
            -- Not rounded: what does not fit the currency is to be seen.
            trim_scale(
                raw.{{ hop.money.amount }} * power(cast(10 as numeric), currencies.minor_unit_exponent)
            ) as amount_minor
        from {{ from_raw(hop.source, hop.table, after=mark, up_to=reached) }} as raw
        left join currencies on raw.{{ hop.money.currency }} = currencies.currency_code
    ),

    staged_{{ loop.index }} as (
        select
            *,
            {{ utc_date('_loaded_at') }} as loaded_date,
            -- The events that came since have all lost.
            _dlt_load_id <= {{ mark }} as stands_still
        from {{ ref(hop.staging) }}
        where _last_load_id > {{ mark }} and _last_load_id <= {{ reached }}
    ),

    mart_{{ loop.index }} as (
        select
            *,
            {{ utc_date('_loaded_at') }} as loaded_date
        from {{ ref(hop.money.mart) }}
        -- No upper bound: what the mart has and staging has not is to be seen.
        where _last_load_id > {{ mark }}
    ),
{% endfor %}

landed as (
    {%- for hop in hops %}
        select
            '{{ hop.source }}.{{ hop.table }}' as feed,
            loaded_date,
            {{ hop.money.currency }} as currency_code,
            count(*) as raw_rows,
            sum(amount_minor) as raw_minor,
            max(_dlt_load_id) as _last_load_id
        from raw_{{ loop.index }}
        group by loaded_date, {{ hop.money.currency }}
        {%- if not loop.last %}
            union all
        {%- endif %}
    {%- endfor %}
),

-- What raw and the mart say of a record counts where they agree with staging about its day and currency. Joined in full
-- because such a join is made by hash: the planner takes a new load for one row, and would compare all with all.
compared as (
    {%- for hop in hops %}
        {%- set feed = hop.source ~ '.' ~ hop.table %}
        {%- set key, same_record, same_row, found = [], [], [], [] %}
        {%- for name, raw_name in hop.key.items() %}
            {%- do key.append('coalesce(staged.' ~ name ~ ', mart.' ~ name ~ ')') %}
            {%- do same_record.append('staged.' ~ name ~ ' = mart.' ~ name) %}
            {%- do found.extend(['staged.' ~ name, 'mart.' ~ name]) %}
            {%- do same_row.append('staged.' ~ name ~ ' = raw.' ~ raw_name) %}
        {%- endfor %}
        {%- for coordinate in hop.money.coordinates %}
            {%- do same_row.append('staged.' ~ coordinate ~ ' = raw.' ~ coordinate) %}
        {%- endfor %}
        select
            {{ surrogate_key(["'record'", "'" ~ feed ~ "'"] + key) }} as entry_key,
            '{{ feed }}' as feed,
            coalesce(staged.loaded_date, mart.loaded_date) as loaded_date,
            coalesce(staged.currency_code, mart.currency_code) as currency_code,
            coalesce(staged.stands_still, false) as stands_still,
            raw.amount_minor as standing_minor,
            staged.amount_minor as staged_minor,
            case
                when
                    staged.currency_code is null
                    or (staged.loaded_date = mart.loaded_date and staged.currency_code = mart.currency_code)
                    then mart.amount_minor
            end as mart_minor
        from staged_{{ loop.index }} as staged
        full outer join mart_{{ loop.index }} as mart
            on {{ same_record | join(' and ') }}
        full outer join raw_{{ loop.index }} as raw
            on
                staged._dlt_load_id = raw._dlt_load_id
                and staged.loaded_date = raw.loaded_date
                and staged.currency_code = raw.{{ hop.money.currency }}
                and {{ same_row | join(' and ') }}
        -- In a form that leaves the join as it is.
        where coalesce({{ found | join(', ') }}) is not null
        {%- if not loop.last %}
            union all
        {%- endif %}
    {%- endfor %}
),

{% if is_incremental() %}
    before as (
        select * from {{ this }}
        where not is_sum and entry_key in (select compared.entry_key from compared)
    ),
{% endif %}

records as (
    select
        compared.entry_key,
        compared.feed,
        compared.loaded_date,
        compared.currency_code,
        {% if is_incremental() -%}
            case
                when not compared.stands_still then compared.standing_minor
                when compared.loaded_date = before.loaded_date and compared.currency_code = before.currency_code
                    then before.standing_minor
            end as standing_minor,
        {%- else -%}
            compared.standing_minor,
        {%- endif %}
        compared.staged_minor,
        compared.mart_minor
    from compared
    {% if is_incremental() -%}
        -- None is there alone: see above.
        full outer join before on compared.entry_key = before.entry_key
    {%- endif %}
),

changes as (
    select
        feed,
        loaded_date,
        currency_code,
        true as is_change,
        raw_rows,
        raw_minor,
        0 as standing_rows,
        0 as standing_minor,
        0 as staged_rows,
        0 as staged_minor,
        0 as mart_rows,
        0 as mart_minor,
        _last_load_id
    from landed
    {%- for relation, sign in [('records', '')] + ([('before', '-')] if is_incremental() else []) %}
        union all
        select
            feed,
            loaded_date,
            currency_code,
            true as is_change,
            0 as raw_rows,
            0 as raw_minor,
            {% for measure in measures[1:] -%}
                {{ sign }}count({{ measure }}_minor) as {{ measure }}_rows,
                {{ sign }}coalesce(sum({{ measure }}_minor), 0) as {{ measure }}_minor,
            {% endfor -%}
            cast(null as text) as _last_load_id
        from {{ relation }}
        group by feed, loaded_date, currency_code
    {%- endfor %}
    {%- if is_incremental() %}
        union all
        select
            feed,
            loaded_date,
            currency_code,
            false as is_change,
            {% for measure in measures -%}
                {{ measure }}_rows,
                {{ measure }}_minor,
            {% endfor -%}
            _last_load_id
        from {{ this }}
        where is_sum
    {%- endif %}
),

sums as (
    select
        {{ surrogate_key(["'sum'", 'feed', 'loaded_date', 'currency_code']) }} as entry_key,
        feed,
        loaded_date,
        currency_code,
        {% for measure in measures -%}
            cast(sum({{ measure }}_rows) as bigint) as {{ measure }}_rows,
            sum({{ measure }}_minor) as {{ measure }}_minor,
        {% endfor -%}
        max(_last_load_id) as _last_load_id
    from changes
    group by feed, loaded_date, currency_code
    having bool_or(is_change)
),

final as (
    select
        entry_key,
        feed,
        true as is_sum,
        loaded_date,
        currency_code,
        {% for measure in measures -%}
            {{ measure }}_rows,
            {{ measure }}_minor,
        {% endfor -%}
        _last_load_id
    from sums
    union all
    select
        entry_key,
        feed,
        false as is_sum,
        loaded_date,
        currency_code,
        cast(null as bigint) as raw_rows,
        cast(null as numeric) as raw_minor,
        {% for measure in measures[1:] -%}
            cast(null as bigint) as {{ measure }}_rows,
            {{ measure }}_minor,
        {% endfor -%}
        cast(null as text) as _last_load_id
    from records
)

select * from final

{{
    config(
        unique_key='event_id',
        indexes=[
            {'columns': ['event_id'], 'unique': True},
            {'columns': ['user_id']},
            {'columns': ['occurred_at']},
            {'columns': ['_last_load_id']},
        ],
        post_hook='{{ analyze_if_written() }}',
    )
}}

with events as (
    select * from {{ from_raw('raw_users', 'user_events', key=['event_id']) }} as raw
),

new_events as (
    select
        event_id,
        event_type,
        user_id,
        email,
        full_name,
        phone,
        ip_address,
        country as country_code,
        occurred_at,
        _kafka_timestamp as received_at,
        1 as folded_count,
        _stream_id,
        _kafka_partition,
        _kafka_offset,
        _loaded_at,
        _dlt_load_id,
        _dlt_load_id as _first_load_id,
        _dlt_load_id as _last_load_id,
        cast(null as text) as _previous_user_id,
        cast(null as text) as _previous_load_id
    from events
),

all_events as (
    select * from new_events
    {% if is_incremental() %}
        union all
        select
            event_id,
            event_type,
            user_id,
            email,
            full_name,
            phone,
            ip_address,
            country_code,
            occurred_at,
            received_at,
            event_count as folded_count,
            _stream_id,
            _kafka_partition,
            _kafka_offset,
            _loaded_at,
            _dlt_load_id,
            _first_load_id,
            _last_load_id,
            user_id as _previous_user_id,
            _last_load_id as _previous_load_id
        from {{ this }}
        where event_id in {{ keys_to_fold('new_events', ['event_id'], 'raw_users', 'user_events') }}
    {% endif %}
),

ranked as (
    {{ deduplicate(
        relation='all_events',
        key=['event_id'],
        order_by=[
            'occurred_at desc',
            'received_at desc nulls last',
            '_dlt_load_id desc',
            '_stream_id desc',
            '_kafka_partition desc',
            '_kafka_offset desc',
        ],
        folds={
            '_folded_first_load_id': 'min(_first_load_id)',
            '_folded_user_id': 'max(_previous_user_id)',
            '_folded_previous_load_id': 'max(_previous_load_id)',
        },
    ) }}
),

final as (
    select
        event_id,
        event_type,
        user_id,
        email,
        full_name,
        phone,
        ip_address,
        country_code,
        occurred_at,
        received_at,
        _folded_count as event_count,
        _stream_id,
        _kafka_partition,
        _kafka_offset,
        _loaded_at,
        _dlt_load_id,
        _folded_first_load_id as _first_load_id,
        _folded_load_id as _last_load_id,
        case when user_id = _folded_user_id then _folded_previous_load_id end as _previous_load_id
    from ranked
    where _rank = 1
)

select * from final

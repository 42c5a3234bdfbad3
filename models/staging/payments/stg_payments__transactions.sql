{{
    config(
        unique_key='transaction_id',
        indexes=[
            {'columns': ['transaction_id'], 'unique': True},
            {'columns': ['_last_load_id']},
            {'columns': ['occurred_date', 'currency_code']},
        ],
        post_hook='{{ analyze_if_written() }}',
    )
}}

with events as (
    select * from {{ from_raw('raw_payments', 'transaction_created', key=['transaction_id']) }} as raw
),

currencies as (
    select * from {{ ref('currencies') }}
),

new_events as (
    select
        events.transaction_id,
        events.user_id,
        events.merchant_id,
        events.currency as currency_code,
        events.country as country_code,
        events.status,
        {{ to_minor_units('events.amount', 'currencies.minor_unit_exponent') }} as amount_minor,
        events.created_at as occurred_at,
        events.created_at as first_occurred_at,
        events._kafka_timestamp as received_at,
        1 as folded_count,
        events._stream_id,
        events._kafka_partition,
        events._kafka_offset,
        events._loaded_at,
        events._dlt_load_id,
        events._dlt_load_id as _first_load_id,
        events._dlt_load_id as _last_load_id
    from events
    left join currencies on events.currency = currencies.currency_code
),

all_events as (
    select * from new_events
    {% if is_incremental() %}
        union all
        select
            transaction_id,
            user_id,
            merchant_id,
            currency_code,
            country_code,
            status,
            amount_minor,
            occurred_at,
            first_occurred_at,
            received_at,
            event_count as folded_count,
            _stream_id,
            _kafka_partition,
            _kafka_offset,
            _loaded_at,
            _dlt_load_id,
            _first_load_id,
            _last_load_id
        from {{ this }}
        where transaction_id in {{ keys_to_fold('new_events', ['transaction_id'], 'raw_payments', 'transaction_created') }}
    {% endif %}
),

ranked as (
    {{ deduplicate(
        relation='all_events',
        key=['transaction_id'],
        order_by=[
            'occurred_at desc',
            'received_at desc nulls last',
            '_dlt_load_id desc',
            '_stream_id desc',
            '_kafka_partition desc',
            '_kafka_offset desc',
        ],
        folds={
            '_folded_first_occurred_at': 'min(first_occurred_at)',
            '_folded_first_load_id': 'min(_first_load_id)',
        },
    ) }}
),

final as (
    select
        transaction_id,
        user_id,
        merchant_id,
        currency_code,
        country_code,
        status,
        amount_minor,
        occurred_at,
        {{ utc_date('occurred_at') }} as occurred_date,
        _folded_first_occurred_at as first_occurred_at,
        received_at,
        _folded_count as event_count,
        _stream_id,
        _kafka_partition,
        _kafka_offset,
        _loaded_at,
        _dlt_load_id,
        _folded_first_load_id as _first_load_id,
        _folded_load_id as _last_load_id
    from ranked
    where _rank = 1
)

select * from final

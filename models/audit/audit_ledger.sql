with ledger as (
    select * from {{ source('ops', 'ledger') }}
),

loads as (
    select * from {{ source('ops', 'loads') }}
),

final as (
    select
        {{ surrogate_key([
            'ledger.feed',
            'ledger.load_id',
            'ledger.stream_id',
            'ledger.partition',
            'ledger.first_position',
            'ledger.window_from',
        ]) }} as ledger_key,
        ledger.feed,
        ledger.load_id,
        ledger.stream_id,
        ledger.stream_name,
        ledger.kind as feed_kind,

        ledger.partition as kafka_partition,
        ledger.first_position as first_offset,
        ledger.last_position as last_offset,
        ledger.window_from as api_window_from,
        ledger.window_to as api_window_to,
        ledger.pages as api_pages,

        ledger.offered,
        ledger.landed,
        ledger.dead,
        ledger.tombstones,
        ledger.unchanged,
        ledger.control,
        ledger.lost,
        ledger.restored,
        ledger.drifted,
        ledger.bytes,

        ledger.source_time_min,
        ledger.source_time_max,
        ledger.loaded_at,
        loads.committed_at,
        ledger.contract_version
    from ledger
    left join loads on ledger.feed = loads.feed and ledger.load_id = loads.load_id
)

select * from final

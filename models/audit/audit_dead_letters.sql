-- No payload, key, headers or message: they quote what was sent, which may be personal.
with dead_letters as (
    select * from {{ source('ops', 'dead_letters') }}
),

final as (
    select
        dead_letter_id,
        feed,
        load_id,
        stream_id,
        stream_name,

        kafka_partition,
        kafka_offset,
        api_window_from,
        api_window_to,
        api_page,
        api_item,

        reason,
        path,
        status,
        attempts,

        source_time,
        failed_at,
        replay_load_id,
        resolved_at,
        resolved_by,
        resolved_because,
        contract_version,
        loader_version
    from dead_letters
)

select * from final

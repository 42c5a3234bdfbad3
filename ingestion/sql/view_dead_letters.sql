select
    'source_name'::text as source_name,
    d.dead_letter_id,
    d.feed,
    d._dlt_load_id as load_id,
    d._stream_id as stream_id,
    s.name as stream_name,
    d._kafka_partition as kafka_partition,
    d._kafka_offset as kafka_offset,
    d._api_window_from as api_window_from,
    d._api_window_to as api_window_to,
    d._api_page as api_page,
    d._api_item as api_item,
    d.source_time,
    d.failed_at,
    d.reason,
    d.path,
    d.message,
    d.raw_key,
    d.raw_value,
    d.headers,
    d.contract_version,
    d.loader_version,
    (
        d.attempts + (
            select count(*) from raw_schema._dead_letter_events as e
            where
                e.dead_letter_id = d.dead_letter_id
                and e.action in ('replayed', 'failed_again')
                and (e.load_id is null or e.load_id in (select load_id from raw_schema._dlt_loads))
        )
    )::integer as attempts,
    case
        when d.replay_load_id in (select load_id from raw_schema._dlt_loads) then 'replayed'
        when d.discarded_at is not null then 'discarded'
        else 'open'
    end as status,
    case
        when d.replay_load_id in (select load_id from raw_schema._dlt_loads) then d.replay_load_id
    end as replay_load_id,
    d.discarded_at,
    d.discarded_by,
    d.discarded_because,
    case
        when d.replay_load_id in (select load_id from raw_schema._dlt_loads) then (
            select e.acted_at from raw_schema._dead_letter_events as e
            where e.dead_letter_id = d.dead_letter_id and e.load_id = d.replay_load_id
            limit 1
        )
        else d.discarded_at
    end as resolved_at,
    case
        when d.replay_load_id in (select load_id from raw_schema._dlt_loads) then (
            select e.acted_by from raw_schema._dead_letter_events as e
            where e.dead_letter_id = d.dead_letter_id and e.load_id = d.replay_load_id
            limit 1
        )
        else d.discarded_by
    end as resolved_by,
    case
        when d.replay_load_id in (select load_id from raw_schema._dlt_loads) then (
            select e.because from raw_schema._dead_letter_events as e
            where e.dead_letter_id = d.dead_letter_id and e.load_id = d.replay_load_id
            limit 1
        )
        else d.discarded_because
    end as resolved_because
from raw_schema._dead_letters as d
inner join raw_schema._streams as s on d._stream_id = s.stream_id
where d._dlt_load_id in (select load_id from raw_schema._dlt_loads)

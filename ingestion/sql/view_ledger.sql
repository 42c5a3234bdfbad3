select
    'source_name'::text as source_name,
    l.feed,
    l._dlt_load_id as load_id,
    l.stream_id,
    s.name as stream_name,
    l.kind,
    l.partition,
    l.first_position,
    l.last_position,
    l.window_from,
    l.window_to,
    l.pages,
    l.offered,
    l.landed,
    l.dead,
    l.tombstones,
    l.unchanged,
    l.control,
    l.lost,
    l.drifted,
    l.bytes,
    l.source_time_min,
    l.source_time_max,
    l.contract_version,
    l.loaded_at
from raw_schema._ledger as l
inner join raw_schema._streams as s on l.stream_id = s.stream_id
where l._dlt_load_id in (select load_id from raw_schema._dlt_loads)

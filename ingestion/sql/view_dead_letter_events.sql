select
    'source_name'::text as source_name,
    e.event_id,
    e.dead_letter_id,
    e.feed,
    e.action,
    e.acted_at,
    e.acted_by,
    e.because,
    e.load_id,
    e.contract_version,
    e.loader_version,
    e.reason,
    e.path,
    e.message
from raw_schema._dead_letter_events as e
where e.load_id is null or e.load_id in (select load_id from raw_schema._dlt_loads)

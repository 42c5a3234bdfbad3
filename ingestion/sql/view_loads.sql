select
    'source_name'::text as source_name,
    'source_name' || '.' || schema_name as feed,
    load_id::text as load_id,
    min(inserted_at) as committed_at
from raw_schema._dlt_loads
group by schema_name, load_id

-- Whatever was offered is landed, set aside, a tombstone or unchanged; what landed is in the raw table; and what is
-- in the raw table is in staging or came after it was built.
select *
from {{ ref('audit_reconciliation') }}
where
    offered <> landed + dead + tombstones + unchanged
    or dead <> dead_letter_rows
    or landed <> raw_rows
    or raw_rows <> staged_rows + waiting_rows

-- On each day, what was offered is landed, set aside, a tombstone or unchanged; what landed is in the raw table; what
-- is there is in staging or came after it was built; and amounts are the same in raw, staging and mart.
select *
from {{ ref('audit_reconciliation') }}
where
    not adds_up
    or offered + replayed <> landed + dead + tombstones + unchanged
    or dead <> dead_letter_rows
    or replayed <> replayed_letter_rows
    or landed + restored <> raw_rows + missing_rows
    or raw_rows <> staged_rows + waiting_rows
    or raw_rows <> superseded_rows + standing_rows + waiting_rows
    or standing_rows <> mart_rows

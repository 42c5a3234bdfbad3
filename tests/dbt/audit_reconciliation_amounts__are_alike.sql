-- By day and currency, the rows that stand are as many and sum up to the same in raw, in staging and in the mart.
select *
from {{ ref('audit_reconciliation_amounts') }}
where
    not adds_up
    or standing_rows <> staged_rows
    or standing_minor <> staged_minor
    or staged_rows <> mart_rows
    or staged_minor <> mart_minor
    or superseded_rows < 0

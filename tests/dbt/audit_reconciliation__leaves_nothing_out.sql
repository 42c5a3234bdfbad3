-- Every load of the ledger, up to the last one counted, is on a day of the reconciliation, and on one only.
with loads as (
    select
        feed,
        max(load_id) as load_id
    from {{ ref('audit_loads') }}
    group by feed
),

ledger as (
    select
        ledger.feed,
        sum(ledger.offered) as offered,
        sum(ledger.landed) as landed,
        sum(ledger.dead) as dead
    from {{ source('ops', 'ledger') }} as ledger
    inner join loads on ledger.feed = loads.feed and ledger.load_id <= loads.load_id
    group by ledger.feed
),

reconciled as (
    select
        feed,
        sum(offered) as offered,
        sum(landed) as landed,
        sum(dead - replayed) as dead
    from {{ ref('audit_reconciliation') }}
    group by feed
)

select
    coalesce(ledger.feed, reconciled.feed) as feed,
    ledger.offered as ledger_offered,
    reconciled.offered as reconciled_offered,
    ledger.landed as ledger_landed,
    reconciled.landed as reconciled_landed,
    ledger.dead as ledger_dead,
    reconciled.dead as reconciled_dead
from ledger
full outer join reconciled on ledger.feed = reconciled.feed
where
    coalesce(ledger.offered, 0) <> coalesce(reconciled.offered, 0)
    or coalesce(ledger.landed, 0) <> coalesce(reconciled.landed, 0)
    or coalesce(ledger.dead, 0) <> coalesce(reconciled.dead, 0)

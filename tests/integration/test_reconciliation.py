"""The reconciliation: every day adds up, each figure equals a second count, and what does not add up is named.

`loads written straight into the raw tables -> dbt -> audit_reconciliation`, see tests/harness/models.py.
"""

from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import psycopg2.extensions
import pytest

from tests.harness.models import (
    EXPONENTS,
    RATES,
    SAMPLE_CURRENCIES,
    TRANSACTIONS,
    USER_EVENTS,
    Dbt,
    Payment,
    RawLog,
    assert_same_rows,
    days_from,
    execute,
    failed_tests,
    failures,
    make_payments,
    make_user_events,
    publish,
    query,
    uuid_of,
)

pytestmark = pytest.mark.timeout(600)

Connection = psycopg2.extensions.connection

PAYMENTS = ".".join(TRANSACTIONS)
AUDITS = ("audit_loads", "audit_amounts", "audit_reconciliation_amounts", "audit_reconciliation")
COUNT_ANEW = ("--full-refresh", "--select", *AUDITS)
TESTS = ("--select", "audit_reconciliation", "audit_reconciliation_amounts")


def minor(event: Payment) -> Decimal:
    return event.amount.scaleb(EXPONENTS[event.currency])


def tally(log: RawLog) -> dict[tuple[date, str], tuple[int, Decimal, int, Decimal]]:
    """(day, currency) -> raw rows and minor units, and those of them that stand: the latest of their transaction."""
    latest: dict[str, int] = {}
    for place, event in enumerate(log.landed):
        before = latest.get(event.transaction_id)
        if before is None or event.created_at >= log.landed[before].created_at:
            latest[event.transaction_id] = place
    counts: dict[tuple[date, str], list[Any]] = {}
    for place, event in enumerate(log.landed):
        count = counts.setdefault((log.landed_on[place], event.currency), [0, Decimal(0), 0, Decimal(0)])
        count[0] += 1
        count[1] += minor(event)
        if latest[event.transaction_id] == place:
            count[2] += 1
            count[3] += minor(event)
    return {place: tuple(count) for place, count in counts.items()}


def reconciled_amounts(connection: Connection) -> dict[tuple[date, str], tuple[int, Decimal, int, Decimal]]:
    rows = query(
        connection,
        "select loaded_date, currency_code, raw_rows, raw_minor, standing_rows, standing_minor"
        " from audit.audit_reconciliation_amounts",
    )
    return {row[:2]: row[2:] for row in rows}


def not_adding_up(connection: Connection) -> set[tuple[str, date]]:
    return set(query(connection, "select feed, loaded_date from audit.audit_reconciliation where not adds_up"))


def build_models(dbt: Dbt, *arguments: str, schema: str = "analytics") -> None:
    """Everything but tests."""
    for command in ("seed", "run"):
        succeeded, results = dbt(command, *(arguments if command == "run" else ()), schema=schema)
        assert succeeded, failures(results)


def test_every_day_adds_up_and_equals_a_second_count(
    dbt: Dbt, log: RawLog, connection: Connection, database_dsn: str
) -> None:
    """Loads on several days, with events that supersede those of earlier days, dead letters, replays and late rows."""
    payments = make_payments(seed=31, transactions=300, currencies=list(EXPONENTS))
    users = make_user_events(seed=32, events=80)
    for schema in ("analytics", "full"):
        succeeded, results = dbt("seed", schema=schema)
        assert succeeded, failures(results)
    for number in range(3):
        for load in payments[number]:
            log.land(TRANSACTIONS, load, dead=number)
        letters_load = log.land(USER_EVENTS, users[number], dead=3)
        log.land(USER_EVENTS, [], dead=1)  # nothing landed
        back = [replace(users[number][0], event_id=uuid_of(8_000_000 + number))]
        log.land(USER_EVENTS, back, replayed=[f"{letters_load}/0"])
        log.land(RATES, publish(days_from(date(2025, 3, 3 + number), 1), seed=33))
        dbt.run()
        dbt.run("--full-refresh", schema="full")
        assert_same_rows(database_dsn, [relation for relation in dbt.relations() if relation[0] == "audit"], "full")
        assert reconciled_amounts(connection) == tally(log)
        assert not_adding_up(connection) == set()
    by_feed = query(
        connection,
        "select feed, sum(offered)::int, sum(landed)::int, sum(dead)::int, sum(replayed)::int, sum(raw_rows)::int,"
        " count(*)::int > 1 from audit.audit_reconciliation group by feed order by feed",
    )
    landed, rates, events = len(log.landed), len(log.rates), sum(len(one) for one in users)
    assert by_feed == [
        (".".join(RATES), rates, rates, 0, 0, rates, True),
        (PAYMENTS, landed + 6, landed, 6, 0, landed, True),
        (".".join(USER_EVENTS), events + 12, events + 3, 12, 3, events + 3, True),
    ]
    superseded = query(
        connection, "select superseded_rows from audit.audit_reconciliation_amounts where superseded_rows > 0"
    )
    assert len(superseded) > 5
    succeeded, results = dbt("test", *TESTS)
    assert succeeded, failures(results)
    assert len(results) >= 3


def test_what_is_not_touched_is_not_counted_again(dbt: Dbt, log: RawLog, connection: Connection) -> None:
    """By the rows the audit tables rewrite: none with nothing new, and afterwards those of what is new alone."""

    def versions() -> dict[str, dict[Any, Any]]:
        return {
            table: dict(query(connection, f"select {key}, (ctid, xmin)::text from audit.{table}"))
            for table, key in (
                ("audit_loads", "load_id"),
                ("audit_amounts", "entry_key"),
                ("audit_reconciliation", "feed || loaded_date"),
            )
        }

    events = make_payments(seed=34, transactions=200, currencies=SAMPLE_CURRENCIES)
    for loads in events:
        for load in loads:
            log.land(TRANSACTIONS, load)
    build_models(dbt)
    before = versions()
    build_models(dbt)
    assert versions() == before

    # Half of a transaction's life was on other days: one sum changes for each day and currency it was on.
    corrected = log.landed[0]
    log.land(
        TRANSACTIONS, [replace(corrected, amount=corrected.amount + 1, created_at=datetime(2025, 6, 1, tzinfo=UTC))]
    )
    build_models(dbt)
    after = versions()
    rewritten = {
        table: sum(before[table].get(key) != version for key, version in rows.items()) for table, rows in after.items()
    }
    assert rewritten["audit_loads"] == 1
    assert rewritten["audit_amounts"] <= 3
    assert rewritten["audit_reconciliation"] <= 2
    assert reconciled_amounts(connection) == tally(log)


def land_on_four_days(log: RawLog) -> dict[str, list[tuple[date, str]]]:
    """A load of each feed on each of four days; feed -> (day, load)."""
    days: dict[str, list[tuple[date, str]]] = {".".join(feed): [] for feed in (TRANSACTIONS, USER_EVENTS, RATES)}
    events = [one for loads in make_payments(41, 160, SAMPLE_CURRENCIES) for load in loads for one in load]
    # One event a transaction: each stands on the day of its load.
    firsts = list({event.transaction_id: event for event in events}.values())
    for number in range(4):
        for feed, rows in (
            (TRANSACTIONS, firsts[number::4]),
            (USER_EVENTS, make_user_events(42 + number, 200)[0][number * 5 : number * 5 + 5]),
            (RATES, publish([date(2025, 3, 3 + number)], seed=43)),
        ):
            load_id = log.land(feed, rows, dead=2)
            days[".".join(feed)].append((log.loaded_at.date(), load_id))
        log.loads += 1  # half a night passes
    return days


FIRST = "ctid = (select min(ctid) from {table} where _loaded_at::date = '{day}')"
FACTS = "marts.fct_transactions"
STAGED = "staging.stg_payments__transactions"
# What is changed by hand on the n-th day of a feed: the table, and the change to one row of it.
TAMPERED: dict[tuple[str, int], tuple[str, str]] = {
    ("raw_users.user_events", 0): ("raw_users.user_events", "delete from {table} where {first}"),
    ("raw_users.user_events", 1): ("raw_users.user_events", "insert into {table} select * from {table} where {first}"),
    ("raw_users.user_events", 2): ("raw_users._ledger", "delete from {table} where loaded_at::date = '{day}'"),
    ("raw_users.user_events", 3): ("staging.stg_users__events", "delete from {table} where {first}"),
    ("raw_fx.daily_rates", 0): ("raw_fx._dead_letters", "delete from {table} where failed_at::date = '{day}'"),
    ("raw_fx.daily_rates", 1): ("raw_fx.daily_rates", "delete from {table} where {first}"),
    ("raw_fx.daily_rates", 2): ("raw_fx._dlt_loads", "delete from {table} where load_id = '{load}'"),
    (PAYMENTS, 0): (FACTS, "update {table} set amount_minor = amount_minor + 1 where {first}"),
    (PAYMENTS, 1): (STAGED, "update {table} set amount_minor = amount_minor + 1 where {first}"),
    (PAYMENTS, 2): (PAYMENTS, "update {table} set amount = amount + 1 where {first}"),
    (PAYMENTS, 3): (FACTS, "delete from {table} where {first}"),
}


def tamper(connection: Connection, days: dict[str, list[tuple[date, str]]], feed: str, number: int) -> date:
    """Change one thing by hand; the day it is on."""
    day, load_id = days[feed][number]
    table, change = TAMPERED[feed, number]
    execute(connection, change.format(table=table, day=day, load=load_id, first=FIRST.format(table=table, day=day)))
    return day


def test_twin_what_is_changed_by_hand_is_found_on_its_day(dbt: Dbt, log: RawLog, connection: Connection) -> None:
    """Rows, amounts by one minor unit, dead letters, the ledger: each breaks its own day and no other."""
    days = land_on_four_days(log)
    build_models(dbt)
    assert not_adding_up(connection) == set()
    tables = {table for table, _ in TAMPERED.values()}
    for number, table in enumerate(sorted(tables)):
        execute(connection, f"create table kept_{number} as table {table}")
    broken = {(feed, tamper(connection, days, feed, number)) for feed, number in TAMPERED}
    assert len(broken) == len(TAMPERED)

    # A build looks at what is new; what was changed since is found when everything is counted.
    dbt.run("--select", *AUDITS)
    found_at_once = not_adding_up(connection)
    dbt.run(*COUNT_ANEW)
    # The load taken out of _dlt_loads is no load any more, and neither are its ledger and its rows.
    gone = (".".join(RATES), days[".".join(RATES)][2][0])
    assert not_adding_up(connection) == broken - {gone}
    assert found_at_once == {
        gone,
        (".".join(USER_EVENTS), days[".".join(USER_EVENTS)][2][0]),  # the ledger is read whole each time
    }
    _, results = dbt("test", *TESTS)
    assert failed_tests(results) == {
        "audit_reconciliation__accounts_for_every_record",
        "audit_reconciliation_amounts__are_alike",
    }

    # Put right, the next build counts these feeds anew and is content.
    for number, table in enumerate(sorted(tables)):
        execute(connection, f"truncate {table}; insert into {table} table kept_{number}; drop table kept_{number}")
    dbt.run("--select", *AUDITS)
    assert not_adding_up(connection) == set()
    succeeded, results = dbt("test", *TESTS)
    assert succeeded, failures(results)


# What goes wrong with what one load brought, each of another load.
IN_FLIGHT = [
    (FACTS, "update {table} set amount_minor = amount_minor - 1 where {new}"),
    (FACTS, "delete from {table} where {new}"),
    (FACTS, "update {table} set currency_code = 'JPY' where {new}"),
    (PAYMENTS, "delete from {table} where {new}"),
    (PAYMENTS, "update {table} set amount = amount + 0.01 where {new}"),
    ("raw_payments._ledger", "delete from {table} where {new}"),
    (STAGED, "update {table} set amount_minor = amount_minor + 1 where {new}"),
    (STAGED, "delete from {table} where {new}"),
]


def test_twin_what_goes_wrong_on_the_way_is_found_by_the_next_build(
    dbt: Dbt, log: RawLog, connection: Connection
) -> None:
    """Between landing and the reconciliation, with nothing but what is new looked at."""
    land_on_four_days(log)
    build_models(dbt)
    loads = []
    for number in range(len(IN_FLIGHT) + 1):
        log.loads += 3  # another day
        late = replace(log.landed[number], created_at=datetime(2025, 6, 9, tzinfo=UTC), status="failed")
        added = replace(late, transaction_id=uuid_of(9_000_000 + number), currency="USD")
        loads.append((log.land(TRANSACTIONS, [late, added]), log.loaded_at.date()))
    build_models(dbt, "--exclude", *AUDITS)
    for (table, change), (load_id, _) in zip(IN_FLIGHT, loads, strict=False):
        column = "_last_load_id" if table in (FACTS, STAGED) else "_dlt_load_id"
        execute(connection, change.format(table=table, new=f"{column} = '{load_id}'"))
    dbt.run("--select", *AUDITS)
    assert not_adding_up(connection) == {(PAYMENTS, day) for _, day in loads[:-1]}


def test_a_row_that_was_gone_and_came_back_adds_up(
    dbt: Dbt, log: RawLog, connection: Connection, database_dsn: str
) -> None:
    land_on_four_days(log)
    build_models(dbt)
    lost = log.landed[5]
    execute(connection, f"delete from {PAYMENTS} where transaction_id = '{lost.transaction_id}'")
    dbt.run(*COUNT_ANEW)
    assert not_adding_up(connection) == {(PAYMENTS, log.landed_on[5])}

    log.land(TRANSACTIONS, [lost], restored=True)
    build_models(dbt)
    assert not_adding_up(connection) == set()
    days = query(
        connection,
        "select loaded_date, missing_rows::int, restored::int, raw_rows - landed from audit.audit_reconciliation"
        f" where feed = '{PAYMENTS}' and (missing_rows > 0 or restored > 0) order by loaded_date",
    )
    assert days == [(log.landed_on[5], 1, 0, -1), (log.landed_on[-1], 0, 1, 1)]
    build_models(dbt, "--full-refresh", schema="full")
    assert_same_rows(database_dsn, [relation for relation in dbt.relations() if relation[0] == "audit"], "full")


def test_what_a_loader_commits_meanwhile_waits(dbt: Dbt, log: RawLog, connection: Connection) -> None:
    land_on_four_days(log)
    build_models(dbt)
    # Committed while the models were being built: staging does not have it yet.
    log.land(TRANSACTIONS, [replace(log.landed[0], transaction_id=uuid_of(9_999_999))], dead=1)
    dbt.run("--select", *AUDITS)
    waiting = query(
        connection,
        "select feed, loaded_date, raw_rows::int, waiting_rows::int, staged_rows::int, dead::int"
        " from audit.audit_reconciliation where waiting_rows > 0",
    )
    assert waiting == [(PAYMENTS, log.landed_on[-1], 1, 1, 0, 1)]
    assert not_adding_up(connection) == set()
    build_models(dbt)
    assert query(connection, "select sum(waiting_rows)::int from audit.audit_reconciliation") == [(0,)]
    assert not_adding_up(connection) == set()

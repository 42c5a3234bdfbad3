"""The models on a real Postgres: incremental equals full refresh, money equals a second computation, checks can fail.

`rows written straight into the raw tables -> dbt (in process) -> marts`, see tests/harness/models.py. The expected
figures are computed here from the same events with exact fractions and nothing of the models.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import psycopg2
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
    Rate,
    RawLog,
    assert_same_rows,
    days_from,
    execute,
    failed_tests,
    failures,
    land_sample,
    make_payments,
    make_user_events,
    publish,
    query,
    uuid_of,
)

pytestmark = pytest.mark.long

MAX_RATE_AGE_DAYS = 7
# KWD is refused at the door, and the models must be right about it all the same: these rules are the door's.
DOOR_RULES = "source:*"
EVERYTHING = ("--vars", "full_tests: true")


def latest_states(landed: Sequence[Payment]) -> dict[str, Payment]:
    """The state of each transaction: the latest event, of equal ones the one that came last."""
    states: dict[str, Payment] = {}
    for event in landed:
        before = states.get(event.transaction_id)
        if before is None or event.created_at >= before.created_at:
            states[event.transaction_id] = event
    return states


def half_away_from_zero(amount: Fraction) -> int:
    return int(amount + Fraction(1, 2))  # amounts are not negative


def price_on(prices: dict[tuple[date, str], Decimal], day: date, currency: str, reporting: str) -> Fraction | None:
    """Units of the reporting currency for one of the currency, by the last day both have a price."""
    if currency == reporting:
        return Fraction(1)
    for age in range(MAX_RATE_AGE_DAYS + 1):
        published = day - timedelta(days=age)
        legs = [
            Decimal(1) if code == "USD" and any(d == published for d, _ in prices) else prices.get((published, code))
            for code in (currency, reporting)
        ]
        if legs[0] is not None and legs[1] is not None:
            return Fraction(legs[1]) / Fraction(legs[0]) if legs[0] and legs[1] else None
    return None


def expected_revenue(log: RawLog, reporting: str) -> dict[tuple[date, str, str], tuple[int, int, int, int | None]]:
    """(day, currency, country) -> transactions, unconverted, revenue minor, reporting revenue minor."""
    prices = {(rate.rate_date, rate.quote_currency): rate.rate for rate in log.rates}
    groups: dict[tuple[date, str, str], list[tuple[int, int | None]]] = defaultdict(list)
    for state in latest_states(log.landed).values():
        if state.status == "completed":
            day = state.created_at.date()
            price = price_on(prices, day, state.currency, reporting)
            minor = int(state.amount.scaleb(EXPONENTS[state.currency]))
            converted = None
            if price is not None:
                converted = half_away_from_zero(Fraction(state.amount) * price * 10 ** EXPONENTS[reporting])
            groups[day, state.currency, state.country].append((minor, converted))
    return {
        group: (
            len(rows),
            sum(converted is None for _, converted in rows),
            sum(minor for minor, _ in rows),
            None if all(c is None for _, c in rows) else sum(c for _, c in rows if c is not None),
        )
        for group, rows in groups.items()
    }


def reported_revenue(
    connection: psycopg2.extensions.connection, schema: str = "marts"
) -> dict[tuple[date, str, str], tuple[int, int, int, int | None]]:
    rows = query(
        connection,
        "select revenue_date, currency_code, country_code, transaction_count, unconverted_count, revenue_minor,"
        f" reporting_revenue_minor from {schema}.rpt_finance__daily_revenue",
    )
    return {row[:3]: row[3:] for row in rows}


@pytest.mark.timeout(600)
def test_incremental_equals_full_refresh(
    dbt: Dbt, log: RawLog, connection: psycopg2.extensions.connection, database_dsn: str
) -> None:
    """Three rounds of late, duplicate, out-of-order, status-changing and corrected data."""
    payments = make_payments(seed=7, transactions=400, currencies=list(EXPONENTS))
    users = make_user_events(seed=8, events=200)
    for schema in ("analytics", "full"):
        succeeded, results = dbt("seed", schema=schema)
        assert succeeded, failures(results)
    late_day, friday, zero_day = date(2025, 3, 5), date(2025, 3, 7), date(2025, 3, 12)

    for number in range(3):
        for load in payments[number]:
            log.land(TRANSACTIONS, load)
        log.land(USER_EVENTS, users[number])
        if number == 0:
            log.land(RATES, publish(days_from(date(2025, 3, 3), 12), seed=1, without=[late_day]))
        elif number == 1:
            # A Friday corrected (its weekend follows), a day that comes late, and the days after.
            log.land(RATES, publish([friday], seed=2))
            log.land(RATES, publish([late_day, *days_from(date(2025, 3, 17), 3)], seed=3))
        else:
            # Rates no transaction needs; a correction to nothing, whose day must not fall back to the day before.
            log.land(RATES, [Rate(zero_day, "USD", "EUR", Decimal(0))])
            log.land(RATES, publish([date(2024, 1, 2)], seed=4))
        dbt.run()
        dbt.run("--full-refresh", schema="full")
        assert_same_rows(database_dsn, dbt.relations(), "full")
        assert reported_revenue(connection) == expected_revenue(log, "USD")
        assert reported_revenue(connection, "full_marts") == reported_revenue(connection)

    # A load all of whose events lose changes no state, is counted, and is not taken in twice.
    before = query(connection, "select transaction_id, status, amount_minor from staging.stg_payments__transactions")
    states = list(latest_states(log.landed).values())
    log.land(TRANSACTIONS, [replace(s, created_at=s.created_at - timedelta(days=60), status="failed") for s in states])
    # Rates alone, for days that have none, with no new transaction.
    log.land(RATES, publish(days_from(date(2025, 3, 20), 9), seed=5))
    for _ in range(2):
        dbt.run()
        dbt.run("--full-refresh", schema="full")
        assert_same_rows(database_dsn, dbt.relations(), "full")
    after = query(connection, "select transaction_id, status, amount_minor from staging.stg_payments__transactions")
    assert Counter(before) == Counter(after)
    assert reported_revenue(connection) == expected_revenue(log, "USD")

    succeeded, results = dbt("test", "--select", "test_type:data", "--exclude", DOOR_RULES)
    assert succeeded, failures(results)

    # Another reporting currency: every pair but one goes through the dollar.
    for reporting in ("EUR", "JPY"):
        prefix = reporting.lower()
        for command in ("seed", "run"):
            succeeded, results = dbt(command, "--vars", f"reporting_currency: {reporting}", schema=prefix)
            assert succeeded, failures(results)
        assert reported_revenue(connection, f"{prefix}_marts") == expected_revenue(log, reporting)


def row_versions(
    connection: psycopg2.extensions.connection, relations: Sequence[tuple[str, str]]
) -> dict[str, list[tuple[Any, ...]]]:
    """Where each row of a table lies and which transaction wrote it: the same only where nothing was written."""
    return {
        f"{schema}.{table}": query(connection, f"select ctid::text, xmin::text from {schema}.{table} order by 1")
        for schema, table in relations
    }


@pytest.mark.timeout(600)
def test_build_from_empty_then_with_data_then_again(
    dbt: Dbt, log: RawLog, connection: psycopg2.extensions.connection
) -> None:
    """`dbt build` passes with nothing landed; with nothing new it writes no row of a mart."""
    succeeded, results = dbt("build")
    assert succeeded, failures(results)
    assert query(connection, "select count(*) from marts.fct_transactions") == [(0,)]
    assert query(connection, "select country_name from reference.countries where country_code = 'NA'") == [("Namibia",)]

    for (schema, table), columns in dbt.described().items():
        made = query(
            connection,
            "select column_name from information_schema.columns"
            f" where (table_schema, table_name) = ('{schema}', '{table}') order by ordinal_position",
        )
        assert [name for (name,) in made] == columns, f"columns of {schema}.{table} and of its YAML"

    land_sample(log)
    succeeded, results = dbt("build")
    assert succeeded, failures(results)
    assert reported_revenue(connection) == expected_revenue(log, "USD")

    # Views have no rows of their own.
    stored = set(query(connection, "select schemaname, tablename from pg_tables"))
    tables = [one for one in dbt.relations() if one[0] in ("staging", "marts") and one in stored]
    before = row_versions(connection, tables)
    assert all(before.values())
    succeeded, results = dbt("build")
    assert succeeded, failures(results)
    assert row_versions(connection, tables) == before


def test_only_committed_loads_are_read(dbt: Dbt, log: RawLog, connection: psycopg2.extensions.connection) -> None:
    """Rows of a load without its commit do not exist; once it is there, twice even, they do, once."""
    land_sample(log)
    late = Payment(
        uuid_of(777_777), Decimal("5.00"), "USD", "usr_000001", "mer_00001", "DE",
        datetime(2025, 3, 9, tzinfo=UTC), "completed",
    )  # fmt: skip
    load_id = log.land(TRANSACTIONS, [late], commit=False)
    dbt("seed")
    dbt.run()
    found = f"select event_count from staging.stg_payments__transactions where transaction_id = '{uuid_of(777_777)}'"
    assert query(connection, found) == []

    log.commit(TRANSACTIONS, load_id)
    log.commit(TRANSACTIONS, load_id)
    dbt.run()
    assert query(connection, found) == [(1,)]
    dbt.run()
    assert query(connection, found) == [(1,)]


def test_a_loader_at_work_raises_no_alarm(dbt: Dbt, log: RawLog) -> None:
    """Loads committed between the build and the tests wait; they are not missing."""
    land_sample(log)
    succeeded, results = dbt("build", "--exclude-resource-type", "unit_test")
    assert succeeded, failures(results)
    log.land(TRANSACTIONS, make_payments(seed=21, transactions=30, currencies=SAMPLE_CURRENCIES)[0][0])
    log.land(USER_EVENTS, [replace(e, event_id=uuid_of(5_000_000)) for e in make_user_events(22, 3)[0][:1]])
    log.land(RATES, publish([date(2025, 4, 1)], seed=23))
    succeeded, results = dbt("test", "--select", "test_type:singular")
    assert succeeded, failures(results)


@dataclass(frozen=True)
class Twin:
    """A guarantee broken on purpose, and the checks that must notice."""

    broken: str  # the relation that is changed, and restored afterwards
    how: str
    caught_by: frozenset[str]

    def __str__(self) -> str:
        return f"{self.broken}: {self.how}"


def one_row(table: str, where: str = "true") -> str:
    return f"ctid = (select min(ctid) from {table} where {where})"


STAGED = "staging.stg_payments__transactions"
CONVERTED = "intermediate.int_payments__transactions_converted"
FACTS = "marts.fct_transactions"
TOTALS = "intermediate.int_payments__daily_totals"
REPORT = "marts.rpt_finance__daily_revenue"
COMPLETED = "status = 'completed'"
YEN = "currency_code = 'JPY'"
EURO = "currency_code = 'EUR' and amount_minor > 0"

TWINS = [
    Twin(
        STAGED,
        f"delete from {STAGED} where {one_row(STAGED, EURO)}",
        frozenset(
            {
                "stg_payments__transactions__conserves_events",
                "stg_payments__transactions__conserves_amounts",
                "int_payments__transactions_converted__conserves_transactions",
            }
        ),
    ),
    Twin(
        STAGED,
        f"update {STAGED} set amount_minor = amount_minor + 1 where {one_row(STAGED)}",
        frozenset(
            {
                "stg_payments__transactions__conserves_amounts",
                "int_payments__transactions_converted__conserves_transactions",
            }
        ),
    ),
    Twin(
        STAGED,
        f"update {STAGED} set event_count = event_count + 1 where {one_row(STAGED)}",
        frozenset({"stg_payments__transactions__conserves_events"}),
    ),
    Twin(
        STAGED,
        f"update {STAGED} set status = 'failed' where {one_row(STAGED, COMPLETED)}",
        frozenset({"stg_payments__transactions__conserves_amounts"}),
    ),
    Twin(
        "raw_payments.transaction_created",
        f"delete from raw_payments.transaction_created where {one_row('raw_payments.transaction_created')}",
        frozenset({"stg_payments__transactions__conserves_events"}),
    ),
    Twin(
        "staging.stg_users__events",
        f"delete from staging.stg_users__events where {one_row('staging.stg_users__events')}",
        frozenset({"stg_users__events__conserves_events", "int_users__latest__conserves_events"}),
    ),
    Twin(
        "intermediate.int_users__latest",
        f"delete from intermediate.int_users__latest where {one_row('intermediate.int_users__latest')}",
        frozenset({"int_users__latest__conserves_events", "int_users__latest__conserves_deliveries"}),
    ),
    Twin(
        "staging.stg_fx__daily_rates",
        f"update staging.stg_fx__daily_rates set rate = rate * 1.01 where {one_row('staging.stg_fx__daily_rates')}",
        frozenset({"stg_fx__daily_rates__conserves_rates", "int_fx__daily_rates_filled__keeps_published_rates"}),
    ),
    Twin(
        "intermediate.int_fx__daily_rates_filled",
        "update intermediate.int_fx__daily_rates_filled set rate_as_of_date = rate_as_of_date - 1"
        " where rate_date = '2025-03-05' and currency_code = 'EUR'",
        frozenset({"int_fx__daily_rates_filled__keeps_published_rates"}),
    ),
    Twin(
        CONVERTED,
        f"delete from {CONVERTED} where {one_row(CONVERTED)}",
        frozenset(
            {
                "int_payments__transactions_converted__conserves_transactions",
                "fct_transactions__conserves_transactions",
            }
        ),
    ),
    Twin(
        CONVERTED,
        f"update {CONVERTED} set fx_rate = fx_rate * 2 where {one_row(CONVERTED, EURO)}",
        frozenset({"int_payments__transactions_converted__uses_the_days_rate"}),
    ),
    Twin(
        CONVERTED,
        f"update {CONVERTED} set reporting_amount_minor = reporting_amount_minor + 2 where {one_row(CONVERTED, EURO)}",
        frozenset(
            {"int_payments__transactions_converted__uses_the_days_rate", "fct_transactions__conserves_transactions"}
        ),
    ),
    Twin(
        FACTS,
        f"delete from {FACTS} where {one_row(FACTS, 'is_completed')}",
        frozenset(
            {
                "fct_transactions__conserves_transactions",
                "rpt_finance__daily_revenue__sums_to_transactions",
                "dim_users__sums_to_transactions",
                "dim_merchants__sums_to_transactions",
            }
        ),
    ),
    Twin(
        TOTALS,
        f"update {TOTALS} set amount_minor = amount_minor + 1 where {one_row(TOTALS)}",
        frozenset({"int_payments__daily_totals__conserves_transactions"}),
    ),
    Twin(
        TOTALS,
        f"update {TOTALS} set transaction_count = transaction_count + 1, event_count = event_count + 1"
        f" where {one_row(TOTALS)}",
        frozenset(
            {
                "int_payments__daily_totals__conserves_transactions",
                "int_payments__daily_totals__conserves_events",
                "int_payments__user_totals__conserves_transactions",
                "int_payments__merchant_totals__conserves_transactions",
            }
        ),
    ),
    Twin(
        REPORT,
        f"update {REPORT} set revenue_minor = revenue_minor + 1 where {one_row(REPORT)}",
        frozenset({"rpt_finance__daily_revenue__sums_to_transactions"}),
    ),
    Twin(
        REPORT,
        f"update {REPORT} set revenue_major = revenue_major / 100 where {one_row(REPORT, YEN)}",
        frozenset({"rpt_finance__daily_revenue__sums_to_transactions"}),
    ),
    Twin(
        "audit.audit_reconciliation",
        "update audit.audit_reconciliation set staged_rows = staged_rows - 1 where feed = 'raw_fx.daily_rates'",
        frozenset({"audit_reconciliation__accounts_for_every_record"}),
    ),
    Twin(
        "audit.audit_reconciliation",
        "update audit.audit_reconciliation set offered = offered + 1 where feed = 'raw_users.user_events'",
        frozenset({"audit_reconciliation__accounts_for_every_record"}),
    ),
    Twin(
        "raw_payments.transaction_created",
        "update raw_payments.transaction_created set amount = 0.001 where "
        + one_row("raw_payments.transaction_created", "currency = 'USD'"),
        frozenset({"source_exact_in_currency_raw_payments_transaction_created_amount__currency"}),
    ),
    Twin(
        "raw_payments.transaction_created",
        "update raw_payments.transaction_created set user_id = 'usr_0000001' where "
        + one_row("raw_payments.transaction_created"),
        frozenset({"source_matches_pattern_raw_payments_transaction_created_user_id___usr__0_9_6_"}),
    ),
    Twin(
        "raw_payments.transaction_created",
        "update raw_payments.transaction_created set amount = -0.01 where "
        + one_row("raw_payments.transaction_created"),
        frozenset({"source_within_range_raw_payments_transaction_created_amount__0"}),
    ),
    Twin(
        "intermediate.int_fx__daily_rates_filled",
        "insert into intermediate.int_fx__daily_rates_filled (currency_code) values ('EUR')",
        frozenset({"unique_combination_int_fx__daily_rates_filled_rate_date__currency_code"}),
    ),
]


@pytest.mark.timeout(600)
def test_checks_catch_what_they_are_for(dbt: Dbt, log: RawLog, connection: psycopg2.extensions.connection) -> None:
    """Each check of a guarantee fails when the guarantee is broken, and passes again when it is restored."""
    land_sample(log)
    succeeded, results = dbt("build", "--exclude-resource-type", "unit_test")
    assert succeeded, failures(results)
    for twin in TWINS:
        execute(connection, f"create table kept as table {twin.broken}")
        execute(connection, twin.how)
        _, results = dbt("test", "--select", *sorted(twin.caught_by), *EVERYTHING)
        assert failed_tests(results) == twin.caught_by, str(twin)
        execute(connection, f"truncate {twin.broken}; insert into {twin.broken} table kept; drop table kept")
    succeeded, results = dbt("test", "--select", "test_type:data", *EVERYTHING)
    assert succeeded, failures(results)


def test_tests_look_at_what_is_new(dbt: Dbt, log: RawLog, connection: psycopg2.extensions.connection) -> None:
    """What passed is not looked at again by a build, but for a test that failed, and when all is to be looked at."""
    land_sample(log)
    succeeded, results = dbt("build", "--exclude-resource-type", "unit_test")
    assert succeeded, failures(results)
    uses_the_rate = "int_payments__transactions_converted__uses_the_days_rate"
    # All tests of one model: as many as it takes for it to count as tested.
    tests = ("test", "--select", "int_payments__transactions_converted")

    def wrong(where: str) -> set[str]:
        execute(connection, f"update {CONVERTED} set fx_rate = fx_rate * 2 where {one_row(CONVERTED, where)}")
        return failed_tests(dbt(*tests)[1])

    assert wrong(EURO) == set()
    # The twin: an old row is found as soon as all is looked at; and once found, until it is mended.
    for arguments in (("test", "--select", uses_the_rate, *EVERYTHING), tests, tests):
        assert failed_tests(dbt(*arguments)[1]) == {uses_the_rate}
    dbt.run("--full-refresh")
    succeeded, results = dbt(*tests)
    assert succeeded, failures(results)

    # What a load brought is looked at, and what a new rate changed.
    marks = "select relation, load_column, load_id from audit.tested_loads order by 1, 2"
    before = query(connection, marks)
    load_id = log.land(TRANSACTIONS, make_payments(seed=5, transactions=40, currencies=["EUR"])[0][0])
    dbt.run()
    assert wrong(f"_last_load_id = '{load_id}' and amount_minor > 0") == {uses_the_rate}
    dbt.run("--full-refresh")
    succeeded, results = dbt(*tests)
    assert succeeded, failures(results)
    after = query(connection, marks)
    assert len(after) == len(before) > 0
    assert (CONVERTED, "_last_load_id", load_id) in after

    # The two ways to read a relation, in the same words as dbt's own tests.
    execute(connection, f"update {CONVERTED} set reporting_currency_code = 'EUR' where {one_row(CONVERTED, EURO)}")
    named = "accepted_values_int_payments__transactions_converted_reporting_currency_code___var_reporting_currency_"
    assert failed_tests(dbt("test", "--select", named)[1]) == set()
    assert failed_tests(dbt("test", "--select", named, *EVERYTHING)[1]) == {named}

    # What was rebuilt without its tests is looked at, all of it.
    dbt.run("--full-refresh")
    assert failed_tests(dbt(*tests)[1]) == set()
    assert wrong(EURO) == set()
    dbt.run("--full-refresh", "--select", "int_payments__transactions_converted")
    assert wrong(EURO) == {uses_the_rate}


@pytest.mark.timeout(600)
def test_totals_count_on_or_count_again(
    dbt: Dbt, log: RawLog, connection: psycopg2.extensions.connection, database_dsn: str
) -> None:
    """Sums follow what changed; where what was counted cannot be known, everything is counted again."""
    event = Payment(
        uuid_of(1), Decimal("5.00"), "EUR", "usr_000001", "mer_00001", "DE",
        datetime(2025, 3, 3, 12, tzinfo=UTC), "completed",
    )  # fmt: skip
    later = replace(event, transaction_id=uuid_of(2), country="FR", created_at=event.created_at + timedelta(hours=1))
    day, own = timedelta(days=1), replace(event, user_id="usr_000003")
    converted = ["stg_payments__transactions", "int_payments__transactions_converted"]
    profile = make_user_events(seed=8, events=20)

    def compare() -> None:
        dbt.run("--select", "staging", "intermediate")
        dbt.run("--full-refresh", "--select", "staging", "intermediate", schema="full")
        built = [relation for relation in dbt.relations() if relation[0] in ("staging", "intermediate")]
        assert_same_rows(database_dsn, built, "full")

    def counted_on() -> bool:
        folder = dbt.scratch / "analytics" / "compiled" / "payments_warehouse" / "models" / "intermediate" / "payments"
        return "full outer join known" in (folder / "int_payments__user_totals.sql").read_text(encoding="utf-8")

    for schema in ("analytics", "full"):
        dbt("seed", schema=schema)
    log.land(TRANSACTIONS, [event, later, replace(later, transaction_id=uuid_of(3), user_id="usr_000002")])
    log.land(RATES, publish(days_from(date(2025, 2, 20), 30), seed=1))
    log.land(USER_EVENTS, profile[0])
    compare()

    # No longer completed, on another day, in another country; and one that came to be the first.
    log.land(TRANSACTIONS, [replace(event, status="failed", country="NL", created_at=event.created_at + 2 * day)])
    log.land(TRANSACTIONS, [replace(later, transaction_id=uuid_of(4), created_at=event.created_at - 3 * day)])
    log.land(USER_EVENTS, profile[1])
    compare()
    assert counted_on()
    # An older event of it, a redelivery, a new rate of its day.
    log.land(TRANSACTIONS, [replace(event, created_at=event.created_at - 9 * day), later])
    log.land(RATES, publish([date(2025, 3, 5)], seed=2))
    compare()
    assert counted_on()
    # A new rate alone, between two states.
    log.land(TRANSACTIONS, [replace(later, status="failed", created_at=later.created_at + day)])
    dbt.run("--select", *converted)
    log.land(RATES, publish([date(2025, 3, 4)], seed=3))
    compare()
    assert counted_on()

    # Two states of a transaction since the last count, one of them never counted.
    log.land(TRANSACTIONS, [replace(later, status="completed", created_at=later.created_at + 2 * day)])
    dbt.run("--select", *converted)
    log.land(TRANSACTIONS, [replace(later, status="failed", created_at=later.created_at + 3 * day)])
    compare()
    assert not counted_on()
    # A transaction that leaves its user and merchant; an event that leaves its user.
    log.land(TRANSACTIONS, [replace(own, merchant_id="mer_00002", created_at=event.created_at + 5 * day)])
    log.land(USER_EVENTS, [replace(profile[0][0], user_id="usr_777777", occurred_at=datetime(2025, 6, 1, tzinfo=UTC))])
    compare()
    assert not counted_on()
    # Forgotten by a full refresh of what they are counted from.
    log.land(TRANSACTIONS, [replace(own, merchant_id="mer_00002", created_at=event.created_at + 6 * day)])
    dbt.run("--select", converted[0])
    dbt.run("--full-refresh", "--select", "int_payments__transactions_converted")
    compare()
    assert not counted_on()
    log.land(TRANSACTIONS, [replace(own, transaction_id=uuid_of(9))])
    compare()
    assert counted_on()


CONSTRAINTS = [
    f"insert into {FACTS} table {FACTS} limit 1",
    f"update {FACTS} set status = 'lost'",
    f"update {FACTS} set amount_minor = -1",
    f"update {FACTS} set has_fx_rate = not has_fx_rate",
    f"insert into {REPORT} table {REPORT} limit 1",
    f"update {REPORT} set unconverted_count = transaction_count + 1",
    "insert into marts.dim_users table marts.dim_users limit 1",
    "insert into marts.dim_merchants table marts.dim_merchants limit 1",
    "insert into marts.dim_currencies table marts.dim_currencies limit 1",
    "insert into marts.dim_dates table marts.dim_dates limit 1",
]


def test_contracts_are_real_constraints(dbt: Dbt, log: RawLog, connection: psycopg2.extensions.connection) -> None:
    """Postgres itself refuses what the contracts of the marts exclude."""
    land_sample(log)
    dbt("seed")
    dbt.run()
    for statement in CONSTRAINTS:
        with pytest.raises(psycopg2.IntegrityError):
            execute(connection, statement)


def test_personal_data_stops_before_the_marts(
    dbt: Dbt, log: RawLog, connection: psycopg2.extensions.connection
) -> None:
    """No contact data in marts or audit, neither as a column nor as a value."""
    land_sample(log)
    dbt("seed")
    dbt.run()
    columns = query(
        connection,
        "select table_schema, table_name, column_name from information_schema.columns"
        " where table_schema in ('marts', 'audit')"
        " and column_name in ('email', 'full_name', 'phone', 'ip_address', 'raw_key', 'raw_value', 'headers')",
    )
    assert columns == []
    for schema, table in dbt.relations():
        if schema in ("marts", "audit"):
            rows = query(connection, f"select 1 from {schema}.{table} t where t::text like '%@example.com%' limit 1")
            assert rows == [], f"{schema}.{table}"

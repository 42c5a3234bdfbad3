"""The models on a real Postgres: incremental equals full refresh, money equals a second computation, checks can fail.

`rows written straight into the raw tables -> dbt (in process) -> marts`, past the loaders, so that every order of
arrival can be made: late, duplicate, out of order, corrected, and loads none of whose events stand. The expected
figures are computed here from the same events with exact fractions and nothing of the models.
"""

import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest
from psycopg2.extras import execute_values

from ingestion.ddl import ensure_schema
from ingestion.feeds import load_feeds
from ingestion.settings import Settings

PROJECT = Path(__file__).parents[2]
TRANSACTIONS = ("raw_payments", "transaction_created")
USER_EVENTS = ("raw_users", "user_events")
RATES = ("raw_fx", "daily_rates")

EXPONENTS = {"USD": 2, "EUR": 2, "GBP": 2, "JPY": 0, "CAD": 2, "KWD": 3}
MAX_RATE_AGE_DAYS = 7
# KWD is refused at the door, and the models must be right about it all the same: these rules are the door's.
DOOR_RULES = "source:*"


@dataclass(frozen=True)
class Payment:
    """An event of a transaction, in the columns of its raw table."""

    transaction_id: str
    amount: Decimal
    currency: str
    user_id: str
    merchant_id: str
    country: str
    created_at: datetime
    status: str


@dataclass(frozen=True)
class UserEvent:
    """A user event, in the columns of its raw table."""

    event_id: str
    event_type: str
    user_id: str
    email: str | None
    full_name: str | None
    phone: str | None
    ip_address: str | None
    country: str | None
    occurred_at: datetime


@dataclass(frozen=True)
class Rate:
    """A published rate, in the columns of its raw table."""

    rate_date: date
    base_currency: str
    quote_currency: str
    rate: Decimal


class RawLog:
    """Writes loads as the loaders leave them: rows, an interval of the ledger, and the commit."""

    def __init__(self, connection: psycopg2.extensions.connection) -> None:
        self.connection = connection
        self.loads = 0
        self.offset = 0
        self.landed: list[Payment] = []  # in the order the models must see them
        self.rates: list[Rate] = []

    def land(self, feed: tuple[str, str], rows: Sequence[Payment | UserEvent | Rate], *, commit: bool = True) -> str:
        """One load of a feed; returns its id."""
        self.loads += 1
        load_id = f"{1_732_288_096 + self.loads}.{self.loads:05d}"
        schema, table = feed
        with self.connection, self.connection.cursor() as cursor:
            cursor.execute(
                f"insert into {schema}._streams (feed, kind, origin, name, incarnation) values (%s, 'test', '', '', '')"
                " on conflict (feed, origin, name, incarnation) do update set kind = 'test' returning stream_id",
                (".".join(feed),),
            )
            (stream_id,) = cursor.fetchone() or (None,)
            stamped = [self._row(row, stream_id, load_id) for row in rows]
            if stamped:
                columns = ", ".join(stamped[0])
                execute_values(
                    cursor, f"insert into {schema}.{table} ({columns}) values %s", [tuple(r.values()) for r in stamped]
                )
            cursor.execute(
                f"insert into {schema}._ledger values (%s, %s, 'api', 0, null, null, %s, %s, 1, %s, %s, 0, 0, 0, 0, 0,"
                " 0, 0, 0, null, null, 'test', 1, now(), %s)",
                (
                    ".".join(feed),
                    stream_id,
                    datetime(2025, 1, 1, tzinfo=UTC),
                    datetime(2025, 1, 2, tzinfo=UTC),
                    len(rows),
                    len(rows),
                    load_id,
                ),
            )
        self.landed += [row for row in rows if isinstance(row, Payment)]
        self.rates += [row for row in rows if isinstance(row, Rate)]
        if commit:
            self.commit(feed, load_id)
        return load_id

    def commit(self, feed: tuple[str, str], load_id: str) -> None:
        """Make a load true."""
        with self.connection, self.connection.cursor() as cursor:
            cursor.execute(
                f"insert into {feed[0]}._dlt_loads values (%s, %s, 0, now(), 'test')",
                (load_id, feed[1]),
            )

    def _row(self, row: Payment | UserEvent | Rate, stream_id: int, load_id: str) -> dict[str, Any]:
        columns: dict[str, Any] = dict(zip(row.__dataclass_fields__, astuple(row), strict=True))
        self.offset += 1
        now = datetime(2025, 6, 1, tzinfo=UTC) + timedelta(seconds=self.offset)
        columns |= {"_stream_id": stream_id, "_loaded_at": now, "_dlt_load_id": load_id}
        if isinstance(row, Rate):
            window = {"_api_window_from": now, "_api_window_to": now + timedelta(days=1), "_api_page": 1}
            return columns | window | {"_api_item": self.offset, "_content_hash": str(self.offset)}
        return columns | {
            "_kafka_partition": self.offset % 3,
            "_kafka_offset": self.offset,
            "_kafka_timestamp": now,
        }


class Dbt:
    """dbt in this process, against one database."""

    def __init__(self, dsn: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        parts = psycopg2.extensions.parse_dsn(dsn)
        self.scratch = scratch
        self.monkeypatch = monkeypatch
        profiles = scratch / "profiles"
        profiles.mkdir()
        shutil.copy(PROJECT / "profiles.yml.example", profiles / "profiles.yml")
        for name, value in {
            "WAREHOUSE_DB_HOST": parts.get("host", "127.0.0.1"),
            "WAREHOUSE_DB_PORT": str(parts.get("port", 5432)),
            "WAREHOUSE_DB_USER": parts["user"],
            "WAREHOUSE_DB_PASSWORD": parts.get("password", "none"),
            "WAREHOUSE_DB_NAME": parts["dbname"],
            "DBT_PROFILES_DIR": str(profiles),
            "DBT_PROJECT_DIR": str(PROJECT),
        }.items():
            monkeypatch.setenv(name, value)

    def __call__(self, *args: str, schema: str = "analytics") -> tuple[bool, list[Any]]:
        """Whether the command succeeded, and its results; `schema` prefixes all schemas (the default does not)."""
        from dbt.cli.main import dbtRunner

        self.monkeypatch.setenv("WAREHOUSE_SCHEMA", schema)
        folders = ["--target-path", str(self.scratch / schema), "--log-path", str(self.scratch / "logs")]
        outcome = dbtRunner().invoke([*args, *folders, "--quiet", "--no-use-colors", "--no-version-check"])
        if outcome.exception is not None:
            raise outcome.exception
        return outcome.success, list(getattr(outcome.result, "results", []))

    def run(self, *args: str, schema: str = "analytics") -> None:
        succeeded, results = self("run", *args, schema=schema)
        assert succeeded, failures(results)

    def described(self) -> dict[tuple[str, str], list[str]]:
        """(schema, table) of every model, in plain schemas -> the columns its YAML lists."""
        manifest = json.loads((self.scratch / "analytics" / "manifest.json").read_text(encoding="utf-8"))
        return {
            (node["schema"], node["alias"]): list(node["columns"])
            for node in manifest["nodes"].values()
            if node["resource_type"] == "model"
        }

    def relations(self) -> list[tuple[str, str]]:
        """(schema, table) of every model, in plain schemas."""
        return sorted(self.described())


def failures(results: Sequence[Any]) -> list[str]:
    """Names of what did not succeed, with the message."""
    return [
        f"{result.node.name}: {result.message}"
        for result in results
        if str(result.status) not in ("success", "pass", "no-op")
    ]


def failed_tests(results: Sequence[Any]) -> set[str]:
    return {result.node.name for result in results if str(result.status) == "fail"}


@pytest.fixture
def connection(database_dsn: str, clean_settings: Settings) -> Iterator[psycopg2.extensions.connection]:
    """A connection to a fresh database with the raw tables made."""
    opened = psycopg2.connect(database_dsn, options="-c timezone=UTC")
    ensure_schema(opened, load_feeds(clean_settings))
    yield opened
    opened.close()


@pytest.fixture
def log(connection: psycopg2.extensions.connection) -> RawLog:
    return RawLog(connection)


@pytest.fixture
def dbt(database_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dbt:
    return Dbt(database_dsn, tmp_path, monkeypatch)


def query(connection: psycopg2.extensions.connection, sql: str) -> list[tuple[Any, ...]]:
    with connection, connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall()


def execute(connection: psycopg2.extensions.connection, sql: str) -> None:
    with connection, connection.cursor() as cursor:
        cursor.execute(sql)


def assert_same_rows(dsn: str, relations: Sequence[tuple[str, str]], prefix: str) -> None:
    """Every relation holds, row for row and column for column, what its twin in the prefixed schema holds."""
    connection = psycopg2.connect(dsn, options="-c timezone=UTC")
    try:
        for schema, table in relations:
            one, other = f"{schema}.{table}", f"{prefix}_{schema}.{table}"
            for here, there in ((one, other), (other, one)):
                extra = query(connection, f"select * from {here} except all select * from {there}")
                assert extra == [], f"{len(extra)} rows of {here} are not in {there}, first: {extra[0]}"
    finally:
        connection.close()


def uuid_of(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def make_payments(seed: int, transactions: int, currencies: Sequence[str]) -> list[list[list[Payment]]]:
    """Three rounds of two loads each: status changes across days, redeliveries, events in any order of arrival."""
    chance = random.Random(seed)
    rounds: list[list[list[Payment]]] = [[[], []] for _ in range(3)]
    start = datetime(2025, 3, 1, 22, tzinfo=UTC)
    for number in range(transactions):
        currency = chance.choice(currencies)
        amount = Decimal(chance.randrange(0, 2_000_000)).scaleb(-EXPONENTS[currency])
        first = Payment(
            transaction_id=uuid_of(number),
            amount=amount,
            currency=currency,
            user_id=f"usr_{chance.randrange(30):06d}",
            merchant_id=f"mer_{chance.randrange(12):05d}",
            country=chance.choice(["DE", "US", "NA", "JP"]),
            created_at=start + timedelta(minutes=chance.randrange(28 * 24 * 60)),
            status="pending",
        )
        events = [first]
        for _ in range(chance.randrange(3)):
            later = events[-1].created_at + timedelta(minutes=chance.choice([0, 1, 90, 3000]))
            changed = replace(events[-1], created_at=later, status=chance.choice(["completed", "completed", "failed"]))
            if chance.random() < 0.1:
                changed = replace(changed, amount=amount * 2, country="FR")
            events.append(changed)
        if chance.random() < 0.3:
            events.append(chance.choice(events))
        for event in events:
            chance.choice(chance.choice(rounds)).append(event)
    for loads in rounds:
        for load in loads:
            chance.shuffle(load)
    return rounds


def make_user_events(seed: int, events: int) -> list[list[UserEvent]]:
    """Three rounds with redeliveries, one of which names another user than before."""
    chance = random.Random(seed)
    rounds: list[list[UserEvent]] = [[], [], []]
    start = datetime(2025, 2, 1, tzinfo=UTC)
    for number in range(events):
        user = chance.randrange(40)
        event = UserEvent(
            event_id=uuid_of(number),
            event_type=chance.choice(["signed_up", "profile_updated", "signed_in", "closed"]),
            user_id=f"usr_{user:06d}",
            email=chance.choice([None, f"user{user}.{number}@example.com"]),
            full_name=chance.choice([None, f"Name {number}"]),
            phone=None,
            ip_address=f"192.0.2.{number % 250}",
            country=chance.choice([None, "DE", "NA"]),
            occurred_at=start + timedelta(minutes=chance.randrange(40 * 24 * 60)),
        )
        chance.choice(rounds).append(event)
        if chance.random() < 0.2:
            chance.choice(rounds).append(event)
    moved = UserEvent(uuid_of(90_001), "signed_up", "usr_000900", None, None, None, None, "DE", start)
    rounds[0].append(moved)
    rounds[1].append(replace(moved, user_id="usr_000901"))
    return rounds


def publish(days: Sequence[date], seed: int, without: Sequence[date] = ()) -> list[Rate]:
    """A rate for every currency and business day."""
    chance = random.Random(seed)
    middle = {"EUR": 9613, "GBP": 7812, "JPY": 1_501_234, "CAD": 13812, "KWD": 3067}
    return [
        Rate(day, "USD", currency, Decimal(price + chance.randrange(-200, 200)).scaleb(-4))
        for day in days
        if day.weekday() < 5 and day not in without
        for currency, price in middle.items()
    ]


def days_from(first: date, count: int) -> list[date]:
    return [first + timedelta(days=number) for number in range(count)]


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


SAMPLE_CURRENCIES = ["USD", "EUR", "GBP", "JPY", "CAD"]


def land_sample(log: RawLog) -> None:
    """A load or two of every feed, within the rules of the door."""
    for loads in make_payments(seed=11, transactions=120, currencies=SAMPLE_CURRENCIES):
        for load in loads:
            log.land(TRANSACTIONS, load)
    for events in make_user_events(seed=12, events=60):
        log.land(USER_EVENTS, events)
    log.land(RATES, publish(days_from(date(2025, 2, 24), 30), seed=13))


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

    tables = [relation for relation in dbt.relations() if relation[0] in ("staging", "marts")]
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
        frozenset({"int_users__latest__conserves_events"}),
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
        _, results = dbt("test", "--select", *sorted(twin.caught_by))
        assert failed_tests(results) == twin.caught_by, str(twin)
        execute(connection, f"truncate {twin.broken}; insert into {twin.broken} table kept; drop table kept")
    succeeded, results = dbt("test", "--select", "test_type:data")
    assert succeeded, failures(results)


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

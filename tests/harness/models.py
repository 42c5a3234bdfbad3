"""What the models need to be tested: loads written straight into the raw tables, dbt in process, made-up events.

    log.land(TRANSACTIONS, payments) -> raw rows, an interval of the ledger, the commit; dbt("build") -> results

Past the loaders, so that every order of arrival can be made: late, duplicate, out of order, corrected, and loads none
of whose events stand. The fixtures `log` and `dbt` stand in tests/integration/conftest.py.
"""

import contextlib
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest
from psycopg2.extras import execute_values

from orchestration.transform import load_runner

PROJECT = Path(__file__).parents[2]
PARSED = "partial_parse.msgpack"
TRANSACTIONS = ("raw_payments", "transaction_created")
USER_EVENTS = ("raw_users", "user_events")
RATES = ("raw_fx", "daily_rates")

EXPONENTS = {"USD": 2, "EUR": 2, "GBP": 2, "JPY": 0, "CAD": 2, "KWD": 3}
SAMPLE_CURRENCIES = ["USD", "EUR", "GBP", "JPY", "CAD"]


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
        self.landed_on: list[date] = []  # the day of each one's load
        self.rates: list[Rate] = []

    def land(
        self,
        feed: tuple[str, str],
        rows: Sequence[Payment | UserEvent | Rate],
        *,
        dead: int = 0,
        restored: bool = False,
        replayed: Sequence[str] = (),
        commit: bool = True,
    ) -> str:
        """One load of a feed; returns its id.

        Args:
            dead: records set aside beside the rows.
            restored: the rows had landed before and were gone.
            replayed: dead letters the rows come from.
        """
        self.loads += 1
        load_id = f"{1_732_288_096 + self.loads}.{self.loads:05d}"
        loaded_at = self.loaded_at
        schema, table = feed
        with self.connection, self.connection.cursor() as cursor:
            cursor.execute(
                f"insert into {schema}._streams (feed, kind, origin, name, incarnation) values (%s, 'test', '', '', '')"
                " on conflict (feed, origin, name, incarnation) do update set kind = 'test' returning stream_id",
                (".".join(feed),),
            )
            (stream_id,) = cursor.fetchone() or (None,)
            interval = {
                "feed": ".".join(feed),
                "stream_id": stream_id,
                "kind": "replay" if restored or replayed else "api",
                "window_from": datetime(2025, 1, 1, tzinfo=UTC),
                "window_to": datetime(2025, 1, 2, tzinfo=UTC),
                "offered": 0 if restored or replayed else len(rows) + dead,
                "landed": 0 if restored else len(rows),
                "restored": len(rows) if restored else 0,
                "dead": -len(replayed) if replayed else dead,
                "contract_version": "test",
                "loaded_at": loaded_at,
                "_dlt_load_id": load_id,
            }
            zero = (
                "partition",
                "pages",
                "tombstones",
                "unchanged",
                "control",
                "lost",
                "drifted",
                "bytes",
                "writer_token",
            )
            self._insert(cursor, f"{schema}._ledger", [interval | dict.fromkeys(zero, 0)])
            self._insert(cursor, f"{schema}.{table}", [self._row(row, stream_id, load_id, loaded_at) for row in rows])
            letter = {
                "feed": ".".join(feed),
                "_stream_id": stream_id,
                "failed_at": loaded_at,
                **dict.fromkeys(("reason", "path", "message", "contract_version", "loader_version"), "test"),
                "raw_value": b"",
                "attempts": 1,
                "_dlt_load_id": load_id,
            }
            letters = [letter | {"dead_letter_id": f"{load_id}/{number}"} for number in range(dead)]
            self._insert(cursor, f"{schema}._dead_letters", letters)
            cursor.execute(
                f"update {schema}._dead_letters set replay_load_id = %s where dead_letter_id = any(%s)",
                (load_id, list(replayed)),
            )
        self.landed += [row for row in rows if isinstance(row, Payment)]
        self.landed_on += [loaded_at.date() for row in rows if isinstance(row, Payment)]
        self.rates += [row for row in rows if isinstance(row, Rate)]
        if commit:
            self.commit(feed, load_id)
        return load_id

    @staticmethod
    def _insert(cursor: psycopg2.extensions.cursor, table: str, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            values = [tuple(row.values()) for row in rows]
            execute_values(cursor, f"insert into {table} ({', '.join(rows[0])}) values %s", values)

    @property
    def loaded_at(self) -> datetime:
        """When the last load was made: three or four a day, so that what follows comes the same day or later."""
        return datetime(2025, 6, 1, tzinfo=UTC) + timedelta(hours=7 * self.loads)

    def commit(self, feed: tuple[str, str], load_id: str) -> None:
        """Make a load true."""
        with self.connection, self.connection.cursor() as cursor:
            cursor.execute(
                f"insert into {feed[0]}._dlt_loads values (%s, %s, 0, now(), 'test')",
                (load_id, feed[1]),
            )

    def _row(
        self, row: Payment | UserEvent | Rate, stream_id: int, load_id: str, loaded_at: datetime
    ) -> dict[str, Any]:
        columns: dict[str, Any] = dict(zip(row.__dataclass_fields__, astuple(row), strict=True))
        self.offset += 1
        now = datetime(2025, 6, 1, tzinfo=UTC) + timedelta(seconds=self.offset)
        columns |= {"_stream_id": stream_id, "_loaded_at": loaded_at, "_dlt_load_id": load_id}
        if isinstance(row, Rate):
            window = {"_api_window_from": now, "_api_window_to": now + timedelta(days=1), "_api_page": 1}
            return columns | window | {"_api_item": self.offset, "_content_hash": str(self.offset)}
        return columns | {
            "_kafka_partition": self.offset % 3,
            "_kafka_offset": self.offset,
            "_kafka_timestamp": now,
        }


class Dbt:
    """dbt in this process, against one database.

    `parsed` is a folder in which the parsed project outlives the test: dbt takes it up where the database has the same
    address, and what is parsed anew is what differs. Within a test it is parsed once a schema: dbt would do it again
    for every other `--vars`.
    """

    def __init__(self, dsn: str, scratch: Path, parsed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        parts = psycopg2.extensions.parse_dsn(dsn)
        self.scratch = scratch
        self.parsed = parsed
        self.monkeypatch = monkeypatch
        self.projects: dict[str, Any] = {}
        profiles = scratch / "profiles"
        profiles.mkdir()
        shutil.copy(PROJECT / "profiles.yml.example", profiles / "profiles.yml")
        self.address = {
            "WAREHOUSE_DB_HOST": parts.get("host", "127.0.0.1"),
            "WAREHOUSE_DB_PORT": str(parts.get("port", 5432)),
            "WAREHOUSE_DB_USER": parts["user"],
            "WAREHOUSE_DB_PASSWORD": parts.get("password", "none"),
            "WAREHOUSE_DB_NAME": parts["dbname"],
            "DBT_PROFILES_DIR": str(profiles),
            "DBT_PROJECT_DIR": str(PROJECT),
        }

    def __call__(self, *args: str, schema: str = "analytics") -> tuple[bool, list[Any]]:
        """Whether the command succeeded, and its results; `schema` prefixes all schemas (the default does not)."""
        for name, value in (self.address | {"WAREHOUSE_SCHEMA": schema}).items():
            self.monkeypatch.setenv(name, value)
        target = self.scratch / schema
        if not target.exists():
            target.mkdir()
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(self.parsed / schema / PARSED, target)
        folders = ["--target-path", str(target), "--log-path", str(self.scratch / "logs")]
        options = [*folders, "--quiet", "--no-use-colors", "--no-version-check"]
        if schema not in self.projects:
            outcome = load_runner()().invoke(["parse", *options])
            if outcome.exception is not None:
                raise outcome.exception
            self.projects[schema] = outcome.result
            (self.parsed / schema).mkdir(exist_ok=True)
            shutil.copy(target / PARSED, self.parsed / schema)
        outcome = load_runner()(manifest=self.projects[schema]).invoke([*args, *options])
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
            columns = query(
                connection,
                "select string_agg(quote_ident(attname), ', ' order by attnum) from pg_attribute"
                # What a row was before, a full refresh cannot know.
                f" where attrelid = '{one}'::regclass and attnum > 0 and attname !~ '^_previous_'",
            )[0][0]
            for here, there in ((one, other), (other, one)):
                extra = query(connection, f"select {columns} from {here} except all select {columns} from {there}")
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


def land_sample(log: RawLog) -> None:
    """A load or two of every feed, within the rules of the door."""
    for loads in make_payments(seed=11, transactions=120, currencies=SAMPLE_CURRENCIES):
        for load in loads:
            log.land(TRANSACTIONS, load)
    for events in make_user_events(seed=12, events=60):
        log.land(USER_EVENTS, events)
    log.land(RATES, publish(days_from(date(2025, 2, 24), 30), seed=13))

"""The whole way, from a log of records to money in a mart, against a second computation that shares no code with it.

`tests/fixtures/make_expected.py` reads the same files with the standard library alone; what the warehouse makes of
them has to equal that, to the minor unit. What each sample record must become, its generator says.
"""

import csv
import importlib.util
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest
from confluent_kafka import Producer

from ingestion.database import connect
from ingestion.feeds import FeedSpec, KafkaOrigin, load_feeds
from ingestion.landing import land_feed
from ingestion.settings import Settings, load_settings
from orchestration import transform
from orchestration.console import Reporter
from orchestration.run import RunReport, prepare, run_all
from orchestration.sample import FEEDS, TRANSACTIONS, USER_EVENTS, SampleSpec, generate, read_jsonl, to_jsonl, to_kafka
from orchestration.standing import find_standing, take_inputs
from tests.harness.project_copy import copy_project

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"

Query = Callable[..., list[tuple]]
Row = dict[str, Any]

SAMPLE_DAYS = 5
RECORDS = {TRANSACTIONS: 100_000, USER_EVENTS: 5_000}
BAD_SHARE = 0.01


def _load_make_expected() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_expected", FIXTURES / "make_expected.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_expected = _load_make_expected()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project whose topics nobody else uses."""
    copied = copy_project(tmp_path_factory.mktemp("acceptance") / "project")
    for declaration in copied.glob("models/staging/*/_*__sources.yml"):
        text = declaration.read_text()
        declaration.write_text(re.sub(r"(topic: \w+)", rf"\1_{uuid.uuid4().hex[:8]}", text))
    return copied


@pytest.fixture(scope="module")
def new_warehouse(
    project: Path, services: Settings, server_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], Settings]]:
    """Settings of the copy on the embedded services, with a database of their own for each call."""
    made: list[str] = []
    admin = psycopg2.connect(server_dsn)
    admin.autocommit = True

    def make() -> Settings:
        made.append(f"test_acceptance_{uuid.uuid4().hex[:8]}")
        admin.cursor().execute(f"create database {made[-1]}")
        settings = replace(load_settings(project), home=tmp_path_factory.mktemp("home"), env=services.env)
        return settings.with_env(WAREHOUSE_DSN=psycopg2.extensions.make_dsn(server_dsn, dbname=made[-1]))

    yield make
    for name in made:
        admin.cursor().execute(f"drop database {name} with (force)")
    admin.close()


def ask(settings: Settings, statement: str) -> list[tuple]:
    connection = psycopg2.connect(settings.require("WAREHOUSE_DSN", "to ask"), options="-c timezone=UTC")
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement)
            rows = cursor.fetchall()
        connection.commit()
        return rows
    finally:
        connection.close()


def revenue_of(settings: Settings) -> dict[tuple[str, str, str], tuple[int, int, Decimal]]:
    """(day, currency, country) -> transactions, minor units, major units, as the mart says."""
    rows = ask(
        settings,
        "select revenue_date::text, currency_code, country_code, transaction_count, revenue_minor, revenue_major "
        "from marts.rpt_finance__daily_revenue",
    )
    revenue = {row[:3]: row[3:] for row in rows}
    assert len(revenue) == len(rows)
    return revenue


def keyed_revenue(rows: list[Row]) -> dict[tuple[str, str, str], tuple[int, int, Decimal]]:
    """The independent computation in the same form."""
    return {
        (row["revenue_date"], row["currency_code"], row["country_code"]): (
            int(row["transaction_count"]),
            int(row["revenue_minor"]),
            Decimal(row["revenue_major"]),
        )
        for row in rows
    }


# --- 100,000 sample records -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample as JSON lines, a folder a feed."""
    folder = tmp_path_factory.mktemp("sample")
    for feed in FEEDS:
        spec = SampleSpec(
            records=RECORDS[feed],
            seed=20250303,
            start=datetime(2025, 3, 3, tzinfo=UTC),
            bad_share=BAD_SHARE,
            events_per_second=RECORDS[feed] / (SAMPLE_DAYS * 86_400),
        )
        assert to_jsonl(generate(spec, feed), folder / feed / "sample.jsonl") == RECORDS[feed]
    return folder


@pytest.fixture(scope="module")
def marks(sample_folder: Path) -> dict[str, Counter[str]]:
    """Per feed, what the generator says its records must become."""
    return {
        feed: Counter(message.expected for message in read_jsonl(sample_folder / feed / "sample.jsonl"))
        for feed in FEEDS
    }


@pytest.fixture(scope="module")
def sampled(new_warehouse: Callable[[], Settings], sample_folder: Path) -> tuple[Settings, RunReport]:
    """The very messages of the files, sent to the broker, landed and built by the main job."""
    settings = new_warehouse()
    topics = {feed.name: feed.origin.topic for feed in load_feeds(settings) if isinstance(feed.origin, KafkaOrigin)}
    for feed in FEEDS:
        sent = to_kafka(
            read_jsonl(sample_folder / feed / "sample.jsonl"),
            settings.require("KAFKA_BOOTSTRAP_SERVERS", "it is embedded"),
            topics.__getitem__,
            {"broker.address.family": "v4"},
        )
        assert sum(sent.values()) == RECORDS[feed]
    return settings, run_all(settings, Reporter(quiet=True))


def test_the_ledger_adds_up_and_equals_the_generators_marks(
    sampled: tuple[Settings, RunReport], marks: dict[str, Counter[str]]
) -> None:
    settings, report = sampled
    expected = {
        feed: (RECORDS[feed], counts["landed"], counts["dead"], counts["tombstone"]) for feed, counts in marks.items()
    }
    for feed, (offered, landed, dead, tombstones) in expected.items():
        assert offered == landed + dead + tombstones
        assert 0.8 * BAD_SHARE < (dead + tombstones) / offered < 1.2 * BAD_SHARE, feed
    landings = {one.feed: (one.offered, one.landed, one.dead, one.tombstones) for one in report.landings}
    assert {feed: landings[feed] for feed in FEEDS} == expected
    ledger = ask(
        settings,
        "select feed, sum(offered)::int, sum(landed)::int, sum(dead)::int, sum(tombstones)::int, sum(lost)::int, "
        "sum(unchanged)::int, sum(control)::int, sum(last_position - first_position + 1)::int "
        "from ops.ledger where kind = 'kafka' group by feed",
    )
    assert {row[0]: row[1:5] for row in ledger} == expected
    assert {row[5:] for row in ledger} == {(0, 0, 0, RECORDS[feed]) for feed in FEEDS}
    for feed, (_, landed, dead, _) in expected.items():
        assert ask(settings, f"select count(*)::int from {feed}") == [(landed,)]
        assert ask(settings, f"select count(*)::int from ops.dead_letters where feed = '{feed}'") == [(dead,)]


def test_every_bad_record_is_set_aside_with_its_bytes(sampled: tuple[Settings, RunReport], sample_folder: Path) -> None:
    for feed in FEEDS:
        dead = Counter(
            bytes(value)
            for (value,) in ask(sampled[0], f"select raw_value from ops.dead_letters where feed = '{feed}'")
        )
        sent = read_jsonl(sample_folder / feed / "sample.jsonl")
        assert dead == Counter(message.value for message in sent if message.expected == "dead")


def test_daily_revenue_equals_the_independent_computation(
    sampled: tuple[Settings, RunReport], marks: dict[str, Counter[str]], sample_folder: Path
) -> None:
    transactions, dead, accounting = make_expected.settle(
        sample_folder / TRANSACTIONS, make_expected.transaction, "transaction_id"
    )
    counts = marks[TRANSACTIONS]
    assert [(a["landed"], a["dead"], a["tombstones"]) for a in accounting] == [
        (counts["landed"], counts["dead"], counts["tombstone"])
    ]
    assert len(dead) == counts["dead"]
    expected = keyed_revenue(make_expected.daily_revenue(transactions))
    assert len(expected) > 100
    assert revenue_of(sampled[0]) == expected
    states = ask(
        sampled[0],
        "select status, currency_code, count(*)::int, sum(amount_minor)::bigint from marts.fct_transactions "
        "group by 1, 2",
    )
    totals: dict[tuple[str, str], list[int]] = {}
    for row in transactions:
        total = totals.setdefault((row["status"], row["currency_code"]), [0, 0])
        total[0] += 1
        total[1] += row["amount_minor"]
    assert {row[:2]: list(row[2:]) for row in states} == totals


def test_the_run_was_built_tested_fresh_and_documented(sampled: tuple[Settings, RunReport]) -> None:
    settings, report = sampled
    assert report.build is not None
    assert report.freshness is not None
    assert (report.build.failures, report.build.warnings, report.freshness.failures) == ((), (), ())
    assert report.docs is not None
    assert report.docs.is_relative_to(settings.project_dir)
    assert report.docs.stat().st_size > 100_000
    steps = ask(settings, "select step, outcome, count(*)::int from ops.run_steps group by 1, 2 order by 1")
    assert steps == [
        (step, "success", 3 if step == "ingest" else 1) for step in ("build", "docs", "freshness", "ingest")
    ]
    # Its models are in the history, and it ended with a tick.
    recorded = ask(settings, "select kind, status, count(*)::int from ops.run_nodes group by 1, 2 order by 1")
    assert recorded == [(kind, "success", report.build.counts[kind]) for kind in ("model", "seed")]
    ages = dict(ask(settings, "select table_name, age is not null from ops.table_ages"))
    assert set(ages) >= {*FEEDS, "raw_fx.daily_rates", "marts.rpt_finance__daily_revenue"}
    assert all(ages.values())
    reconciled = ask(
        settings,
        "select feed, bool_and(adds_up), sum(offered) = sum(landed + dead + tombstones + unchanged), "
        "sum(landed) = sum(raw_rows), sum(raw_rows) = sum(staged_rows), sum(dead) = sum(dead_letter_rows) "
        "from audit.audit_reconciliation group by feed order by feed",
    )
    assert reconciled == [(feed, True, True, True, True, True) for feed in ("raw_fx.daily_rates", *FEEDS)]


def test_a_second_run_lands_nothing_and_changes_no_mart_row(sampled: tuple[Settings, RunReport]) -> None:
    settings, _ = sampled
    names = [row[0] for row in ask(settings, "select tablename from pg_tables where schemaname = 'marts' order by 1")]
    assert {"fct_transactions", "rpt_finance__daily_revenue", "dim_users", "dim_merchants"} <= set(names)

    def snapshot() -> list[list[tuple]]:
        # The transaction that wrote a row and its place: a row written again with the same values shows.
        return [ask(settings, f"select xmin::text, ctid::text from marts.{name} order by 2") for name in names]

    before = snapshot()
    loads = ask(settings, "select feed, load_id from ops.loads order by 1, 2")
    # As if somebody had begun to build since; or the models would be left alone.
    assert ask(settings, "delete from ops.standing returning 1") == [(1,)]
    again = run_all(settings, Reporter(quiet=True))
    assert again.build is not None
    assert again.build.stands_since is None
    assert [(one.landed, one.dead, one.loads) for one in again.landings] == [(0, 0, [])] * 3
    assert ask(settings, "select feed, load_id from ops.loads order by 1, 2") == loads
    assert snapshot() == before


def test_models_that_stand_are_left_alone(sampled: tuple[Settings, RunReport], tmp_path: Path) -> None:
    settings, first = sampled
    run_all(settings, Reporter(quiet=True))
    again = run_all(settings, Reporter(quiet=True))
    assert first.build is not None
    assert again.build is not None
    assert again.build.stands_since is not None
    assert again.build.counts == first.build.counts
    assert again.freshness is not None
    assert again.freshness.counts["source"] > 0
    assert again.docs is not None
    assert again.docs.is_file()

    def stands(of: Settings = settings) -> bool:
        connection = connect(of, purpose="test")
        connection.autocommit = True
        try:
            return find_standing(connection, take_inputs(of, connection)) is not None
        finally:
            connection.close()

    assert stands()
    # Each thing a build depends on, changed; the twin of each is that it stands before and after.
    copy = replace(settings, project_dir=tmp_path / "project")
    ignored = shutil.ignore_patterns("target", "logs", ".*")
    for folder in ("models", "macros", "seeds", "tests/dbt"):
        shutil.copytree(settings.project_dir / folder, copy.project_dir / folder, ignore=ignored)
    for name in ("dbt_project.yml", "profiles.yml"):
        shutil.copy(settings.project_dir / name, copy.project_dir)
    assert stands(copy)
    model = next(copy.project_dir.rglob("fct_transactions.sql"))
    text = model.read_text()
    model.write_text(text + "-- changed")
    assert not stands(copy)
    model.write_text(text)
    assert stands(copy)
    (copy.project_dir / "seeds" / "another.csv").write_text("a\n1\n")
    assert not stands(copy)
    assert not stands(settings.with_env(WAREHOUSE_SCHEMA="other"))
    assert stands()
    # A load, a relation that is gone, and somebody else's build.
    unguarded = "alter table raw_fx._dlt_loads disable trigger _guard_commit; {}; " + (
        "alter table raw_fx._dlt_loads enable trigger _guard_commit; select 1"
    )
    load = "insert into raw_fx._dlt_loads (load_id, schema_name, status, inserted_at) values ('9', 'x', 0, now())"
    ask(settings, unguarded.format(load))
    assert not stands()
    ask(settings, "delete from raw_fx._dlt_loads where load_id = '9' returning 1")
    assert stands()
    ask(settings, "do $$ begin alter table marts.dim_dates rename to away; "
        "create table marts.dim_dates as table marts.away; end $$; select 1")  # fmt: skip
    assert not stands()
    ask(settings, "drop table marts.dim_dates; alter table marts.away rename to dim_dates; select 1")
    assert stands()
    transform.run_dbt(settings, ["test", "--select", "dim_dates"])
    assert stands()
    transform.run_dbt(settings, ["run", "--select", "dim_dates"])
    assert not stands()


# --- fixtures ---------------------------------------------------------------------------------------------------------


def expected_rows(path: str) -> list[dict[str, str]]:
    with (FIXTURES / path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def log_of(area: str) -> list[tuple[str, int]]:
    """(file, line) by offset: all files of an area are one log, in the order of their names."""
    return [
        (path.name, line)
        for path in sorted((FIXTURES / area / "raw").glob("*.jsonl"))
        for line, _ in enumerate(read_jsonl(path), start=1)
    ]


@pytest.fixture(scope="module")
def fixtures(new_warehouse: Callable[[], Settings]) -> Settings:
    """Both logs in partition 0 of their topics, landed, and everything built from them."""
    settings = new_warehouse()
    feeds = {feed.name: feed for feed in prepare(settings)}
    for area, name in (("payments", TRANSACTIONS), ("users", USER_EVENTS)):
        origin = feeds[name].origin
        assert isinstance(origin, KafkaOrigin)
        feed = replace(feeds[name], origin=replace(origin, topic=f"fixtures_{uuid.uuid4().hex[:8]}"))
        _send_log(settings, feed, area)
        landing = land_feed(settings, feed)
        assert landing.offered == len(log_of(area))
    transform.build(settings)
    return settings


def _send_log(settings: Settings, feed: FeedSpec, area: str) -> None:
    assert isinstance(feed.origin, KafkaOrigin)
    producer = Producer(
        {
            "bootstrap.servers": settings.kafka_bootstrap,
            "broker.address.family": "v4",
            "message.max.bytes": 4_000_000,
            "compression.type": "lz4",
        }
    )
    for path in sorted((FIXTURES / area / "raw").glob("*.jsonl")):
        for message in read_jsonl(path):
            producer.produce(
                feed.origin.topic,
                key=message.key,
                value=message.value,
                timestamp=message.timestamp_ms,
                headers=list(message.headers),
                partition=0,
            )
    assert producer.flush(30) == 0


AREAS = {
    "payments": (
        TRANSACTIONS,
        "staging.stg_payments__transactions",
        "normalised_transactions.csv",
    ),
    "users": (USER_EVENTS, "staging.stg_users__events", "deduplicated_user_events.csv"),
}


@pytest.mark.parametrize("area", AREAS)
def test_staging_is_what_the_fixtures_expect(fixtures: Settings, area: str) -> None:
    _, relation, name = AREAS[area]
    expected = expected_rows(f"{area}/expected/{name}")
    columns = [column for column in expected[0] if column not in ("events", "file", "line")]
    rendered = ", ".join(
        f"to_char({c} at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')" if c == "occurred_at" else f"{c}::text"
        for c in columns
    )
    log = log_of(area)
    found = []
    for *cells, events, offset in ask(
        fixtures, f"select {rendered}, event_count::text, _kafka_offset from {relation} order by 1"
    ):
        file, line = log[offset]
        values = [r"\N" if cell is None else cell for cell in cells]
        found.append(dict(zip(expected[0], [*values, events, file, str(line)], strict=True)))
    assert found == sorted(expected, key=lambda row: next(iter(row.values())))


def test_daily_revenue_is_what_the_fixtures_expect(fixtures: Settings) -> None:
    expected = keyed_revenue(expected_rows("payments/expected/daily_revenue.csv"))
    assert expected
    assert revenue_of(fixtures) == expected


@pytest.mark.parametrize("area", AREAS)
def test_dead_letters_are_what_the_fixtures_expect(fixtures: Settings, area: str) -> None:
    feed = AREAS[area][0]
    log = log_of(area)
    expected = {
        (row["file"], int(row["line"])): (row["reason"], row["field"])
        for row in expected_rows(f"{area}/expected/dead_letters.csv")
    }
    found = {}
    for offset, reason, path in ask(
        fixtures, f"select kafka_offset, reason, path from ops.dead_letters where feed = '{feed}'"
    ):
        # The expectation names the field, the warehouse the path to the value inside it.
        field = re.split(r"[.\[]", path.removeprefix("$").removeprefix("."))[0]
        found[log[offset]] = (reason, field)
    assert found == expected


@pytest.mark.parametrize("area", AREAS)
def test_the_account_of_each_file_is_what_the_fixtures_expect(fixtures: Settings, area: str) -> None:
    feed, *_ = AREAS[area]
    log = log_of(area)
    offered = Counter(file for file, _ in log)
    landed = Counter(log[offset][0] for (offset,) in ask(fixtures, f"select _kafka_offset from {feed}"))
    dead = Counter(
        log[offset][0]
        for (offset,) in ask(fixtures, f"select kafka_offset from ops.dead_letters where feed = '{feed}'")
    )
    expected = {
        row["file"]: (int(row["offered"]), int(row["landed"]), int(row["dead"]), int(row["tombstones"]))
        for row in expected_rows(f"{area}/expected/accounting.csv")
    }
    assert {f: (n, landed[f], dead[f], n - landed[f] - dead[f]) for f, n in offered.items()} == expected
    ((tombstones,),) = ask(fixtures, f"select sum(tombstones)::int from ops.ledger where feed = '{feed}'")
    assert tombstones == sum(counts[3] for counts in expected.values())


def test_twin_a_cent_more_in_one_record_is_seen(fixtures: Settings, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(FIXTURES / "payments" / "raw", raw)
    valid = raw / "valid.jsonl"
    text = valid.read_text()
    assert '\\"amount\\": 1.07,' in text
    valid.write_text(text.replace('\\"amount\\": 1.07,', '\\"amount\\": 1.08,', 1))
    transactions, *_ = make_expected.settle(raw, make_expected.transaction, "transaction_id")
    changed, found = keyed_revenue(make_expected.daily_revenue(transactions)), revenue_of(fixtures)
    assert {key: minor - found[key][1] for key, (_, minor, _) in changed.items() if minor != found[key][1]} == {
        ("2026-01-06", "USD", "US"): 1
    }

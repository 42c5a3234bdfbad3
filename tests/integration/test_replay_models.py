"""Which days of which models a replay changes: told before, done to those alone, and the same as a full refresh.

`records on the embedded broker and API -> land -> dbt -> replay`, in a copy of the project. What really changed is
found here by comparing every row of every model before and after, knowing nothing of how a forecast is made.
"""

import datetime as dt
import json
import re
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ingestion import rest
from ingestion.errors import ConfigurationError, DataError
from ingestion.feeds import FeedSpec, load_feeds
from ingestion.landing import land_feed
from ingestion.replay import Selection
from ingestion.replay_window import OffsetWindow, TimeWindow
from ingestion.settings import Settings, load_settings
from orchestration import forecast, transform
from orchestration.backfill import DayRange, plan_backfill, run_backfill
from orchestration.console import Reporter
from orchestration.forecast import ModelDays
from orchestration.replay import Rebuild, build_downstream, forecast_models, recording, replay_letters, replay_source
from orchestration.run import prepare
from orchestration.sample.rates import is_publishing_day
from orchestration.sample.rates_api import RatesServer, serving
from tests.harness.models import assert_same_rows
from tests.harness.project_copy import copy_project, run_warehouse
from tests.harness.records import payment

pytestmark = pytest.mark.long

PAYMENTS, USERS, RATES = "raw_payments.transaction_created", "raw_users.user_events", "raw_fx.daily_rates"
TODAY = dt.datetime.now(dt.UTC).date()

# Model -> the column of its day, as this test knows it.
DAYS = {
    "staging.stg_payments__transactions": "occurred_date",
    "staging.stg_users__events": "(occurred_at at time zone 'UTC')::date",
    "staging.stg_fx__daily_rates": "rate_date",
    "intermediate.int_fx__daily_rates_filled": "rate_date",
    "intermediate.int_payments__transactions_converted": "occurred_date",
    "intermediate.int_payments__daily_totals": "occurred_date",
    "marts.fct_transactions": "occurred_date",
    "marts.rpt_finance__daily_revenue": "revenue_date",
}
DAYLESS = (
    "intermediate.int_users__latest",
    "intermediate.int_payments__merchant_totals",
    "intermediate.int_payments__user_totals",
    "marts.dim_merchants",
    "marts.dim_users",
)

Query = Callable[..., list[tuple]]
Send = Callable[..., None]
Days = dict[str, set[dt.date]]


def a_friday() -> dt.date:
    """One with a weekend without rates behind it, and three weeks before today."""
    day = TODAY - dt.timedelta(days=21)
    while day.weekday() != 4 or not is_publishing_day(day) or not is_publishing_day(day + dt.timedelta(days=3)):
        day -= dt.timedelta(days=1)
    return day


FRIDAY = a_friday()


def day(number: int) -> dt.date:
    """Day 0 is the Friday."""
    return FRIDAY + dt.timedelta(days=number)


def noon(number: int) -> str:
    return f"{day(number)}T12:00:00Z"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    copied = copy_project(tmp_path / "project")
    for declaration in copied.glob("models/staging/*/_*__sources.yml"):
        text = re.sub(r"(topic: \w+)", rf"\1_{uuid.uuid4().hex[:8]}", declaration.read_text())
        text = re.sub(r"start: 2025-01-01", f"start: {day(-30)}", text)
        declaration.write_text(re.sub(r"dead_letter_budget: .*", "dead_letter_budget: {share: 1}", text))
    return copied


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RatesServer]:
    monkeypatch.setattr(rest, "BACKOFF_FACTOR_S", 0.01)
    with serving(7, today=lambda: TODAY) as running:
        yield running


@pytest.fixture
def settings(warehouse: Settings, project: Path, server: RatesServer) -> Settings:
    own = load_settings(project)
    return replace(warehouse, project_dir=own.project_dir, env={**warehouse.env, "FX_API_BASE": server.url}).with_env(
        WAREHOUSE_EMBEDDED="kafka"
    )


@dataclass
class Warehouse:
    """A warehouse under test: land, build, replay, and look at every row of every model."""

    settings: Settings
    query: Query

    def feed(self, name: str) -> FeedSpec:
        return {feed.name: feed for feed in load_feeds(self.settings)}[name]

    def declare(self, old: str, new: str) -> None:
        (path,) = self.settings.project_dir.glob("models/staging/payments/_*__sources.yml")
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def land(self, *names: str) -> None:
        for name in names:
            land_feed(self.settings, self.feed(name))

    def dbt(self, *arguments: str, schema: str = "analytics") -> None:
        """A plain dbt command, which has to succeed."""
        # A folder each: dbt parses everything anew where what it parsed before was of another schema.
        folder = [] if schema == "analytics" else ["--target-path", f"target-{schema}"]
        settings = self.settings.with_env(WAREHOUSE_SCHEMA=schema)
        report = transform.summarise(transform.run_dbt(settings, [*arguments, *folder]))
        assert not report.failures, report.failures

    def forecast(self, name: str, window: TimeWindow | OffsetWindow | None = None) -> list[ModelDays]:
        coming: list[Any] = []
        self._replay(name, window, None, coming)
        return forecast_models(self.settings, coming, Reporter(quiet=True))

    def replay(self, name: str, window: TimeWindow | OffsetWindow | None = None) -> Rebuild:
        with recording(self.settings, "replay", True) as run:
            assert run is not None
            return build_downstream(self.settings, [self._replay(name, window, run, None)], run, Reporter(quiet=True))

    def _replay(self, name: str, window: Any, run: Any, coming: Any) -> Any:
        options = {"wait_s": 1.0, "coming": coming}
        reporter = Reporter(quiet=True)
        if window is not None:
            return replay_source(self.settings, self.feed(name), window, run, reporter, **options)
        (replayed,) = replay_letters(self.settings, [self.feed(name)], Selection(), run, reporter, **options)
        return replayed

    def contents(self) -> dict[tuple[str, dt.date | None], Counter[str]]:
        """(model, day) -> its rows as text."""
        found = defaultdict(Counter)
        for model in (*DAYS, *DAYLESS):
            for when, content in self.query(f"select {DAYS.get(model, 'null::date')}, t::text from {model} t"):
                found[model, when][content] += 1
        return found

    def versions(self) -> dict[tuple[str, dt.date | None], set[tuple[str, str]]]:
        """(model, day) -> where its rows lie and who wrote them."""
        found = defaultdict(set)
        for model in DAYS:
            for when, *version in self.query(f"select {DAYS[model]}, ctid::text, xmin::text from {model} t"):
                found[model, when].add(tuple(version))
        return found

    def relations(self) -> list[tuple]:
        """Everything in the catalog with columns."""
        return self.query("select oid, relname, relnatts from pg_class order by 1")


@pytest.fixture
def stage(settings: Settings, query: Query) -> Warehouse:
    return Warehouse(settings, query)


def told(models: list[ModelDays]) -> Days:
    """Model -> days, of those that have some."""
    return {one.model.name: set(one.days) for one in models if one.days}


def changed_days(before: dict, after: dict) -> Days:
    changed: Days = {model.partition(".")[2]: set() for model in DAYS}
    for model, when in before.keys() | after.keys():
        if model in DAYS and before.get((model, when)) != after.get((model, when)):
            changed[model.partition(".")[2]].add(when)
    return {model: days for model, days in changed.items() if days}


def assert_covered(forecast: Days, changed: Days) -> None:
    """Every day that changed was told."""
    for model, days in changed.items():
        assert days <= forecast.get(model, set()), f"{model}: not told of {sorted(days - forecast.get(model, set()))}"


def assert_same_as_full_refresh(stage: Warehouse) -> None:
    for command in (("seed",), ("run", "--full-refresh")):
        stage.dbt(*command, schema="full")
    relations = [(schema, table) for schema, _, table in (model.partition(".") for model in (*DAYS, *DAYLESS))]
    assert_same_rows(stage.settings.require("WAREHOUSE_DSN", "the test has one"), relations, "full")


def replay_and_compare(
    stage: Warehouse, name: str, window: TimeWindow | OffsetWindow | None = None
) -> tuple[Days, Days]:
    """Forecast and replay; (told, changed) after checking everything about them."""
    before, versions, relations = stage.contents(), stage.versions(), stage.relations()
    foreseen = told(stage.forecast(name, window))
    assert (stage.contents(), stage.versions()) == (before, versions), "a dry run changed a model"
    assert stage.relations() == relations
    rebuild = stage.replay(name, window)
    after = stage.contents()
    changed = changed_days(before, after)
    assert_covered(foreseen, changed)
    assert told(rebuild.models) == changed
    assert rebuild.unforeseen == []
    for place, rows in stage.versions().items():
        if place[1] not in changed.get(place[0].partition(".")[2], set()):
            assert rows == versions[place], f"{place} was written and holds what it held"
    again = stage.replay(name, window) if window is not None else Rebuild([], [])
    assert again.models == []
    assert stage.contents() == after
    return foreseen, changed


BYSTANDERS = range(10)
CONTRACT = ("[USD, EUR, GBP, JPY, CAD]", "[USD, EUR, GBP, JPY, CAD, CHF]")


@pytest.fixture
def built(stage: Warehouse, send: Send) -> Warehouse:
    """Landed and built: rates, and a payment in pounds a day (offsets 0 to 9)."""
    prepare(stage.settings)
    send(stage.feed(PAYMENTS), [(None, payment(currency="GBP", created_at=noon(n))) for n in BYSTANDERS], 0)
    stage.land(PAYMENTS, RATES)
    stage.dbt("seed")
    stage.dbt("run")
    return stage


@pytest.mark.timeout(600)
def test_new_rows_change_the_days_they_leave_and_the_days_they_come_to(
    built: Warehouse, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    stays, moves, fails = (str(uuid.uuid4()) for _ in range(3))
    francs = {"currency": "CHF"}  # which the contract does not know yet
    records = [
        payment(transaction_id=stays, created_at=noon(3)),
        payment(transaction_id=moves, created_at=noon(2), status="pending"),
        payment(**francs, created_at=noon(4)),
        payment(**francs, transaction_id=moves, created_at=noon(5)),
        payment(**francs, transaction_id=stays, created_at=noon(1)),
        payment(**francs, transaction_id=fails, created_at=noon(7), status="failed"),
    ]
    send(built.feed(PAYMENTS), [(None, record) for record in records], 0)
    built.land(PAYMENTS)
    built.dbt("run")
    # Landed and not built: the build takes it in with the replayed rows.
    send(built.feed(PAYMENTS), [(None, payment(created_at=noon(9)))], 0)
    built.land(PAYMENTS)
    built.declare(*CONTRACT)

    whole = forecast.render_changes
    with monkeypatch.context() as patch:
        patch.setattr(forecast, "render_changes", lambda *parts: whole(*parts).replace("-1 from", "0 from"))
        blind = told(built.forecast(PAYMENTS))

    foreseen, changed = replay_and_compare(built, PAYMENTS)
    rows = {day(n) for n in (2, 3, 4, 5, 7, 9)}
    assert changed == {
        "stg_payments__transactions": rows,
        "int_payments__transactions_converted": rows,
        "int_payments__daily_totals": rows,
        "fct_transactions": rows,
        # Pending and failed ones are no revenue, and an older event changes none.
        "rpt_finance__daily_revenue": {day(4), day(5), day(9)},
    }
    assert foreseen == changed
    assert_same_as_full_refresh(built)

    # The twins: a forecast that does not look at what rows were before, and one that leaves out any day.
    with pytest.raises(AssertionError, match=re.escape(f"not told of [{day(2)!r}]")):
        assert_covered(blind, changed)
    for model in changed:
        for left_out in changed[model]:
            with pytest.raises(AssertionError, match=re.escape(f"not told of [{left_out!r}]")):
                assert_covered({**foreseen, model: foreseen[model] - {left_out}}, changed)


def lose(stage: Warehouse, *offsets: int) -> None:
    """Rows of the payments that are gone from the raw table, as after a careless delete."""
    gone = stage.query(f"delete from {PAYMENTS} where _kafka_offset = any(%s) returning 1", list(offsets))
    assert len(gone) == len(offsets)


ALL = OffsetWindow(0, 0, 100)


@pytest.mark.timeout(600)
def test_rows_that_are_back_are_counted_once(built: Warehouse, send: Send) -> None:
    """Whether or not staging had taken them in before they were gone; by a plain build, too."""
    # One transaction in three events, offsets 10 to 12, a load each.
    one = {"transaction_id": str(uuid.uuid4()), "currency": "GBP"}
    for number, status in ((1, "pending"), (3, "pending"), (5, "completed")):
        send(built.feed(PAYMENTS), [(None, payment(**one, created_at=noon(number), status=status))], 0)
        built.land(PAYMENTS)
    # Never taken in.
    lose(built, 12)
    built.dbt("run")
    foreseen, changed = replay_and_compare(built, PAYMENTS, ALL)
    assert foreseen == changed
    assert changed["fct_transactions"] == {day(3), day(5)}

    # Taken in: the rows change by the load they came back with, and nothing of the report does.
    for gone, numbers in (([6, 10], [6, 5]), ([0, 11, 12], [0, 5])):
        lose(built, *gone)
        foreseen, changed = replay_and_compare(built, PAYMENTS, ALL)
        assert foreseen == changed
        assert changed == {
            model: {day(n) for n in numbers}
            for model in (
                "stg_payments__transactions",
                "int_payments__transactions_converted",
                "int_payments__daily_totals",
                "fct_transactions",
            )
        }
    assert_same_as_full_refresh(built)

    # Some taken in, some forgotten by a full refresh.
    lose(built, 4, 7, 10)
    built.dbt("run", "--full-refresh", "--select", "stg_payments__transactions")
    lose(built, 8, 11)
    with recording(built.settings, "replay", True) as run:
        built._replay(PAYMENTS, ALL, run, None)
    built.dbt("build", "--select", f"source:{PAYMENTS}+")
    assert_same_as_full_refresh(built)

    # The twin: nothing is made of loads that brought rows back.
    macro = built.settings.project_dir / "macros" / "restored_loads.sql"
    macro.write_text("{% macro restored_loads(source_name, table_name) %}{{ return([]) }}{% endmacro %}")
    lose(built, 3)
    with pytest.raises(DataError, match="int_payments__daily_totals__conserves_events"):
        built.replay(PAYMENTS, ALL)


def user_event(number: int, **changes: object) -> bytes:
    event = {
        "event_id": str(uuid.uuid4()), "event_type": "signed_in", "user_id": "usr_123456", "country": "DE",
        "occurred_at": f"{day(number)}T23:30:00Z",
    }  # fmt: skip
    return json.dumps({**event, **changes}).encode()


@pytest.mark.timeout(600)
def test_rates_change_the_days_they_stand_on_and_moments_their_day_in_utc(
    built: Warehouse, server: RatesServer, send: Send
) -> None:
    # A Friday's pound, whose weekend follows; and a currency nobody pays in.
    server.book.correct(FRIDAY, "GBP", "0.5")
    server.book.correct(day(5), "SEK", "12")
    # And one that is set aside, until the contract is another.
    server.book.correct(day(3), "JPY", "-1")
    window = TimeWindow(*(dt.datetime.combine(day(n), dt.time(), dt.UTC) for n in (-3, 9)))
    foreseen, changed = replay_and_compare(built, RATES, window)
    weekend = {day(0), day(1), day(2)}
    assert changed == {
        "stg_fx__daily_rates": {day(0), day(5)},
        "int_fx__daily_rates_filled": weekend | {day(5)},
        "int_payments__transactions_converted": weekend,
        "int_payments__daily_totals": weekend,
        "fct_transactions": weekend,
        "rpt_finance__daily_revenue": weekend,
    }
    assert foreseen == changed

    # A dead letter and a correction: two loads.
    server.book.correct(day(4), "SEK", "13")
    (path,) = built.settings.project_dir.glob("models/staging/fx/_*__sources.yml")
    path.write_text(path.read_text().replace("{min_value: 0,", "{min_value: -10,"))
    foreseen, changed = replay_and_compare(built, RATES, window)
    assert changed == {model: {day(3), day(4)} for model in ("stg_fx__daily_rates", "int_fx__daily_rates_filled")}
    assert foreseen == changed

    send(built.feed(USERS), [(None, user_event(n)) for n in (0, 1)], 0)
    send(built.feed(USERS), [(None, user_event(1, country="XX", occurred_at=f"{day(1)}T23:30:00-02:00"))], 0)
    built.land(USERS)
    built.dbt("run")
    (path,) = built.settings.project_dir.glob("models/staging/users/_*__sources.yml")
    path.write_text(re.sub(r" +data_tests:\n +- relationships:\n.*\n", "", path.read_text()))
    foreseen, changed = replay_and_compare(built, USERS)
    assert changed == {"stg_users__events": {day(2)}}
    assert foreseen == changed
    assert_same_as_full_refresh(built)


def test_what_cannot_be_told_is_said(stage: Warehouse, send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that were never built, and what lands between the forecast and the build."""
    feed = stage.feed(PAYMENTS)
    prepare(stage.settings)
    send(feed, [(None, payment(currency="CHF"))], 0)
    stage.land(PAYMENTS)
    stage.declare(*CONTRACT)
    with pytest.raises(
        ConfigurationError, match=r"ever built: stg_payments__transactions, .*rpt_finance__daily_revenue"
    ) as failed:
        stage.forecast(PAYMENTS)
    assert "dbt build" in failed.value.hint

    stage.dbt("seed")
    stage.dbt("run")

    def forecast_and_land(*arguments: Any) -> list[ModelDays]:
        told = forecast.forecast_days(*arguments)
        send(feed, [(None, payment(created_at=noon(8)))], 0)
        stage.land(PAYMENTS)
        return told

    monkeypatch.setattr("orchestration.replay.forecast_days", forecast_and_land)
    rebuild = stage.replay(PAYMENTS)
    assert set(rebuild.unforeseen) == {
        "stg_payments__transactions",
        "int_payments__transactions_converted",
        "int_payments__daily_totals",
        "fct_transactions",
        "rpt_finance__daily_revenue",
    }


@pytest.mark.timeout(600)
def test_the_commands_say_which_days(built: Warehouse, send: Send) -> None:
    names = ("WAREHOUSE_DSN", "KAFKA_BOOTSTRAP_SERVERS", "KAFKA_CLUSTER_INCARNATION", "FX_API_BASE")
    own = {name: built.settings.env[name] for name in names}
    own |= {"WAREHOUSE_HOME": str(built.settings.home), "WAREHOUSE_EMBEDDED": "kafka"}

    def ask(*arguments: str) -> str:
        result = run_warehouse(built.settings.project_dir, *arguments, **own)
        assert result.returncode == 0, result.stderr
        return result.stdout

    send(built.feed(PAYMENTS), [(None, payment(created_at=noon(n), currency="CHF")) for n in (3, 4, 7)], 0)
    built.land(PAYMENTS)
    built.declare(*CONTRACT)
    command = ("dead-letters", "replay", "-q", "--with-models")
    dry = ask(*command)
    days = f"{day(3)} .. {day(4)}, {day(7)} (3 days)"
    assert re.search(rf"^model +days that may change\nstg_payments__transactions +{re.escape(days)}$", dry, re.M), dry
    assert re.search(rf"^rpt_finance__daily_revenue +{re.escape(days)}$", dry, re.M), dry
    assert "without days, would be built too: " in dry
    assert dry.endswith("Nothing was changed; --apply does it.\n")
    done = json.loads(ask(*command, "--json", "--apply"))
    assert done["unforeseen"] == []
    three = [day(n).isoformat() for n in (3, 4, 7)]
    assert {"model": "fct_transactions", "day_column": "occurred_date", "days": three} in done["models"]
    assert {"model": "dim_users", "day_column": None, "days": None} in done["models"]

    lose(built, 4)
    window = ("replay", PAYMENTS, "-q", "--partition", "0", "--from-offset", "0", "--to-offset", "99", "--with-models")
    foreseen = json.loads(ask(*window, "--json"))
    assert {"model": "fct_transactions", "day_column": "occurred_date", "days": three[1:2]} in foreseen["models"]
    applied = ask(*window, "--apply")
    assert re.search(rf"^model +days changed\nstg_payments__transactions +{day(4)} \(1 day\)$", applied, re.M), applied
    assert re.search(r"^rpt_finance__daily_revenue +none$", applied, re.M), applied
    assert ask(*window, "--apply").endswith("No model changes.\n")


def test_a_backfill_plans_first_and_lands_the_days_that_miss_something(built: Warehouse, query: Query) -> None:
    feed, quiet = built.feed(RATES), Reporter(quiet=True)
    days = DayRange(day(-7), day(5))

    def rates() -> Counter[dt.date]:
        return Counter(when for (when,) in query("select rate_date from raw_fx.daily_rates"))

    before = rates()
    # The Friday and the Monday behind it: two days that do not follow each other.
    query("delete from raw_fx.daily_rates where rate_date = any(%s)", [day(0), day(3)])

    plan = plan_backfill(built.settings, feed, days, quiet)
    # One request asks for all of these days, and says of all of them together that something is missing.
    assert plan.stretches == (DayRange(day(-7), day(-1)), DayRange(day(0), day(5)))
    assert plan.found.landed == before[day(0)] + before[day(3)]
    assert told(list(plan.models))
    assert day(0) not in rates()

    with recording(built.settings, "backfill", True) as run:
        assert run is not None
        done = run_backfill(built.settings, feed, plan, run, quiet)
    assert len(done) == 2
    assert rates() == before
    # What landed stays as it is: nothing is missing any more.
    assert plan_backfill(built.settings, feed, days, quiet).stretches == ()

"""The figures of the service level against an independent count, and the run history they come from.

A day of 200 runs is played with a clock of the test's own (tests/harness/scripted_day.py); what the views, the page and
the metrics say is compared with what was scripted and with numpy on the raw run table.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import numpy
import psycopg2.extensions
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ingestion.database import connect
from ingestion.ddl import ensure_schema
from ingestion.feeds import load_feeds
from ingestion.settings import Settings
from orchestration import history, plots
from orchestration.figures import Curves, Figures, fetch_curves, fetch_figures
from orchestration.history import recorded_run, trim_history
from orchestration.metrics import render_metrics
from orchestration.report import render_report
from orchestration.run import prepare
from orchestration.transform import NodeResult
from tests.harness.models import Dbt
from tests.harness.scripted_day import FACTS, RUNS, Clock, Day, play_day

Connection = psycopg2.extensions.connection
Query = Callable[..., list[tuple]]

QUANTILES = {"p50": 50, "p95": 95, "p99": 99}


class Tables(HTMLParser):
    """(name of a line, name of a column) -> the exact figure the page has there."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.figures: dict[tuple[str, str], float] = {}
        self._line = self._column = ""
        self._in_name = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "th" and found.get("scope") == "row":
            self._in_name, self._line = True, ""
        elif tag == "td":
            self._column = found["data-name"] or ""
        elif tag == "data":
            self.figures[self._line, self._column] = float(found["value"] or "nan")

    def handle_endtag(self, tag: str) -> None:
        self._in_name = self._in_name and tag != "th"

    def handle_data(self, data: str) -> None:
        if self._in_name:
            self._line += data


def raw_seconds(query: Query) -> dict[tuple[str, str], list[float]]:
    """Run times of what succeeded, by pipeline, from the raw tables and nothing else."""
    found: dict[tuple[str, str], list[float]] = {}
    for kind, name, seconds in query(
        "select 'run', command, extract(epoch from finished_at - started_at)::float8 from ops.runs "
        "where outcome = 'success' union all "
        "select case feed when '' then 'step' else 'feed' end, case feed when '' then step else feed end, "
        "extract(epoch from finished_at - started_at)::float8 from ops.run_steps where outcome = 'success' union all "
        "select kind, node, seconds from ops.run_nodes where status = 'success'"
    ):
        found.setdefault((kind, name), []).append(seconds)
    return found


def require_same(page: Tables, day: Day, query: Query) -> None:
    """The page says what was scripted, and numpy's percentiles on the raw run table."""
    for (kind, name), seconds in raw_seconds(query).items():
        assert sorted(seconds) == pytest.approx(sorted(day.seconds[kind, name]), abs=1e-5), name
        for column, quantile in QUANTILES.items():
            assert page.figures[name, column] == pytest.approx(numpy.percentile(seconds, quantile), abs=1e-9), name
    for (kind, name), runs in day.runs.items():
        assert page.figures[name, "runs"] == runs, name
        assert page.figures[name, "failed in 100"] == pytest.approx(100 * day.failed[kind, name] / runs), name
        if kind != "model":
            assert page.figures[name, "misses"] == day.misses[kind, name], name


def test_a_scripted_day_is_counted_as_it_was_scripted(
    warehouse: Settings, connection: Connection, query: Query, dbt: Dbt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAREHOUSE_CODE_VERSION", "scripted")
    feeds = prepare(warehouse)
    dbt.run("--select", "rpt_ops__*")
    day = play_day(connection, warehouse.project_dir, (datetime.now(UTC) - timedelta(days=1)).date())
    assert query("select count(*), count(distinct started_at::date) from ops.runs") == [(RUNS, 1)]
    assert sum(day.failed["run", name] for name in ("run", "dagster warehouse")) > 10
    assert day.misses == {("feed", "raw_payments.transaction_created"): 2, ("step", "build"): 1}

    def read() -> Figures:
        return fetch_figures(warehouse, feeds, connection)

    figures = read()
    text = render_report(figures, fetch_curves(connection, figures.at), "<scripted>")
    require_self_contained(text)
    assert "<scripted>" not in text
    page = Tables(text)
    require_same(page, day, query)

    # Queues and error budgets, as the last tick and all ticks left them.
    queues = query("select feed, lag_records, open_dead_letters from marts.rpt_ops__queues")
    assert {feed: (lag, dead) for feed, lag, dead in queues} == {
        feed: (lag, day.open_dead_letters[feed]) for feed, lag in day.lag.items()
    }
    for table, left in figures.budgets_left.items():
        assert left == pytest.approx(1 - day.late_ticks[table] / day.ticks / 0.01), table
    assert figures.budgets_left[FACTS] < 0
    # One row per pipeline and day, and the days add up.
    assert dbt("test", "--select", "rpt_ops__*")[0]

    # The same figures for Prometheus.
    families = {one.name: one for one in text_string_to_metric_families(render_metrics(warehouse))}
    runs = {
        (one.labels["pipeline"], one.labels["quantile"]): one.value
        for one in families["warehouse_pipeline_run_seconds"].samples
    }
    assert runs["run", "0.95"] == page.figures["run", "p95"]
    misses = {one.labels["pipeline"]: one.value for one in families["warehouse_pipeline_misses"].samples}
    assert misses["raw_payments.transaction_created"] == 2
    assert misses["build"] == 1

    # The twins: a run that is gone, a run time that was changed, a miss that was overlooked.
    monkeypatch.setattr(plots, "_render", lambda *_, **__: "")  # the text has the figures
    for change in (
        "delete from ops.runs where run_id = (select min(run_id) from ops.runs where outcome = 'success')",
        "update ops.runs set finished_at = finished_at + interval '1 s' where run_id = "
        "(select max(run_id) from ops.runs where outcome = 'success')",
        "delete from ops.table_ages where state = 'error' and hop like 'raw_%'",
    ):
        connection.autocommit = False
        query(change)
        spoiled = Tables(render_report(read(), Curves(), "scripted"))
        with pytest.raises(AssertionError):
            require_same(spoiled, day, query)
        connection.rollback()
        connection.autocommit = True


def require_self_contained(page: str) -> None:
    """No script, no address but the lineage page beside it, no colour but the theme's; plots say what they show."""
    assert re.findall(r'(?:href|src)="([^"#]*)"', page) == ["static_index.html"]
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    pictures = re.findall(r"<svg [^>]*>", page)
    assert len(pictures) > 8
    assert all('role="img" aria-label="' in picture for picture in pictures)
    assert not re.search(r"(fill|stroke): #", page)


# --- the run history --------------------------------------------------------------------------------------------------


@pytest.fixture
def books(connection: Connection, clean_settings: Settings) -> Connection:
    ensure_schema(connection, load_feeds(clean_settings))
    return connection


def test_a_run_without_work_has_a_heartbeat(
    books: Connection, clean_settings: Settings, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "HEARTBEAT_S", 0.01)

    def age_of_heartbeat() -> float:
        ((seconds,),) = query("select extract(epoch from heartbeat_at - started_at)::float8 from ops.runs")
        return seconds

    with recorded_run(books, "run", "manual", clean_settings.project_dir):
        deadline = time.monotonic() + 20
        while age_of_heartbeat() == 0 and time.monotonic() < deadline:
            pass
        assert age_of_heartbeat() > 0


def test_a_killed_run_is_closed_by_the_next(books: Connection, clean_settings: Settings, query: Query) -> None:
    clock = Clock(datetime(2026, 3, 1, tzinfo=UTC))

    @contextmanager
    def killed() -> Iterator[None]:
        """A run of a process that is gone before it could write its end."""
        run = recorded_run(books, "run", "schedule", clean_settings.project_dir, clock=clock)
        with run as going, going.step("build"):
            yield
        query("update ops.runs set outcome = 'running', finished_at = null")
        query("update ops.run_steps set outcome = 'running', finished_at = null")

    with killed():
        pass
    clock.wait(60)
    with recorded_run(books, "run", "schedule", clean_settings.project_dir, clock=clock):
        # Silent for a minute is not dead.
        assert query("select count(*) from ops.runs where outcome = 'running'") == [(2,)]
    clock.wait(600)
    with recorded_run(books, "run", "schedule", clean_settings.project_dir, clock=clock):
        assert query("select outcome, error_class from ops.runs order by started_at") == [
            ("failed", "killed"),
            ("success", None),
            ("running", None),
        ]
    assert query("select outcome, error_class from ops.run_steps") == [("failed", "killed")]


def test_models_are_recorded_and_messages_are_not(books: Connection, clean_settings: Settings, query: Query) -> None:
    nodes = [
        NodeResult("model.payments_warehouse.fct_transactions", "success", "", 1.5, 10),
        NodeResult("seed.payments_warehouse.currencies", "success", "", 0.5, 156),
        NodeResult("model.payments_warehouse.dim_users", "error", "Key (email)=(ada@example.com) exists", 0.1),
        NodeResult("model.payments_warehouse.audit_runs", "success", "", 0.1, -1),
        NodeResult("exposure.payments_warehouse.ops_service_level", "no-op", ""),
        NodeResult("test.payments_warehouse.unique_dim_users", "pass", "", 0.1, failures=0),
        NodeResult("test.payments_warehouse.not_null_dim_users", "fail", "Got 3 results", 0.1, failures=3),
    ]
    with recorded_run(books, "run", "manual", clean_settings.project_dir) as run:
        run.record_nodes(nodes)
        # Only what failed runs again: its second try stands.
        run.record_nodes([replace(nodes[2], status="success", message="", rows=7)])
    assert query("select kind, node, status, rows, failures from ops.run_nodes order by kind, node") == [
        ("model", "audit_runs", "success", None, None),
        ("model", "dim_users", "success", 7, None),
        ("model", "fct_transactions", "success", 10, None),
        ("seed", "currencies", "success", 156, None),
        ("test", "not_null_dim_users", "fail", None, 3),
    ]
    assert not [row for row in query("select r::text from ops.run_nodes as r") if "ada" in row[0]]


def test_the_history_is_cut_off_at_its_retention(books: Connection, clean_settings: Settings, query: Query) -> None:
    start = datetime(2026, 3, 1, tzinfo=UTC)
    for days in range(5):
        at = start + timedelta(days=days)
        with recorded_run(books, "run", "manual", clean_settings.project_dir, clock=Clock(at)) as run:
            run.record_nodes([NodeResult("model.payments_warehouse.dim_users", "success", "")])
        query("insert into ops.table_ages values (%s, 'marts.dim_users', null, null, null, 'unknown', '', '')", at)
        query("insert into ops.queue_depths values (%s, 'raw_users.user_events', 0, 0, null)", at)
    books.autocommit = False
    trim_history(books, timedelta(days=2), start + timedelta(days=4))
    books.autocommit = True
    for table in ("runs", "run_nodes", "table_ages", "queue_depths"):
        assert query(f"select count(*) from ops.{table}") == [(3,)], table


def test_a_retention_of_the_settings_is_kept_by_every_command(warehouse: Settings, query: Query) -> None:
    prepare(warehouse)
    connection: Any = connect(warehouse)
    long_ago = datetime.now(UTC) - timedelta(days=11)
    with recorded_run(connection, "run", "manual", warehouse.project_dir, clock=Clock(long_ago)):
        pass
    connection.close()
    prepare(warehouse.with_env(WAREHOUSE_HISTORY_DAYS="12"))
    assert query("select count(*) from ops.runs") == [(1,)]
    prepare(warehouse.with_env(WAREHOUSE_HISTORY_DAYS="10"))
    assert query("select count(*) from ops.runs") == [(0,)]

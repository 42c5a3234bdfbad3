"""Alerts from what is wrong in the warehouse to receivers: once, to the end, at least once delivered, nothing private.

On a clock of the test's own and a local receiver; the runs are recorded as the command line records them.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest

from ingestion import ledger
from ingestion.database import connect
from ingestion.ddl import ensure_schema
from ingestion.errors import (
    ConfigurationError,
    DataError,
    FeedBusyError,
    SourceLossError,
    TransientError,
    WarehouseError,
)
from ingestion.feeds import DeadLetterBudget, FeedSpec, load_feeds
from ingestion.settings import Settings
from orchestration import alerts, cli, conditions, transform, watch
from orchestration.ages import TableAge
from orchestration.alerts import Clock, fetch_receiver_states
from orchestration.console import Reporter
from orchestration.history import recorded_run
from orchestration.manifest import keep_manifest
from orchestration.receivers import NAMES, find_receivers
from orchestration.run import ingest
from orchestration.watch import send_test, tick, watched
from tests.harness.alert_receiver import AlertReceiver
from tests.harness.models import USER_EVENTS, RawLog, make_user_events
from tests.harness.project_copy import OWN_SETTINGS, PROJECT, copy_project
from tests.harness.records import payment
from tests.unit.test_receivers import PAGERDUTY_SCHEMA, ROUTING_KEY, SLACK_SCHEMA, WEBHOOK_SCHEMA

PAYMENTS = "raw_payments.transaction_created"
USERS = "raw_users.user_events"
RATES = "raw_fx.daily_rates"
START = datetime(2026, 3, 1, 3, 0, tzinfo=UTC)
CANARY = "canary7f3e"
DOWN = TransientError("Kafka at broker.example:9092 does not answer.")

Connection = psycopg2.extensions.connection
Query = Callable[..., list[tuple]]


class Warehouse:
    """The test's warehouse as a look sees it: a clock, runs recorded on it, receivers."""

    def __init__(self, settings: Settings, connection: Connection, receiver: AlertReceiver) -> None:
        self.settings, self.connection, self.receiver = settings, connection, receiver
        self.now = START
        self.slept = 0.0
        self.ages: list[TableAge] | None = None

    def later(self, **passed: float) -> None:
        self.now += timedelta(**passed)

    def clock(self) -> Clock:
        """Nothing takes time but waiting, and the longest wait is drawn."""
        self.slept = 0.0
        return Clock(self.now, lambda: self.slept, self._sleep, lambda low, high: high)

    def _sleep(self, seconds: float) -> None:
        self.slept += seconds

    def look(self, **options: Any) -> list[tuple[str, str]]:
        """A look -> (event, key) of what changed."""
        seen = tick(self.settings, self.connection, self.now, clock=self.clock(), may_parse=False, **options)
        self.problems = seen.problems
        return [(change.event, change.key) for change in seen.changes]

    def record(
        self,
        outcomes: Mapping[tuple[str, str], WarehouseError | BaseException | None],
        *,
        command: str = "run",
        trigger: str = "schedule",
        nodes: Mapping[str, str] | None = None,
        whole: bool = False,
    ) -> None:
        """A run of a minute with a step per outcome; it fails with the first error."""
        self.later(minutes=1)
        failed = [error for error in outcomes.values() if error is not None]
        with (
            contextlib.suppress(WarehouseError, ValueError, KeyboardInterrupt),
            recorded_run(self.connection, command, trigger, self.settings.project_dir, clock=lambda: self.now) as run,
        ):
            for (step, feed), error in outcomes.items():
                with contextlib.suppress(WarehouseError, ValueError, KeyboardInterrupt), run.step(step, feed):
                    if error is not None:
                        raise error
            if nodes:
                run.record_nodes(
                    [transform.NodeResult(f"test.payments_warehouse.{name}", said, "") for name, said in nodes.items()],
                    whole=whole,
                )
            if failed:
                raise failed[0]

    def told(self) -> list[tuple[str, str]]:
        """(event, key) of what the webhook was told, in order."""
        return [(one["event"], one["incident"]["key"]) for one in self.receiver.documents("/hook")]


@pytest.fixture
def receiver() -> Iterator[AlertReceiver]:
    with AlertReceiver() as running:
        yield running


@pytest.fixture(scope="module")
def shared(services: Settings, server_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A database of the file's, every table made once."""
    name = f"alerts_{os.getpid()}"
    admin = psycopg2.connect(server_dsn)
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute(f"create database {name}")
    dsn = psycopg2.extensions.make_dsn(server_dsn, dbname=name)
    folder = tmp_path_factory.mktemp("alerts")
    settings = replace(
        services.with_env(WAREHOUSE_DSN=dsn), project_dir=copy_project(folder / "project"), home=folder / "home"
    )
    with contextlib.closing(psycopg2.connect(dsn)) as connection:
        ensure_schema(connection, load_feeds(settings))
    yield settings
    with admin.cursor() as cursor:
        cursor.execute(f"drop database {name} with (force)")
    admin.close()


@pytest.fixture
def connection(shared: Settings) -> Iterator[Connection]:
    """To the file's database, with nothing in it."""
    with contextlib.closing(connect(shared)) as opened:
        opened.autocommit = True
        with opened.cursor() as cursor:
            cursor.execute(
                "truncate ops.runs, ops.failing_nodes, ops.incidents, ops.alert_receivers, raw_payments._losses cascade"
            )
            cursor.execute("drop schema if exists audit cascade")
        yield opened


@pytest.fixture
def house(shared: Settings, connection: Connection, receiver: AlertReceiver) -> Warehouse:
    """A warehouse with nothing in it and a webhook."""
    return Warehouse(shared.with_env(WAREHOUSE_ALERT_WEBHOOK_URL=f"{receiver.base}/hook"), connection, receiver)


def with_all_receivers(house: Warehouse) -> None:
    base = house.receiver.base
    house.settings = house.settings.with_env(
        WAREHOUSE_ALERT_SLACK_URL=f"{base}/slack",
        WAREHOUSE_ALERT_PAGERDUTY_KEY=ROUTING_KEY,
        WAREHOUSE_ALERT_PAGERDUTY_URL=base,
    )


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_an_outage_is_one_alert_and_one_resolution_for_each_receiver(house: Warehouse) -> None:
    with_all_receivers(house)
    house.record({("ingest", PAYMENTS): DOWN, ("ingest", USERS): DOWN, ("ingest", RATES): None})
    assert house.look() == [("opened", "run_failed/ingest/kafka")]
    # It goes on, then for one feed only; the other's success does not end it.
    house.record({("ingest", PAYMENTS): DOWN, ("ingest", USERS): DOWN})
    assert house.look() == []
    house.record({("ingest", PAYMENTS): None, ("ingest", USERS): DOWN}, command="ingest")
    assert house.look() == []
    house.record({("ingest", USERS): None}, command="dagster users")
    assert house.look() == [("resolved", "run_failed/ingest/kafka")]
    assert house.look() == []

    opened, resolved = house.receiver.documents("/hook")
    for document in (opened, resolved):
        WEBHOOK_SCHEMA.validate(document)
    assert (opened["event"], resolved["event"]) == ("opened", "resolved")
    assert opened["incident"]["summary"] == f"ingest of {PAYMENTS}, {USERS} failed: transient"
    assert opened["incident"]["details"]["message"] == DOWN.message
    assert "warehouse doctor" in opened["incident"]["action"]
    messages = house.receiver.documents("/slack")
    for message in messages:
        SLACK_SCHEMA.validate(message)
    assert [message["text"].partition(":")[0] for message in messages] == ["Error", "Resolved"]
    events = house.receiver.documents("/v2/enqueue")
    for event in events:
        PAGERDUTY_SCHEMA.validate(event)
    assert [event["event_action"] for event in events] == ["trigger", "resolve"]
    assert len({event["dedup_key"] for event in events}) == 1


def test_a_failed_data_test_is_one_alert_and_another_one_is_news(house: Warehouse) -> None:
    error = DataError("dbt build: 1 failed\n  test a: Got 1 result")
    house.record({("build", ""): error}, nodes={"unique_a.1": "fail", "b.2": "warn", "c.3": "skipped"})
    assert house.look() == [("opened", "run_failed/models")]
    house.record({("build", ""): error}, nodes={"unique_a.1": "fail"})
    assert house.look() == []
    house.record({("build", ""): error}, nodes={"unique_a.1": "fail", "d__adds_up": "error"})
    assert house.look() == [("changed", "run_failed/models")]
    # Another part of the project is built and passes, as Dagster does it: that is no end of this one.
    house.record({("build", ""): None}, nodes={"e.5": "pass", "unique_a.1": "skipped"})
    assert house.look() == []
    house.record({("build", ""): error}, nodes={"d__adds_up": "error", "unique_a.1": "pass"})
    assert house.look() == []
    house.record({("build", ""): None}, nodes={"d__adds_up": "pass"})
    assert house.look() == [("resolved", "run_failed/models")]
    # A test that was taken away fails no more, once the whole was built without it.
    house.record({("build", ""): error}, nodes={"unique_a.1": "fail"})
    assert house.look() == [("opened", "run_failed/models")]
    house.record({("build", ""): None}, nodes={"e.5": "pass"}, whole=True)
    assert house.look() == [("resolved", "run_failed/models")]
    first = house.receiver.documents("/hook")[0]["incident"]
    assert first["summary"] == "build failed: test unique_a.1"
    assert first["details"]["failed"] == ["test unique_a.1"]
    assert "dbt retry" in first["action"]
    assert [event for event, _ in house.told()] == ["opened", "changed", "resolved", "opened", "resolved"]


def test_a_data_test_that_fails_in_dbt_is_one_alert_until_it_passes(
    house: Warehouse, query: Query, tmp_path: Path
) -> None:
    # With the manifest in a home of the test's own, ages are measured too.
    house.settings = replace(house.settings, home=tmp_path)
    project = transform.parse_project(house.settings)
    keep_manifest(house.settings, project)

    def build(outcome: str) -> None:
        with (
            contextlib.suppress(DataError),
            watched(house.settings, house.connection, Reporter(quiet=True)),
            recorded_run(house.connection, "run", "schedule", house.settings.project_dir) as run,
            run.step("build"),
        ):
            report = transform.run_build(
                house.settings, ["--select", f"source:{USERS}", "--indirect-selection", "cautious"], project=project
            )
            run.record_nodes(report.nodes)
            transform.require_built(report)
        assert query("select outcome from ops.runs order by started_at desc limit 1") == [(outcome,)]

    RawLog(house.connection).land(USER_EVENTS, make_user_events(1, 3)[0])
    change = f"update {USERS} set event_type = %s where event_type = %s"
    ((kind,),) = query(f"select event_type from {USERS} limit 1")
    query(change, CANARY, kind)
    build("failed")
    build("failed")
    query(change, kind, CANARY)
    build("success")
    about_builds = [one for one in house.receiver.documents("/hook") if one["incident"]["kind"] == "run_failed"]
    assert [(one["event"], one["incident"]["key"]) for one in about_builds] == [
        ("opened", "run_failed/models"),
        ("resolved", "run_failed/models"),
    ]
    (failed,) = about_builds[0]["incident"]["details"]["failed"]
    assert failed.startswith("test source_accepted_values_raw_users_user_events_event_type")
    # What landed is of last year: the look that ends a run sees it.
    assert [one for one in house.told() if one[1].startswith("sla_missed")] == [("opened", f"sla_missed/{USERS}")]
    assert query("select distinct state from ops.table_ages where table_name = %s", USERS) == [("error",)]
    assert CANARY.encode() not in b"".join(one.body for one in house.receiver.received)


def test_an_outage_that_outlasts_a_steps_own_tries_is_one_alert_until_a_later_try_succeeds(house: Warehouse) -> None:
    """Dagster tries a step again within one run: whoever is on call hears of it once, and once that it is over."""
    with recorded_run(
        house.connection, "dagster", "sensor", house.settings.project_dir, clock=lambda: house.now
    ) as run:
        with contextlib.suppress(TransientError), run.step("ingest", PAYMENTS):
            assert house.look() == []
            raise DOWN
        assert house.look() == [("opened", "run_failed/ingest/kafka")]
        with contextlib.suppress(TransientError), run.step("ingest", PAYMENTS):
            assert house.look() == [], "tried again is not over"
            raise DOWN
        assert house.look() == []
        with run.step("ingest", PAYMENTS):
            assert house.look() == []
        assert house.look() == [("resolved", "run_failed/ingest/kafka")]


def test_what_is_no_outage_alerts_when_the_run_has_failed(house: Warehouse) -> None:
    with (
        contextlib.suppress(FeedBusyError),
        recorded_run(house.connection, "dagster", "sensor", house.settings.project_dir, clock=lambda: house.now) as run,
    ):
        with contextlib.suppress(FeedBusyError), run.step("ingest", PAYMENTS):
            raise FeedBusyError("held")
        assert house.look() == []
        raise FeedBusyError("held")
    assert [kind for kind, _ in house.look()] == ["opened"]


@pytest.mark.parametrize(
    ("outcomes", "options", "key"),
    [
        ({("ingest", PAYMENTS): ConfigurationError("wrong")}, {}, f"run_failed/ingest/{PAYMENTS}"),
        ({("ingest", RATES): DOWN}, {}, f"run_failed/ingest/{RATES}"),
        ({("ingest", "files:/srv/drop"): DOWN}, {}, None),
        ({("ingest", "raw_old.gone"): DOWN}, {}, None),
        ({("freshness", ""): DataError("old")}, {}, "run_failed/freshness"),
        ({("build", ""): DataError("x")}, {"command": "replay"}, None),
        ({("ingest", PAYMENTS): KeyboardInterrupt()}, {"trigger": "manual"}, None),
        ({("ingest", PAYMENTS): KeyboardInterrupt()}, {}, f"run_failed/ingest/{PAYMENTS}"),
        ({}, {}, None),
    ],
    ids=["setting", "api", "folder", "undeclared", "freshness", "replay", "ctrl-c", "terminated", "nothing"],
)
def test_which_failures_alert(house: Warehouse, outcomes: Any, options: Any, key: str | None) -> None:
    house.record(outcomes, **options)
    assert house.look() == ([("opened", key)] if key else [])


def test_a_run_that_failed_outside_of_a_step(house: Warehouse) -> None:
    def run(error: WarehouseError | None) -> None:
        house.later(minutes=1)
        with (
            contextlib.suppress(WarehouseError),
            recorded_run(house.connection, "run", "manual", house.settings.project_dir, clock=lambda: house.now),
        ):
            if error is not None:
                raise error

    run(ConfigurationError("no"))
    assert house.look() == [("opened", "run_failed/run")]
    run(None)
    assert house.look() == [("resolved", "run_failed/run")]


def test_a_run_without_life_is_one_alert_from_its_silence_to_the_next_success(house: Warehouse, query: Query) -> None:
    query(
        "insert into ops.runs values ('r1', 'run', 'schedule', %s, %s, null, 'running', null, null, 'v')",
        house.now,
        house.now,
    )
    query("insert into ops.run_steps (run_id, step, started_at, outcome) values ('r1', 'build', %s, 'running')", START)
    house.later(seconds=290)
    assert house.look() == []
    house.later(seconds=20)
    assert house.look() == [("opened", "run_stuck/run")]
    # The next run closes the silent one as failed, and is itself not through yet.
    with recorded_run(house.connection, "run", "schedule", house.settings.project_dir, clock=lambda: house.now):
        assert query("select outcome, error_class from ops.runs where run_id = 'r1'") == [("failed", "killed")]
        assert house.look() == []
        house.later(minutes=1)
    assert house.look() == [("resolved", "run_stuck/run")]
    summary = house.receiver.documents("/hook")[0]["incident"]["summary"]
    assert summary == "run shows no life since 2026-03-01 03:00 UTC, at build"


def test_an_open_loss_is_one_alert_until_it_is_accepted(house: Warehouse, query: Query) -> None:
    feed = next(feed for feed in load_feeds(house.settings) if feed.name == PAYMENTS)

    def lose(offset: int) -> None:
        query(
            "insert into raw_payments._losses (feed, kind, stream_id, first_position, last_position, detail) "
            "values (%s, 'retention', 1, %s, %s, %s)",
            PAYMENTS,
            offset,
            offset,
            f"partition 0 lost offset {offset} before it was read (retention)",
        )
        house.record({("ingest", PAYMENTS): SourceLossError("lost")})

    lose(5)
    # The failed run is the same news.
    assert house.look() == [("opened", f"loss/{PAYMENTS}")]
    house.record({("ingest", PAYMENTS): SourceLossError("lost")})
    assert house.look() == []
    lose(9)
    assert house.look() == [("changed", f"loss/{PAYMENTS}")]
    ledger.accept_losses(house.connection, feed, "known")
    house.record({("ingest", PAYMENTS): None})
    assert house.look() == [("resolved", f"loss/{PAYMENTS}")]
    incident = house.receiver.documents("/hook")[0]["incident"]
    assert incident["severity"] == "critical"
    assert f"warehouse feeds accept-loss {PAYMENTS}" in incident["action"]


def test_a_day_that_does_not_add_up_is_one_alert_until_it_does(house: Warehouse, query: Query) -> None:
    assert house.look() == []  # not built yet
    query("create schema audit")
    query("create table audit.audit_reconciliation (feed text, loaded_date date, adds_up boolean)")
    query("insert into audit.audit_reconciliation values (%s, '2026-02-27', false)", PAYMENTS)
    # A test of the reconciliation that fails for it is the same news; another one is not.
    nodes = {"audit_reconciliation__accounts_for_every_record": "fail"}
    house.record({("build", ""): DataError("x")}, nodes=nodes)
    assert house.look() == [("opened", f"reconciliation_over_budget/{PAYMENTS}")]
    house.record({("build", ""): DataError("x")}, nodes={**nodes, "not_null_a.1": "fail"})
    assert house.look() == [("opened", "run_failed/models")]
    house.record({("build", ""): DataError("x")}, nodes={**nodes, "not_null_a.1": "pass"})
    assert house.look() == [("resolved", "run_failed/models")]
    query("insert into audit.audit_reconciliation values (%s, '2026-02-28', false)", PAYMENTS)
    assert house.look() == [("changed", f"reconciliation_over_budget/{PAYMENTS}")]
    # Not known is not over: the table is locked, or gone for a moment.
    builder = psycopg2.connect(house.settings.require("WAREHOUSE_DSN", ""))
    with builder.cursor() as cursor:
        cursor.execute("lock table audit.audit_reconciliation in access exclusive mode")
        cursor.execute("alter table audit.audit_reconciliation rename to away")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conditions, "LOCK_TIMEOUT", "50ms")
            assert house.look() == []
        builder.commit()
        assert house.look() == []
        cursor.execute("alter table audit.away rename to audit_reconciliation")
        cursor.execute("update audit.audit_reconciliation set adds_up = true")
        builder.commit()
    builder.close()
    house.record({("build", ""): None}, nodes=dict.fromkeys(nodes, "pass"))
    assert house.look() == [("resolved", f"reconciliation_over_budget/{PAYMENTS}")]


def test_twin_not_known_taken_for_over_is_caught(
    house: Warehouse, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    query("create schema audit")
    query("create table audit.audit_reconciliation (feed text, loaded_date date, adds_up boolean)")
    query("insert into audit.audit_reconciliation values (%s, '2026-02-27', false)", PAYMENTS)
    house.look()
    query("drop table audit.audit_reconciliation")
    attempt = conditions._attempt
    monkeypatch.setattr(conditions, "_attempt", lambda cursor, look: attempt(cursor, look) or [])
    assert house.look() == [("resolved", f"reconciliation_over_budget/{PAYMENTS}")]


def age(state: str, hours: float | None = 3) -> TableAge:
    measured = None if hours is None else timedelta(hours=hours)
    return TableAge(
        "marts.fct_transactions", measured, timedelta(hours=2), timedelta(hours=24), state, "partition 3: old", PAYMENTS
    )


def test_a_miss_gets_worse_is_not_known_and_is_over(house: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[list[TableAge] | None] = []
    monkeypatch.setattr(watch, "has_manifest", lambda settings: True)
    monkeypatch.setattr(watch, "_measure", lambda *_: measured[-1])
    key = f"sla_missed/{PAYMENTS}"
    steps: list[tuple[list[TableAge] | None, list[tuple[str, str]]]] = [
        ([age("pass", 1)], []),
        ([age("warn")], [("opened", key)]),
        ([age("warn", 4)], []),
        ([age("error", 25)], [("escalated", key)]),
        ([age("warn", 23)], []),
        ([age("error", 25)], []),
        ([age("unknown", None)], []),
        (None, []),
        ([age("pass", 0)], [("resolved", key)]),
    ]
    for ages, changes in steps:
        measured.append(ages)
        house.later(minutes=1)
        assert house.look() == changes
    assert [one["incident"]["severity"] for one in house.receiver.documents("/hook")] == ["warning", "error", "error"]


def test_reminders_are_off_until_they_are_asked_for(house: Warehouse) -> None:
    house.record({("ingest", PAYMENTS): DOWN})
    house.look()
    house.later(days=7)
    assert house.look() == []
    house.settings = house.settings.with_env(WAREHOUSE_ALERT_REMIND_SECONDS="3600")
    assert [event for event, _ in house.look()] == ["reminded"]
    house.later(minutes=59)
    assert house.look() == []
    house.later(minutes=2)
    assert [event for event, _ in house.look()] == ["reminded"]


def test_an_alert_closed_by_hand_opens_again_when_it_happens_anew(house: Warehouse) -> None:
    house.record({("build", ""): DataError("x")})
    house.look()
    receivers, _ = find_receivers(house.settings)
    close = alerts.close_incident
    closed = close(house.connection, "run_failed/build", "known", receivers, source="s", now=house.now)
    assert (closed.state, closed.resolved_because) == ("closed", "known")
    house.later(hours=1)
    assert house.look() == []
    assert [event for event, _ in house.told()] == ["opened", "resolved"]
    assert house.receiver.documents("/hook")[1]["incident"]["resolved_because"] == "known"
    house.record({("build", ""): DataError("x")})
    assert house.look() == [("opened", "run_failed/build")]
    close(house.connection, "run_failed/build", "known", receivers, source="s", now=house.now)
    house.record({("build", ""): None})
    assert house.look() == []  # everybody knows that it is closed
    with pytest.raises(ConfigurationError, match="No alert run_failed/build is open"):
        close(house.connection, "run_failed/build", "known", receivers, source="s", now=house.now)


# --- delivery ---------------------------------------------------------------------------------------------------------


def test_an_incident_and_its_deliveries_become_true_together(
    house: Warehouse, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.record({("ingest", PAYMENTS): DOWN})
    with monkeypatch.context() as patch:
        patch.setattr(alerts, "_enqueue", lambda *_: (_ for _ in ()).throw(RuntimeError("died")))
        with pytest.raises(RuntimeError):
            house.look()
    assert query("select count(*) from ops.incidents") == [(0,)]
    assert house.look() == [("opened", "run_failed/ingest/kafka")]


def test_a_first_try_that_fails_is_made_up_for_in_order(house: Warehouse, query: Query) -> None:
    house.receiver.default = (503, {}, b"")
    house.record({("ingest", PAYMENTS): DOWN})
    house.look(within_s=5.0)
    # 1, 2, then 4 seconds would be too long.
    assert len(house.receiver.received) == 3
    assert house.problems == [f"webhook: {house.receiver.base.removeprefix('http://')} answered with status 503"]
    house.record({("ingest", PAYMENTS): None})
    house.look(within_s=5.0)
    assert house.problems == []  # told already
    house.receiver.default = (200, {}, b"")
    house.later(minutes=10)
    house.look()
    ids = [one["id"] for one in house.receiver.documents("/hook")]
    assert [event for event, _ in house.told()][-2:] == ["opened", "resolved"]
    assert len(set(ids)) == 2, "the same delivery has the same id at each try"
    assert query("select count(*) from ops.alert_deliveries where delivered_at is null") == [(0,)]
    before = len(ids)
    house.later(minutes=10)
    house.look()
    assert len(house.receiver.received) == before


def test_a_receiver_is_not_asked_before_it_said(house: Warehouse) -> None:
    house.receiver.answers = [(429, {"Retry-After": "90"}, b"")]
    house.record({("ingest", PAYMENTS): DOWN})
    house.look()
    for seconds, requests in ((60, 1), (25, 1), (10, 2)):
        house.later(seconds=seconds)
        house.look(within_s=1.0)
        assert len(house.receiver.received) == requests


def test_a_receiver_that_refuses_is_told_of_once_and_gets_everything_once_it_is_put_right(
    house: Warehouse, query: Query
) -> None:
    good = house.settings
    house.settings = house.settings.with_env(WAREHOUSE_ALERT_WEBHOOK_URL=f"{house.receiver.base}/gone")
    house.receiver.default = (404, {}, b"")
    house.record({("ingest", PAYMENTS): DOWN})
    house.look()
    said = f"{house.receiver.base.removeprefix('http://')} answered with status 404"
    assert house.problems == [f"webhook: {said}"]
    for _ in range(3):
        house.later(days=1)
        house.look()
        assert house.problems == []
    assert len(house.receiver.received) == 1
    (state,) = fetch_receiver_states(house.connection, find_receivers(house.settings)[0])
    assert (state.refused, state.waiting, state.problem, state.is_refusing) == (1, 0, said, True)
    check = {one.name: one for one in examine_alerts(house.settings)}["alerts to webhook"]
    assert (check.ok, check.found) == (False, said)
    assert "WAREHOUSE_ALERT_WEBHOOK_URL" in check.hint

    house.receiver.default = (200, {}, b"")
    house.settings = good
    assert examine_alerts(good)[-1].ok, "other settings are not judged before they were tried"
    house.record({("ingest", PAYMENTS): None})
    house.look()
    assert [event for event, _ in house.told()] == ["opened", "resolved"]
    # Put right on the other side: a test that gets through says so.
    house.receiver.default = (403, {}, b"")
    house.record({("ingest", PAYMENTS): DOWN})
    house.look()
    house.receiver.default = (200, {}, b"")
    house.later(days=1)
    house.look()
    assert query("select count(*) from ops.alert_deliveries where refused_at is not null") == [(1,)]
    ((_, outcome),) = send_test(house.settings, house.connection, find_receivers(house.settings)[0])
    assert outcome.delivered
    house.look()
    assert [event for event, _ in house.told()][-2:] == ["test", "opened"]
    assert query("select count(*) from ops.alert_deliveries where delivered_at is null") == [(0,)]


def examine_alerts(settings: Settings) -> list[Any]:
    from orchestration.doctor import _check_alerts

    return _check_alerts(settings)


def test_a_receiver_named_later_hears_what_is_open(house: Warehouse) -> None:
    house.record({("ingest", PAYMENTS): DOWN, ("ingest", RATES): DOWN})
    house.look()
    house.record({("ingest", RATES): None})
    with_all_receivers(house)
    house.look()
    assert len(house.receiver.documents("/v2/enqueue")) == 1
    house.record({("ingest", PAYMENTS): None})
    house.look()
    assert [one["event_action"] for one in house.receiver.documents("/v2/enqueue")] == ["trigger", "resolve"]


def test_a_test_alert_is_in_the_published_shapes_and_leaves_nothing_open(house: Warehouse) -> None:
    with_all_receivers(house)
    receivers, _ = find_receivers(house.settings)
    outcomes = send_test(house.settings, house.connection, receivers)
    assert [one.name for one, outcome in outcomes if outcome.delivered] == list(NAMES)
    (document,) = house.receiver.documents("/hook")
    WEBHOOK_SCHEMA.validate(document)
    (message,) = house.receiver.documents("/slack")
    SLACK_SCHEMA.validate(message)
    events = house.receiver.documents("/v2/enqueue")
    for event in events:
        PAGERDUTY_SCHEMA.validate(event)
    assert [event["event_action"] for event in events] == ["trigger", "resolve"]


def die_delivering(house: Warehouse, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.harness.dying_delivery", *arguments],
        cwd=PROJECT,
        env={**os.environ, **house.settings.env, "WAREHOUSE_PROJECT_DIR": str(house.settings.project_dir)},
    )
    assert done.returncode == -signal.SIGKILL


def test_a_process_killed_around_a_send_leaves_it_to_the_next(house: Warehouse, query: Query) -> None:
    house.record({("ingest", PAYMENTS): DOWN})
    house.look(within_s=0.0)
    assert house.receiver.received == []
    die_delivering(house, "before")
    assert house.receiver.received == []
    die_delivering(house, "after")
    assert len(house.receiver.received) == 1
    assert query("select delivered_at from ops.alert_deliveries") == [(None,)]
    house.look()
    first, second = house.receiver.documents("/hook")
    assert first == second, "the same id says that it is the same"
    house.look()
    assert len(house.receiver.received) == 2


def test_twin_marked_before_it_is_sent_loses_an_alert(house: Warehouse) -> None:
    house.record({("ingest", PAYMENTS): DOWN})
    house.look(within_s=0.0)
    die_delivering(house, "before", "twin")
    house.look()
    assert house.receiver.received == []


def deliver_twice_at_once(house: Warehouse) -> int:
    """Two processes deliver, the second while the first waits for the receiver -> requests received."""
    house.record({("ingest", PAYMENTS): DOWN})
    house.look(within_s=0.0)
    asked, answer = threading.Event(), threading.Event()

    def wait(_: Any) -> None:
        if not asked.is_set():
            asked.set()
            assert answer.wait(20)

    house.receiver.on_request = wait
    receivers, _ = find_receivers(house.settings)
    other = connect(house.settings)
    first = threading.Thread(
        target=alerts.deliver, args=(other, receivers, Clock(house.now)), kwargs={"within_s": 10.0}
    )
    first.start()
    assert asked.wait(20)
    # Neither look waits for the other.
    house.look()
    answer.set()
    first.join()
    other.close()
    return len(house.receiver.received)


def test_two_at_once_do_not_both_send(house: Warehouse) -> None:
    assert deliver_twice_at_once(house) == 1


def test_twin_without_a_turn_both_send(house: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "TURN", "")
    assert deliver_twice_at_once(house) == 2


def test_two_looks_at_once_open_one_incident(house: Warehouse, query: Query) -> None:
    house.record({("ingest", PAYMENTS): DOWN})
    other = connect(house.settings)
    with other, other.cursor() as cursor:
        assert alerts.take_turn(cursor)
        # Somebody else's turn: left to that one.
        assert house.look() == []
    other.close()
    assert house.look() == [("opened", "run_failed/ingest/kafka")]


# --- at the end of a run ----------------------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[str]:
    """A receiver that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"


def test_receivers_that_are_down_neither_fail_nor_hold_a_run(
    house: Warehouse, silent: str, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "RUN_END_S", 0.5)
    said: list[str] = []
    monkeypatch.setattr(Reporter, "line", lambda self, text: said.append(text))
    settings = house.settings.with_env(
        WAREHOUSE_ALERT_WEBHOOK_URL=silent, WAREHOUSE_ALERT_SLACK_URL="http://127.0.0.1:1"
    )
    for error in (DOWN, None):
        connection = connect(settings)
        with (
            contextlib.nullcontext() if error is None else pytest.raises(TransientError, match=r"broker\.example"),
            watched(settings, connection, Reporter(quiet=True)),
            recorded_run(connection, "ingest", "schedule", settings.project_dir) as run,
            run.step("ingest", PAYMENTS),
        ):
            if error is not None:
                raise error
        connection.close()
    assert query("select outcome from ops.runs order by started_at") == [("failed",), ("success",)]
    assert query("select receiver, event from ops.alert_deliveries where delivered_at is null order by 1, 2") == [
        ("slack", "opened"),
        ("slack", "resolved"),
        ("webhook", "opened"),
        ("webhook", "resolved"),
    ]
    assert any("does not answer within" in line for line in said)


def test_a_look_that_cannot_be_taken_is_not_the_runs_failure(house: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Reporter, "line", lambda self, text: said.append(text))
    monkeypatch.setattr(watch, "tick", lambda *_, **__: (_ for _ in ()).throw(ValueError(CANARY)))
    with watched(house.settings, house.connection, Reporter(quiet=True)):
        pass
    assert said == ["alerts: could not look: ValueError"]
    # The database went away with the run.
    house.connection.close()
    with pytest.raises(TransientError), watched(house.settings, house.connection, Reporter(quiet=True)):
        raise DOWN


def test_a_broker_outage_from_the_run_to_the_receiver(
    house: Warehouse,
    own_topic: Callable[[str], FeedSpec],
    send: Callable[..., None],
    query: Query,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ingestion.kafka.REQUEST_TIMEOUT_S", 1.0)
    before = query("select count(*)::int from raw_payments._dead_letters")
    feed = own_topic(PAYMENTS)
    send(feed, [(b"k", payment())], 0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        nowhere = f"127.0.0.1:{server.getsockname()[1]}"

    def run(settings: Settings) -> None:
        connection = connect(settings)
        try:
            with (
                watched(settings, connection, Reporter(quiet=True)),
                recorded_run(connection, "ingest", "schedule", settings.project_dir) as recorded,
            ):
                ingest(settings, [feed], recorded, Reporter(quiet=True))
        finally:
            connection.close()

    for _ in range(2):
        with pytest.raises(TransientError):
            run(house.settings.with_env(KAFKA_BOOTSTRAP_SERVERS=nowhere, WAREHOUSE_RETRY_SECONDS="0"))
    run(house.settings)
    assert house.told() == [("opened", "run_failed/ingest/kafka"), ("resolved", "run_failed/ingest/kafka")]
    assert query("select count(*)::int from raw_payments._dead_letters") == before


def test_a_budget_that_was_passed_is_one_alert_until_good_records_come(
    house: Warehouse, own_topic: Callable[[str], FeedSpec], send: Callable[..., None]
) -> None:
    feed = replace(own_topic(PAYMENTS), dead_letter_budget=DeadLetterBudget(share=0.1))
    bad = payment(user_id=CANARY, merchant_id=CANARY)

    def run() -> None:
        with (
            contextlib.suppress(DataError),
            watched(house.settings, house.connection, Reporter(quiet=True)),
            recorded_run(house.connection, "ingest", "schedule", house.settings.project_dir) as recorded,
        ):
            ingest(house.settings, [feed], recorded, Reporter(quiet=True))

    key = f"dead_letters_over_budget/{PAYMENTS}"
    send(feed, [(CANARY.encode(), payment()) for _ in range(60)] + [(CANARY.encode(), bad) for _ in range(60)], 0)
    run()
    assert house.told() == [("opened", key)]
    run()  # nothing new was offered, and nothing is better
    assert house.told() == [("opened", key)]
    send(feed, [(b"k", payment()) for _ in range(100)], 0)
    run()
    assert house.told() == [("opened", key), ("resolved", key)]
    incident = house.receiver.documents("/hook")[0]["incident"]
    assert incident["summary"] == f"{PAYMENTS} set 60 of 120 records aside (50.0%), its budget is 10.0%"
    assert incident["details"]["reasons"] == ["pattern_mismatch 60"]
    assert CANARY.encode() not in b"".join(one.body for one in house.receiver.received)


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(
    house: Warehouse, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """A command in this process -> exit code, stdout, stderr. Ages take a parsed project, and are left out."""
    monkeypatch.setattr(watch, "_measure", lambda *_: None)

    def run(*arguments: str, **values: str) -> tuple[int, str, str]:
        for name in list(os.environ):
            if name.startswith(OWN_SETTINGS):
                monkeypatch.delenv(name)
        own = {name: value for name, value in house.settings.env.items() if name.startswith(OWN_SETTINGS)}
        places = {"WAREHOUSE_PROJECT_DIR": house.settings.project_dir, "WAREHOUSE_HOME": house.settings.home}
        for name, value in {**own, **places, **values}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", ["warehouse", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ROUTING_KEY not in out + err
        assert "/hook" not in out + err
        return int(ended.value.code or 0), out, err

    return run


def test_alerts_are_listed_with_what_to_do_and_who_was_told(
    house: Warehouse, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = command("alerts", "list", WAREHOUSE_ALERT_WEBHOOK_URL="")
    assert (code, out) == (
        0,
        "no alert is open\nNobody is told: no WAREHOUSE_ALERT_ setting names a receiver; see .env.example.\n",
    )
    with_all_receivers(house)
    house.receiver.answers = [(404, {}, b"")]
    house.record({("ingest", PAYMENTS): DOWN})
    code, out, _ = command("alerts", "check")
    assert code == 0
    host = house.receiver.base.removeprefix("http://")
    assert out.splitlines() == [
        f"alert opened: error: ingest of {PAYMENTS} failed: transient",
        f"alerts: webhook: {host} answered with status 404",
    ]
    _, out, _ = command("alerts", "list")
    lines = out.splitlines()
    assert lines[0] == f"error: ingest of {PAYMENTS} failed: transient"
    assert lines[1].startswith("  run_failed/ingest/kafka, for ")
    assert lines[2].startswith("  `warehouse doctor` says which server does not answer.")
    assert lines[-1].startswith("  Check WAREHOUSE_ALERT_WEBHOOK_URL; once `warehouse alerts test --receiver webhook`")
    code, out, _ = command("alerts", "resolve", "run_failed/ingest/kafka", "--because", "known")
    assert (code, out) == (0, f"closed: ingest of {PAYMENTS} failed: transient\n")
    code, _, err = command("alerts", "resolve", "run_failed/ingest/kafka", "--because", "known")
    assert (code, err.splitlines()[0]) == (2, "error: No alert run_failed/ingest/kafka is open.")
    _, out, _ = command("alerts", "list", "--all", "--json")
    listed = json.loads(out)
    assert [(one["key"], one["state"], one["resolved_because"]) for one in listed["alerts"]] == [
        ("run_failed/ingest/kafka", "closed", "known")
    ]
    assert [(one["receiver"], one["refused"]) for one in listed["receivers"]] == [
        ("pagerduty", 0),
        ("slack", 0),
        ("webhook", 1),
    ]


@pytest.mark.parametrize(
    ("arguments", "values", "code", "said"),
    [
        ((), {}, 0, "webhook: delivered to 127.0.0.1:"),
        (("--receiver", "slack"), {}, 2, "error: slack is not set."),
        (("--receiver", "mail"), {}, 2, "error: There is no receiver mail."),
        ((), {"WAREHOUSE_ALERT_WEBHOOK_URL": ""}, 2, "error: No receiver is set."),
        (
            (),
            {"WAREHOUSE_ALERT_WEBHOOK_URL": "http://example.com/hook"},
            2,
            "error: WAREHOUSE_ALERT_WEBHOOK_URL is not",
        ),
        ((), {"WAREHOUSE_ALERT_WEBHOOK_URL": "http://127.0.0.1:1/hook"}, 4, "webhook: 127.0.0.1:1 cannot be reached"),
    ],
)
def test_a_test_alert_by_command(
    command: Callable[..., tuple[int, str, str]], arguments: Any, values: Any, code: int, said: str
) -> None:
    found, out, err = command("alerts", "test", *arguments, **values)
    assert found == code
    assert (out + err).startswith(said)


def run_with_sources_down(
    house: Warehouse, command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingestion.kafka.REQUEST_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        nowhere = f"127.0.0.1:{server.getsockname()[1]}"
    code, _, err = command(
        "run",
        KAFKA_BOOTSTRAP_SERVERS=nowhere,
        FX_API_BASE=f"http://{nowhere}",
        WAREHOUSE_RETRY_SECONDS="0",
    )
    assert code == 4, err


def test_a_run_by_command_ends_with_a_look(
    house: Warehouse, command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with_sources_down(house, command, monkeypatch)
    keys = [("opened", "run_failed/ingest/kafka"), ("opened", f"run_failed/ingest/{RATES}")]
    assert sorted(house.told()) == sorted(keys)
    # So does an ingest; the same failure is no news.
    code, _, _ = command("ingest", RATES, FX_API_BASE="http://127.0.0.1:1", WAREHOUSE_RETRY_SECONDS="0")
    assert code == 4
    assert len(house.told()) == 2
    assert command("ingest", RATES)[0] == 0
    assert house.told()[2:] == [("resolved", f"run_failed/ingest/{RATES}")]


def test_twin_a_run_without_a_look_tells_nobody(
    house: Warehouse, command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestration.run.watched", lambda *_: contextlib.nullcontext())
    run_with_sources_down(house, command, monkeypatch)
    assert house.told() == []


def test_the_watch_looks_until_interrupted_and_says_a_thing_once(
    house: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) >= 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Reporter, "line", lambda self, text: said.append(text))
    house.record({("ingest", PAYMENTS): DOWN})
    monkeypatch.setattr(watch, "_measure", lambda *_: None)
    settings = house.settings.with_env(
        WAREHOUSE_ALERT_SLACK_URL="no address", WAREHOUSE_ALERT_HEARTBEAT_URL=f"{house.receiver.base}/beat"
    )
    with pytest.raises(KeyboardInterrupt):
        watch.watch(settings, 60.0, Reporter(), sleep)
    assert said == [
        f"alert opened: error: ingest of {PAYMENTS} failed: transient",
        "alerts: WAREHOUSE_ALERT_SLACK_URL is not the https address of a receiver.",
    ]
    assert len([one for one in house.receiver.received if one.path == "/beat"]) == 3
    assert all(0 < seconds <= 60 for seconds in slept)
    # The database is away: the watch goes on, and its heartbeat stops.
    slept.clear()
    said.clear()
    house.receiver.received.clear()
    with pytest.raises(KeyboardInterrupt):
        watch.watch(settings.with_env(WAREHOUSE_DSN="postgresql://nobody@127.0.0.1:1/x"), 60.0, Reporter(), sleep)
    assert said == ["alerts: could not look: Postgres at 127.0.0.1:1/x does not answer."]
    assert house.receiver.received == []


# --- nothing private --------------------------------------------------------------------------------------------------


def provoke_everything(house: Warehouse, query: Query) -> bytes:
    """Every kind of alert, with a record's text wherever a database or dbt may have put it -> all that was sent."""
    with_all_receivers(house)
    text = f'DETAIL: Key (user_id)=({CANARY}) already exists; invalid input "{CANARY}"'
    quoting = DataError(f"dbt build: 1 failed\n  model fct_x: Database Error in model fct_x {text}")
    house.record({("build", ""): quoting}, nodes={"x": "fail"})
    house.record({("ingest", USERS): ValueError(text)})
    house.record(
        {
            ("ingest", RATES): ConfigurationError(
                f"https://u:{CANARY}@api.example.com/v1?key={CANARY} is no API.\n{text}"
            )
        }
    )
    query(
        "insert into raw_payments._losses (feed, kind, stream_id, first_position, detail) "
        "values (%s, 'retention', 1, 1, 'partition 0 lost offset 1')",
        PAYMENTS,
    )
    query("create schema audit")
    query("create table audit.audit_reconciliation (feed text, loaded_date date, adds_up boolean)")
    query("insert into audit.audit_reconciliation values (%s, '2026-02-27', false)", USERS)
    query(
        "insert into ops.runs values ('r1', 'ingest', 'schedule', %s, %s, null, 'running', null, %s, 'v')",
        START,
        START,
        text,
    )
    house.later(hours=1)
    opened = house.look()
    assert {key.partition("/")[0] for _, key in opened} == {
        "run_failed",
        "run_stuck",
        "loss",
        "reconciliation_over_budget",
    }
    stored = query("select row_to_json(d)::text from ops.alert_deliveries d")
    stored += query("select row_to_json(i)::text from ops.incidents i") + query("select * from ops.alert_receivers")
    return b"".join(one.body for one in house.receiver.received) + str(stored).encode()


def test_no_record_and_no_secret_is_sent_or_stored(house: Warehouse, query: Query) -> None:
    said = provoke_everything(house, query)
    assert b"run_failed/models" in said
    assert b"api.example.com/v1 is no API." in said
    assert CANARY.encode() not in said
    stored = str(query("select row_to_json(r)::text from ops.alert_receivers r")) + str(
        query("select document::text from ops.alert_deliveries")
    )
    for secret in (ROUTING_KEY, "/slack", "/hook"):
        assert secret not in stored


def test_twin_a_message_that_is_passed_on_shows_the_record(
    house: Warehouse, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_failure = conditions._to_failure

    def chatty(key: str, lasts: Any) -> conditions.Condition:
        made = to_failure(key, lasts)
        return replace(made, details={**made.details, "message": lasts[-1].message})

    monkeypatch.setattr(conditions, "_to_failure", chatty)
    assert CANARY.encode() in provoke_everything(house, query)

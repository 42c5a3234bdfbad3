"""A look at everything: measure ages, see what is wrong, open and resolve incidents, send what is due.

    ages and queues -> conditions -> incidents and outbox (one transaction) -> receivers

`tick` is one look. It is taken at the end of each recorded run of the command line (`watched`), every minute by
Dagster's sensor or by `warehouse watch`, and by `warehouse alerts check`; any number of them at once do no harm. None
of it needs a run: ages grow while nothing runs.

A warehouse whose Postgres is down cannot look, and tells nobody. That is what the heartbeat is for: it is sent after
each look, and somebody else's watch notices that it stopped.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psycopg2
import psycopg2.extensions

from ingestion.database import classify_error, connect
from ingestion.errors import ConfigurationError, WarehouseError
from ingestion.feeds import FeedSpec, load_feeds
from ingestion.settings import Settings
from orchestration import alerts
from orchestration.alerts import LEAST_REQUEST_S, Change, Clock
from orchestration.conditions import find_conditions
from orchestration.console import Reporter
from orchestration.manifest import has_manifest
from orchestration.receivers import (
    PAGERDUTY,
    REQUEST_S,
    Outcome,
    Receiver,
    beat,
    find_heartbeat,
    find_receivers,
    send,
)

if TYPE_CHECKING:
    from orchestration.ages import TableAge

Connection = psycopg2.extensions.connection

SOURCE_SETTING = "WAREHOUSE_ALERT_SOURCE"
SOURCE = "payments-warehouse"
REMIND_SETTING = "WAREHOUSE_ALERT_REMIND_SECONDS"

# About how long a tick sends. A run ends sooner: what it leaves, the next tick sends.
TICK_S = 20.0
RUN_END_S = 5.0


@dataclass
class Tick:
    """What one look came to. `problems` are new ones of receivers and settings, in words."""

    changes: list[Change] = field(default_factory=list)
    delivered: int = 0
    problems: list[str] = field(default_factory=list)


def tick(
    settings: Settings,
    connection: Connection,
    now: datetime,
    *,
    within_s: float = TICK_S,
    clock: Clock | None = None,
    may_parse: bool = True,
) -> Tick:
    """Measure, compare, tell.

    Args:
        connection: with every table in place and no transaction open; left in autocommit.
        within_s: about how long receivers may take, all together.
        may_parse: whether dbt may be started for its manifest where no recent one is there. Without one, ages are
            not known, and misses stay as they are.

    Raises:
        WarehouseError, psycopg2.Error: the database does not serve us, or the declarations cannot be read.
    """
    connection.autocommit = True
    clock = clock or Clock(now)
    feeds = load_feeds(settings)
    receivers, heartbeat, wrong = _find_all(settings)
    result = Tick(problems=[error.message for error in wrong])
    ages = _measure(settings, feeds, connection, now, result) if may_parse or has_manifest(settings) else None
    with connection, connection.cursor() as cursor:
        if alerts.take_turn(cursor):
            result.changes = alerts.update_incidents(
                cursor,
                find_conditions(settings, cursor, feeds, ages, now),
                receivers,
                source=source_of(settings),
                now=now,
                remind_s=settings.number(REMIND_SETTING, 0.0),
            )
    sent = alerts.deliver(connection, receivers, clock, within_s=within_s)
    result.delivered = sent.delivered
    result.problems.extend(sent.problems)
    if heartbeat is not None:
        outcome = beat(heartbeat, min(REQUEST_S, max(within_s - clock.passed_s, LEAST_REQUEST_S)))
        if not outcome.delivered:
            result.problems.append(f"heartbeat: {outcome.problem}")
    return result


def _find_all(settings: Settings) -> tuple[list[Receiver], Receiver | None, list[ConfigurationError]]:
    receivers, wrong = find_receivers(settings)
    try:
        return receivers, find_heartbeat(settings), wrong
    except ConfigurationError as error:
        return receivers, None, [*wrong, error]


def source_of(settings: Settings) -> str:
    """The name of this warehouse in alerts."""
    return settings.get(SOURCE_SETTING) or SOURCE


def _measure(
    settings: Settings, feeds: Sequence[FeedSpec], connection: Connection, now: datetime, result: Tick
) -> "Sequence[TableAge] | None":
    """The ages; kept, with what waits for each feed. None where they cannot be measured now: the rest is looked at
    all the same."""
    from orchestration.ticks import record_tick, take_tick

    try:
        measured = take_tick(settings, feeds, connection, now)
        with connection:
            record_tick(connection, measured)
    except WarehouseError as error:
        result.problems.append(f"ages and queues were not measured: {error.message}")
        return None
    except psycopg2.Error as error:
        if connection.closed or error.pgcode is None:
            raise
        result.problems.append(f"ages and queues were not measured ({type(error).__name__})")
        return None
    return measured.ages


@contextmanager
def watched(settings: Settings, connection: Connection, reporter: Reporter) -> Iterator[None]:
    """A look at everything after the block, a recorded run, whether it failed or not. Never makes it fail.

    An interrupted run does not wait for one.
    """
    try:
        yield
    except Exception:
        _look_after_run(settings, connection, reporter)
        raise
    _look_after_run(settings, connection, reporter)


def _look_after_run(settings: Settings, connection: Connection, reporter: Reporter) -> None:
    if connection.closed:
        return
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("set statement_timeout = '10s'")
        seen = tick(settings, connection, datetime.now(UTC), within_s=RUN_END_S, may_parse=False)
    except Exception as error:
        # Of a fault of ours only its kind: its text might hold a record's.
        said = error.message if isinstance(error, WarehouseError) else type(error).__name__
        reporter.line(f"alerts: could not look: {said}")
        return
    for line in describe(seen):
        reporter.line(line)


def describe(seen: Tick) -> list[str]:
    """A look in lines; none when there is nothing to say."""
    return [
        *(f"alert {change.event}: {change.severity}: {change.summary}" for change in seen.changes),
        *(f"alerts: {problem}" for problem in seen.problems),
    ]


def watch(settings: Settings, every_s: float, reporter: Reporter) -> None:
    """A look every so often, until interrupted. A database that is away is asked again at the next one."""
    # Imported here: orchestration.run ends its runs with a look.
    from orchestration.run import prepare

    is_prepared = False
    told: list[str] = []
    while True:
        started = time.monotonic()
        try:
            if not is_prepared:
                prepare(settings)
                is_prepared = True
            connection = connect(settings, purpose="watch")
            try:
                seen = tick(settings, connection, datetime.now(UTC))
            finally:
                connection.close()
            lines = describe(seen)
        except (WarehouseError, psycopg2.Error) as error:
            named = error if isinstance(error, WarehouseError) else classify_error(error)
            lines = [f"alerts: could not look: {named.message if named else type(error).__name__}"]
        for line in lines:
            # What is wrong with a setting is as wrong a minute later.
            if line not in told:
                reporter.line(line)
        told = lines
        time.sleep(max(every_s - (time.monotonic() - started), 0.0))


def send_test(
    settings: Settings, connection: Connection, receivers: Sequence[Receiver]
) -> list[tuple[Receiver, Outcome]]:
    """A test alert to each, at once and past the outbox; who takes it is given what it had refused at the next look."""
    connection.autocommit = True
    now = datetime.now(UTC)
    outcomes = []
    for receiver in receivers:
        outcome = Outcome(True)
        for event in ("test", "resolved") if receiver.name == PAGERDUTY else ("test",):
            # PagerDuty keeps an alert open until it is resolved.
            outcome = send(receiver, _test_document(event, source_of(settings), now), now)
            if not outcome.delivered:
                break
        if outcome.delivered:
            with connection, connection.cursor() as cursor:
                alerts.release_refused(cursor, receiver)
        outcomes.append((receiver, outcome))
    return outcomes


def _test_document(event: str, source: str, now: datetime) -> dict[str, Any]:
    incident = {
        "id": 0,
        "key": "test",
        "kind": "test",
        "severity": "info",
        "summary": f"Test alert of {source}",
        "action": "Nothing: somebody ran `warehouse alerts test`.",
        "details": {},
        "opened_at": now.isoformat(),
        "resolved_at": now.isoformat() if event == "resolved" else None,
        "resolved_because": None,
    }
    return alerts.build_document(event, incident, message_id=alerts.new_message_id(), source=source, at=now)

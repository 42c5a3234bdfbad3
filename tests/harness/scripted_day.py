"""A day of 200 runs with a clock of the test's own, written through the run history's own functions.

    day = play_day(connection, project_dir, date) -> what an independent count must find

Times, outcomes, ages and queues follow from the number of the run alone, so that a count from the same numbers, made
without the database, says what the views must.
"""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import psycopg2.extensions

from ingestion.errors import DataError, TransientError
from orchestration.accounts import Account
from orchestration.ages import Budget, TableAge, record_ages
from orchestration.history import recorded_run
from orchestration.status import FeedStatus, Status
from orchestration.ticks import record_queues
from orchestration.transform import NodeResult

Connection = psycopg2.extensions.connection

RUNS = 200
PAYMENTS = "raw_payments.transaction_created"
USERS = "raw_users.user_events"
FACTS = "marts.fct_transactions"
HOUR = timedelta(hours=1)


@dataclass
class Day:
    """The independent count: what happened, as it was decided and not as it was written."""

    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    runs: Counter[tuple[str, str]] = field(default_factory=Counter)
    failed: Counter[tuple[str, str]] = field(default_factory=Counter)
    misses: Counter[tuple[str, str]] = field(default_factory=Counter)
    late_ticks: Counter[str] = field(default_factory=Counter)
    ticks: int = 0
    lag: dict[str, int] = field(default_factory=dict)
    open_dead_letters: dict[str, int] = field(default_factory=dict)

    def ended(self, kind: str, name: str, seconds: float, failed: bool) -> None:
        self.runs[kind, name] += 1
        self.failed[kind, name] += failed
        if not failed:
            self.seconds.setdefault((kind, name), []).append(seconds)


class Clock:
    """Stands still until it is moved."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def play_day(connection: Connection, project: Path, on: date) -> Day:
    """200 runs, one every seven minutes, each with a tick at its end. Three kinds of failure, two kinds of misses."""
    day = Day()
    start = datetime.combine(on, time(0, 20), UTC)
    late: dict[str, str] = {}
    for number in range(RUNS):
        clock = Clock(start + timedelta(minutes=7) * number)
        _run(connection, project, number, clock, day)
        _tick(connection, number, clock(), day, late)
    return day


def _run(connection: Connection, project: Path, number: int, clock: Clock, day: Day) -> None:
    read, build = 2.0 + (number * 37 % 101) / 10, 5.0 + (number * 53 % 89) / 4
    read_fails, build_fails = number % 23 == 5, number % 31 == 7
    command = "run" if number % 4 else "dagster warehouse"
    try:
        with recorded_run(connection, command, "schedule", project, clock=clock) as run:
            with run.step("ingest", PAYMENTS) as step:
                clock.wait(read)
                if read_fails:
                    raise TransientError("Kafka does not answer.")
                step.rows, step.dead = 1000 + number, number % 3
            with run.step("build"):
                clock.wait(build)
                status = "error" if build_fails else "success"
                run.record_nodes([NodeResult("model.payments_warehouse.fct_transactions", status, "", build / 2, 10)])
                if build_fails:
                    raise DataError("a test failed")
    except (TransientError, DataError):
        pass
    day.ended("feed", PAYMENTS, read, read_fails)
    if not read_fails:
        day.ended("step", "build", build, build_fails)
        day.ended("model", "fct_transactions", build / 2, build_fails)
    day.ended("run", command, read + build, read_fails or build_fails)


def _tick(connection: Connection, number: int, at: datetime, day: Day, late: dict[str, str]) -> None:
    # One partition stands still in the morning, and the models are left behind in the afternoon.
    frozen = HOUR * (number - 40) if 40 <= number < 75 else timedelta(minutes=5)
    behind = HOUR * (number - 120) if 120 <= number < 160 else timedelta(minutes=9)
    facts, hop = max((frozen, PAYMENTS), (behind, "stg_payments__transactions"))
    ages = [
        _age(PAYMENTS, frozen, Budget(2 * HOUR, 24 * HOUR), PAYMENTS),
        _age(USERS, timedelta(minutes=3), Budget(2 * HOUR, 24 * HOUR), USERS),
        _age(FACTS, facts, Budget(3 * HOUR, 25 * HOUR), hop),
    ]
    record_ages(connection, ages, at)
    day.ticks += 1
    for one in ages:
        if one.state == "error":
            day.late_ticks[one.table] += 1
            if late.get(one.table) != "error":
                day.misses["feed" if "." in one.hop else "step", one.hop if "." in one.hop else "build"] += 1
        late[one.table] = one.state
    feeds = []
    for feed, lag, dead in ((PAYMENTS, number * 13 % 700, 100 - number // 4), (USERS, number % 9, number // 50)):
        oldest = at - timedelta(minutes=number) if dead else None
        feeds.append(FeedStatus(feed, "kafka", Account(open_dead_letters=dead, oldest_dead_letter=oldest), lag=lag))
        day.lag[feed], day.open_dead_letters[feed] = lag, dead
    record_queues(connection, Status(tuple(feeds), at), at)


def _age(table: str, age: timedelta, budget: Budget, hop: str) -> TableAge:
    where: dict[str, Any] = {"warn_after": budget.warn_after, "error_after": budget.error_after}
    return TableAge(table, age, state=budget.state_of(age), held_by=f"{hop}: as the script has it", hop=hop, **where)

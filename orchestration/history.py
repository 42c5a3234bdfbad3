"""Run history: who ran what, when, with which outcome, in the warehouse itself (schema `ops`).

Written by whoever runs, the command line or Dagster, through the same context managers. A run without work leaves its
row too: source freshness is the last success of a feed's step. While it works a thread renews its heartbeat; a run
whose heartbeat stopped is closed as failed by the next one. Whoever runs cuts off what is older than the retention.
"""

import os
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg2.extensions
from psycopg2.extras import execute_values

from ingestion.errors import ErrorClass, WarehouseError
from ingestion.settings import Settings

if TYPE_CHECKING:
    from orchestration.transform import NodeResult

Connection = psycopg2.extensions.connection
# What time it is; None leaves it to the database, whose clock all runners share.
Clock = Callable[[], datetime]

HEARTBEAT_S = 15.0
# A run that was silent for so long is over: its process was killed, or lost the database for good.
ABANDONED_AFTER = timedelta(minutes=5)
# dbt's words for what did not pass.
FAILED = ("fail", "error", "runtime error")
RETENTION_SETTING = "WAREHOUSE_HISTORY_DAYS"
RETENTION_DAYS = 400.0


@dataclass
class Step:
    """Figures of a step, filled in by the block that runs it."""

    rows: int | None = None
    dead: int | None = None
    offered: int | None = None


@dataclass(frozen=True)
class Run:
    """A run being recorded."""

    run_id: str
    connection: Connection
    clock: Clock | None = None

    def now(self) -> datetime | None:
        return self.clock() if self.clock else None

    @contextmanager
    def step(self, name: str, feed: str = "") -> Iterator[Step]:
        """Record a step around a block: running, then success or failed with the error's class."""
        step = Step()
        self._execute(
            "insert into ops.run_steps (run_id, step, feed, started_at, outcome) "
            "values (%s, %s, %s, coalesce(%s, clock_timestamp()), 'running') "
            "on conflict (run_id, step, feed) do update set started_at = excluded.started_at, outcome = 'running'",
            (self.run_id, name, feed, self.now()),
        )
        outcome: tuple[str, str | None, str | None] = ("success", None, None)
        try:
            yield step
        except BaseException as error:
            outcome = ("failed", error_class_of(error), _message_of(error))
            raise
        finally:
            self._execute(
                "update ops.run_steps set finished_at = coalesce(%s, clock_timestamp()), outcome = %s, "
                "error_class = %s, message = %s, rows = %s, dead = %s, offered = %s "
                "where (run_id, step, feed) = (%s, %s, %s)",
                (self.now(), *outcome, step.rows, step.dead, step.offered, self.run_id, name, feed),
            )
            self.beat()

    def beat(self) -> None:
        """The run is alive."""
        self._execute(
            "update ops.runs set heartbeat_at = coalesce(%s, clock_timestamp()) where run_id = %s",
            (self.now(), self.run_id),
        )

    def record_nodes(self, nodes: "Sequence[NodeResult]", *, whole: bool = False) -> None:
        """What became of the models and seeds of a build, and of the tests that did not pass. A second try replaces.

        Args:
            whole: nothing was left out, so that what failed before and is not there has been taken away.
        """
        self._note_failing(nodes, whole)
        rows = []
        for node in nodes:
            kind, name = node.node.partition(".")[0], _short_name(node)
            is_built = kind in ("model", "seed", "snapshot")
            if is_built or (kind in ("test", "unit_test") and node.status not in ("pass", "skipped")):
                # Of a view Postgres says -1.
                written = node.rows if node.rows is not None and node.rows >= 0 else None
                rows.append((self.run_id, kind, name, node.status, node.seconds, written, node.failures, self.now()))
        if not rows:
            return
        try:
            with self.connection.cursor() as cursor:
                execute_values(
                    cursor,
                    "insert into ops.run_nodes (run_id, kind, node, status, seconds, rows, failures, finished_at) "
                    "values %s on conflict (run_id, kind, node) do update set status = excluded.status, "
                    "seconds = excluded.seconds, rows = excluded.rows, failures = excluded.failures, "
                    "finished_at = excluded.finished_at",
                    rows,
                    template="(%s, %s, %s, %s, %s, %s, %s, coalesce(%s, clock_timestamp()))",
                    page_size=len(rows),
                )
        except (psycopg2.OperationalError, psycopg2.InterfaceError):
            return

    def _note_failing(self, nodes: "Sequence[NodeResult]", whole: bool) -> None:
        """Keep ops.failing_nodes true: what failed is there until it has passed. Of what was skipped nothing is new."""
        seen = [(node.node.partition(".")[0], _short_name(node), node.status) for node in nodes]
        passed = [(kind, name) for kind, name, status in seen if status not in (*FAILED, "skipped")]
        self._execute(
            "delete from ops.failing_nodes as f "
            "where (f.kind, f.node) in (select * from unnest(%s::text[], %s::text[])) or (%s and f.kind = any(%s) "
            "and (f.kind, f.node) not in (select * from unnest(%s::text[], %s::text[])))",
            (
                [kind for kind, _ in passed],
                [name for _, name in passed],
                whole,
                [kind for kind, _, _ in seen],
                [kind for kind, _, _ in seen],
                [name for _, name, _ in seen],
            ),
        )
        failed = [one for one in seen if one[2] in FAILED]
        if failed:
            kinds, names, statuses = (list(column) for column in zip(*failed, strict=True))
            self._execute(
                "insert into ops.failing_nodes (kind, node, status, run_id, failed_at) "
                "select f.kind, f.node, f.status, %s, coalesce(%s, clock_timestamp()) "
                "from unnest(%s::text[], %s::text[], %s::text[]) as f (kind, node, status) on conflict (kind, node) "
                "do update set status = excluded.status, run_id = excluded.run_id, failed_at = excluded.failed_at",
                (self.run_id, self.now(), kinds, names, statuses),
            )

    def _execute(self, statement: str, values: tuple[object, ...]) -> None:
        _execute(self.connection, statement, values)


def _short_name(node: "NodeResult") -> str:
    """A node's name without its kind and the project's name."""
    rest = node.node.partition(".")[2]
    return rest.partition(".")[2] or rest


def _execute(connection: Connection, statement: str, values: tuple[object, ...]) -> None:
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement, values)
    except (psycopg2.OperationalError, psycopg2.InterfaceError):
        # The database went away: that failure is the run's own to tell, and the row stays "running" with an old
        # heartbeat.
        return


@contextmanager
def recorded_run(
    connection: Connection, command: str, trigger: str, project_dir: Path, *, clock: Clock | None = None
) -> Iterator[Run]:
    """Record a run around a block. The connection is in autocommit from here on, and shared with the heartbeat.

    Args:
        trigger: who asked: `manual`, `schedule`, `sensor`, `demo`.
        clock: another clock than the database's.
    """
    connection.autocommit = True
    run = Run(f"{uuid.uuid4()}", connection, clock)
    close_abandoned(connection, run.now())
    with connection.cursor() as cursor:
        cursor.execute(
            "insert into ops.runs (run_id, command, trigger, started_at, heartbeat_at, outcome, code_version) "
            "select %s, %s, %s, t.now, t.now, 'running', %s from (select coalesce(%s, clock_timestamp()) as now) as t",
            (run.run_id, command, trigger, code_version(project_dir), run.now()),
        )
    outcome: tuple[str, str | None, str | None] = ("success", None, None)
    try:
        with _beating(run):
            yield run
    except BaseException as error:
        outcome = ("failed", error_class_of(error), _message_of(error))
        raise
    finally:
        _execute(
            connection,
            "update ops.runs set finished_at = t.now, heartbeat_at = t.now, outcome = %s, error_class = %s, "
            "message = %s from (select coalesce(%s, clock_timestamp()) as now) as t where run_id = %s",
            (*outcome, run.now(), run.run_id),
        )


@contextmanager
def _beating(run: Run) -> Iterator[None]:
    """Renew the run's heartbeat while the block works, whatever it waits for."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            run.beat()

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def close_abandoned(connection: Connection, now: datetime | None = None) -> None:
    """Mark runs and their steps as failed whose heartbeat stopped: nobody is left to do it."""
    _execute(
        connection,
        "with abandoned as ("
        "  update ops.runs set outcome = 'failed', error_class = 'killed', message = 'no heartbeat any more', "
        "  finished_at = heartbeat_at "
        "  where outcome = 'running' and heartbeat_at < coalesce(%s, clock_timestamp()) - %s "
        "  returning run_id, heartbeat_at"
        ") update ops.run_steps as s set outcome = 'failed', error_class = 'killed', finished_at = a.heartbeat_at, "
        "message = 'no heartbeat any more' from abandoned as a where s.run_id = a.run_id and s.outcome = 'running'",
        (now, ABANDONED_AFTER),
    )


def retention_of(settings: Settings) -> timedelta:
    """How long the history is kept."""
    return timedelta(days=settings.number(RETENTION_SETTING, RETENTION_DAYS))


def trim_history(connection: Connection, keep: timedelta, now: datetime | None = None) -> None:
    """Remove what is older than `keep`: runs with their steps and models, what ticks measured, alerts
    that were resolved. Commits."""
    with connection, connection.cursor() as cursor:
        for table, column in (
            ("runs", "started_at"),
            ("table_ages", "measured_at"),
            ("queue_depths", "measured_at"),
            ("incidents", "resolved_at"),
        ):
            # By an index, so that it costs nothing where there is nothing to do.
            cursor.execute(
                f"delete from ops.{table} where {column} < coalesce(%s, clock_timestamp()) - %s", (now, keep)
            )


def error_class_of(error: BaseException) -> str:
    if isinstance(error, WarehouseError):
        return error.error_class.value
    return "interrupted" if isinstance(error, KeyboardInterrupt | GeneratorExit) else ErrorClass.INTERNAL.value


def _message_of(error: BaseException) -> str:
    # A WarehouseError's message holds coordinates only; another error's text might hold a record's.
    return error.message[:2000] if isinstance(error, WarehouseError) else type(error).__name__


def code_version(project_dir: Path) -> str:
    """The project's git revision, or the WAREHOUSE_CODE_VERSION an image was built with, or unknown."""
    if named := os.environ.get("WAREHOUSE_CODE_VERSION"):
        return named
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=project_dir,
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()

"""Run history: who ran what, when, with which outcome, in the warehouse itself (schema `ops`).

Written by whoever runs, the command line or Dagster, through the same context managers. A run without work leaves its
row too: source freshness is the last success of a feed's step.
"""

import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg2.extensions

from ingestion.errors import ErrorClass, WarehouseError

Connection = psycopg2.extensions.connection


@dataclass
class Step:
    """Figures of a step, filled in by the block that runs it."""

    rows: int | None = None
    dead: int | None = None


@dataclass(frozen=True)
class Run:
    """A run being recorded."""

    run_id: str
    connection: Connection

    @contextmanager
    def step(self, name: str, feed: str = "") -> Iterator[Step]:
        """Record a step around a block: running, then success or failed with the error's class."""
        step = Step()
        self._execute(
            "insert into ops.run_steps (run_id, step, feed, started_at, outcome) "
            "values (%s, %s, %s, clock_timestamp(), 'running') "
            "on conflict (run_id, step, feed) do update set started_at = excluded.started_at, outcome = 'running'",
            (self.run_id, name, feed),
        )
        outcome: tuple[str, str | None, str | None] = ("success", None, None)
        try:
            yield step
        except BaseException as error:
            outcome = ("failed", error_class_of(error), _message_of(error))
            raise
        finally:
            self._execute(
                "update ops.run_steps set finished_at = clock_timestamp(), outcome = %s, error_class = %s, "
                "message = %s, rows = %s, dead = %s where (run_id, step, feed) = (%s, %s, %s)",
                (*outcome, step.rows, step.dead, self.run_id, name, feed),
            )
            self._execute("update ops.runs set heartbeat_at = clock_timestamp() where run_id = %s", (self.run_id,))

    def _execute(self, statement: str, values: tuple[object, ...]) -> None:
        _execute(self.connection, statement, values)


def _execute(connection: Connection, statement: str, values: tuple[object, ...]) -> None:
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement, values)
    except (psycopg2.OperationalError, psycopg2.InterfaceError):
        # The database went away: that failure is the run's own to tell, and the row stays "running" with an old
        # heartbeat.
        return


@contextmanager
def recorded_run(connection: Connection, command: str, trigger: str, project_dir: Path) -> Iterator[Run]:
    """Record a run around a block. The connection is used for nothing else and set to autocommit.

    Args:
        trigger: who asked: `manual`, `schedule`, `sensor`, `demo`.
    """
    connection.autocommit = True
    run = Run(f"{uuid.uuid4()}", connection)
    with connection.cursor() as cursor:
        cursor.execute(
            "insert into ops.runs (run_id, command, trigger, started_at, heartbeat_at, outcome, code_version) "
            "values (%s, %s, %s, clock_timestamp(), clock_timestamp(), 'running', %s)",
            (run.run_id, command, trigger, code_version(project_dir)),
        )
    outcome: tuple[str, str | None, str | None] = ("success", None, None)
    try:
        yield run
    except BaseException as error:
        outcome = ("failed", error_class_of(error), _message_of(error))
        raise
    finally:
        _execute(
            connection,
            "update ops.runs set finished_at = clock_timestamp(), heartbeat_at = clock_timestamp(), outcome = %s, "
            "error_class = %s, message = %s where run_id = %s",
            (*outcome, run.run_id),
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

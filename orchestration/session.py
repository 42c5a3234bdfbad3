"""What a Dagster run holds while it runs: the embedded services it needs, and its row in the warehouse's run history.

    first asset that works -> services up, tables in place, a row in ops.runs -> ... -> run ends: row closed, lease ends

Opened by the first asset and not before, so that a database that is down fails that asset with the warehouse's own
message, and closed by Dagster when the run ends. In the in-process executor, which all jobs here use, a Dagster run is
one run of the history; an executor with a process a step would write one for each step.
"""

import contextlib
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import dagster as dg

from ingestion.database import connect
from ingestion.errors import TransientError, WarehouseError
from ingestion.retry import RetryPolicy
from ingestion.settings import Settings
from orchestration.console import Reporter
from orchestration.history import Run, recorded_run
from orchestration.run import prepare
from orchestration.services import running
from orchestration.transform import BuildReport
from orchestration.unattended import RETRYABLE

RESOURCE_KEY = "warehouse"
# Of a run: who asked for it. What a person launches carries none.
TRIGGER_TAG = "warehouse/trigger"
# On a run whose data tests look at everything: see macros/untested.sql.
FULL_TESTS_TAG = "warehouse/full_tests"


@dataclass
class WarehouseSession:
    """The warehouse as the assets of one run see it."""

    settings: Settings
    command: str
    trigger: str
    # What the last try of a build left, for the next one.
    report: BuildReport | None = None
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _opened: tuple[Settings, Run] | None = None
    _failures: dict[str, BaseException] = field(default_factory=dict)

    @contextlib.contextmanager
    def attempt(self, work: str) -> Iterator[tuple[Settings, Run]]:
        """Settings in which every service has an address, and the run being recorded, for a block of work.

        A block that fails makes the recorded run a failed one, unless the same work is done again and succeeds; the
        error goes on to the caller.
        """
        try:
            with _interrupts_as_python_has_them():
                yield self._opened or self._open()
        except BaseException as error:
            self._failures[work] = error
            if isinstance(error, KeyboardInterrupt):
                raise dg.DagsterExecutionInterruptedError from None
            raise
        self._failures.pop(work, None)

    def _open(self) -> tuple[Settings, Run]:
        with contextlib.ExitStack() as stack:
            settings = stack.enter_context(running(self.settings))
            prepare(settings)
            # Postgres cuts a longer name, and says so on stderr.
            connection = connect(settings, purpose=self.command[:44])
            stack.callback(connection.close)
            run = stack.enter_context(recorded_run(connection, self.command, self.trigger, settings.project_dir))
            self._stack = stack.pop_all()
        self._opened = (settings, run)
        return self._opened

    def close(self) -> None:
        """End the recorded run, with the first failure if there was one, and give up the services."""
        failure = next(iter(self._failures.values()), None)
        if failure is None:
            self._stack.close()
        else:
            self._stack.__exit__(type(failure), failure, failure.__traceback__)


@contextlib.contextmanager
def _interrupts_as_python_has_them() -> Iterator[None]:
    """A terminated run raises KeyboardInterrupt inside: dbt cancels its queries for no other exception."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: not Python's, and then Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def build_session_resource(settings: Settings) -> dg.ResourceDefinition:
    """A `WarehouseSession` for each run. Not resource config: Dagster shows config, and settings hold secrets."""

    @dg.resource(description="Embedded services and the run history, for the length of a run.")
    def warehouse(context: dg.InitResourceContext) -> Iterator[WarehouseSession]:
        run = context.run
        session = WarehouseSession(
            settings,
            command=f"dagster {run.job_name.strip('_').lower()}" if run else "dagster",
            trigger=run.tags.get(TRIGGER_TAG, "manual") if run else "manual",
        )
        try:
            yield session
        finally:
            session.close()

    return warehouse


def session_of(
    context: dg.AssetExecutionContext | dg.OpExecutionContext | dg.AssetCheckExecutionContext,
) -> WarehouseSession:
    """The session of the run an asset works in."""
    return cast(WarehouseSession, getattr(context.resources, RESOURCE_KEY))


def run_retries(settings: Settings) -> tuple[int, RetryPolicy]:
    """How often a step of a run is tried again after an outage, and how long it waits before each."""
    return int(settings.number("WAREHOUSE_RUN_RETRIES", 5)), RetryPolicy(
        base_s=settings.number("WAREHOUSE_RUN_RETRY_SECONDS", 15.0), cap_s=600.0
    )


def to_retry_or_failure(context: dg.AssetExecutionContext | dg.OpExecutionContext, error: WarehouseError) -> Exception:
    """What a step raises for an error: a retry by its class, or a failure that is not tried again.

    A dg.RetryPolicy knows no classes. Waits grow, with full jitter, as those within a run do (ingestion/retry.py).
    """
    most, policy = run_retries(session_of(context).settings)
    attempt = context.retry_number + 1
    if error.error_class not in RETRYABLE or attempt > most:
        return to_failure(error)
    after = error.retry_after_s if isinstance(error, TransientError) else None
    delay = policy.delay(attempt, after, random.uniform)
    context.log.warning(f"{error.message} ({error.error_class}) Try {attempt + 1} of {most + 1} in {delay:.1f} s.")
    retry = dg.RetryRequested(max_retries=most, seconds_to_wait=delay)
    retry.__cause__ = error
    return retry


def to_failure(error: WarehouseError) -> dg.Failure:
    """The warehouse's error as Dagster shows it: what happened, its class, what to do. Not tried again as it is."""
    return dg.Failure(
        description=error.message,
        metadata={"error_class": error.error_class.value, **({"hint": error.hint} if error.hint else {})},
        allow_retries=error.error_class in RETRYABLE,
    )


class LogReporter(Reporter):
    """Progress as lines of the asset's log."""

    def __init__(self, context: dg.AssetExecutionContext | dg.OpExecutionContext) -> None:
        super().__init__()
        # Bars belong to a terminal, and a code server may have been started from one.
        self.terminal = False
        self._log = context.log

    def line(self, text: str) -> None:
        self._log.info(text)

"""The figures of the service level, for the page and for Prometheus: one reading, the same numbers in both.

    a tick taken now (orchestration/ticks.py) + the views marts.rpt_ops__* -> Figures

Ages and queues are those of this moment, also when nothing runs; run times, failures, misses and error budgets are what
the views say of the last days. Changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

import psycopg2
import psycopg2.extensions
import yaml
from psycopg2 import sql

from ingestion.errors import ConfigurationError
from ingestion.feeds import FeedSpec
from ingestion.settings import Settings
from orchestration.ages import TableAge
from orchestration.ticks import Tick, take_tick

Connection = psycopg2.extensions.connection

# Of the curves on the page.
HISTORY_DAYS = 7


@dataclass(frozen=True)
class Pipeline:
    """A row of rpt_ops__pipelines. Seconds are of runs that succeeded."""

    kind: str
    name: str
    runs: int
    failed: int
    failures_per_hundred: float
    p50: float | None
    p95: float | None
    p99: float | None
    last_started: datetime
    last_success: datetime | None


@dataclass(frozen=True)
class Day:
    """A row of rpt_ops__sla_daily."""

    day: date
    kind: str
    name: str
    runs: int
    failed: int
    misses: int
    late_tables: int
    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True)
class Queue:
    """What waits for a feed now; None where it is not known or does not apply."""

    feed: str
    kind: str
    lag: int | None
    open_dead_letters: int | None
    oldest_dead_letter_seconds: float | None


@dataclass(frozen=True)
class Figures:
    """All of it at one moment. `budgets_left`: table -> share of its error budget that is left.

    `span_days`, `objective`: how far the views look back, and the share of ticks that is to be in time.
    """

    tick: Tick
    pipelines: Sequence[Pipeline]
    days: Sequence[Day]
    budgets_left: Mapping[str, float]
    span_days: int
    objective: float

    @property
    def at(self) -> datetime:
        return self.tick.at

    @property
    def ages(self) -> Sequence[TableAge]:
        return self.tick.ages

    @property
    def misses(self) -> dict[tuple[str, str], int]:
        """(kind, pipeline) -> misses that began within the days of the reports. Models have none: the build does."""
        found = {(one.kind, one.name): 0 for one in self.pipelines if one.kind not in ("model", "seed")}
        for day in self.days:
            found[day.kind, day.name] = found.get((day.kind, day.name), 0) + day.misses
        return found

    @property
    def queues(self) -> list[Queue]:
        found = []
        for one in self.tick.status.feeds:
            account = one.account
            oldest = account.oldest_dead_letter if account else None
            found.append(
                Queue(
                    one.feed,
                    one.kind,
                    one.lag,
                    account.open_dead_letters if account else None,
                    (self.at - oldest).total_seconds() if oldest else None,
                )
            )
        return found


@dataclass(frozen=True)
class Curves:
    """Hour by hour, the greatest value of each hour: table -> ages in seconds, feed -> offsets that waited."""

    ages: Mapping[str, list[tuple[datetime, float]]] = field(default_factory=dict)
    lags: Mapping[str, list[tuple[datetime, float]]] = field(default_factory=dict)


def fetch_figures(
    settings: Settings, feeds: Sequence[FeedSpec], connection: Connection, now: datetime | None = None
) -> Figures:
    """Measure now, and read what the views say.

    Args:
        connection: in autocommit.

    Raises:
        ConfigurationError: the views were not built yet, or the project does not parse.
    """
    tick = take_tick(settings, feeds, connection, now)
    days = [Day(*row) for row in _rows(connection, settings, "rpt_ops__sla_daily", _DAYS)]
    pipelines = [Pipeline(*row) for row in _rows(connection, settings, "rpt_ops__pipelines", _PIPELINES)]
    budgets = dict(_rows(connection, settings, "rpt_ops__table_ages", _BUDGETS))
    project = yaml.safe_load((settings.project_dir / "dbt_project.yml").read_text(encoding="utf-8"))
    return Figures(tick, pipelines, days, budgets, project["vars"]["sla_days"], project["vars"]["sla_objective"])


_PIPELINES = (
    "select pipeline_kind, pipeline, run_count, failed_count, failures_per_hundred_runs, p50_seconds, p95_seconds, "
    "p99_seconds, last_started_at, last_success_started_at from {} order by pipeline_kind, pipeline"
)
_DAYS = (
    "select day, pipeline_kind, pipeline, run_count, failed_count, miss_count, late_table_count, p50_seconds, "
    "p95_seconds, p99_seconds from {} order by day, pipeline_kind, pipeline"
)
_BUDGETS = "select table_name, error_budget_left from {} where error_budget_left is not null order by table_name"


def fetch_curves(connection: Connection, now: datetime) -> Curves:
    """What the ticks of the last days measured."""
    return Curves(
        _curve(connection, "table_ages", "table_name", "extract(epoch from age)::double precision", now),
        _curve(connection, "queue_depths", "feed", "lag::double precision", now),
    )


def _curve(
    connection: Connection, table: str, name: str, value: str, now: datetime
) -> dict[str, list[tuple[datetime, float]]]:
    found: dict[str, list[tuple[datetime, float]]] = {}
    with connection.cursor() as cursor:
        cursor.execute(
            f"select {name}, date_trunc('hour', measured_at), max({value}) from ops.{table} "
            f"where measured_at > %s - make_interval(days => {HISTORY_DAYS}) and measured_at <= %s "
            f"and {value} is not null group by 1, 2 order by 1, 2",
            (now, now),
        )
        for key, hour, greatest in cursor.fetchall():
            found.setdefault(key, []).append((hour, greatest))
    return found


def _rows(connection: Connection, settings: Settings, view: str, statement: str) -> list[tuple[Any, ...]]:
    # As macros/generate_schema_name.sql names it.
    schema = settings.get("WAREHOUSE_SCHEMA") or "analytics"
    place = sql.Identifier("marts" if schema == "analytics" else f"{schema}_marts", view)
    try:
        with connection.cursor() as cursor:
            cursor.execute(sql.SQL(statement).format(place))
            return cursor.fetchall()
    except (psycopg2.errors.UndefinedTable, psycopg2.errors.InvalidSchemaName, psycopg2.errors.UndefinedColumn):
        raise ConfigurationError(
            f"{view} was not built yet.", hint="`warehouse run` builds it, or `dbt build --select rpt_ops__*`."
        ) from None

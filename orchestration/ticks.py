"""A tick: the ages of all tables and what waits for every feed, measured at one moment and kept in `ops`.

    ages (orchestration/ages.py) + books and broker (orchestration/status.py) -> ops.table_ages, ops.queue_depths

Every run ends with one; in between, whoever watches takes them (orchestration/watch.py). The reports on the service
level are views over what the ticks left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg2.extensions
from psycopg2.extras import execute_values

from ingestion.feeds import FeedSpec
from ingestion.settings import Settings
from orchestration.ages import TableAge, measure_ages, record_ages
from orchestration.status import Status, fetch_status

Connection = psycopg2.extensions.connection


@dataclass(frozen=True)
class Tick:
    """What was measured at one moment."""

    at: datetime
    ages: list[TableAge]
    status: Status


def take_tick(
    settings: Settings, feeds: Sequence[FeedSpec], connection: Connection, now: datetime | None = None
) -> Tick:
    """Measure, without keeping it.

    Raises:
        ConfigurationError: the project does not parse, or the database refuses us.
    """
    now = now or datetime.now(UTC)
    return Tick(now, measure_ages(settings, connection, now), fetch_status(settings, feeds))


def record_tick(connection: Connection, tick: Tick) -> None:
    """Keep what was measured."""
    record_ages(connection, tick.ages, tick.at)
    record_queues(connection, tick.status, tick.at)


def record_queues(connection: Connection, status: Status, at: datetime) -> None:
    """Keep what waits for each feed. Of a database that did not answer there is nothing to keep."""
    rows = [
        (at, one.feed, one.lag, one.account.open_dead_letters, one.account.oldest_dead_letter)
        for one in status.feeds
        if one.account is not None
    ]
    if rows:
        with connection.cursor() as cursor:
            execute_values(
                cursor,
                "insert into ops.queue_depths (measured_at, feed, lag, open_dead_letters, oldest_dead_letter_at) "
                "values %s on conflict (measured_at, feed) do nothing",
                rows,
            )

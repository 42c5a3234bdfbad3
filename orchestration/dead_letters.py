"""Reading the dead-letter queue: what was set aside, where it came from and why.

Lists show coordinates and reasons, never a payload; the bytes of one record are shown only when asked for.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg2.extensions

from ingestion.errors import ConfigurationError

Connection = psycopg2.extensions.connection

_COLUMNS = (
    "dead_letter_id, feed, stream_name, kafka_partition, kafka_offset, api_window_from, api_window_to, api_page, "
    "api_item, source_time, failed_at, reason, path, message, contract_version, loader_version, attempts, status, "
    "load_id"
)


@dataclass(frozen=True)
class DeadLetter:
    """One record set aside, without its bytes."""

    dead_letter_id: str
    feed: str
    stream_name: str
    kafka_partition: int | None
    kafka_offset: int | None
    api_window_from: datetime | None
    api_window_to: datetime | None
    api_page: int | None
    api_item: int | None
    source_time: datetime | None
    failed_at: datetime
    reason: str
    path: str
    message: str
    contract_version: str
    loader_version: str
    attempts: int
    status: str
    load_id: str

    @property
    def coordinates(self) -> str:
        if self.kafka_partition is not None:
            return f"{self.stream_name}/{self.kafka_partition}@{self.kafka_offset}"
        return f"{self.stream_name} {self.api_window_from:%Y-%m-%d} page {self.api_page} item {self.api_item}"

    def as_dict(self) -> dict[str, Any]:
        return {
            name: value.isoformat() if isinstance(value, datetime) else value
            for name, value in {**self.__dict__, "coordinates": self.coordinates}.items()
        }


def list_dead_letters(
    connection: Connection,
    *,
    feed: str | None = None,
    reason: str | None = None,
    since: datetime | None = None,
    limit: int = 50,
) -> list[DeadLetter]:
    """Dead letters of committed loads, newest first."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"select {_COLUMNS} from ops.dead_letters where (%(feed)s is null or feed = %(feed)s) "
            "and (%(reason)s is null or reason = %(reason)s) and (%(since)s is null or failed_at >= %(since)s) "
            "order by failed_at desc, kafka_partition, kafka_offset, api_page, api_item limit %(limit)s",
            {"feed": feed, "reason": reason, "since": since, "limit": limit},
        )
        return [DeadLetter(*row) for row in cursor.fetchall()]


def fetch_dead_letter(connection: Connection, dead_letter_id: str) -> tuple[DeadLetter, bytes | None, bytes, Any]:
    """One dead letter with its key, value and headers.

    Raises:
        ConfigurationError: no committed dead letter has this id.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f"select {_COLUMNS}, raw_key, raw_value, headers from ops.dead_letters where dead_letter_id = %s",
            (dead_letter_id,),
        )
        row = cursor.fetchone()
    if row is None:
        raise ConfigurationError(
            f"There is no dead letter {dead_letter_id}.", hint="`warehouse dead-letters list` shows the ids."
        )
    key = bytes(row[-3]) if row[-3] is not None else None
    return DeadLetter(*row[:-3]), key, bytes(row[-2]), row[-1]

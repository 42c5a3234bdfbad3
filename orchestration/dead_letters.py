"""Reading the dead-letter queue: what was set aside, where it came from and why.

Lists show coordinates and reasons, never a payload; the bytes of one record are shown only when asked for, and those
of many only in a file of the caller's own.
"""

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingestion.errors import ConfigurationError

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


class Status(StrEnum):
    """What became of a dead letter."""

    OPEN = "open"
    REPLAYED = "replayed"
    DISCARDED = "discarded"


_COLUMNS = (
    "dead_letter_id, feed, stream_name, kafka_partition, kafka_offset, api_window_from, api_window_to, api_page, "
    "api_item, source_time, failed_at, reason, path, message, contract_version, loader_version, attempts, status, "
    "load_id, replay_load_id, resolved_at, resolved_by, resolved_because, "
    # The path of a file is its place; the key of a message is payload.
    "case when stream_name like 'files:%%' then raw_key end"
)
_FILTER = (
    "(%(feed)s is null or feed = %(feed)s) and (%(reason)s is null or reason = %(reason)s) "
    "and (%(status)s is null or status = %(status)s) and (%(since)s::timestamptz is null or failed_at >= %(since)s) "
    "and (%(until)s::timestamptz is null or failed_at < %(until)s)"
)


@dataclass(frozen=True)
class Filter:
    """Which dead letters; None leaves one open. Times are those of the failure, `until` the first left out."""

    feed: str | None = None
    reason: str | None = None
    status: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True)
class DeadLetter:
    """One record set aside, without its bytes. `resolved_` says who replayed or discarded it, when and why."""

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
    replay_load_id: str | None
    resolved_at: datetime | None
    resolved_by: str | None
    resolved_because: str | None
    file_path: bytes | None

    @property
    def coordinates(self) -> str:
        if self.file_path is not None:
            from ingestion.files import show_path

            return f"{self.stream_name}/{show_path(bytes(self.file_path))}"
        if self.kafka_partition is not None:
            return f"{self.stream_name}/{self.kafka_partition}@{self.kafka_offset}"
        return f"{self.stream_name} {self.api_window_from:%Y-%m-%d} page {self.api_page} item {self.api_item}"

    def as_dict(self) -> dict[str, Any]:
        return {
            name: value.isoformat() if isinstance(value, datetime) else value
            for name, value in {**self.__dict__, "coordinates": self.coordinates}.items()
            if name != "file_path"
        }


def list_dead_letters(connection: "Connection", wanted: Filter, *, limit: int = 50) -> list[DeadLetter]:
    """Dead letters of committed loads, newest first."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"select {_COLUMNS} from ops.dead_letters where {_FILTER} "
            "order by failed_at desc, kafka_partition, kafka_offset, api_page, api_item limit %(limit)s",
            {**wanted.__dict__, "limit": limit},
        )
        return [DeadLetter(*row) for row in cursor.fetchall()]


@dataclass(frozen=True)
class Group:
    """Dead letters of one feed, reason and status."""

    feed: str
    reason: str
    status: str
    letters: int
    oldest: datetime
    newest: datetime

    @property
    def oldest_age_seconds(self) -> float:
        return (datetime.now(UTC) - self.oldest).total_seconds()

    def as_dict(self) -> dict[str, Any]:
        times = {"oldest": self.oldest.isoformat(), "newest": self.newest.isoformat()}
        return {**self.__dict__, **times, "oldest_age_seconds": self.oldest_age_seconds}


def count_dead_letters(connection: "Connection", wanted: Filter) -> list[Group]:
    """Dead letters by feed, reason and status, the most frequent of a feed first."""
    with connection.cursor() as cursor:
        cursor.execute(
            "select feed, reason, status, count(*), min(failed_at), max(failed_at) from ops.dead_letters "
            f"where {_FILTER} group by feed, reason, status order by feed, count(*) desc, reason, status",
            wanted.__dict__,
        )
        return [Group(*row) for row in cursor.fetchall()]


@dataclass(frozen=True)
class Event:
    """What somebody did with a dead letter."""

    acted_at: datetime
    acted_by: str
    action: str
    because: str | None
    load_id: str | None
    contract_version: str
    reason: str | None
    path: str | None
    message: str | None

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "acted_at": self.acted_at.isoformat()}

    def __str__(self) -> str:
        why = [f"{self.reason} at {self.path}: {self.message}"] if self.reason else []
        why += [f"by load {self.load_id}"] if self.load_id else []
        why += [self.because] if self.because else []
        return f"{self.acted_at:%Y-%m-%d %H:%M:%S} {self.action} by {self.acted_by}" + "".join(f"; {w}" for w in why)


def fetch_events(connection: "Connection", dead_letter_id: str) -> list[Event]:
    """The audit of one dead letter, oldest first."""
    with connection.cursor() as cursor:
        cursor.execute(
            "select acted_at, acted_by, action, because, load_id, contract_version, reason, path, message "
            "from ops.dead_letter_events where dead_letter_id = %s order by event_id",
            (dead_letter_id,),
        )
        return [Event(*row) for row in cursor.fetchall()]


def require_letters(connection: "Connection", ids: Sequence[str]) -> None:
    """Nothing when every id is a dead letter's.

    Raises:
        ConfigurationError: some are not.
    """
    with connection.cursor() as cursor:
        cursor.execute("select dead_letter_id from ops.dead_letters where dead_letter_id = any(%s)", (list(ids),))
        known = {row[0] for row in cursor.fetchall()}
    unknown = [one for one in ids if one not in known]
    if unknown:
        raise _no_such_letter(", ".join(unknown))


def _no_such_letter(dead_letter_id: str) -> ConfigurationError:
    return ConfigurationError(
        f"There is no dead letter {dead_letter_id}.", hint="`warehouse dead-letters list` shows the ids."
    )


def export_dead_letters(connection: "Connection", wanted: Filter, path: Path) -> int:
    """Write dead letters with their bytes (base64) as JSON lines to a new file only its owner reads; how many.

    Raises:
        ConfigurationError: there is such a file already.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigurationError(f"{path} is there already.", hint="Name a new file; none is overwritten.") from None
    count = 0
    # A named cursor: what there is need not fit into memory.
    with os.fdopen(descriptor, "w", encoding="utf-8") as file, connection, connection.cursor("export") as cursor:
        cursor.execute(
            f"select {_COLUMNS}, raw_key, raw_value, headers from ops.dead_letters where {_FILTER} "
            "order by feed, failed_at, kafka_partition, kafka_offset, api_page, api_item",
            wanted.__dict__,
        )
        cursor.itersize = 500
        for *columns, key, value, headers in cursor:
            line = DeadLetter(*columns).as_dict() | {
                "key_base64": _base64(key),
                "value_base64": _base64(value),
                "headers": headers,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    return count


def _base64(value: Any) -> str | None:
    return None if value is None else base64.b64encode(bytes(value)).decode("ascii")


def fetch_dead_letter(connection: "Connection", dead_letter_id: str) -> tuple[DeadLetter, bytes | None, bytes, Any]:
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
        raise _no_such_letter(dead_letter_id)
    key = bytes(row[-3]) if row[-3] is not None else None
    return DeadLetter(*row[:-3]), key, bytes(row[-2]), row[-1]

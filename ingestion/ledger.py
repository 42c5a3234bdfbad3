"""The warehouse's own account of what it read: writers, streams, positions, and the sweep of what never committed.

Everything here is about one feed and one connection. A load is true when its row stands in `_dlt_loads`; what an
interrupted load left behind is invisible to every reader and removed by the next writer.
"""

import contextlib
import getpass
import json
import os
import random
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import psycopg2
import psycopg2.extensions
from psycopg2 import sql

from ingestion.errors import FeedBusyError
from ingestion.feeds import FeedSpec

Connection = psycopg2.extensions.connection

# First key of the two-part advisory lock; any constant of our own.
LOCK_SPACE = 0x9A71

# How the names of those among the loads begun start that only read, and will never commit.
READING = "reading-"


@dataclass(frozen=True)
class Writer:
    """The right to commit for a feed, until somebody takes it over."""

    feed: FeedSpec
    token: int


@dataclass(frozen=True)
class Stream:
    """One incarnation of a topic or endpoint. Positions mean something within one stream only."""

    stream_id: int
    origin: str
    name: str
    incarnation: str
    begins_at: Mapping[int, int] = field(default_factory=dict)
    # "files" for a folder; None means what the feed is.
    kind: Literal["files"] | None = None
    # Which records stand behind the positions not read yet, where another run may find others there.
    edition: str = ""


@dataclass(frozen=True)
class EmptyWindow:
    """A window [start, stop) of an API that held nothing, and when that was first seen."""

    start: datetime
    stop: datetime
    found_at: datetime


def holder_name() -> str:
    """Who we are, for the message another runner gets."""
    return f"{getpass.getuser()}@{socket.gethostname()} pid {os.getpid()}"


@contextmanager
def writing(
    connection: Connection, feed: FeedSpec, *, take_over: bool = False, wait_s: float = 0.0
) -> Iterator[Writer]:
    """Hold the feed's lock and a fresh fencing token while the block runs.

    Args:
        wait_s: seconds to wait for another writer to finish.
        take_over: end the session of a writer that holds the lock. It cannot commit any more: the token is ours.

    Raises:
        FeedBusyError: another writer holds the feed; the message says who and since when.
    """
    connection.autocommit = True
    with connection.cursor() as cursor:
        if not _wait_for_lock(cursor, feed, wait_s) and not (take_over and _end_holder(cursor, feed)):
            cursor.execute(
                sql.SQL("select holder, acquired_at from {} where feed = %s").format(_table(feed, "_writers")),
                (feed.name,),
            )
            row = cursor.fetchone()
            who = f"{row[0]} since {row[1]:%Y-%m-%d %H:%M:%S} UTC" if row else "another writer"
            raise FeedBusyError(
                f"{feed.name} is being written by {who}.",
                hint="Wait for it to finish. If it is stuck, `warehouse ingest --take-over` ends its right to commit.",
            )
        _end_load_sessions(cursor, feed)
        cursor.execute(
            sql.SQL(
                "insert into {} as w (feed, token, holder, acquired_at) values (%s, 1, %s, now()) "
                "on conflict (feed) do update set token = w.token + 1, holder = excluded.holder, acquired_at = now() "
                "returning token"
            ).format(_table(feed, "_writers")),
            (feed.name, holder_name()),
        )
        token = _one(cursor)[0]
    try:
        yield Writer(feed, token)
    finally:
        # A session that was ended holds no lock, and must not hide why the block failed.
        with contextlib.suppress(psycopg2.Error), connection.cursor() as cursor:
            cursor.execute("select pg_advisory_unlock(%s, hashtext(%s))", (LOCK_SPACE, feed.name))


def load_session_name(feed: FeedSpec) -> str:
    """The application_name of the sessions dlt copies with, as Postgres keeps it (63 bytes)."""
    return f"payments-warehouse:{feed.name}"[:63]


def _end_load_sessions(cursor: psycopg2.extensions.cursor, feed: FeedSpec) -> None:
    """End what an earlier writer left copying: the lock is ours, so none of it can become true.

    A writer that froze between a COPY into the ledger and its commit would hold up ours in the exclusion constraint.
    """
    cursor.execute(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity "
        "where datname = current_database() and usename = current_user and application_name = %s",
        (load_session_name(feed),),
    )


def _wait_for_lock(cursor: psycopg2.extensions.cursor, feed: FeedSpec, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while not _try_lock(cursor, feed):
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(random.uniform(0.05, 0.3), max(deadline - time.monotonic(), 0.0)))
    return True


@contextmanager
def fenced(connection: Connection, writer: Writer) -> Iterator[psycopg2.extensions.cursor]:
    """One transaction that is true only while the writer holds its feed: no taker-over can come between.

    Raises:
        FeedBusyError: the feed was taken over; nothing of the block is true.
    """
    connection.autocommit = False
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(
                sql.SQL("select token from {} where feed = %s for share").format(_table(writer.feed, "_writers")),
                (writer.feed.name,),
            )
            if _one(cursor)[0] != writer.token:
                raise FeedBusyError(
                    f"{writer.feed.name} was taken over by another writer; this command changed nothing more.",
                    hint="Nothing is lost: run it again.",
                )
            yield cursor
    finally:
        if not connection.closed:
            connection.autocommit = True


def _try_lock(cursor: psycopg2.extensions.cursor, feed: FeedSpec) -> bool:
    cursor.execute("select pg_try_advisory_lock(%s, hashtext(%s))", (LOCK_SPACE, feed.name))
    return bool(_one(cursor)[0])


def _end_holder(cursor: psycopg2.extensions.cursor, feed: FeedSpec) -> bool:
    """End the session that holds the feed's lock and take the lock; False when another was quicker."""
    cursor.execute(
        "select pg_terminate_backend(pid, 10000) from pg_locks where locktype = 'advisory' and granted "
        "and database = (select oid from pg_database where datname = current_database()) "
        "and classid = %s and objid::bigint = hashtext(%s)::bigint & 4294967295 and objsubid = 2",
        (LOCK_SPACE, feed.name),
    )
    return _try_lock(cursor, feed)


def begin_load(connection: Connection, writer: Writer, load_id: str) -> None:
    """Note a load before its first row can reach the database, so that a sweep knows what to look for."""
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL("insert into {} (load_id, feed, writer_token) values (%s, %s, %s)").format(
                _table(writer.feed, "_loads_begun")
            ),
            (load_id, writer.feed.name, writer.token),
        )


def summarize(connection: Connection, feed: FeedSpec) -> None:
    """Bring the raw table's index of loads up to date, which Postgres does only now and then.

    Pages it does not know yet are searched for every load: by the guard of each commit, and by the models.
    """
    with connection.cursor() as cursor:
        cursor.execute("select brin_summarize_new_values(%s::regclass)", (f"{feed.source}.{feed.table}__load",))


def sweep(connection: Connection, feed: FeedSpec) -> list[str]:
    """Remove what loads left that began and never committed; returns their load ids.

    Loads of the last week are looked at again: a writer that was stopped, taken over and woke up can leave rows
    after the first sweep (it cannot commit them).
    """
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL("delete from {begun} where feed = %s and load_id in (select load_id from {loads})").format(
                begun=_table(feed, "_loads_begun"), loads=_table(feed, "_dlt_loads")
            ),
            (feed.name,),
        )
        cursor.execute(
            sql.SQL(
                "select load_id, swept_at from {begun} where feed = %s "
                "and (swept_at is null or begun_at > now() - interval '7 days')"
            ).format(begun=_table(feed, "_loads_begun"), loads=_table(feed, "_dlt_loads")),
            (feed.name,),
        )
        begun = cursor.fetchall()
        load_ids = [row[0] for row in begun]
        if load_ids:
            for table in (feed.table, "_dead_letters", "_ledger", "_files"):
                cursor.execute(
                    sql.SQL("delete from {} where _dlt_load_id = any(%s)").format(_table(feed, table)), (load_ids,)
                )
            cursor.execute(
                sql.SQL("update {} set replay_load_id = null where replay_load_id = any(%s)").format(
                    _table(feed, "_dead_letters")
                ),
                (load_ids,),
            )
            cursor.execute(
                sql.SQL("update {} set swept_at = now() where load_id = any(%s)").format(_table(feed, "_loads_begun")),
                (load_ids,),
            )
    return [load_id for load_id, swept_at in begun if swept_at is None and not load_id.startswith(READING)]


def find_streams(connection: Connection, feed: FeedSpec) -> list[Stream]:
    """The source's streams that hold committed intervals or follow one that was cut, oldest first; no folders."""
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "select stream_id, origin, name, incarnation, begins_at from {streams} where feed = %s "
                "and kind <> 'files' and (begins_at <> '{{}}' or stream_id in "
                "(select stream_id from {ledger} where _dlt_load_id in (select load_id from {loads}))) "
                "order by stream_id"
            ).format(
                streams=_table(feed, "_streams"), ledger=_table(feed, "_ledger"), loads=_table(feed, "_dlt_loads")
            ),
            (feed.name,),
        )
        return [
            Stream(stream_id, origin, name, incarnation, {int(p): offset for p, offset in begins_at.items()})
            for stream_id, origin, name, incarnation, begins_at in cursor.fetchall()
        ]


def match_stream(streams: Sequence[Stream], origin: str, name: str, incarnation: str) -> Stream | None:
    """The stream a topic of this identity is read into: the newest, where a log was cut and goes on as another."""
    return next(
        (
            stream
            for stream in reversed(streams)
            if (stream.origin, stream.name, stream.incarnation.partition("#")[0]) == (origin, name, incarnation)
        ),
        None,
    )


def ensure_stream(
    connection: Connection,
    feed: FeedSpec,
    origin: str,
    name: str,
    incarnation: str,
    begins_at: Mapping[int, int] | None = None,
    kind: Literal["files"] | None = None,
) -> Stream:
    """The stream of these names, made when it is new."""
    identity = (feed.name, origin, name, incarnation)
    begins_at = begins_at or {}
    with connection.cursor() as cursor:
        select = sql.SQL("select stream_id from {} where (feed, origin, name, incarnation) = (%s, %s, %s, %s)").format(
            _table(feed, "_streams")
        )
        cursor.execute(select, identity)
        row = cursor.fetchone()
        if row is None:
            cursor.execute(
                sql.SQL(
                    "insert into {} (feed, kind, origin, name, incarnation, begins_at) values (%s, %s, %s, %s, %s, %s) "
                    "returning stream_id"
                ).format(_table(feed, "_streams")),
                (feed.name, kind or feed.origin.kind, origin, name, incarnation, json.dumps(begins_at)),
            )
            row = _one(cursor)
    return Stream(row[0], origin, name, incarnation, begins_at, kind)


def fetch_positions(connection: Connection, feed: FeedSpec, stream: Stream) -> dict[int, int]:
    """Partition -> next offset to read, from the committed intervals. Partitions never read are absent."""
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "select partition, max(last_position) + 1 from {ledger} "
                "where stream_id = %s and last_position is not null and _dlt_load_id in (select load_id from {loads}) "
                "group by partition"
            ).format(ledger=_table(feed, "_ledger"), loads=_table(feed, "_dlt_loads")),
            (stream.stream_id,),
        )
        return {**stream.begins_at, **dict(cursor.fetchall())}


def record_loss(
    connection: Connection,
    feed: FeedSpec,
    kind: str,
    stream: Stream,
    partition: int,
    first_position: int,
    last_position: int | None,
    detail: str,
    successor: str = "",
) -> bool:
    """Note a loss when it is first seen; whether somebody has accepted it."""
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "insert into {losses} as l (feed, kind, stream_id, partition, first_position, last_position, detail, "
                "successor) values (%s, %s, %s, %s, %s, %s, %s, %s) "
                "on conflict (feed, kind, stream_id, partition, first_position, successor) "
                "do update set detail = l.detail returning accepted_at is not null"
            ).format(losses=_table(feed, "_losses")),
            (feed.name, kind, stream.stream_id, partition, first_position, last_position, detail, successor),
        )
        return bool(_one(cursor)[0])


def find_open_losses(connection: Connection, feed: FeedSpec) -> list[str]:
    """What was lost and nobody has accepted, in words."""
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL("select detail from {} where feed = %s and accepted_at is null order by loss_id").format(
                _table(feed, "_losses")
            ),
            (feed.name,),
        )
        return [row[0] for row in cursor.fetchall()]


def accept_losses(connection: Connection, feed: FeedSpec, reason: str) -> list[str]:
    """Accept a feed's open losses by name and reason; what was accepted, in words.

    A log that was cut goes on as a stream of its own: its offsets from the cut on are given to other records now, so
    those of before keep their coordinates, and reading begins at the cut.
    """
    streams = {stream.stream_id: stream for stream in find_streams(connection, feed)}
    with connection, connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "update {} set accepted_at = now(), accepted_by = %s, accepted_because = %s "
                "where feed = %s and accepted_at is null returning kind, stream_id, partition, first_position, detail"
            ).format(_table(feed, "_losses")),
            (holder_name(), reason, feed.name),
        )
        accepted = cursor.fetchall()
    for stream_id in {row[1] for row in accepted if row[0] == "truncated"}:
        stream = streams[stream_id]
        begins_at = fetch_positions(connection, feed, stream)
        begins_at |= {row[2]: row[3] for row in accepted if row[:2] == ("truncated", stream_id)}
        name, _, number = stream.incarnation.partition("#")
        ensure_stream(connection, feed, stream.origin, stream.name, f"{name}#{int(number or 1) + 1}", begins_at)
    return [row[-1] for row in accepted]


def fetch_window_end(connection: Connection, feed: FeedSpec, stream: Stream) -> datetime | None:
    """The end of the last committed window of an API feed; None when it was never read."""
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "select max(window_to) from {ledger} where stream_id = %s and kind = 'api' "
                "and _dlt_load_id in (select load_id from {loads})"
            ).format(ledger=_table(feed, "_ledger"), loads=_table(feed, "_dlt_loads")),
            (stream.stream_id,),
        )
        end: datetime | None = _one(cursor)[0]
        return end


def fetch_empty_windows(connection: Connection, feed: FeedSpec, stream: Stream) -> list[EmptyWindow]:
    """The windows that held nothing when they were last read, as the last load noted them."""
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "select empty_windows from {ledger} where stream_id = %s and empty_windows is not null "
                "and _dlt_load_id in (select load_id from {loads}) order by _dlt_load_id desc limit 1"
            ).format(ledger=_table(feed, "_ledger"), loads=_table(feed, "_dlt_loads")),
            (stream.stream_id,),
        )
        row = cursor.fetchone()
        return [EmptyWindow(*map(datetime.fromisoformat, one)) for one in (row[0] if row else [])]


def fetch_content_hashes(
    connection: Connection, feed: FeedSpec, key: Sequence[str], keys: Sequence[tuple[str | None, ...]]
) -> list[str | None]:
    """For each key (as text) the content hash of its latest committed version; None where there is none."""
    if not keys:
        return []
    # The columns keep their own type in the comparison, so that an index on the key serves it.
    types = {column.name: column.type.sql for column in feed.columns}
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "select (select r._content_hash from {raw} r where ({columns}) = ({wanted}) "
                "and r._dlt_load_id in (select load_id from {loads}) "
                "order by r._dlt_load_id desc, r._api_page desc, r._api_item desc limit 1) "
                "from unnest({arrays}) with ordinality as wanted({names}, position) order by position"
            ).format(
                raw=_table(feed, feed.table),
                loads=_table(feed, "_dlt_loads"),
                columns=_listed(sql.Identifier("r", name) for name in key),
                wanted=_listed(sql.Identifier("wanted", name) for name in key),
                names=_listed(sql.Identifier(name) for name in key),
                arrays=_listed(sql.SQL("%s::{}[]").format(sql.SQL(types[name])) for name in key),
            ),
            [list(values) for values in zip(*keys, strict=True)],
        )
        return [row[0] for row in cursor.fetchall()]


def fetch_known_dead_values(connection: Connection, feed: FeedSpec, values: Sequence[bytes]) -> set[bytes]:
    """Which of these bytes are dead-lettered already: open, or discarded and not to be set aside again."""
    if not values:
        return set()
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "select raw_value from {dead} where feed = %s and raw_value = any(%s) "
                "and _dlt_load_id in (select load_id from {loads}) "
                "and (replay_load_id in (select load_id from {loads})) is not true"
            ).format(dead=_table(feed, "_dead_letters"), loads=_table(feed, "_dlt_loads")),
            (feed.name, list(values)),
        )
        return {bytes(row[0]) for row in cursor.fetchall()}


def fetch_poison_digests(connection: Connection, feed: FeedSpec) -> set[bytes]:
    """SHA-256 of the records set aside as poison: open, or discarded and not to be set aside again."""
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "select sha256(raw_value) from {dead} where feed = %s and reason = 'poison' "
                "and _dlt_load_id in (select load_id from {loads}) "
                "and (replay_load_id in (select load_id from {loads})) is not true"
            ).format(dead=_table(feed, "_dead_letters"), loads=_table(feed, "_dlt_loads")),
            (feed.name,),
        )
        return {bytes(row[0]) for row in cursor.fetchall()}


def _listed(parts: Iterable[sql.Composable]) -> sql.Composable:
    return sql.SQL(", ").join(parts)


def _table(feed: FeedSpec, name: str) -> sql.Identifier:
    return sql.Identifier(feed.source, name)


def _one(cursor: psycopg2.extensions.cursor) -> tuple:  # type: ignore[type-arg]
    row = cursor.fetchone()
    assert row is not None, "the statement returns one row"
    return row

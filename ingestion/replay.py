"""Trying dead letters again: dead letters -> the present contract -> raw table, each record once.

    lock the feed -> sweep -> open letters -> decode -> mark the letters, land their rows, one package, one commit

A letter is replayed exactly when the load it is marked with is committed: that load's row makes its raw rows, its
ledger (n landed, n fewer dead) and the letters' new state true together. A record that fails again stays open. Without
`apply` the same code reads inside a read-only transaction and says what it would do.

Refuses to land a record of an API whose later version has landed: it would take that one's place.
"""

import itertools
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import IO, Any

import psycopg2
import psycopg2.extensions
from psycopg2 import sql
from psycopg2.extras import execute_values

from ingestion import ledger
from ingestion.contract import Contract, Rejection, Row
from ingestion.database import classify_error, connect
from ingestion.ddl import ensure_schema
from ingestion.endpoint import content_hash
from ingestion.errors import ConfigurationError, ErrorClass, Reason, RefusedDataError, WarehouseError
from ingestion.feeds import FeedSpec, KafkaOrigin, RestOrigin
from ingestion.ledger import Connection, Stream, Writer
from ingestion.load import classify_load_error, commit_package
from ingestion.package import LOADER_VERSION, Interval, Package, cell, copy_line
from ingestion.settings import Settings

WAIT_S = 60.0
# Letters held in memory at once: bounded by both, because a record may be large.
LETTERS_PER_CHUNK = 1_000
BYTES_PER_CHUNK = 16 * 2**20

# Ids of the loads that would come, after any there is: the second for what follows the dead letters of an API.
COMING_LOADS = ("9999999999.1", "9999999999.2")

# (letters looked at so far, letters in all or None)
Progress = Callable[[int, int | None], None]

# What makes a letter open; `committed` stands for the schema's committed loads.
OPEN = (
    "d.discarded_at is null and (d.replay_load_id in (select load_id from {loads})) is not true "
    "and d._dlt_load_id in (select load_id from {loads})"
)


@dataclass(frozen=True)
class Selection:
    """Which open letters of a feed. Times are those of the failure; `until` is the first moment left out.

    A record that made loads die is tried again only when its reason or its id is named.
    """

    reason: Reason | None = None
    since: datetime | None = None
    until: datetime | None = None
    ids: tuple[str, ...] = ()
    # Letters of an API whose window overlaps [from, to).
    api_window: tuple[datetime, datetime] | None = None

    @property
    def is_all(self) -> bool:
        return self == Selection()


@dataclass(frozen=True)
class Offer:
    """A record to be tried again.

    `coordinates` are those of the raw row after the stream id; an API's content hash comes later. `letter_id` is None
    for a record that had landed and whose row is gone. `age` orders the versions of an API's record.
    """

    stream_id: int
    partition: int
    value: bytes
    coordinates: tuple[str | None, ...]
    letter_id: str | None
    day: str
    age: tuple[str, int, int] = ("", 0, 0)


@dataclass(frozen=True)
class Verdict:
    """What the present contract says of an offer; None: a later version of the record has landed."""

    offer: Offer
    decoded: Row | Rejection | None


@dataclass
class Replay:
    """What a replay did, or (`applied` False) would do."""

    feed: str
    applied: bool
    landed: int = 0
    failed: int = 0
    superseded: int = 0
    restored: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    load_ids: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def note(self, verdict: Verdict) -> None:
        if isinstance(verdict.decoded, Row):
            if verdict.offer.letter_id is None:
                self.restored += 1
            else:
                self.landed += 1
        elif verdict.decoded is None:
            self.superseded += 1
        else:
            self.failed += 1
            self.reasons[verdict.decoded.reason.value] += 1

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "reasons": dict(self.reasons)}


@dataclass
class Coming:
    """The rows a dry run would land, for whoever wants to know what would come of them.

    `file`: lines for COPY of the columns of `ddl.raw_columns`, in a file without a name; `close` closes it. `restored`:
    some of them had landed before.
    """

    feed: FeedSpec
    rows: int = 0
    restored: bool = False
    file: IO[bytes] = field(default_factory=tempfile.TemporaryFile)

    def add(self, row: Row, stream_id: int, coordinates: Sequence[str | None], load_id: str = COMING_LOADS[0]) -> None:
        """A row that would land; coordinates are those after the stream."""
        loaded_at = datetime.now(UTC).isoformat()
        cells = (*row.cells, row.extra, str(stream_id), *coordinates, loaded_at, load_id)
        self.file.write(copy_line(cells).encode())
        self.rows += 1

    def add_verdict(self, verdict: Verdict) -> None:
        """The row of a verdict that has one."""
        if isinstance(verdict.decoded, Row):
            self.restored = self.restored or verdict.offer.letter_id is None
            self.add(verdict.decoded, verdict.offer.stream_id, _coordinates(self.feed, verdict.offer, verdict.decoded))

    def close(self) -> None:
        self.file.close()


def _coordinates(feed: FeedSpec, offer: Offer, row: Row) -> tuple[str | None, ...]:
    """Those of the raw row, after the stream."""
    return (*offer.coordinates, content_hash(row)) if isinstance(feed.origin, RestOrigin) else offer.coordinates


def replay_dead_letters(
    settings: Settings,
    feed: FeedSpec,
    selection: Selection,
    *,
    apply: bool = False,
    because: str | None = None,
    wait_s: float = WAIT_S,
    coming: Coming | None = None,
    progress: Progress = lambda done, due: None,
) -> Replay:
    """Try a feed's open dead letters again, under the contract as it is declared now.

    Args:
        apply: land what fits. Without it nothing in the database changes, and the answer is the forecast.
        because: noted in the audit.
        wait_s: seconds to wait for another writer of the feed.
        coming: gets the rows a dry run would land.

    Raises:
        FeedBusyError, TransientError, ConfigurationError, RefusedDataError: nothing of the replay is true.
    """
    started = time.monotonic()
    replay = Replay(feed.name, apply)
    with replaying(settings, feed, apply=apply, wait_s=wait_s) as (connection, writer):
        verdicts = judge(connection, feed, fetch_offers(connection, feed, selection, progress))
        if writer is None:
            for verdict in verdicts:
                replay.note(verdict)
                if coming is not None:
                    coming.add_verdict(verdict)
        else:
            land(settings, connection, writer, replay, verdicts, because)
    replay.seconds = time.monotonic() - started
    return replay


@contextmanager
def replaying(
    settings: Settings, feed: FeedSpec, *, apply: bool, wait_s: float
) -> Iterator[tuple[Connection, Writer | None]]:
    """A connection to replay on: as the feed's writer, swept, or (no writer) in a transaction that cannot write.

    What Postgres refuses inside leaves as a WarehouseError.
    """
    connection = connect(settings, purpose=f"replay {feed.name}")
    try:
        if not apply:
            connection.set_session(isolation_level="REPEATABLE READ", readonly=True)
            require_queue(connection, feed)
            yield connection, None
            return
        ensure_schema(connection, [feed])
        with ledger.writing(connection, feed, wait_s=wait_s) as writer:
            ledger.sweep(connection, feed)
            yield connection, writer
    except psycopg2.Error as error:
        raise _named(error, feed) from error
    finally:
        connection.close()


def _named(error: psycopg2.Error, feed: FeedSpec) -> WarehouseError:
    named = classify_error(error) or classify_load_error(error, feed)
    if named.error_class is not ErrorClass.INTERNAL:
        return named
    # Not the error's text: it quotes the statement, and with it what was to be written.
    return WarehouseError(
        f"{feed.name}: the replay failed: {error.diag.message_primary or type(error).__name__}.",
        hint="Nothing of it is true.",
    )


def require_queue(connection: Connection, feed: FeedSpec) -> None:
    """Nothing when the feed's tables are those of this version; a dry run makes none.

    Raises:
        ConfigurationError: the feed was never read, or not by this version.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "select to_regclass(%s) is not null and to_regclass(%s) is not null",
            (f'"{feed.source}"._dead_letter_events', f'"{feed.source}"."{feed.table}"'),
        )
        if not (cursor.fetchone() or (False,))[0]:
            raise ConfigurationError(
                f"{feed.name} has no dead-letter queue of this version in the warehouse.",
                hint="`warehouse ingest` makes it; a dry run makes nothing.",
            )


# --- which letters ----------------------------------------------------------------------------------------------------


def find_open(connection: Connection, feed: FeedSpec, selection: Selection) -> list[tuple[str, int]]:
    """(id, bytes) of the open letters of a selection, the latest load first."""
    window = selection.api_window or (None, None)
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "select d.dead_letter_id, octet_length(d.raw_value) from {dead} as d where d.feed = %(feed)s and "
                + OPEN
                + " and (%(reason)s is null or d.reason = %(reason)s)"
                " and (%(since)s::timestamptz is null or d.failed_at >= %(since)s)"
                " and (%(until)s::timestamptz is null or d.failed_at < %(until)s)"
                " and (%(ids)s::text[] is null or d.dead_letter_id = any(%(ids)s))"
                " and (d.reason <> 'poison' or %(reason)s = 'poison' or d.dead_letter_id = any(%(ids)s))"
                " and (%(from)s::timestamptz is null or d._api_window_to > %(from)s and d._api_window_from < %(to)s)"
                " order by d._dlt_load_id desc, d._api_page desc, d._api_item desc, d._kafka_partition, d._kafka_offset"
            ).format(**_tables(feed)),
            {
                "feed": feed.name,
                "reason": selection.reason.value if selection.reason else None,
                "since": selection.since,
                "until": selection.until,
                "ids": list(selection.ids) or None,
                "from": window[0],
                "to": window[1],
            },
        )
        return cursor.fetchall()


def count_open(settings: Settings, feed: FeedSpec, selection: Selection) -> int:
    """How many open letters a selection has; changes nothing. 0 for a feed that was never read."""
    connection = connect(settings, purpose=f"replay {feed.name}")
    try:
        connection.set_session(readonly=True)
        with connection.cursor() as cursor:
            cursor.execute("select to_regclass(%s) is null", (f'"{feed.source}"._dead_letters',))
            if (cursor.fetchone() or (True,))[0]:
                return 0
        require_queue(connection, feed)
        return len(find_open(connection, feed, selection))
    except psycopg2.Error as error:
        raise _named(error, feed) from error
    finally:
        connection.close()


def fetch_offers(
    connection: Connection, feed: FeedSpec, selection: Selection, progress: Progress = lambda done, due: None
) -> Iterator[list[Offer]]:
    """The records of the selected letters with their bytes, in chunks."""
    letters = find_open(connection, feed, selection)
    done = 0
    for ids in _chunks(letters):
        yield fetch_offers_of(connection, feed, ids)
        done += len(ids)
        progress(done, len(letters))


def _chunks(letters: Iterable[tuple[str, int]]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for letter_id, length in letters:
        if chunk and (len(chunk) == LETTERS_PER_CHUNK or size + length > BYTES_PER_CHUNK):
            yield chunk
            chunk, size = [], 0
        chunk.append(letter_id)
        size += length
    if chunk:
        yield chunk


def fetch_offers_of(connection: Connection, feed: FeedSpec, ids: Sequence[str]) -> list[Offer]:
    """The records of these letters, in the order of the ids."""
    is_topic = isinstance(feed.origin, KafkaOrigin)
    coordinates = (
        "d._kafka_partition::text, d._kafka_offset::text, d.source_time::text, d.raw_key, d.headers::text"
        if is_topic
        else "d._api_window_from::text, d._api_window_to::text, d._api_page::text, d._api_item::text"
    )
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "select d.dead_letter_id, d._stream_id, coalesce(d._kafka_partition, 0), d.raw_value, "
                "to_char(coalesce(d._api_window_from, d.source_time) at time zone 'utc', 'YYYY-MM-DD'), "
                "d._dlt_load_id, coalesce(d._api_page, 0), coalesce(d._api_item, 0), "
                + coordinates
                + " from {dead} as d where d.dead_letter_id = any(%s) "
                "and d._dlt_load_id in (select load_id from {loads}) order by array_position(%s, d.dead_letter_id)"
            ).format(**_tables(feed)),
            (list(ids), list(ids)),
        )
        return [
            Offer(
                stream_id=stream_id,
                partition=partition,
                value=bytes(value),
                coordinates=tuple(cell(bytes(one) if isinstance(one, memoryview) else one) for one in where),
                letter_id=letter_id,
                day=day or "no time",
                age=(load_id, page, item),
            )
            for letter_id, stream_id, partition, value, day, load_id, page, item, *where in cursor.fetchall()
        ]


def _tables(feed: FeedSpec) -> dict[str, sql.Composable]:
    return {
        "raw": sql.Identifier(feed.source, feed.table),
        "dead": sql.Identifier(feed.source, "_dead_letters"),
        "loads": sql.Identifier(feed.source, "_dlt_loads"),
        "events": sql.Identifier(feed.source, "_dead_letter_events"),
    }


# --- what becomes of them ---------------------------------------------------------------------------------------------


def judge(connection: Connection, feed: FeedSpec, chunks: Iterable[list[Offer]]) -> Iterator[Verdict]:
    """Each offer under the present contract. An API's come latest first: of one record, the latest alone lands."""
    contract = Contract(feed)
    newest: set[tuple[str | None, ...]] = set()
    for offers in chunks:
        decoded = [(offer, contract.decode(offer.value)) for offer in offers]
        later = [False] * len(offers)
        if isinstance(feed.origin, RestOrigin):
            names = [column.name for column in feed.columns]
            indexes = [names.index(name) for name in feed.origin.key]
            rows = [(i, offer, row) for i, (offer, row) in enumerate(decoded) if isinstance(row, Row)]
            keys = [tuple(row.cells[index] for index in indexes) for _, _, row in rows]
            has_landed = _find_superseded(connection, feed, keys, [offer.age for _, offer, _ in rows])
            for (i, _, _), key, landed in zip(rows, keys, has_landed, strict=True):
                later[i] = landed or key in newest
                newest.add(key)
        for (offer, verdict), is_old in zip(decoded, later, strict=True):
            yield Verdict(offer, None if is_old else verdict)


def _find_superseded(
    connection: Connection, feed: FeedSpec, keys: Sequence[tuple[str | None, ...]], ages: Sequence[tuple[str, int, int]]
) -> list[bool]:
    """For each key, whether a version the API sent later has landed.

    A version that landed by a replay is as old as its dead letter, not as its load.
    """
    assert isinstance(feed.origin, RestOrigin)
    if not keys:
        return []
    types = {column.name: column.type.sql for column in feed.columns}
    names = feed.origin.key
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "select exists (select from {raw} as r where ({columns}) = ({wanted}) "
                "and r._dlt_load_id in (select load_id from {loads}) and (coalesce(("
                "select d._dlt_load_id from {dead} as d where d.replay_load_id = r._dlt_load_id "
                "and (d._stream_id, d._api_window_from, d._api_page, d._api_item) "
                "= (r._stream_id, r._api_window_from, r._api_page, r._api_item) limit 1), r._dlt_load_id), "
                "r._api_page, r._api_item) > (wanted._load, wanted._page, wanted._item)) "
                "from unnest({arrays}, %s::text[], %s::integer[], %s::integer[]) with ordinality "
                "as wanted({names}, _load, _page, _item, _position) order by wanted._position"
            ).format(
                **_tables(feed),
                columns=sql.SQL(", ").join(sql.Identifier("r", name) for name in names),
                wanted=sql.SQL(", ").join(sql.Identifier("wanted", name) for name in names),
                names=sql.SQL(", ").join(map(sql.Identifier, names)),
                arrays=sql.SQL(", ").join(sql.SQL(f"%s::{types[name]}[]") for name in names),
            ),
            [list(values) for values in (*zip(*keys, strict=True), *zip(*ages, strict=True))],
        )
        return [row[0] for row in cursor.fetchall()]


@dataclass
class _Counts:
    landed: int = 0
    restored: int = 0
    drifted: int = 0


def land(
    settings: Settings,
    connection: Connection,
    writer: Writer,
    replay: Replay,
    verdicts: Iterator[Verdict],
    because: str | None,
) -> None:
    """Land what fits in one package; note what failed again; discard what a later version has superseded."""
    audit = _Audit(connection, writer, because)
    superseded: list[str] = []

    def set_aside(verdict: Verdict) -> None:
        letter_id = verdict.offer.letter_id
        if letter_id is None:
            return
        if isinstance(verdict.decoded, Rejection):
            audit.add_failure(letter_id, verdict.decoded)
        else:
            superseded.append(letter_id)

    first: Verdict | None = None
    for verdict in verdicts:
        replay.note(verdict)
        if isinstance(verdict.decoded, Row):
            first = verdict
            break
        set_aside(verdict)

    def fill(package: Package) -> None:
        assert first is not None
        counts: dict[tuple[int, int], _Counts] = defaultdict(_Counts)
        for verdict in itertools.chain([first], verdicts):
            offer, row = verdict.offer, verdict.decoded
            if verdict is not first:
                replay.note(verdict)
            if not isinstance(row, Row):
                set_aside(verdict)
                continue
            package.add_row(row.cells, row.extra, _coordinates(writer.feed, offer, row), offer.stream_id)
            count = counts[offer.stream_id, offer.partition]
            if offer.letter_id is None:
                count.restored += 1
            else:
                count.landed += 1
                count.drifted += row.extra is not None
                audit.add_replayed(offer.letter_id, package.load_id)
        for (stream_id, partition), count in sorted(counts.items()):
            package.add_interval(
                Interval(
                    partition=partition,
                    kind="replay",
                    stream_id=stream_id,
                    landed=count.landed,
                    dead=-count.landed,
                    restored=count.restored,
                    drifted=count.drifted,
                )
            )
        audit.flush()

    if first is not None:
        stream = Stream(first.offer.stream_id, "", "", "")
        try:
            package = commit_package(settings, connection, stream, writer, fill)
        except RefusedDataError as error:
            raise RefusedDataError(
                f"{writer.feed.name}: Postgres refused a record of the replay; nothing of it landed.",
                hint="See the raw table's constraints; `--reason` or `--id` replays fewer at once.",
            ) from error
        replay.load_ids.append(package.load_id)
    audit.flush()
    discard_ids(connection, writer, superseded, "superseded: a later version of the record landed")


class _Audit:
    """Marks and events of one replay, written in chunks."""

    def __init__(self, connection: Connection, writer: Writer, because: str | None) -> None:
        self._connection = connection
        self._writer = writer
        self._because = because
        self._events: list[tuple[str | None, ...]] = []
        self._marks: list[str] = []
        self._load_id = ""

    def add_replayed(self, letter_id: str, load_id: str) -> None:
        self._load_id = load_id
        self._marks.append(letter_id)
        self._add(letter_id, "replayed", load_id)

    def add_failure(self, letter_id: str, rejection: Rejection) -> None:
        self._add(letter_id, "failed_again", None, rejection.reason.value, rejection.path, rejection.message)

    def _add(self, letter_id: str, action: str, load_id: str | None, *why: str) -> None:
        why = why or (None, None, None)  # type: ignore[assignment]
        self._events.append(event(self._writer.feed, letter_id, action, self._because, load_id, *why))
        if len(self._events) >= LETTERS_PER_CHUNK:
            self.flush()

    def flush(self) -> None:
        if not self._events:
            return
        feed = self._writer.feed
        with ledger.fenced(self._connection, self._writer) as cursor:
            if self._marks:
                cursor.execute(
                    sql.SQL(
                        "update {dead} as d set replay_load_id = %s "
                        "where d.feed = %s and d.dead_letter_id = any(%s) and " + OPEN
                    ).format(**_tables(feed)),
                    (self._load_id, feed.name, self._marks),
                )
                if cursor.rowcount != len(self._marks):
                    raise WarehouseError(
                        f"{feed.name}: {len(self._marks)} dead letters were to be marked and {cursor.rowcount} were "
                        "open; nothing of the replay is true.",
                        hint="Run it again.",
                    )
            write_events(cursor, feed, self._events)
        self._events, self._marks = [], []


def event(
    feed: FeedSpec,
    letter_id: str,
    action: str,
    because: str | None,
    load_id: str | None = None,
    reason: str | None = None,
    path: str | None = None,
    message: str | None = None,
) -> tuple[str | None, ...]:
    """One row of the audit, in the order `write_events` takes it."""
    who = ledger.holder_name()
    version = (feed.contract_version, LOADER_VERSION)
    return (letter_id, feed.name, action, who, because, load_id, *version, reason, path, message)


def write_events(cursor: psycopg2.extensions.cursor, feed: FeedSpec, events: Sequence[tuple[str | None, ...]]) -> None:
    """Add rows to the audit."""
    execute_values(
        cursor,
        sql.SQL(
            "insert into {events} (dead_letter_id, feed, action, acted_by, because, load_id, contract_version, "
            "loader_version, reason, path, message) values %s"
        ).format(**_tables(feed)),
        events,
    )


# --- discarding -------------------------------------------------------------------------------------------------------


def discard_dead_letters(
    settings: Settings,
    feed: FeedSpec,
    selection: Selection,
    because: str,
    *,
    apply: bool = False,
    wait_s: float = WAIT_S,
) -> int:
    """Close a feed's open dead letters for good, by name and reason; how many. Their bytes stay.

    Raises:
        FeedBusyError, TransientError, ConfigurationError: nothing was discarded.
    """
    with replaying(settings, feed, apply=apply, wait_s=wait_s) as (connection, writer):
        ids = [letter_id for letter_id, _ in find_open(connection, feed, selection)]
        if writer is not None:
            discard_ids(connection, writer, ids, because)
        return len(ids)


def discard_ids(connection: Connection, writer: Writer, ids: Sequence[str], because: str) -> None:
    """Discard open letters with their audit, all or none."""
    if not ids:
        return
    feed = writer.feed
    with ledger.fenced(connection, writer) as cursor:
        cursor.execute(
            sql.SQL(
                "update {dead} as d set discarded_at = clock_timestamp(), discarded_by = %s, discarded_because = %s "
                "where d.feed = %s and d.dead_letter_id = any(%s) and " + OPEN + " returning d.dead_letter_id"
            ).format(**_tables(feed)),
            (ledger.holder_name(), because, feed.name, list(ids)),
        )
        discarded = [row[0] for row in cursor.fetchall()]
        write_events(cursor, feed, [event(feed, letter_id, "discarded", because) for letter_id in discarded])

"""Landing one feed: source -> decoded against the contract -> raw table, dead letters and ledger, load by load.

    lock the feed -> sweep what never committed -> compare positions with the source -> read, decode, commit, repeat

What was offered is, after every commit, landed, dead-lettered, or counted as tombstone, unchanged or lost. A run that
dies leaves nothing true: the next one sweeps and reads on from the last commit. Run alone:
`warehouse ingest raw_payments.transaction_created`.
"""

import datetime as dt
import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import psycopg2
from confluent_kafka import Message
from psycopg2 import sql

from ingestion import ledger
from ingestion.contract import Contract, Rejection, Row
from ingestion.database import classify_error, connect
from ingestion.ddl import ensure_schema
from ingestion.errors import ErrorClass, RefusedDataError, SourceLossError, WarehouseError
from ingestion.feeds import FeedSpec, KafkaOrigin
from ingestion.kafka import Loss, Topic, TopicReader
from ingestion.ledger import Connection, Stream, Writer
from ingestion.package import Interval, Package, cell, commit_package, headers_json, open_pipeline
from ingestion.poison import Suspicion
from ingestion.rest import EndpointReader, Page, plan_windows
from ingestion.settings import Settings

if TYPE_CHECKING:
    from ingestion.batch import BatchDecoder

# Records read into one load. Bounds what a killed run repeats and the disk the CSV files take, not the memory.
RECORDS_PER_LOAD = 500_000

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

# (records read so far, records due or None when the source cannot say)
Progress = Callable[[int, int | None], None]


@dataclass
class Landing:
    """What one run did to one feed. offered = landed + dead + tombstones + unchanged."""

    feed: str
    landed: int = 0
    dead: int = 0
    tombstones: int = 0
    unchanged: int = 0
    control: int = 0
    lost: int = 0
    drifted: int = 0
    loads: list[str] = field(default_factory=list)
    swept: list[str] = field(default_factory=list)
    open_losses: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def offered(self) -> int:
        return self.landed + self.dead + self.tombstones + self.unchanged

    def add(self, package: Package) -> None:
        """Count a committed package."""
        self.loads.append(package.load_id)
        for interval in package.intervals:
            for name in ("landed", "dead", "tombstones", "unchanged", "control", "lost", "drifted"):
                setattr(self, name, getattr(self, name) + getattr(interval, name))


def land_feed(
    settings: Settings,
    feed: FeedSpec,
    *,
    progress: Progress = lambda done, due: None,
    records_per_load: int = RECORDS_PER_LOAD,
    take_over: bool = False,
) -> Landing:
    """Read everything the source offers now and land it.

    A landing with `open_losses` is complete and the run it belongs to has failed all the same.

    Raises:
        FeedBusyError, SourceLossError, TransientError, ConfigurationError, AuthenticationError: the loads committed
            before stay; nothing else is true.
    """
    started = time.monotonic()
    connection = connect(settings, purpose=f"ingest {feed.name}")
    landing = Landing(feed.name)
    try:
        ensure_schema(connection, [feed])
        with ledger.writing(connection, feed, take_over=take_over) as writer:
            landing.swept = ledger.sweep(connection, feed)
            if isinstance(feed.origin, KafkaOrigin):
                _land_topic(settings, connection, writer, landing, progress, records_per_load)
            else:
                _land_endpoint(settings, connection, writer, landing, progress)
            if landing.loads:
                _analyze(connection, feed)
            landing.open_losses = ledger.find_open_losses(connection, feed)
    except psycopg2.Error as error:
        # A statement of our own (schema, lock, sweep, positions): named, or the retry would not know an outage.
        named = classify_error(error)
        if named is None:
            raise
        raise named from error
    finally:
        connection.close()
        landing.seconds = time.monotonic() - started
    return landing


def _analyze(connection: Connection, feed: FeedSpec) -> None:
    """Without statistics the planner takes a load of a million rows for one of a thousand."""
    with connection.cursor() as cursor:
        for table in (feed.table, "_dlt_loads", "_ledger", "_dead_letters"):
            cursor.execute(sql.SQL("analyze {}").format(sql.Identifier(feed.source, table)))


class Tally:
    """Counts of one partition (or API window) within one load."""

    def __init__(self, first: int = 0) -> None:
        self.first = first
        self.next = first
        self.seen = self.landed = self.dead = self.tombstones = self.unchanged = self.drifted = self.bytes = 0
        self.earliest: int | None = None
        self.latest = 0

    def add_time(self, milliseconds: int) -> None:
        if self.earliest is None:
            self.earliest = self.latest = milliseconds
        elif milliseconds < self.earliest:
            self.earliest = milliseconds
        elif milliseconds > self.latest:
            self.latest = milliseconds

    def interval(self, partition: int) -> Interval:
        return Interval(
            partition=partition,
            landed=self.landed,
            dead=self.dead,
            tombstones=self.tombstones,
            unchanged=self.unchanged,
            drifted=self.drifted,
            bytes=self.bytes,
            source_time_min=None if self.earliest is None else time_text(self.earliest),
            source_time_max=None if self.earliest is None else time_text(self.latest),
        )


# --- Kafka ------------------------------------------------------------------------------------------------------------


def _land_topic(
    settings: Settings,
    connection: Connection,
    writer: Writer,
    landing: Landing,
    progress: Progress,
    records_per_load: int,
) -> None:
    feed = writer.feed
    reader = TopicReader(settings, feed)
    try:
        topic = reader.fetch_topic()
        stream = _guard_stream(connection, feed, topic)
        positions = ledger.fetch_positions(connection, feed, stream)
        lost = _guard_positions(connection, feed, stream, reader.find_losses(topic, positions))
        if lost:
            package = commit_package(
                settings, connection, open_pipeline(settings, connection, feed), stream, writer, lost
            )
            landing.add(package)
            positions = ledger.fetch_positions(connection, feed, stream)
        positions = {p: positions.get(p, start) for p, (start, _) in topic.bounds.items()}
        due = sum(end - positions[p] for p, (_, end) in topic.bounds.items())
        if due == 0:
            return
        # Loads Arrow: only where there is something to decode.
        from ingestion.batch import BatchDecoder

        decoder = BatchDecoder(Contract(feed))
        suspicion = Suspicion.after(connection, feed, stream, positions, records_per_load)
        batches = reader.read(topic, positions, suspicion.limit)
        reading = _Reading()

        def fill(package: Package) -> None:
            nonlocal reading
            suspicion.note_batch(package.load_id, stream, positions)
            reading = _Reading({p: Tally(position) for p, position in positions.items()}, package.load_id)
            exhausted = True
            for batch in batches:
                good = _set_poison_aside(batch, suspicion, package, reading)
                for part in [[message] for message in good] if suspicion.noting else [good]:
                    if suspicion.noting:
                        suspicion.note_record(package.load_id, (part[0].partition(), part[0].offset()))
                    _decode_messages(part, decoder, package, reading.tallies, reading.reasons)
                if suspicion.noting:
                    suspicion.note_decoded(package.load_id)
                reading.taken += len(batch)
                if suspicion.limit < suspicion.usual_limit:
                    reading.places.extend((message.partition(), message.offset()) for message in batch)
                progress(landing.offered + reading.taken, due)
                if reading.taken >= suspicion.limit:
                    exhausted = False
                    break
            for partition, tally in sorted(reading.tallies.items()):
                # At the end of the log the last records may be control records, which nobody delivers.
                stop = topic.bounds[partition][1] if exhausted else tally.next
                if stop > tally.first:
                    package.add_interval(
                        replace(
                            tally.interval(partition),
                            first_position=tally.first,
                            last_position=stop - 1,
                            control=stop - tally.first - tally.seen,
                        )
                    )
            suspicion.note_read(package.load_id)

        while any(positions[p] < end for p, (_, end) in topic.bounds.items()):
            pipeline = open_pipeline(settings, connection, feed)
            try:
                package = commit_package(settings, connection, pipeline, stream, writer, fill)
            except RefusedDataError:
                ends = {p: tally.next for p, tally in reading.tallies.items() if tally.seen}
                if not suspicion.refused(reading.places or _all_places(reading.tallies), ends):
                    raise
                ledger.sweep(connection, feed)
                batches = reader.read(topic, positions, suspicion.limit)
                continue
            except WarehouseError as error:
                if error.error_class is not ErrorClass.INTERNAL and reading.load_id and not connection.closed:
                    suspicion.excuse(reading.load_id)
                raise
            landing.add(package)
            landing.reasons.update(reading.reasons)
            for interval in package.intervals:
                positions[interval.partition] = (interval.last_position or 0) + 1
            limit = suspicion.limit
            suspicion.committed(positions)
            if suspicion.limit != limit:
                batches = reader.read(topic, positions, suspicion.limit)
    finally:
        reader.close()


@dataclass
class _Reading:
    """What one load has read so far; nothing of it is true before the load commits."""

    tallies: dict[int, Tally] = field(default_factory=dict)
    load_id: str = ""
    taken: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    places: list[tuple[int, int]] = field(default_factory=list)


def _all_places(tallies: dict[int, Tally]) -> list[tuple[int, int]]:
    """Every offset a load passed; a few may be control records, which are suspected in vain."""
    return [(p, offset) for p, tally in tallies.items() if tally.seen for offset in range(tally.first, tally.next)]


def _set_poison_aside(batch: list[Message], suspicion: Suspicion, package: Package, reading: _Reading) -> list[Message]:
    """Dead-letter the batch's known poison without looking at it; the rest is returned."""
    if not suspicion.poison:
        return batch
    good = []
    for message in batch:
        place = (message.partition(), message.offset())
        rejection = suspicion.poison.get(place)
        if rejection is None:
            good.append(message)
            continue
        tally = reading.tallies[place[0]]
        tally.seen += 1
        tally.next = place[1] + 1
        tally.dead += 1
        reading.reasons[rejection.reason.value] += 1
        value = bytes(message.value() or b"")
        tally.bytes += len(value)
        package.add_dead_letter(
            rejection, value, key=message.key(), headers=headers_json(message.headers()), kafka=place
        )
    return good


def _guard_stream(connection: Connection, feed: FeedSpec, topic: Topic) -> Stream:
    """The topic's stream; refuses a topic that is not the one read before, until somebody accepts it.

    Raises:
        SourceLossError: another cluster answers, or the topic was re-created. The embedded broker forgets on exit, so
            its streams may be followed by any other.
    """
    assert isinstance(feed.origin, KafkaOrigin)
    known = ledger.find_streams(connection, feed)
    identity = (topic.cluster, feed.origin.topic, topic.incarnation)
    stream = ledger.match_stream(known, *identity)
    foreign = [s for s in known if not s.origin.startswith("embedded-")]
    if stream is None and foreign:
        last = foreign[-1]
        what = (
            f"topic {feed.origin.topic} was re-created"
            if (last.origin, last.name) == identity[:2]
            else f"topic {feed.origin.topic} of cluster {topic.cluster} is not {last.name} of cluster {last.origin}"
        )
        detail = f"{what}, which was read before; records of the old one may never have been read"
        if not ledger.record_loss(connection, feed, "replaced", last, 0, 0, None, detail, json.dumps(identity)):
            raise SourceLossError(
                f"{feed.name}: {detail}.",
                hint="Check KAFKA_BOOTSTRAP_SERVERS. If it is meant: "
                f"`warehouse feeds accept-loss {feed.name} --reason ...`.",
            )
    return stream or ledger.ensure_stream(connection, feed, *identity)


def _guard_positions(
    connection: Connection, feed: FeedSpec, stream: Stream, losses: list[Loss]
) -> Callable[[Package], None] | None:
    """Note what the log lost; what retention took becomes intervals of the ledger, and reading goes on behind it.

    Reading goes on, because waiting for somebody to accept the loss would lose more. The run fails all the same.

    Raises:
        SourceLossError: a log was cut: its offsets mean other records now, so nothing is read until it is accepted.
    """
    for loss in losses:
        ledger.record_loss(
            connection,
            feed,
            loss.kind,
            stream,
            loss.partition,
            loss.first_position,
            loss.last_position,
            loss.detail,
        )
    cut = [loss.detail for loss in losses if loss.kind == "truncated"]
    if cut:
        raise loss_error(feed.name, cut)

    def fill(package: Package) -> None:
        for loss in losses:
            package.add_interval(
                Interval(
                    partition=loss.partition,
                    first_position=loss.first_position,
                    last_position=loss.last_position,
                    lost=loss.last_position - loss.first_position + 1,
                )
            )

    return fill if losses else None


def loss_error(feed: str, details: list[str]) -> SourceLossError:
    """The failure of a run whose feed has losses nobody accepted."""
    return SourceLossError(
        f"{feed}: " + "; ".join(details) + ".",
        hint=f"Nothing else is lost. When it is known why: `warehouse feeds accept-loss {feed} --reason ...`.",
    )


def _decode_messages(
    batch: list[Message],
    decoder: "BatchDecoder",
    package: Package,
    tallies: dict[int, Tally],
    reasons: Counter[str],
) -> None:
    """Each message to a row, a dead letter or a tombstone, counted in its partition."""
    from ingestion.batch import MessageBatch, split_by_size

    for part in split_by_size(batch):
        messages = MessageBatch(part)
        coordinates = messages.coordinates()
        decoded = decoder.decode(messages.values)
        package.add_rows(decoded.cells, decoded.select(coordinates))
        dead: Counter[int] = Counter()
        for index, verdict in decoded.others:
            place = [column[index].as_py() for column in coordinates]
            partition, offset, sent_at, _, headers = place
            if isinstance(verdict, Row):
                tallies[int(partition)].drifted += verdict.extra is not None
                package.add_row(verdict.cells, verdict.extra, place)
                continue
            dead[int(partition)] += 1
            reasons[verdict.reason.value] += 1
            package.add_dead_letter(
                verdict,
                messages.values[index] or b"",
                key=messages.keys[index],
                headers=headers,
                source_time=sent_at,
                kafka=(int(partition), int(offset)),
            )
        for count in messages.count_partitions():
            tally = tallies[count.partition]
            tally.seen += count.seen
            tally.next = count.last_offset + 1
            tally.bytes += count.bytes
            tally.tombstones += count.tombstones
            tally.dead += dead[count.partition]
            tally.landed += count.seen - count.tombstones - dead[count.partition]
            for milliseconds in (count.earliest, count.latest):
                if milliseconds is not None:
                    tally.add_time(milliseconds)


@lru_cache(maxsize=1024)
def _second_text(seconds: int) -> str | None:
    try:
        return (_EPOCH + dt.timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M:%S")
    except OverflowError:
        return None


def time_text(milliseconds: int) -> str | None:
    """A Kafka timestamp as Postgres reads it; None for one beyond the calendar. Streams repeat their seconds."""
    seconds, rest = divmod(milliseconds, 1000)
    text = _second_text(seconds)
    return None if text is None else f"{text}.{rest:03d}+00"


# --- REST -------------------------------------------------------------------------------------------------------------


def _land_endpoint(
    settings: Settings, connection: Connection, writer: Writer, landing: Landing, progress: Progress
) -> None:
    feed = writer.feed
    contract = Contract(feed)
    reader = EndpointReader(settings, feed)
    # The embedded API has another port with every start and is the same API all the same.
    origin = "embedded" if "rates" in settings.embedded else reader.base_url
    stream = ledger.ensure_stream(connection, feed, origin, reader.origin.path, "")
    read_until = ledger.fetch_window_end(connection, feed, stream)
    windows = plan_windows(reader.origin, read_until, dt.datetime.now(dt.UTC).date())
    sorter = Sorter(connection, contract, reader)
    pages = (sorter.sort(page) for page in reader.read(windows))
    land_pages(settings, connection, writer, stream, windows, pages, landing, progress)


def land_pages(
    settings: Settings,
    connection: Connection,
    writer: Writer,
    stream: Stream,
    windows: list[tuple[dt.datetime, dt.datetime]],
    pages: Iterator["SortedPage"],
    landing: Landing,
    progress: Progress = lambda done, due: None,
) -> None:
    """Land what the pages of the windows bring in one package; none for pages that bring nothing new."""
    feed = writer.feed
    quiet, rest = split_quiet(pages)
    landing.unchanged = sum(page.unchanged for page in quiet)
    if rest is None:
        return

    def fill(package: Package) -> None:
        tally = Tally()
        tally.unchanged = sum(page.unchanged for page in quiet)
        number = len(quiet)
        for page in rest:
            number += 1
            add_page(page, package, tally, landing.reasons)
            progress(tally.landed + tally.dead + tally.unchanged, None)
        package.add_interval(
            replace(tally.interval(0), window_from=windows[0][0], window_to=windows[-1][1], pages=number)
        )

    landing.unchanged = 0
    package = commit_package(settings, connection, open_pipeline(settings, connection, feed), stream, writer, fill)
    landing.add(package)


@dataclass(frozen=True)
class SortedPage:
    """A page's records by what is to become of them."""

    page: Page
    new: list[tuple[int, Row, str]]
    dead: list[tuple[int, Rejection, bytes]]
    unchanged: int


class Sorter:
    """Tells new and corrected records from those a window brings again."""

    def __init__(self, connection: Connection, contract: Contract, reader: EndpointReader) -> None:
        self._connection = connection
        self._contract = contract
        self._reader = reader
        names = [column.name for column in contract.feed.columns]
        self._key = [names.index(name) for name in reader.origin.key]
        self._seen: dict[tuple[str | None, ...], str] = {}
        self._dead_seen: set[bytes] = set()

    def expect(self, row: Row) -> None:
        """Take a row for landed that is about to be."""
        self._seen[tuple(row.cells[index] for index in self._key)] = content_hash(row)

    def sort(self, page: Page) -> SortedPage:
        decoded = [(item, value, self._contract.decode(value)) for item, value in enumerate(page.records)]
        rows = [(item, row, content_hash(row)) for item, _, row in decoded if isinstance(row, Row)]
        keys = [tuple(row.cells[index] for index in self._key) for _, row, _ in rows]
        feed = self._contract.feed
        known = ledger.fetch_content_hashes(self._connection, feed, self._reader.origin.key, keys)
        new = []
        for (item, row, content), key, before in zip(rows, keys, known, strict=True):
            if self._seen.get(key, before) != content:
                new.append((item, row, content))
            self._seen[key] = content
        rejected = [(item, rejection, value) for item, value, rejection in decoded if isinstance(rejection, Rejection)]
        known_dead = ledger.fetch_known_dead_values(self._connection, feed, [value for _, _, value in rejected])
        dead = []
        for entry in rejected:
            if entry[2] not in known_dead and entry[2] not in self._dead_seen:
                dead.append(entry)
            self._dead_seen.add(entry[2])
        return SortedPage(page, new, dead, len(decoded) - len(new) - len(dead))


def content_hash(row: Row) -> str:
    return hashlib.sha256(repr((row.cells, row.extra)).encode()).hexdigest()[:32]


def split_quiet(pages: Iterator[SortedPage]) -> tuple[list[SortedPage], Iterator[SortedPage] | None]:
    """The leading pages that bring nothing new, and the rest; no rest means there is nothing to load."""
    quiet: list[SortedPage] = []
    for page in pages:
        if page.new or page.dead:
            return quiet, itertools.chain([page], pages)
        quiet.append(page)
    return quiet, None


def add_page(page: SortedPage, package: Package, tally: Tally, reasons: Counter[str]) -> None:
    window = (page.page.window_from, page.page.window_to)
    tally.bytes += page.page.size
    tally.unchanged += page.unchanged
    for item, row, content in page.new:
        tally.landed += 1
        tally.drifted += row.extra is not None
        coordinates = [cell(value) for value in (*window, page.page.number, item, content)]
        package.add_row(row.cells, row.extra, coordinates)
    for item, rejection, value in page.dead:
        tally.dead += 1
        reasons[rejection.reason.value] += 1
        package.add_dead_letter(rejection, value, api=(*window, page.page.number, item))

"""Landing a topic: its stream and positions compared with the log, then load after load to the ends seen at the start.

While one load is committed the next one is read; what was lost at the source is named before a row is read. A folder is
a topic of one partition (`ingestion/files.py`).
"""

import contextlib
import datetime as dt
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import psycopg2
from confluent_kafka import Message

from ingestion import ledger
from ingestion.contract import Contract, Row
from ingestion.endpoint import Progress
from ingestion.errors import ErrorClass, RefusedDataError, SourceLossError, WarehouseError
from ingestion.feeds import FeedSpec, KafkaOrigin
from ingestion.files import FolderReader
from ingestion.kafka import Loss, Topic, TopicReader
from ingestion.ledger import Connection, Stream, Writer
from ingestion.load import commit_package, load_package, write_package
from ingestion.package import Interval, Package, cell, headers_json
from ingestion.poison import Suspicion
from ingestion.profile import Profile
from ingestion.settings import Settings

if TYPE_CHECKING:
    from ingestion.batch import BatchDecoder
    from ingestion.landing import Landing

# Records, and bytes of them, read into one load: what a killed run repeats, and what the next load overlaps with.
# Bounds the disk its files take, not the memory.
RECORDS_PER_LOAD = 300_000
BYTES_PER_LOAD = 1 << 30

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def land_topic(
    settings: Settings,
    connection: Connection,
    writer: Writer,
    landing: "Landing",
    progress: Progress,
    records_per_load: int,
    folder: FolderReader | None = None,
) -> None:
    feed = writer.feed
    reader = folder or TopicReader(settings, feed)
    try:
        topic = reader.fetch_topic()
        stream = folder.stream if folder else _guard_stream(connection, feed, topic)
        if folder:
            landing.stream, landing.passed_over, landing.unchanged = stream.name, folder.passed_over, folder.unchanged
        positions = ledger.fetch_positions(connection, feed, stream)
        lost = _guard_positions(connection, feed, stream, reader.find_losses(topic, positions))
        if lost:
            landing.add(commit_package(settings, connection, stream, writer, lost))
            positions = ledger.fetch_positions(connection, feed, stream)
        positions = {p: positions.get(p, start) for p, (start, _) in topic.bounds.items()}
        if any(positions[p] < end for p, (_, end) in topic.bounds.items()):
            suspicion = Suspicion.after(connection, feed, stream, positions, records_per_load)
            loads = _TopicLoads(
                settings, connection, writer, stream, reader, topic, positions, suspicion, landing.profile
            )
            loads.land(landing, progress)
    finally:
        reader.close()


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


class _TopicLoads:
    """Load after load of one topic: while one is committed, the next one is read."""

    def __init__(
        self,
        settings: Settings,
        connection: Connection,
        writer: Writer,
        stream: Stream,
        reader: TopicReader | FolderReader,
        topic: Topic,
        positions: dict[int, int],
        suspicion: Suspicion,
        profile: Profile,
    ) -> None:
        # Loads Arrow: only where there is something to decode.
        from ingestion.batch import BatchDecoder

        self._settings = settings
        self._connection = connection
        self._writer = writer
        self._stream = stream
        self._reader = reader
        self._topic = topic
        # Up to here everything is read; what of it is true, the ledger says.
        self._positions = positions
        self._suspicion = suspicion
        self._profile = profile
        self._decoder = BatchDecoder(Contract(writer.feed))
        self._batches = reader.read(topic, positions, suspicion.limit)
        self._under_way: tuple[_Reading, Future[None]] | None = None

    def land(self, landing: "Landing", progress: Progress) -> None:
        """Read to the ends seen at the start, and commit all of it."""
        total = landing.offered + sum(end - self._positions[p] for p, (_, end) in self._topic.bounds.items())
        with ThreadPoolExecutor(1, "commit") as thread, _collecting_between_loads():
            while True:
                try:
                    if self._under_way is not None:
                        # While it is committed, which takes the longer way.
                        self._tidy_up()
                    reading = (
                        self._read(lambda taken: progress(landing.offered + taken, total)) if self._is_due() else None
                    )
                except BaseException:
                    # The load under way commits all the same, and is part of what was done.
                    with contextlib.suppress(WarehouseError, psycopg2.Error):
                        self._settle(landing)
                    raise
                if not self._settle(landing):
                    if reading is not None:
                        self._drop(reading)
                    continue
                if reading is None:
                    break
                self._under_way = (reading, thread.submit(self._load, reading.package))
                if self._suspicion.is_careful:
                    self._settle(landing)
        ledger.summarize(self._connection, self._writer.feed)
        self._suspicion.settle()

    def _is_due(self) -> bool:
        return any(self._positions[p] < end for p, (_, end) in self._topic.bounds.items())

    def _load(self, package: Package) -> None:
        started = time.monotonic()
        copying = load_package(self._settings, self._connection, package)
        self._profile.add("copy", copying)
        self._profile.add("commit", time.monotonic() - started - copying)

    def _settle(self, landing: "Landing") -> bool:
        """Wait for the load under way; False when it was refused, and reading begins again where it began."""
        if self._under_way is None:
            return True
        reading, loaded = self._under_way
        self._under_way = None
        try:
            with self._profile.stage("wait"):
                loaded.result()
        except RefusedDataError:
            ends = {p: tally.next for p, tally in reading.tallies.items() if tally.seen}
            if not self._suspicion.refused(reading.places or _all_places(reading.tallies), ends):
                raise
            ledger.sweep(self._connection, self._writer.feed)
            self._positions = {p: tally.first for p, tally in reading.tallies.items()}
            self._batches = self._reader.read(self._topic, self._positions, self._suspicion.limit)
            return False
        except WarehouseError as error:
            self._excuse(reading, error)
            raise
        landing.add(reading.package)
        landing.reasons.update(reading.reasons)
        limit = self._suspicion.limit
        self._suspicion.committed({p: tally.next for p, tally in reading.tallies.items()})
        if self._suspicion.limit != limit:
            self._batches = self._reader.read(self._topic, self._positions, self._suspicion.limit)
        return True

    def _tidy_up(self) -> None:
        """What the loads before left behind: Python's garbage, and pages the index does not know."""
        gc.collect()
        ledger.summarize(self._connection, self._writer.feed)

    def _drop(self, reading: "_Reading") -> None:
        """Forget a load that was read behind one that was refused."""
        reading.package.discard()
        self._suspicion.excuse(reading.load_id)

    def _excuse(self, reading: "_Reading", error: WarehouseError) -> None:
        if error.error_class is not ErrorClass.INTERNAL and reading.load_id and not self._connection.closed:
            self._suspicion.excuse(reading.load_id)

    def _read(self, progress: Callable[[int], None]) -> "_Reading":
        """The next load, written and not yet true."""
        reading = _Reading({p: Tally(position) for p, position in self._positions.items()})
        already = 0 if self._under_way is None else self._under_way[0].taken

        def fill(package: Package) -> None:
            reading.load_id = package.load_id
            self._fill(package, reading, lambda taken: progress(already + taken))

        try:
            reading.package = write_package(self._settings, self._connection, self._stream, self._writer, fill)
        except WarehouseError as error:
            self._excuse(reading, error)
            raise
        for interval in reading.package.intervals:
            self._positions[interval.partition] = (interval.last_position or 0) + 1
        return reading

    def _fill(self, package: Package, reading: "_Reading", progress: Callable[[int], None]) -> None:
        suspicion = self._suspicion
        suspicion.note_batch(package.load_id, self._stream, self._positions)
        exhausted = True
        while True:
            with self._profile.stage("consume"):
                batch = next(self._batches, None)
            if batch is None:
                break
            self._take(batch, package, reading)
            progress(reading.taken)
            # Not two batches at once in memory.
            del batch
            if reading.taken >= suspicion.limit or reading.bytes >= BYTES_PER_LOAD:
                exhausted = False
                break
        for partition, tally in sorted(reading.tallies.items()):
            # At the end of the log the last records may be control records, which nobody delivers.
            stop = self._topic.bounds[partition][1] if exhausted else tally.next
            if stop > tally.first:
                package.add_interval(
                    replace(
                        tally.interval(partition),
                        first_position=tally.first,
                        last_position=stop - 1,
                        control=stop - tally.first - tally.seen,
                    )
                )
                if isinstance(self._reader, FolderReader):
                    self._reader.note_read(self._writer, package.load_id, tally.first, stop)
        suspicion.note_read(package.load_id)

    def _take(self, batch: list[Message], package: Package, reading: "_Reading") -> None:
        """Put a batch into the package, record by record where one of them is suspected."""
        suspicion = self._suspicion
        good = _set_poison_aside(batch, suspicion, package, reading)
        for part in [[message] for message in good] if suspicion.noting else [good]:
            if suspicion.noting:
                suspicion.note_record(package.load_id, (part[0].partition(), part[0].offset()))
            decode_messages(part, self._decoder, package, reading.tallies, reading.reasons, self._profile)
        if suspicion.noting:
            suspicion.note_decoded(package.load_id)
        reading.taken += len(batch)
        if suspicion.limit < suspicion.usual_limit:
            reading.places.extend((message.partition(), message.offset()) for message in batch)


@contextlib.contextmanager
def _collecting_between_loads() -> Iterator[None]:
    """Python's garbage collector walks every message of a batch again and again, for cycles there are not.

    What there was before is left out of it too: the modules alone take it a tenth of a second.
    """
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@dataclass
class _Reading:
    """What one load has read so far; nothing of it is true before the load commits."""

    tallies: dict[int, Tally]
    load_id: str = ""
    package: Package = field(init=False)
    taken: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    places: list[tuple[int, int]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(tally.bytes for tally in self.tallies.values())


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


def decode_messages(
    batch: list[Message],
    decoder: "BatchDecoder",
    package: Package,
    tallies: dict[int, Tally],
    reasons: Counter[str],
    profile: Profile,
) -> None:
    """Each message to a row, a dead letter or a tombstone, counted in its partition."""
    from ingestion.batch import MessageBatch, split_by_size

    for part in split_by_size(batch):
        with profile.stage("decode"):
            messages = MessageBatch(part)
            coordinates = messages.coordinates()
            decoded = decoder.decode(messages.values)
        with profile.stage("write"):
            package.add_rows(decoded.cells, decoded.select(coordinates))
        dead: Counter[int] = Counter()
        for index, verdict in decoded.others:
            place = [column[index].as_py() for column in coordinates]
            partition, offset, sent_at, _, headers = place
            if isinstance(verdict, Row):
                tallies[int(partition)].drifted += verdict.extra is not None
                package.add_row(verdict.cells, verdict.extra, [cell(value) for value in place])
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

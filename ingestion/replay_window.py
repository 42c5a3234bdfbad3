"""Reading a window of a source again: a time or offset window -> what is missing lands, everything else stays.

    topic: each record by its coordinates: landed already -> left; open dead letter -> tried again;
           accounted for, but its row is gone -> restored; behind the committed positions -> left to the normal run
    API:   open dead letters of the window's days, then the days again, as a normal run reads them

Applied twice it lands nothing the second time. Positions are read and never written. Without `apply` the same code
runs in a transaction that cannot write, and its answer is the forecast.
"""

import datetime as dt
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Message
from psycopg2 import sql

from ingestion import ledger
from ingestion.contract import Contract, Row
from ingestion.endpoint import PageAccount, Sorter, api_place, endpoint_origin, land_pages
from ingestion.errors import ConfigurationError, Reason
from ingestion.feeds import FeedSpec, KafkaOrigin
from ingestion.kafka import Topic, TopicReader
from ingestion.landing import Landing
from ingestion.ledger import Connection, Stream, Writer
from ingestion.package import cell, headers_json
from ingestion.replay import (
    COMING_LOADS,
    WAIT_S,
    Coming,
    Offer,
    Progress,
    Replay,
    Selection,
    Verdict,
    fetch_offers,
    judge,
    land,
    replaying,
)
from ingestion.rest import EndpointReader
from ingestion.settings import Settings
from ingestion.topic import time_text

# What a day's line counts, in the order it is shown.
FIGURES = ("read", "unchanged", "landed", "failed", "restored", "dead", "discarded", "empty")


@dataclass(frozen=True)
class TimeWindow:
    """Records of times in [start, stop), by the source's clock."""

    start: dt.datetime
    stop: dt.datetime


@dataclass(frozen=True)
class OffsetWindow:
    """Offsets of one partition; both ends belong to it."""

    partition: int
    first: int
    last: int


@dataclass
class WindowReplay(Replay):
    """What a window's replay did or would do.

    `landed` are dead letters that fit now and, of an API, new or changed records; `unchanged` had landed already;
    `failed` are dead letters that stay open; `dead` are records of an API newly set aside; `empty` are tombstones.
    `waiting`: offsets of the window the normal run has yet to read. `gone`: offsets the source no longer holds.
    """

    read: int = 0
    unchanged: int = 0
    dead: int = 0
    discarded: int = 0
    empty: int = 0
    waiting: int = 0
    gone: int = 0
    days: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def count(self, day: str, figure: str, number: int = 1) -> None:
        setattr(self, figure, getattr(self, figure) + number)
        self.days[day][figure] += number

    def note(self, verdict: Verdict) -> None:
        before = {figure: getattr(self, figure) for figure in FIGURES}
        super().note(verdict)
        for figure, number in before.items():
            if getattr(self, figure) != number:
                self.days[verdict.offer.day][figure] += getattr(self, figure) - number

    def as_dict(self) -> dict[str, Any]:
        days = {day: {figure: self.days[day][figure] for figure in FIGURES} for day in sorted(self.days)}
        return {**super().as_dict(), "days": days}


def replay_window(
    settings: Settings,
    feed: FeedSpec,
    window: TimeWindow | OffsetWindow,
    *,
    apply: bool = False,
    because: str | None = None,
    wait_s: float = WAIT_S,
    coming: Coming | None = None,
    progress: Progress = lambda done, due: None,
) -> WindowReplay:
    """Read a window of a feed's source again and land what is missing. `coming` gets the rows a dry run would land.

    Raises:
        ConfigurationError: the window means nothing for this feed, or the broker cannot look up times.
        FeedBusyError, TransientError: what was committed before stays; nothing else is true.
    """
    started = time.monotonic()
    result = WindowReplay(feed.name, apply)
    with replaying(settings, feed, apply=apply, wait_s=wait_s) as (connection, writer):
        if isinstance(feed.origin, KafkaOrigin):
            _replay_topic(settings, feed, window, connection, writer, result, because, coming, progress)
        elif isinstance(window, TimeWindow):
            _replay_endpoint(settings, feed, window, connection, writer, result, because, coming)
        else:
            raise ConfigurationError(f"{feed.name} has no offsets.", hint="Name days: --from and --to.")
    result.seconds = time.monotonic() - started
    return result


# --- Kafka ------------------------------------------------------------------------------------------------------------


def _replay_topic(
    settings: Settings,
    feed: FeedSpec,
    window: TimeWindow | OffsetWindow,
    connection: Connection,
    writer: Writer | None,
    result: WindowReplay,
    because: str | None,
    coming: Coming | None,
    progress: Progress,
) -> None:
    reader = TopicReader(settings, feed)
    try:
        topic = reader.fetch_topic()
        streams = _find_streams(connection, feed, topic)
        positions = ledger.fetch_positions(connection, feed, streams[0])
        if isinstance(window, TimeWindow):
            bounds = _bounds_by_time(connection, feed, streams, reader, topic, positions, window, result)
        else:
            bounds = _bounds_by_offset(feed, topic, positions, window, result)
        due = sum(stop - start for start, stop in bounds.values())
        batches = reader.read(replace(topic, bounds=bounds), {p: start for p, (start, _) in bounds.items()})
        times = (
            (window.start.timestamp() * 1000, window.stop.timestamp() * 1000)
            if isinstance(window, TimeWindow)
            else None
        )
        judged = _judge_messages(connection, feed, streams, batches, times, result, lambda done: progress(done, due))
        if writer is None:
            for verdict in judged:
                result.note(verdict)
                if coming is not None:
                    coming.add_verdict(verdict)
        else:
            land(settings, connection, writer, result, judged, because)
    finally:
        reader.close()


def _find_streams(connection: Connection, feed: FeedSpec, topic: Topic) -> list[Stream]:
    """The streams this very topic was read into, newest first: a log that was cut goes on as another stream.

    Raises:
        ConfigurationError: the topic the broker has now was never read.
    """
    assert isinstance(feed.origin, KafkaOrigin)
    identity = (topic.cluster, feed.origin.topic, topic.incarnation)
    streams = [
        stream
        for stream in reversed(ledger.find_streams(connection, feed))
        if ledger.match_stream([stream], *identity) is not None
    ]
    if not streams:
        raise ConfigurationError(
            f"{feed.name}: nothing of the topic {feed.origin.topic} the broker has now was ever read.",
            hint="`warehouse ingest` reads it. The embedded broker forgets its messages when it stops.",
        )
    return streams


def _bounds_by_offset(
    feed: FeedSpec, topic: Topic, positions: Mapping[int, int], window: OffsetWindow, result: WindowReplay
) -> dict[int, tuple[int, int]]:
    partition = window.partition
    if partition not in topic.bounds:
        raise ConfigurationError(
            f"{feed.name} has no partition {partition}.", hint=f"It has {', '.join(map(str, sorted(topic.bounds)))}."
        )
    start, end = topic.bounds[partition]
    read_until = positions.get(partition, start)
    stop = window.last + 1
    result.gone = max(min(stop, start) - window.first, 0)
    result.waiting = max(min(stop, end) - max(window.first, read_until), 0)
    first, stop = max(window.first, start), min(stop, read_until, end)
    return {partition: (first, stop)} if first < stop else {}


def _bounds_by_time(
    connection: Connection,
    feed: FeedSpec,
    streams: list[Stream],
    reader: TopicReader,
    topic: Topic,
    positions: Mapping[int, int],
    window: TimeWindow,
    result: WindowReplay,
) -> dict[int, tuple[int, int]]:
    """Per partition the offsets that hold every record of the window that was read.

    The broker finds the first record of a time; records of earlier times may follow. The end is therefore the ledger's:
    the last interval with a record before the window's end.
    """
    firsts = reader.find_offsets(topic, window.start)
    afters = reader.find_offsets(topic, window.stop)
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "select partition, stream_id, first_position, last_position, source_time_max >= %s from {ledger} "
                "where stream_id = any(%s) and kind = 'kafka' and source_time_min < %s "
                "and _dlt_load_id in (select load_id from {loads})"
            ).format(**_tables(feed)),
            (window.start, [stream.stream_id for stream in streams], window.stop),
        )
        intervals = cursor.fetchall()
    bounds = {}
    for partition, (start, end) in topic.bounds.items():
        read_until = positions.get(partition, start)
        stop = start
        for its_partition, _, first, last, reaches_window in intervals:
            if its_partition == partition:
                stop = max(stop, last + 1)
                if reaches_window:
                    result.gone += max(min(last + 1, start) - first, 0)
        result.waiting += max(min(afters[partition], end) - max(firsts[partition], read_until), 0)
        first, stop = max(firsts[partition], start), min(stop, read_until, end)
        if first < stop:
            bounds[partition] = (first, stop)
    return bounds


def _judge_messages(
    connection: Connection,
    feed: FeedSpec,
    streams: list[Stream],
    batches: Iterator[list[Message]],
    times: tuple[float, float] | None,
    result: WindowReplay,
    progress: Any,
) -> Iterator[Verdict]:
    """The records that would land, be restored or fail; all others are counted in the result."""
    contract = Contract(feed)
    done = 0
    for batch in batches:
        done += len(batch)
        places: dict[tuple[int, int], list[tuple[Message, str, str | None]]] = defaultdict(list)
        for message in batch:
            kind, milliseconds = message.timestamp()
            sent_at = None if kind == TIMESTAMP_NOT_AVAILABLE else time_text(milliseconds)
            if times is not None and (sent_at is None or not times[0] <= milliseconds < times[1]):
                continue
            stream = _stream_at(streams, message.partition(), message.offset())
            day = sent_at[:10] if sent_at else "no time"
            places[stream.stream_id, message.partition()].append((message, day, sent_at))
        for (stream_id, partition), messages in places.items():
            known = _fetch_known(
                connection, feed, stream_id, partition, messages[0][0].offset(), messages[-1][0].offset()
            )
            for message, day, sent_at in messages:
                verdict = _judge_message(contract, known, message, day, sent_at, stream_id, result)
                if verdict is not None:
                    yield verdict
        progress(done)


@dataclass(frozen=True)
class _Known:
    """What the warehouse holds of a stretch of a partition."""

    landed: frozenset[int]
    letters: Mapping[int, tuple[str, str, str]]  # offset -> (id, status, reason)
    accounted: list[tuple[int, int]]


def _judge_message(
    contract: Contract,
    known: _Known,
    message: Message,
    day: str,
    sent_at: str | None,
    stream_id: int,
    result: WindowReplay,
) -> Verdict | None:
    offset, value = message.offset(), message.value()
    result.count(day, "read")
    if value is None:
        result.count(day, "empty")
        return None
    if offset in known.landed:
        result.count(day, "unchanged")
        return None
    letter_id, status, reason = known.letters.get(offset, (None, "", ""))
    if status == "discarded":
        result.count(day, "discarded")
        return None
    if reason == Reason.POISON.value and status == "open":
        # Loads died of it; `dead-letters replay --id` tries it all the same.
        result.count(day, "failed")
        result.reasons[reason] += 1
        return None
    if letter_id is None and not any(first <= offset <= last for first, last in known.accounted):
        result.waiting += 1
        return None
    value = bytes(value)
    offer = Offer(
        stream_id=stream_id,
        partition=message.partition(),
        value=value,
        coordinates=(
            str(message.partition()),
            str(offset),
            sent_at,
            cell(message.key()),
            headers_json(message.headers()),
        ),
        letter_id=letter_id if status == "open" else None,
        day=day,
    )
    return Verdict(offer, contract.decode(value))


def _stream_at(streams: list[Stream], partition: int, offset: int) -> Stream:
    return next((s for s in streams if s.begins_at.get(partition, 0) <= offset), streams[-1])


def _fetch_known(
    connection: Connection, feed: FeedSpec, stream_id: int, partition: int, first: int, last: int
) -> _Known:
    tables = _tables(feed)
    place = (stream_id, partition, first, last)
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "select _dlt_load_id, first_position, last_position from {ledger} "
                "where stream_id = %s and partition = %s and _dlt_load_id in (select load_id from {loads}) "
                "and (kind = 'replay' or kind = 'kafka' and lost = 0 and last_position >= %s and first_position <= %s)"
            ).format(**tables),
            place,
        )
        intervals = cursor.fetchall()
        # By load, because that is what the raw table has an index on.
        cursor.execute(
            sql.SQL(
                "select _kafka_offset from {raw} where _dlt_load_id = any(%s) and _stream_id = %s "
                "and _kafka_partition = %s and _kafka_offset between %s and %s"
            ).format(**tables),
            (list({row[0] for row in intervals}), *place),
        )
        landed = frozenset(row[0] for row in cursor.fetchall())
        cursor.execute(
            sql.SQL(
                "select _kafka_offset, dead_letter_id, case "
                "when replay_load_id in (select load_id from {loads}) then 'replayed' "
                "when discarded_at is not null then 'discarded' else 'open' end, reason from {dead} "
                "where _stream_id = %s and _kafka_partition = %s and _kafka_offset between %s and %s and feed = %s "
                "and _dlt_load_id in (select load_id from {loads})"
            ).format(**tables),
            (*place, feed.name),
        )
        letters = {offset: (letter_id, status, reason) for offset, letter_id, status, reason in cursor.fetchall()}
    accounted = [(first, last) for _, first, last in intervals if first is not None]
    return _Known(landed, letters, accounted)


def _tables(feed: FeedSpec) -> dict[str, sql.Composable]:
    return {
        "raw": sql.Identifier(feed.source, feed.table),
        "dead": sql.Identifier(feed.source, "_dead_letters"),
        "ledger": sql.Identifier(feed.source, "_ledger"),
        "loads": sql.Identifier(feed.source, "_dlt_loads"),
    }


# --- REST -------------------------------------------------------------------------------------------------------------


def _replay_endpoint(
    settings: Settings,
    feed: FeedSpec,
    window: TimeWindow,
    connection: Connection,
    writer: Writer | None,
    result: WindowReplay,
    because: str | None,
    coming: Coming | None,
) -> None:
    reader = EndpointReader(settings, feed)
    streams = ledger.find_streams(connection, feed)
    stream = ledger.match_stream(streams, endpoint_origin(settings, reader), reader.origin.path, "")
    if stream is None:
        raise ConfigurationError(
            f"{feed.name}: nothing of {reader.base_url} was ever read.", hint="`warehouse ingest` reads it."
        )
    days = _days(window, dt.datetime.combine(reader.origin.window.start, dt.time(), dt.UTC))
    read_until = ledger.fetch_window_end(connection, feed, stream)
    if read_until is not None and days[1] > read_until:
        result.waiting = (days[1] - max(read_until, days[0])).days
        days = (days[0], read_until)
    if days[0] >= days[1]:
        return
    windows = []
    start = days[0]
    while start < days[1]:
        stop = min(start + dt.timedelta(days=reader.origin.window.days), days[1])
        windows.append((start, stop))
        start = stop
    verdicts = judge(connection, feed, fetch_offers(connection, feed, Selection(api_window=days)))
    if writer is None:
        sorter = Sorter(connection, reader)
        for verdict in verdicts:
            result.note(verdict)
            if coming is not None:
                coming.add_verdict(verdict)
            if isinstance(verdict.decoded, Row):
                sorter.expect(verdict.decoded)
        for page in map(sorter.sort, reader.read(windows)):
            _note_page(page.account, result)
            if coming is not None:
                for item, row, content in page.new:
                    coming.add(row, stream.stream_id, api_place(page.page, item, content), COMING_LOADS[1])
        return
    land(settings, connection, writer, result, verdicts, because)
    landing = Landing(feed.name)
    for account in land_pages(settings, connection, writer, stream, windows, reader, landing):
        _note_page(account, result)
    result.load_ids.extend(landing.loads)


def _days(window: TimeWindow, earliest: dt.datetime) -> tuple[dt.datetime, dt.datetime]:
    """The whole days the window touches, none before the feed's first."""
    start = window.start.astimezone(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    stop = window.stop.astimezone(dt.UTC)
    rounded = stop.replace(hour=0, minute=0, second=0, microsecond=0)
    return max(start, earliest), rounded if rounded == stop else rounded + dt.timedelta(days=1)


def _note_page(page: PageAccount, result: WindowReplay) -> None:
    last = page.window_to - dt.timedelta(days=1)
    label = f"{page.window_from:%Y-%m-%d}"
    if last > page.window_from:
        label += f" to {last:%Y-%m-%d}"
    for figure in ("read", "unchanged", "landed", "dead"):
        result.count(label, figure, getattr(page, figure))
    result.reasons.update(page.reasons)

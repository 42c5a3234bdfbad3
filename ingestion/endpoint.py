"""Landing an API feed: windows -> pages -> new and changed records -> one package.

    read a page -> tell new, rejected and unchanged records apart -> package -> commit

Leading pages that bring nothing new make no load. A record the database refuses, or that loads died of, is set aside
as poison and the rest lands (`ingestion/poison_records.py`). A window that was empty is asked for again by later runs:
an API that is not well may say "nothing" of days that hold records.
"""

import datetime as dt
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ingestion import ledger
from ingestion.contract import Contract, Rejection, Row
from ingestion.errors import Reason, RefusedDataError
from ingestion.feeds import RestOrigin
from ingestion.ledger import Connection, EmptyWindow, Stream, Writer
from ingestion.load import commit_package
from ingestion.package import Interval, Package, cell
from ingestion.poison_records import RecordWatch, Trial
from ingestion.rest import EndpointReader, Page, plan_windows
from ingestion.settings import Settings

if TYPE_CHECKING:
    from ingestion.landing import Landing

# (records read so far, records due or None when the source cannot say)
Progress = Callable[[int, int | None], None]
Window = tuple[dt.datetime, dt.datetime]

# Windows asked for once more because they were empty: a few of them each run, all of them over the runs.
EMPTY_WINDOWS_PER_RUN = 5


def land_endpoint(
    settings: Settings, connection: Connection, writer: Writer, landing: "Landing", progress: Progress
) -> None:
    """Read what is due of an API feed and land it; what it did is added to `landing`."""
    feed = writer.feed
    reader = EndpointReader(settings, feed)
    stream = ledger.ensure_stream(connection, feed, endpoint_origin(settings, reader), reader.origin.path, "")
    now = dt.datetime.now(dt.UTC)
    windows = plan_windows(reader.origin, ledger.fetch_window_end(connection, feed, stream), now.date())
    if not windows:
        return
    empty = ledger.fetch_empty_windows(connection, feed, stream)
    again = choose_empty(empty, reader.origin, now, windows[0][0])
    land_pages(
        settings,
        connection,
        writer,
        stream,
        [*again, *windows],
        reader,
        landing,
        progress,
        start=windows[0][0],
        empty=empty,
    )


def endpoint_origin(settings: Settings, reader: EndpointReader) -> str:
    """The name of the API in its stream: the embedded one has another port with every start and is the same API."""
    return "embedded" if "rates" in settings.embedded else reader.base_url


def choose_empty(
    empty: Sequence[EmptyWindow], origin: RestOrigin, now: dt.datetime, before: dt.datetime
) -> list[Window]:
    """Windows to be asked for once more because they were empty: EMPTY_WINDOWS_PER_RUN at most, oldest first.

    Each is due for as long as any other day is read again: `reread_days` from when it was first found empty.

    Args:
        before: where the windows begin that are due anyway.
    """
    since = now - dt.timedelta(days=origin.window.reread_days)
    due = [(one.start, min(one.stop, before)) for one in empty if one.start < before and one.found_at > since]
    return sorted(random.sample(due, min(len(due), EMPTY_WINDOWS_PER_RUN)))


@dataclass(frozen=True)
class SortedPage:
    """A page's records by what is to become of them: (item, ...); the rest is unchanged."""

    page: Page
    new: list[tuple[int, Row, str]]
    dead: list[tuple[int, Rejection, bytes]]

    @property
    def account(self) -> "PageAccount":
        return PageAccount(
            self.page.window_from,
            self.page.window_to,
            read=len(self.page.records),
            landed=len(self.new),
            dead=len(self.dead),
            drifted=sum(row.extra is not None for _, row, _ in self.new),
            bytes=self.page.size,
            reasons=Counter(rejection.reason.value for _, rejection, _ in self.dead),
        )


@dataclass(frozen=True)
class PageAccount:
    """What one page brought, in figures. read = landed + dead + unchanged."""

    window_from: dt.datetime
    window_to: dt.datetime
    read: int
    landed: int
    dead: int
    drifted: int
    bytes: int
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def unchanged(self) -> int:
        return self.read - self.landed - self.dead


def land_pages(
    settings: Settings,
    connection: Connection,
    writer: Writer,
    stream: Stream,
    windows: Sequence[Window],
    reader: EndpointReader,
    landing: "Landing",
    progress: Progress = lambda done, due: None,
    *,
    start: dt.datetime | None = None,
    empty: Sequence[EmptyWindow] | None = None,
) -> list[PageAccount]:
    """Land what the windows bring in one package; none for windows that bring nothing new. What each page brought.

    Args:
        start: tells this reading from others in the account of loads that died; the first window's by default.
        empty: the windows known to be empty; None leaves them as they are.

    Raises:
        WarehouseError: nothing of it is true.
    """
    watch = RecordWatch(connection, writer.feed)
    watch.begin(writer, stream, start or windows[0][0])

    def read_and_land(trial: Trial | None) -> list[PageAccount]:
        sorter = Sorter(connection, reader, watch)
        pages = map(sorter.sort, reader.read(windows))
        accounts: list[PageAccount] = []
        news = next_with_news(pages, accounts)
        if news is None:
            landing.unchanged += sum(account.unchanged for account in accounts)
            return accounts

        def fill(package: Package) -> None:
            for page in itertools.chain([news], pages):
                if trial is not None:
                    page = set_refused_aside(page, package, trial, watch)
                add_page(page, package)
                accounts.append(page.account)
                progress(sum(account.read for account in accounts), None)
            interval = to_interval(windows, accounts)
            if empty is not None:
                interval = replace(interval, empty_windows=note_empty(empty, accounts, package.loaded_at))
            package.add_interval(interval)
            watch.note_read()
            if trial is not None:
                trial.undo()

        landing.add(commit_package(settings, connection, stream, writer, fill))
        for account in accounts:
            landing.reasons.update(account.reasons)
        return accounts

    try:
        with watch.reading():
            return read_and_land(None)
    except RefusedDataError:
        # Which record it was nobody says: read once more, and try each row before it is copied.
        ledger.sweep(connection, writer.feed)
        with Trial(settings, writer.feed) as trial, watch.reading():
            return read_and_land(trial)


def next_with_news(pages: Iterator[SortedPage], accounts: list[PageAccount]) -> SortedPage | None:
    """The next page that brings something new; those before it are only counted."""
    for page in pages:
        if page.new or page.dead:
            return page
        accounts.append(page.account)
    return None


def to_interval(windows: Sequence[Window], accounts: Sequence[PageAccount]) -> Interval:
    """The ledger's row of a load: what was asked for, and what came of it."""
    return Interval(
        partition=0,
        window_from=windows[0][0],
        window_to=windows[-1][1],
        pages=len(accounts),
        landed=sum(account.landed for account in accounts),
        dead=sum(account.dead for account in accounts),
        unchanged=sum(account.unchanged for account in accounts),
        drifted=sum(account.drifted for account in accounts),
        bytes=sum(account.bytes for account in accounts),
    )


def note_empty(known: Sequence[EmptyWindow], accounts: Sequence[PageAccount], now: dt.datetime) -> list[EmptyWindow]:
    """The windows that are empty after these pages: those known and not read now, and those read and empty."""
    read = {account.window_from: account for account in accounts}
    found_at = {one.start: one.found_at for one in known}
    return [one for one in known if one.start not in read] + [
        EmptyWindow(start, account.window_to, found_at.get(start, now))
        for start, account in read.items()
        if account.read == 0
    ]


def add_page(page: SortedPage, package: Package) -> None:
    """Put a page's new rows and dead letters into the package."""
    for item, row, content in page.new:
        package.add_row(row.cells, row.extra, api_place(page.page, item, content))
    for item, rejection, value in page.dead:
        package.add_dead_letter(
            rejection, value, api=(page.page.window_from, page.page.window_to, page.page.number, item)
        )


def api_place(page: Page, item: int, content: str) -> list[str | None]:
    """A record's coordinates in its raw row, after the stream id, as text."""
    return [cell(value) for value in (page.window_from, page.window_to, page.number, item, content)]


def set_refused_aside(page: SortedPage, package: Package, trial: Trial, watch: RecordWatch) -> SortedPage:
    """The page with the rows the database refuses among its dead."""
    refused = trial.find_refused(
        [package.row(row.cells, row.extra, api_place(page.page, item, content)) for item, row, content in page.new]
    )
    dead = [(page.new[index][0], rejection) for index, rejection in refused.items()]
    for item, _ in dead:
        watch.know(page.page.records[item])
    return SortedPage(
        page.page,
        [entry for index, entry in enumerate(page.new) if index not in refused],
        [*page.dead, *((item, rejection, page.page.records[item]) for item, rejection in dead)],
    )


class Sorter:
    """Tells new and corrected records from those a window brings again."""

    def __init__(self, connection: Connection, reader: EndpointReader, watch: RecordWatch | None = None) -> None:
        self._connection = connection
        self._feed = reader.feed
        self._contract = Contract(reader.feed)
        self._watch = watch or RecordWatch(connection, reader.feed)
        self._key = reader.origin.key
        names = [column.name for column in reader.feed.columns]
        self._key_indexes = [names.index(name) for name in self._key]
        self._seen: dict[tuple[str | None, ...], str] = {}
        self._dead_seen: set[bytes] = set()

    def _key_of(self, row: Row) -> tuple[str | None, ...]:
        return tuple(row.cells[index] for index in self._key_indexes)

    def expect(self, row: Row) -> None:
        """Take a row for landed that is about to be."""
        self._seen[self._key_of(row)] = content_hash(row)

    def sort(self, page: Page) -> SortedPage:
        """What is to become of a page's records. One set aside as poison before counts as unchanged."""
        decoded = [(item, value, self._watch.judge(value, self._contract)) for item, value in enumerate(page.records)]
        self._watch.note_decoded()
        rows = [(item, row, content_hash(row)) for item, _, row in decoded if isinstance(row, Row)]
        keys = [self._key_of(row) for _, row, _ in rows]
        known = ledger.fetch_content_hashes(self._connection, self._feed, self._key, keys)
        new = []
        for (item, row, content), key, before in zip(rows, keys, known, strict=True):
            if self._seen.get(key, before) != content:
                new.append((item, row, content))
            self._seen[key] = content
        rejected = [(item, verdict, value) for item, value, verdict in decoded if isinstance(verdict, Rejection)]
        known_dead = ledger.fetch_known_dead_values(self._connection, self._feed, [value for _, _, value in rejected])
        dead = []
        for entry in rejected:
            # A verdict of poison is told once, and has to be kept.
            if entry[1].reason is Reason.POISON or (entry[2] not in known_dead and entry[2] not in self._dead_seen):
                dead.append(entry)
            self._dead_seen.add(entry[2])
        return SortedPage(page, new, dead)


def content_hash(row: Row) -> str:
    """What tells one version of an API's record from another."""
    return hashlib.sha256(repr((row.cells, row.extra)).encode()).hexdigest()[:32]

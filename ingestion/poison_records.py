"""Poison among the records of an API, which have no place of their own: they are known by their bytes.

As in `ingestion/poison.py`: after some loads died while reading from the same day on, each record is noted before it
is decoded, and the one noted again when the process died is the one. What the database refuses is found by trying the
rows in a transaction that is undone. Records set aside as poison before are neither decoded nor landed again; a
window brings them with every run.
"""

import contextlib
import hashlib
import io
import json
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from types import TracebackType

import psycopg2
from psycopg2 import sql

from ingestion import ddl, ledger
from ingestion.contract import Contract, Rejection, Row
from ingestion.database import classify_error, connect
from ingestion.errors import ErrorClass, Reason, WarehouseError
from ingestion.feeds import FeedSpec
from ingestion.ledger import Connection, Stream, Writer
from ingestion.load import classify_load_error
from ingestion.package import copy_line
from ingestion.poison import DEATHS_BEFORE_NOTING, DEATHS_OF_ONE_RECORD, KILLED, REFUSED
from ingestion.settings import Settings


class RecordWatch:
    """Which records are poison, and (after deaths) which one is being decoded."""

    def __init__(self, connection: Connection, feed: FeedSpec) -> None:
        self._connection = connection
        self._feed = feed
        self._known = ledger.fetch_poison_digests(connection, feed)
        # Set aside in this reading; true when it commits.
        self._told: set[bytes] = set()
        self._killed: set[bytes] = set()
        self._noting = False
        self._writer: Writer | None = None
        self._batch = ""
        self._reading_id = ""

    def begin(self, writer: Writer, stream: Stream, start: datetime) -> None:
        """Take up what loads that died left noted when they read from this day on."""
        self._writer = writer
        self._batch = json.dumps([stream.stream_id, start.isoformat()])
        with self._connection.cursor() as cursor:
            cursor.execute(
                sql.SQL(
                    "select noted, count(*) from {} where feed = %s and phase = 'reading' and batch = %s group by noted"
                ).format(self._begun),
                (self._feed.name, self._batch),
            )
            deaths: dict[str | None, int] = dict(cursor.fetchall())
        self._noting = sum(deaths.values()) >= DEATHS_BEFORE_NOTING
        self._killed = {
            bytes.fromhex(noted) for noted, count in deaths.items() if noted and count >= DEATHS_OF_ONE_RECORD
        }

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around reading and committing: whoever dies in here leaves a note, whoever fails is excused."""
        assert self._writer is not None, "begin comes first"
        self._told = set()
        # No load's name: pages that bring nothing new are read before there is a load.
        self._reading_id = f"{ledger.READING}{uuid.uuid4().hex}"
        ledger.begin_load(self._connection, self._writer, self._reading_id)
        self._update("batch", self._batch)
        try:
            yield
        except (WarehouseError, psycopg2.Error) as error:
            if not isinstance(error, WarehouseError) or error.error_class is not ErrorClass.INTERNAL:
                # A session that was ended must not hide what ended the load.
                with contextlib.suppress(psycopg2.Error):
                    self._update("phase", "excused")
            raise
        # What was poison is set aside now: earlier deaths say nothing more.
        with self._connection.cursor() as cursor:
            cursor.execute(sql.SQL("delete from {} where load_id = %s").format(self._begun), (self._reading_id,))
            cursor.execute(
                sql.SQL("update {} set phase = 'excused' where feed = %s and phase = 'reading'").format(self._begun),
                (self._feed.name,),
            )

    def judge(self, value: bytes, contract: Contract) -> Row | Rejection | None:
        """A record's verdict; None for one set aside as poison before. What loads died of is not decoded."""
        if not (self._known or self._told or self._killed or self._noting):
            return contract.decode(value)
        digest = hashlib.sha256(value).digest()
        if digest in self._known or digest in self._told:
            return None
        if digest in self._killed:
            self._told.add(digest)
            return KILLED
        if self._noting:
            self._update("noted", digest.hex())
        return contract.decode(value)

    def know(self, value: bytes) -> None:
        """A record is set aside as poison."""
        self._told.add(hashlib.sha256(value).digest())

    def note_decoded(self) -> None:
        """The noted records are decoded; who dies now dies waiting for the next."""
        if self._noting:
            self._update("noted", None)

    def note_read(self) -> None:
        """Everything is read and decoded; what ends the load now is not a record's doing."""
        self._update("phase", "read")

    @property
    def _begun(self) -> sql.Identifier:
        return sql.Identifier(self._feed.source, "_loads_begun")

    def _update(self, column: str, value: str | None) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(
                sql.SQL("update {} set {} = %s where load_id = %s").format(self._begun, sql.Identifier(column)),
                (value, self._reading_id),
            )


class Trial:
    """Rows tried in a transaction of its own, which is undone: it finds those the database refuses.

    Accepted rows stay until the end, so that what is refused because of a row before it is found too.
    """

    def __init__(self, settings: Settings, feed: FeedSpec) -> None:
        self._feed = feed
        columns = sql.SQL(", ").join(sql.Identifier(name) for name, _, _ in ddl.raw_columns(feed))
        self._copy = sql.SQL("copy {} ({}) from stdin").format(sql.Identifier(feed.source, feed.table), columns)
        self._connection = connect(settings, purpose=f"try {feed.name}")

    def __enter__(self) -> "Trial":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def find_refused(self, rows: Sequence[Sequence[str | None]]) -> dict[int, Rejection]:
        """Index -> why, for the rows the database refuses; the others are accepted, one after the other.

        Raises:
            TransientError: the database is away; nothing is known of any row.
        """
        lines = [copy_line(row) for row in rows]
        refused: dict[int, Rejection] = {}
        todo = [(0, len(lines))]
        while todo:
            first, stop = todo.pop()
            why = self._refusal(lines[first:stop])
            if why is None:
                continue
            if stop - first == 1:
                refused[first] = why
            else:
                middle = (first + stop) // 2
                todo += [(middle, stop), (first, middle)]  # the earlier half is tried first
        return refused

    def undo(self) -> None:
        """Leave no row, and nothing for the load to wait for."""
        self._connection.rollback()

    def _refusal(self, lines: Sequence[str]) -> Rejection | None:
        """Why the database refuses these lines; None when it takes them."""
        try:
            with self._connection.cursor() as cursor:
                # A constraint that waits for the commit would never be asked.
                cursor.execute("set constraints all immediate; savepoint before")
                try:
                    cursor.copy_expert(self._copy.as_string(cursor), io.BytesIO("".join(lines).encode()))
                except psycopg2.Error as error:
                    if classify_load_error(error, self._feed).error_class is not ErrorClass.DATA:
                        raise
                    cursor.execute("rollback to before")
                    # A constraint's name is not the record's; what else Postgres says quotes it.
                    name = error.diag.constraint_name
                    return Rejection(Reason.POISON, "$", f"{REFUSED.message} ({name})") if name else REFUSED
                cursor.execute("release before")
        except psycopg2.Error as error:
            raise classify_error(error) or classify_load_error(error, self._feed) from error
        return None

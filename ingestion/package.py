"""One load package: rows, dead letters and ledger intervals as files for COPY, copied and committed by dlt.

The files are written here, so that nothing changes on the way ('' is not NULL, every byte of a text kept), and handed
to dlt finished; dlt copies them and then writes the row in `_dlt_loads` that makes them true together. Batches of rows
go in COPY's binary format (`ingestion.binary`), everything else, and what has no exact binary form, as text.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from io import BufferedWriter
from pathlib import Path
from typing import Any, Literal

import msgspec

from ingestion import ddl
from ingestion.contract import Rejection
from ingestion.feeds import FeedSpec
from ingestion.ledger import EmptyWindow, Stream, Writer

ROWS_PER_FILE = 100_000
# What stands before and behind the rows in COPY's binary format. No text begins like that: it would not be UTF-8.
BINARY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
BINARY_TRAILER = b"\xff\xff"
LOADER_VERSION = version("payments-warehouse")


@dataclass(frozen=True)
class Interval:
    """One row of the ledger: what a load read of one partition, or of one API window."""

    partition: int
    # "replay" for what comes out of the dead letters; None means what the feed is.
    kind: Literal["replay"] | None = None
    # Of another stream than the package's.
    stream_id: int | None = None
    first_position: int | None = None
    last_position: int | None = None
    window_from: datetime | None = None
    window_to: datetime | None = None
    pages: int = 0
    landed: int = 0
    dead: int = 0
    tombstones: int = 0
    unchanged: int = 0
    control: int = 0
    lost: int = 0
    restored: int = 0
    drifted: int = 0
    bytes: int = 0
    source_time_min: str | None = None
    source_time_max: str | None = None
    # Of an API: the windows that hold nothing, after this load; None leaves what is known.
    empty_windows: Sequence[EmptyWindow] | None = None

    @property
    def offered(self) -> int:
        return self.landed + self.dead + self.tombstones + self.unchanged


def cell(value: Any) -> str | None:
    """The text Postgres reads back as the same value; None is NULL."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return "\\x" + value.hex()
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value)


def _empty_windows_json(windows: Sequence[EmptyWindow] | None) -> str | None:
    if windows is None:
        return None
    return json.dumps([[one.start.isoformat(), one.stop.isoformat(), one.found_at.isoformat()] for one in windows])


def headers_json(headers: Sequence[tuple[str, bytes | None]] | None) -> str | None:
    """Kafka headers as a JSON list of [key, value]; a value that is not text becomes {"hex": ...}."""
    if not headers:
        return None
    pairs: list[tuple[Any, Any]] = []
    for key, value in headers:
        text: Any = None
        if value is not None:
            try:
                text = value.decode("utf-8")
            except UnicodeDecodeError:
                text = {"hex": value.hex()}
            else:
                text = {"hex": value.hex()} if "\x00" in text else text
        pairs.append((key.replace("\x00", "\ufffd"), text))
    return msgspec.json.encode(pairs).decode()


_NULL = "\\N"


def escape(text: str) -> str:
    """The text as a field of COPY's text format."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def copy_line(cells: Sequence[str | None]) -> str:
    """One line as COPY reads it back in its text format; None is NULL."""
    return "\t".join([_NULL if c is None else escape(c) for c in cells]) + "\n"


def copy_lines(columns: Sequence[Any]) -> memoryview:
    """The same lines for whole columns: Arrow arrays, or one text (or None) for every line."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.compute as pc  # type: ignore[import-untyped]
    from pyarrow.csv import WriteOptions, write_csv  # type: ignore[import-untyped]

    rows = max(len(column) for column in columns if isinstance(column, pa.Array))
    arrays, backslashes = [], 0
    for column in columns:
        if not isinstance(column, pa.Array):
            column = pa.repeat(pa.scalar(_NULL if column is None else escape(column)), rows)
            backslashes += rows * column[0].as_py().count("\\") if rows else 0
        else:
            if pa.types.is_binary(column.type):
                column = hex_texts(column)
                backslashes += 2 * (rows - column.null_count)
            elif not pa.types.is_string(column.type):
                column = column.cast(pa.string())
            if column.null_count:
                backslashes += column.null_count
                column = pc.fill_null(column, _NULL)
        arrays.append(column)
    lines = pa.BufferOutputStream()
    names = [str(number) for number in range(len(arrays))]
    try:
        # Without quotes: refuses a text that holds a quote, a tab or a line's end.
        options = WriteOptions(include_header=False, quoting_style="none", delimiter="\t")
        write_csv(pa.Table.from_arrays(arrays, names=names), lines, options)
        written = lines.getvalue()
        if written.to_pybytes().count(b"\\") == backslashes:
            return memoryview(written)
    except pa.ArrowInvalid:
        pass
    texts = [c.to_pylist() if isinstance(c, pa.Array) else [c] * rows for c in columns]
    return memoryview("".join(copy_line([cell(c) for c in cells]) for cells in zip(*texts, strict=True)).encode())


def hex_texts(column: Any) -> Any:
    """Arrow bytes as Postgres reads them in COPY's text format: an escaped `\\x` and hexadecimal digits."""
    import pyarrow as pa
    import pyarrow.compute as pc

    validity, offsets, data = column.buffers()
    start = column.offset
    if data is None:
        return pc.if_else(pc.is_valid(column), "\\\\x", pa.scalar(None, pa.string()))
    if start:
        return hex_texts(pa.concat_arrays([column, pa.array([], pa.binary())]))
    doubled = pc.multiply(pa.Array.from_buffers(pa.int32(), len(column) + 1, [None, offsets]), pa.scalar(2, pa.int32()))
    digits = pa.py_buffer(data.to_pybytes().hex().encode())
    texts = pa.StringArray.from_buffers(len(column), doubled.buffers()[1], digits, validity, column.null_count)
    return pc.binary_join_element_wise("\\\\x", texts, "")


class _CopyFiles:
    """Rows of one table, in files of about ROWS_PER_FILE: what is written together stays together.

    A file's first line names the columns; then comes what COPY reads, in its text format, or between the header and
    trailer of its binary one.
    """

    def __init__(self, folder: Path, table: str, columns: Sequence[str], header: bytes = b"", trailer: bytes = b""):
        self.folder = folder
        self.table = table
        self.paths: list[tuple[Path, int]] = []
        self._head = (" ".join(columns) + "\n").encode() + header
        self._trailer = trailer
        self._file: BufferedWriter | None = None
        self._rows = 0

    def write(self, rows: bytes | memoryview, count: int) -> None:
        if self._file is None:
            path = self.folder / f"{self.table}.{len(self.paths)}.{'binary' if self._trailer else 'text'}"
            self._file = path.open("wb")
            self._file.write(self._head)
            self.paths.append((path, 0))
        self._file.write(rows)
        self._rows += count
        if self._rows >= ROWS_PER_FILE:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.write(self._trailer)
            self._file.close()
            self.paths[-1] = (self.paths[-1][0], self._rows)
            self._file, self._rows = None, 0


class Package:
    """What a load puts into the warehouse; filled by a reader, then committed whole or not at all."""

    def __init__(self, folder: Path, feed: FeedSpec, stream: Stream, writer: Writer, load_id: str) -> None:
        self.feed = feed
        self.load_id = load_id
        self.loaded_at = datetime.now(UTC)
        self._stream = stream
        self._writer = writer
        self._tail = (self.loaded_at.isoformat(), load_id)
        self._folder = folder
        names, self._types, _ = zip(*ddl.raw_columns(feed), strict=True)
        self._rows = _CopyFiles(folder, feed.table, names)
        self._binary_rows = _CopyFiles(folder, feed.table, names, BINARY_HEADER, BINARY_TRAILER)
        self._dead = _CopyFiles(folder, "_dead_letters", [name for name, _, _ in ddl.DEAD_LETTER_COLUMNS])
        self._ledger = _CopyFiles(folder, "_ledger", [name for name, _, _ in ddl.LEDGER_COLUMNS])
        self.intervals: list[Interval] = []

    def add_row(
        self,
        cells: Sequence[str | None],
        extra: str | None,
        coordinates: Sequence[str | None],
        stream_id: int | None = None,
    ) -> None:
        """A record that fits: its cells, unknown fields, and coordinates (after the stream id) as text."""
        self._rows.write(copy_line(self.row(cells, extra, coordinates, stream_id)).encode(), 1)

    def row(
        self,
        cells: Sequence[str | None],
        extra: str | None,
        coordinates: Sequence[str | None],
        stream_id: int | None = None,
    ) -> tuple[str | None, ...]:
        """The raw table's row of a record that fits, in the order of its columns."""
        stream = str(self._stream.stream_id if stream_id is None else stream_id)
        return (*cells, extra, stream, *coordinates, *self._tail)

    def add_rows(self, cells: Sequence[Any], coordinates: Sequence[Any]) -> None:
        """Records that fit and hold nothing unknown, as Arrow columns: cells of text, coordinates as they are."""
        from ingestion.binary import NoBinaryFormError, binary_rows

        count = len(cells[0])
        if not count:
            return
        columns = (*cells, None, str(self._stream.stream_id), *coordinates, *self._tail)
        try:
            self._binary_rows.write(binary_rows(self._types, columns), count)
        except NoBinaryFormError:
            self._rows.write(copy_lines(columns), count)

    def add_dead_letter(
        self,
        rejection: Rejection,
        value: bytes,
        *,
        key: bytes | None = None,
        headers: str | None = None,
        source_time: str | None = None,
        kafka: tuple[int, int] | None = None,
        api: tuple[datetime, datetime, int, int] | None = None,
    ) -> None:
        """A record that does not fit: its bytes and where they came from.

        Args:
            kafka: (partition, offset).
            api: (window from, window to, page, item).
        """
        coordinates = (*(kafka or (None, None)), *(api or (None, None, None, None)))
        identity = json.dumps([self.feed.name, self._stream.stream_id, *map(cell, coordinates)])
        if api is not None:
            # A window is asked for again; the same item of it is another offer, told apart by its load.
            identity += self.load_id
        values = (
            hashlib.sha256(identity.encode()).hexdigest()[:16],
            self.feed.name,
            self._stream.stream_id,
            *coordinates,
            source_time,
            self.loaded_at,
            rejection.reason.value,
            rejection.path,
            rejection.message,
            key,
            value,
            headers,
            self.feed.contract_version,
            LOADER_VERSION,
            1,
            *(None, None, None, None),
            self.load_id,
        )
        self._dead.write(copy_line([cell(value) for value in values]).encode(), 1)

    def add_interval(self, interval: Interval) -> None:
        """What was read, accounted for."""
        self.intervals.append(interval)
        values = (
            self.feed.name,
            self._stream.stream_id if interval.stream_id is None else interval.stream_id,
            interval.kind or self._stream.kind or ("kafka" if self.feed.origin.kind == "kafka" else "api"),
            interval.partition,
            interval.first_position,
            interval.last_position,
            interval.window_from,
            interval.window_to,
            interval.pages,
            interval.offered,
            interval.landed,
            interval.dead,
            interval.tombstones,
            interval.unchanged,
            interval.control,
            interval.lost,
            interval.restored,
            interval.drifted,
            interval.bytes,
            interval.source_time_min,
            interval.source_time_max,
            _empty_windows_json(interval.empty_windows),
            self.feed.contract_version,
            self._writer.token,
            self.loaded_at,
            self.load_id,
        )
        self._ledger.write(copy_line([cell(value) for value in values]).encode(), 1)

    def close(self) -> None:
        """Nothing more comes."""
        for files in (self._binary_rows, self._rows, self._dead, self._ledger):
            files.close()

    def files(self) -> Iterator[tuple[str, Path, int]]:
        """(table, path, number of rows) of each file, in the order in which they are copied."""
        for files in (self._binary_rows, self._rows, self._dead, self._ledger):
            for path, rows in files.paths:
                yield files.table, path, rows

    def discard(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

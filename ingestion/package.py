"""One load package: rows, dead letters and ledger intervals as CSV files, copied and committed by dlt.

The files are written here, quoted so that nothing changes on the way ('' is not NULL, every byte of a text kept), and
handed to dlt finished; dlt copies them (COPY) and then writes the row in `_dlt_loads` that makes them true together.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from io import BufferedWriter
from pathlib import Path
from typing import Any, Literal

import dlt
import msgspec
import psycopg2
import psycopg2.extensions
from dlt.common.pipeline import get_dlt_pipelines_dir
from dlt.common.schema.typing import TColumnSchema

from ingestion import ddl, ledger
from ingestion.contract import Rejection
from ingestion.errors import (
    AuthenticationError,
    ConfigurationError,
    FeedBusyError,
    RefusedDataError,
    TransientError,
    WarehouseError,
)
from ingestion.feeds import FeedSpec
from ingestion.ledger import Connection, Stream, Writer
from ingestion.settings import Settings

ROWS_PER_FILE = 100_000
LOADER_VERSION = version("payments-warehouse")

# dlt is configured by its environment; what the user set there wins.
DLT_DEFAULTS = {
    "RUNTIME__DLTHUB_TELEMETRY": "false",
    # Its error lines quote the failing row; ours hold coordinates.
    "RUNTIME__LOG_LEVEL": "CRITICAL",
    # A job that failed once fails the load: whether to try again is decided by the class of the error, above dlt.
    "LOAD__RAISE_ON_MAX_RETRIES": "1",
    "LOAD__WORKERS": "2",
    "LOAD__DELETE_COMPLETED_JOBS": "true",
    "NORMALIZE__WORKERS": "1",
    # The ledger holds the positions, so there is no state of dlt's to bring back.
    "RESTORE_FROM_DESTINATION": "false",
}

# dlt hands some failures on as text only.
REFUSED_IN_WORDS = re.compile(
    r"violates (check|not-null|unique|foreign key) constraint|invalid input syntax|value too long|"
    r"out of range for type|numeric field overflow|program limit exceeded|unsupported Unicode escape"
)

# How dlt names the types of the tables it finds; it never makes them, `ddl` does.
DLT_TYPES = {
    "integer": "bigint",
    "bigint": "bigint",
    "boolean": "bool",
    "date": "date",
    "timestamptz": "timestamp",
    "jsonb": "json",
    "bytea": "binary",
}


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

    @property
    def offered(self) -> int:
        return self.landed + self.dead + self.tombstones + self.unchanged


@dataclass(frozen=True)
class _Import:
    """A finished CSV file on its way to a table."""

    table: str
    columns: list[TColumnSchema]


def cell(value: Any) -> str | None:
    """The text Postgres reads back as the same value; None is NULL."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return "\\x" + value.hex()
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value)


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


# Stands for NULL while a line is joined: no text in Postgres holds a NUL, so no cell does.
_NULL = "\x00"


def csv_line(cells: Sequence[str | None]) -> str:
    """One line as COPY reads it back: every text quoted ('' stays ''), NULL an empty field without quotes."""
    line = '"' + '","'.join([c if c is not None else _NULL for c in cells]) + '"\n'
    if line.count('"') != 2 * len(cells):
        return ",".join(['"' + c.replace('"', '""') + '"' if c is not None else "" for c in cells]) + "\n"
    return line.replace('"\x00"', "")


def csv_lines(columns: Sequence[Any]) -> memoryview:
    """The same lines for whole columns: Arrow arrays of text, or one text (or None) that stands in every line."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow.csv import WriteOptions, write_csv  # type: ignore[import-untyped]

    rows = max(len(column) for column in columns if isinstance(column, pa.Array))
    arrays = [
        column if isinstance(column, pa.Array) else pa.repeat(pa.scalar(column, pa.string()), rows)
        for column in columns
    ]
    lines = pa.BufferOutputStream()
    table = pa.Table.from_arrays(arrays, names=[str(number) for number in range(len(arrays))])
    write_csv(table, lines, WriteOptions(include_header=False, quoting_style="all_valid"))
    return memoryview(lines.getvalue())


class _CsvFiles:
    """Rows of one table, in files of about ROWS_PER_FILE: lines written together stay together."""

    def __init__(self, folder: Path, table: str, columns: Sequence[str]) -> None:
        self.folder = folder
        self.table = table
        self.columns = columns
        self.paths: list[tuple[Path, int]] = []
        self._file: BufferedWriter | None = None
        self._rows = 0

    def write(self, cells: Sequence[str | None]) -> None:
        self._write_lines(csv_line(cells).encode(), 1)

    def write_columns(self, columns: Sequence[Any], rows: int) -> None:
        self._write_lines(csv_lines(columns), rows)

    def _write_lines(self, lines: bytes | memoryview, rows: int) -> None:
        if self._file is None:
            path = self.folder / f"{self.table}.{len(self.paths)}.csv"
            # Postgres wants LF or CRLF throughout; a CR inside quotes is data and stays.
            self._file = path.open("wb")
            self._file.write((",".join(self.columns) + "\n").encode())
            self.paths.append((path, 0))
        self._file.write(lines)
        self._rows += rows
        if self._rows >= ROWS_PER_FILE:
            self.close()

    def close(self) -> None:
        if self._file is not None:
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
        self._rows = _CsvFiles(folder, feed.table, [name for name, _, _ in ddl.raw_columns(feed)])
        self._dead = _CsvFiles(folder, "_dead_letters", [name for name, _, _ in ddl.DEAD_LETTER_COLUMNS])
        self._ledger = _CsvFiles(folder, "_ledger", [name for name, _, _ in ddl.LEDGER_COLUMNS])
        self.intervals: list[Interval] = []

    def add_row(
        self,
        cells: Sequence[str | None],
        extra: str | None,
        coordinates: Sequence[str | None],
        stream_id: int | None = None,
    ) -> None:
        """A record that fits: its cells, unknown fields, and coordinates (after the stream id) as text."""
        stream = str(self._stream.stream_id if stream_id is None else stream_id)
        self._rows.write((*cells, extra, stream, *coordinates, *self._tail))

    def add_rows(self, cells: Sequence[Any], coordinates: Sequence[Any]) -> None:
        """Records that fit and hold nothing unknown, as Arrow columns of text; coordinates as in `add_row`."""
        rows = len(cells[0])
        if rows:
            self._rows.write_columns((*cells, None, str(self._stream.stream_id), *coordinates, *self._tail), rows)

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
        self._dead.write([cell(value) for value in values])

    def add_interval(self, interval: Interval) -> None:
        """What was read, accounted for."""
        self.intervals.append(interval)
        values = (
            self.feed.name,
            self._stream.stream_id if interval.stream_id is None else interval.stream_id,
            interval.kind or ("kafka" if self.feed.origin.kind == "kafka" else "api"),
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
            self.feed.contract_version,
            self._writer.token,
            self.loaded_at,
            self.load_id,
        )
        self._ledger.write([cell(value) for value in values])

    def finish(self) -> Iterator[tuple[_CsvFiles, Path, int]]:
        """Close the files; each with its table and number of rows."""
        for files in (self._rows, self._dead, self._ledger):
            files.close()
            for path, rows in files.paths:
                yield files, path, rows


def _credentials(settings: Settings, connection: Connection, feed: FeedSpec) -> dict[str, Any]:
    """The open connection's server and user in dlt's form; libpq may have the password from a file of its own."""
    options = psycopg2.extensions.parse_dsn(settings.require("WAREHOUSE_DSN", "to land into"))
    info = connection.info
    own = {"host", "hostaddr", "port", "user", "password", "dbname", "connect_timeout", "application_name"}
    return {
        "drivername": "postgresql",
        "host": info.host,
        "port": info.port,
        "username": info.user,
        "password": info.password or "",
        "database": info.dbname,
        "query": {
            **{name: value for name, value in options.items() if name not in own},
            "application_name": ledger.load_session_name(feed),
        },
    }


def open_pipeline(settings: Settings, connection: Connection, feed: FeedSpec) -> dlt.Pipeline:
    """The feed's dlt pipeline, with no package of an earlier run left in it.

    A package found pending is never resumed: what of it reached the database, dlt does not know. It is dropped with
    the local working folder; the sweep removes its rows and reading starts again at the last committed position.
    """
    for name, value in DLT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    show_to_plain_dlt(settings, feed)
    pipeline = dlt.pipeline(
        pipeline_name=feed.pipeline_name,
        pipelines_dir=str(_pipelines_dir(settings)),
        destination=dlt.destinations.postgres(_credentials(settings, connection, feed)),
        dataset_name=feed.source,
    )
    if pipeline.has_pending_data:
        pipeline.drop()
    return pipeline


def _pipelines_dir(settings: Settings) -> Path:
    return settings.home / "dlt" / "pipelines"


def show_to_plain_dlt(settings: Settings, feed: FeedSpec) -> None:
    """Link the feed's working folder where plain `dlt pipeline NAME info` looks (~/.dlt/pipelines).

    The folder itself stays with the project: two projects of one user must not share it.
    """
    link = Path(get_dlt_pipelines_dir()) / feed.pipeline_name
    target = (_pipelines_dir(settings) / feed.pipeline_name).absolute()
    with contextlib.suppress(OSError):
        if link.is_symlink() and link.readlink() != target:
            link.unlink()
        if not os.path.lexists(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)


def commit_package(
    settings: Settings,
    connection: Connection,
    pipeline: dlt.Pipeline,
    stream: Stream,
    writer: Writer,
    fill: Callable[[Package], None],
) -> Package:
    """Run one package through dlt: `fill` reads into it, dlt copies it and commits it.

    Raises:
        WarehouseError: nothing of the package is true; the next run sweeps what reached the database.
    """
    feed = writer.feed
    folder = settings.home / "spool" / feed.pipeline_name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    packages: list[Package] = []

    def extract() -> Iterator[Any]:
        load_id = str(dlt.current.load_package_state()["load_id"])
        ledger.begin_load(connection, writer, load_id)
        package = Package(folder, feed, stream, writer, load_id)
        fill(package)
        packages.append(package)
        for files, path, rows in package.finish():
            yield dlt.mark.with_file_import(str(path), "csv", rows, hints=_Import(files.table, columns[files.table]))

    columns = {
        feed.table: _dlt_columns(ddl.raw_columns(feed)),
        "_dead_letters": _dlt_columns(ddl.DEAD_LETTER_COLUMNS),
        "_ledger": _dlt_columns(ddl.LEDGER_COLUMNS),
    }
    resource = dlt.resource(
        extract,
        name=feed.table,
        table_name=lambda item: item.table,
        columns=lambda item: item.columns,
        write_disposition="append",
    )
    source = dlt.sources.DltSource(dlt.Schema(feed.table), feed.table, [resource()])
    try:
        pipeline.run(source)
    except Exception as error:
        raise classify_load_error(error, feed) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return packages[0]


def _dlt_columns(columns: Sequence[tuple[str, str, bool]]) -> list[TColumnSchema]:
    """dlt's view of a table. Every column "not null", or its COPY would turn '' into NULL (FORCE_NULL)."""
    return [
        {"name": name, "data_type": DLT_TYPES.get(type_.partition("(")[0], "text"), "nullable": False}  # type: ignore[typeddict-item]
        for name, type_, _ in columns
    ]


def classify_load_error(error: BaseException, feed: FeedSpec) -> WarehouseError:
    """What a failed package means, by the first cause that says: ours, then Postgres', then text."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for cause in chain:
        if isinstance(cause, WarehouseError):
            return cause
    text = " ".join(" ".join(str(cause).split()) for cause in chain)
    code = next((cause.pgcode for cause in chain if isinstance(cause, psycopg2.Error) and cause.pgcode), "") or ""
    if code == "PW001" or "fenced:" in text or code == "23P01" or "_ledger__no_overlap" in text:
        return FeedBusyError(
            f"{feed.name} was taken over by another writer; this run committed nothing more.",
            hint="Nothing is lost: the other writer reads on from the last commit.",
        )
    if code == "PW003" or "clock:" in text:
        return ConfigurationError(
            f"{feed.name}: this machine's clock is behind the one that loaded last.", hint="Correct the clock (NTP)."
        )
    if code.startswith(("22", "23", "54")) or REFUSED_IN_WORDS.search(text):
        return RefusedDataError(
            f"{feed.name}: Postgres refused a record that fits the contract.",
            hint="A constraint of the raw table that is not declared? Declare it as a rule, or drop it.",
        )
    if code.startswith("28"):
        return AuthenticationError(f"{feed.name}: Postgres refused the user.", hint="Check WAREHOUSE_DSN.")
    if code == "42501":
        return AuthenticationError(
            f"{feed.name}: the user of WAREHOUSE_DSN may not write to schema {feed.source}.", hint="Grant it."
        )
    if code.startswith(("08", "53", "57", "55", "40", "25")) or any(
        isinstance(cause, psycopg2.OperationalError | psycopg2.InterfaceError | OSError) for cause in chain
    ):
        reason = next((" ".join(str(c).split())[:200] for c in chain if isinstance(c, psycopg2.Error | OSError)), "")
        return TransientError(
            f"{feed.name}: the load was interrupted: {reason}",
            hint="Nothing of it is true; the next run sweeps what reached the database and reads again.",
        )
    last = chain[-1]
    return WarehouseError(
        f"{feed.name}: the load failed: {type(last).__name__}: {' '.join(str(last).split())[:300]}",
        hint="Nothing of it is true; the next run reads again from the last commit.",
    )

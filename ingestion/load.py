"""Committing packages through dlt: it copies their files and writes the row in `_dlt_loads` that makes them true.

A package is written first and committed afterwards, so that the next one can be written while dlt copies.
"""

import contextlib
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dlt
import dlt.extract.storage
import psycopg2
from dlt.common.pipeline import get_dlt_pipelines_dir
from dlt.common.schema.typing import TColumnSchema
from dlt.common.storages import create_load_id

from ingestion import ddl, ledger
from ingestion.credentials import build_credentials
from ingestion.destination import copying_postgres
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
from ingestion.package import Package
from ingestion.settings import Settings

# dlt is configured by its environment; what the user set there wins.
DLT_DEFAULTS = {
    "RUNTIME__DLTHUB_TELEMETRY": "false",
    # Its error lines quote the failing row; ours hold coordinates.
    "RUNTIME__LOG_LEVEL": "CRITICAL",
    # A job that failed once fails the load: whether to try again is decided by the class of the error, above dlt.
    "LOAD__RAISE_ON_MAX_RETRIES": "1",
    "LOAD__WORKERS": "1",
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
class _Import:
    """A finished CSV file on its way to a table."""

    table: str
    columns: list[TColumnSchema]


def write_package(
    settings: Settings, connection: Connection, stream: Stream, writer: Writer, fill: Callable[[Package], None]
) -> Package:
    """Begin a load and write its files: `fill` reads into the package. Nothing of it is true yet.

    Raises:
        WarehouseError: the files are gone; the load began and never commits.
    """
    # dlt's own form of a name; it grows with time, and so with every load.
    load_id = create_load_id()
    folder = _spool(settings, writer.feed) / load_id
    try:
        folder.mkdir(parents=True)
        ledger.begin_load(connection, writer, load_id)
        package = Package(folder, writer.feed, stream, writer, load_id)
        fill(package)
        package.close()
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise classify_load_error(error, writer.feed) from error
    return package


def load_package(settings: Settings, connection: Connection, package: Package) -> float:
    """Copy a written package and commit it, in any one thread at a time; its files are removed.

    Returns:
        Seconds the copying took; the rest is what dlt and the guard of the commit do.

    Raises:
        WarehouseError: nothing of the package is true; the next run sweeps what reached the database.
    """
    feed = package.feed
    columns = {
        feed.table: _dlt_columns(ddl.raw_columns(feed)),
        "_dead_letters": _dlt_columns(ddl.DEAD_LETTER_COLUMNS),
        "_ledger": _dlt_columns(ddl.LEDGER_COLUMNS),
    }

    def extract() -> Iterator[Any]:
        # The rows bear the name already.
        assert dlt.current.load_package_state()["load_id"] == package.load_id, "dlt named the package otherwise"
        for table, path, rows in package.files():
            yield dlt.mark.with_file_import(str(path), "csv", rows, hints=_Import(table, columns[table]))

    resource = dlt.resource(
        extract,
        name=feed.table,
        table_name=lambda item: item.table,
        columns=lambda item: item.columns,
        write_disposition="append",
    )
    source = dlt.sources.DltSource(dlt.Schema(feed.table), feed.table, [resource()])
    pipeline: dlt.Pipeline | None = None
    destination = copying_postgres(build_credentials(settings, connection, feed))
    try:
        with _named(package.load_id):
            pipeline = open_pipeline(settings, feed, destination)
            done = pipeline.run(source)
    except Exception as error:
        if pipeline is not None:
            # Its files hold records, which are not to lie about until the next run.
            with contextlib.suppress(Exception):
                _drop(pipeline)
        raise classify_load_error(error, feed) from error
    finally:
        destination.close()
        package.discard()
    metrics: Any = done.metrics.get(package.load_id) if done else None
    if metrics is None:
        # Another runner took over on the same disk, and cleared away what this one had begun.
        raise TransientError(
            f"{feed.name}: the load was interrupted: its files in {settings.home} are gone.",
            hint="Nothing of it is true; the next run reads again from the last commit.",
        )
    jobs = [job for step in metrics for job in step["job_metrics"].values()]
    return float(sum((job.finished_at - job.started_at).total_seconds() for job in jobs))


def commit_package(
    settings: Settings, connection: Connection, stream: Stream, writer: Writer, fill: Callable[[Package], None]
) -> Package:
    """Write one package and commit it: `write_package`, then `load_package`."""
    package = write_package(settings, connection, stream, writer, fill)
    load_package(settings, connection, package)
    return package


@contextlib.contextmanager
def _named(load_id: str) -> Iterator[None]:
    """dlt names a package when it begins to extract it; ours has had its name since its first row was written."""
    extracting: Any = dlt.extract.storage
    original = extracting.create_load_id
    extracting.create_load_id = lambda: load_id
    try:
        yield
    finally:
        extracting.create_load_id = original


def clear_spool(settings: Settings, feed: FeedSpec) -> None:
    """Remove the files of loads that died."""
    shutil.rmtree(_spool(settings, feed), ignore_errors=True)


def _spool(settings: Settings, feed: FeedSpec) -> Path:
    return settings.home / "spool" / feed.pipeline_name


def open_pipeline(settings: Settings, feed: FeedSpec, destination: copying_postgres) -> dlt.Pipeline:
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
        destination=destination,
        dataset_name=feed.source,
    )
    if pipeline.has_pending_data:
        _drop(pipeline)
    return pipeline


def _drop(pipeline: dlt.Pipeline) -> None:
    """Drop a pipeline with its working folder, which goes as a whole: of half a one dlt makes no use, run after run."""
    folder = Path(pipeline.working_dir)
    dropped = folder.with_name(f"{folder.name}.dropped")
    shutil.rmtree(dropped, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(dropped)
    shutil.rmtree(dropped, ignore_errors=True)
    pipeline.drop()


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


def _dlt_columns(columns: Sequence[tuple[str, str, bool]]) -> list[TColumnSchema]:
    """dlt's view of a table."""
    return [
        {"name": name, "data_type": DLT_TYPES.get(type_.partition("(")[0], "text"), "nullable": nullable}  # type: ignore[typeddict-item]
        for name, type_, nullable in columns
    ]


def classify_load_error(error: BaseException, feed: FeedSpec) -> WarehouseError:
    """What a failed package means, by the first cause that says: ours, then Postgres' code, then text.

    What Postgres and dlt say quotes rows: nothing of it is passed on but Postgres' words for an outage, and where there
    is a code no text is looked at, or a record could choose the class.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for cause in chain:
        if isinstance(cause, WarehouseError):
            return cause
    failed = next((cause for cause in chain if isinstance(cause, psycopg2.Error) and cause.pgcode), None)
    code = (failed.pgcode if failed else None) or ""
    if code == "PW001" or (failed and failed.diag.constraint_name == "_ledger__no_overlap"):
        return FeedBusyError(
            f"{feed.name} was taken over by another writer; this run committed nothing more.",
            hint="Nothing is lost: the other writer reads on from the last commit.",
        )
    if code == "PW003":
        return ConfigurationError(
            f"{feed.name}: this machine's clock is behind the one that loaded last.", hint="Correct the clock (NTP)."
        )
    if code.startswith(("22", "23", "54")) or (not code and REFUSED_IN_WORDS.search(" ".join(map(str, chain)))):
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
    outage = next(
        (c for c in chain if isinstance(c, psycopg2.OperationalError | psycopg2.InterfaceError | OSError)), None
    )
    if code.startswith(("08", "53", "57", "55", "40", "25")) or outage is not None:
        by = outage or failed
        said = by.diag.message_primary if isinstance(by, psycopg2.Error) else getattr(by, "strerror", None)
        return TransientError(
            f"{feed.name}: the load was interrupted: {said or 'the connection was lost'}.",
            hint="Nothing of it is true; the next run sweeps what reached the database and reads again.",
        )
    last = chain[-1]
    frames = traceback.extract_tb(last.__traceback__)
    said = f"{type(last).__name__} in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    if failed is not None:
        # The guard's words are ours.
        said = failed.diag.message_primary if code.startswith("PW") else f"Postgres error {code}"
    return WarehouseError(
        f"{feed.name}: the load failed: {said or type(last).__name__}.",
        hint="Nothing of it is true; the next run reads again from the last commit.",
    )

"""Reading a folder as a feed's records: one file, one record, byte for byte; under it any folders and any names.

    folder -> files that are new or have other bytes than at last -> running positions -> as a topic's partition 0

The folder is a stream of its own beside the feed's topic, whose positions it leaves alone. A record's key is the path
below the folder, its time the file's last change. `_files` holds path and hash of what was read; its rows count when
their load is committed. Run alone: `warehouse ingest --from-files DIR --feed raw_payments.transaction_created`.

Refuses what it cannot read whole: a file that vanishes, changes or cannot be opened ends the run and makes no dead
letter. Passes over, by name, what is no file: links to folders (what lies behind may be in the folder anyway), pipes,
sockets, devices.
"""

import errno
import hashlib
import os
import stat
import struct
import tempfile
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from confluent_kafka import TIMESTAMP_CREATE_TIME, TIMESTAMP_NOT_AVAILABLE
from psycopg2 import sql
from psycopg2.extras import execute_values

from ingestion import ledger
from ingestion.errors import ConfigurationError, TransientError
from ingestion.feeds import FeedSpec, KafkaOrigin
from ingestion.kafka import Loss, Topic
from ingestion.ledger import Connection, Writer
from ingestion.settings import Settings

# Postgres takes a line of COPY below 1 GB, and bytes take two digits each.
MAX_FILE_BYTES = 256 << 20
# Held in memory at once: bytes of files, or one file; and how many of them.
BYTES_PER_BATCH = 16 << 20
FILES_PER_BATCH = 2_000
_BLOCK = 1 << 20

# Asking again cannot help: somebody has to change the folder.
_SETTLED = {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
_SETTLED_HINT = "Make it readable, or move it out of the folder. No file is set aside for it."
_HINT = "No file is set aside for it and what was committed stays: run again."

# Milliseconds of the years 1 to 9999; a file may claim any time at all.
_FIRST_MILLISECOND, _LAST_MILLISECOND = -62_135_596_800_000, 253_402_300_799_999


@dataclass(frozen=True)
class File:
    """A file of the folder. `path` is relative to it; `sha256` is that of its bytes when it was looked at.

    `changed_ms`: milliseconds since 1970; beyond the calendar it is the next one outside.
    """

    path: bytes
    size: int
    changed_ms: int
    sha256: bytes


@dataclass(frozen=True)
class FileRecord:
    """A file as the record of a topic, with the methods of `confluent_kafka.Message` the loaders use."""

    position: int
    file: File
    content: bytes

    def __len__(self) -> int:
        return len(self.content)

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return self.position

    def key(self) -> bytes:
        return self.file.path

    def value(self) -> bytes:
        return self.content

    def headers(self) -> None:
        return None

    def timestamp(self) -> tuple[int, int]:
        if not _FIRST_MILLISECOND <= self.file.changed_ms <= _LAST_MILLISECOND:
            return TIMESTAMP_NOT_AVAILABLE, 0
        return TIMESTAMP_CREATE_TIME, self.file.changed_ms


def show_path(path: bytes) -> str:
    """A path as text: what is not printable UTF-8, and `%`, as %XX. No two paths look alike."""
    text = path.decode("utf-8", "surrogateescape")
    return "".join(
        char
        if char.isprintable() and char != "%"
        else "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))
        for char in text
    )


def to_milliseconds(nanoseconds: int) -> int:
    """A file's time, held within a millisecond of the calendar's ends."""
    return min(max(nanoseconds // 1_000_000, _FIRST_MILLISECOND - 1), _LAST_MILLISECOND + 1)


def stream_name(folder: Path) -> str:
    """The name of a folder's stream: that of the folder a link leads to."""
    return Folder(os.path.realpath(os.fsencode(folder))).name


def require_folder(settings: Settings, feed: FeedSpec, folder: Path) -> bytes:
    """The folder's real path, once it is clear that the feed can take its files.

    Raises:
        ConfigurationError: no such folder, a feed of an API, or the warehouse's own working folder.
    """
    if not isinstance(feed.origin, KafkaOrigin):
        raise ConfigurationError(
            f"{feed.name} is read from an API: its rows are kept by page and item, which a file does not have.",
            hint="--from-files takes the feed of a topic.",
        )
    root = os.path.realpath(os.fsencode(folder))
    if not os.path.isdir(root):
        raise ConfigurationError(f"{show_path(root)} is not a folder.", hint="--from-files takes a folder of files.")
    home = os.path.realpath(os.fsencode(settings.home))
    if os.path.commonpath([root, home]) == root:
        raise ConfigurationError(
            f"{show_path(root)} holds the warehouse's own working folder {show_path(home)}.",
            hint="--from-files takes a folder of records only; WAREHOUSE_HOME can name another place.",
        )
    return root


class Folder:
    """One folder: which files it has, and their bytes."""

    def __init__(self, root: bytes) -> None:
        self.root = root
        self.name = f"files:{show_path(root)}"

    def list_paths(self, pass_over: Callable[[str], None] = lambda what: None) -> Iterator[bytes]:
        """The relative paths of all files below, in the order of their bytes. Holds the names of one branch at a time.

        Args:
            pass_over: told what is no file, in words.
        """
        branch = [iter(self._list_entries(b""))]
        while branch:
            path = next(branch[-1], None)
            if path is None:
                branch.pop()
            elif path.endswith(b"/"):
                branch.append(iter(self._list_entries(path)))
            elif kind := self._what_else(path):
                pass_over(f"{show_path(path)} ({kind})")
            else:
                yield path

    def _list_entries(self, below: bytes) -> list[bytes]:
        """Paths of the entries of a folder, those of folders with a slash: so sorted, they are in the order of all."""
        with self._naming(below), os.scandir(os.path.join(self.root, below)) as entries:
            return sorted(
                below + entry.name + (b"/" if entry.is_dir(follow_symlinks=False) else b"") for entry in entries
            )

    def _what_else(self, path: bytes) -> str | None:
        """What an entry is that is no file and leads to none; None for a file."""
        whole = os.path.join(self.root, path)
        with self._naming(path):
            try:
                mode = os.stat(whole).st_mode
            except FileNotFoundError:
                if os.path.islink(whole):
                    raise ConfigurationError(
                        f"{self.name}: {show_path(path)} is a link that leads nowhere.", hint=_SETTLED_HINT
                    ) from None
                raise
        if stat.S_ISREG(mode):
            return None
        return "link to a folder" if stat.S_ISDIR(mode) and os.path.islink(whole) else "no regular file"

    def look_at(self, path: bytes) -> File:
        """A file's size, time and hash now. Raises as `read` does."""
        hashed = hashlib.sha256()
        size = 0
        changed_ms, blocks = self._open(path)
        for block in blocks:
            hashed.update(block)
            size += len(block)
        return File(path, size, changed_ms, hashed.digest())

    def read(self, file: File) -> bytes:
        """The bytes that were there when the file was looked at.

        Raises:
            TransientError: it vanished, has changed since, or its device fails.
            ConfigurationError: it is larger than a record can be, or not ours to read.
        """
        _, blocks = self._open(file.path)
        content = b"".join(blocks)
        if hashlib.sha256(content).digest() != file.sha256:
            raise TransientError(f"{self.name}: {show_path(file.path)} changed while it was read.", hint=_HINT)
        return content

    def _open(self, path: bytes) -> tuple[int, Iterator[bytes]]:
        """A file's time (milliseconds) and its bytes, block by block."""
        with self._naming(path):
            # Not to wait for a writer, should a pipe stand there by now.
            descriptor = os.open(os.path.join(self.root, path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            changed_ms = to_milliseconds(os.fstat(descriptor).st_mtime_ns)
        return changed_ms, self._read_blocks(path, descriptor)

    def _read_blocks(self, path: bytes, descriptor: int) -> Iterator[bytes]:
        size = 0
        with self._naming(path), os.fdopen(descriptor, "rb", buffering=0) as opened:
            while block := opened.read(_BLOCK):
                size += len(block)
                if size > MAX_FILE_BYTES:
                    raise ConfigurationError(
                        f"{self.name}: {show_path(path)} is larger than a record can be ({MAX_FILE_BYTES >> 20} MiB).",
                        hint="Move it out of the folder; nothing of it was landed or set aside.",
                    )
                yield block

    @contextmanager
    def _naming(self, path: bytes) -> Iterator[None]:
        """Around what may fail at one path: the system's refusal as an error of ours."""
        try:
            yield
        except OSError as error:
            text = f"{self.name}: {show_path(path) or 'the folder'} cannot be read: {error.strerror}."
            if error.errno in _SETTLED:
                raise ConfigurationError(text, hint=_SETTLED_HINT) from error
            raise TransientError(text, hint=_HINT) from error


class _Plan:
    """The files to be read, in order, on disk: a folder may hold more names than fit into memory."""

    _HEAD = struct.Struct(">IQq32s")

    def __init__(self) -> None:
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the reader
        self._places = array("Q")
        self._digest = hashlib.sha256()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def digest(self) -> str:
        """Says which files, with which bytes, in which order."""
        return self._digest.hexdigest()[:16]

    def add(self, file: File) -> None:
        entry = self._HEAD.pack(len(file.path), file.size, file.changed_ms, file.sha256) + file.path
        self._places.append(self._spool.tell())
        self._spool.write(entry)
        self._digest.update(entry)

    def read(self, first: int, stop: int) -> Iterator[File]:
        """The files of these numbers."""
        for number in range(first, stop):
            self._spool.seek(self._places[number])
            length, size, changed_ms, sha256 = self._HEAD.unpack(self._spool.read(self._HEAD.size))
            yield File(self._spool.read(length), size, changed_ms, sha256)

    def close(self) -> None:
        self._spool.close()


class FolderReader:
    """One folder, read once from its stream's position to its last file; stands where a topic's reader stands.

    `unchanged` counts the files whose latest bytes were read before, `passed_over` names what is no file.

    Args:
        loads: loads of this very run; what they read is not unchanged but landed.
    """

    def __init__(
        self, settings: Settings, connection: Connection, feed: FeedSpec, folder: Path, loads: Collection[str] = ()
    ) -> None:
        self.feed = feed
        self.folder = Folder(require_folder(settings, feed, folder))
        self.unchanged = 0
        self.passed_over: list[str] = []
        self.stream = ledger.ensure_stream(connection, feed, "files", self.folder.name, "", kind="files")
        self._connection = connection
        self._loads = loads
        self._plan = _Plan()
        self._first = ledger.fetch_positions(connection, feed, self.stream).get(0, 0)

    def close(self) -> None:
        self._plan.close()

    def fetch_topic(self) -> Topic:
        """Look at every file and give positions to those that are new or have other bytes than at last."""
        paths = self.folder.list_paths(self.passed_over.append)
        while some := [self.folder.look_at(path) for path in islice(paths, FILES_PER_BATCH)]:
            known = fetch_known_hashes(self._connection, self.feed, self.stream.stream_id, [file.path for file in some])
            for file in some:
                sha256, load_id = known.get(file.path, (b"", ""))
                if sha256 != file.sha256:
                    self._plan.add(file)
                elif load_id not in self._loads:
                    self.unchanged += 1
        # A death counts against a position only while the same files stand behind it.
        self.stream = replace(self.stream, edition=self._plan.digest)
        return Topic("", "", {0: (0, self._first + len(self._plan))})

    def find_losses(self, topic: Topic, positions: Mapping[int, int]) -> list[Loss]:
        """None: what was read is accounted for, and what is gone before it was read was never offered."""
        return []

    def read(
        self, topic: Topic, positions: Mapping[int, int], batch_size: int = FILES_PER_BATCH
    ) -> Iterator[list[FileRecord]]:
        """Records from the position to the end, in batches bounded by number and by bytes."""
        batch: list[FileRecord] = []
        size = 0
        start = positions.get(0, self._first)
        files = self._plan.read(start - self._first, len(self._plan))
        for position, file in enumerate(files, start):
            if batch and (len(batch) >= min(batch_size, FILES_PER_BATCH) or size + file.size > BYTES_PER_BATCH):
                yield batch
                batch, size = [], 0
            batch.append(FileRecord(position, file, self.folder.read(file)))
            size += file.size
        if batch:
            yield batch

    def note_read(self, writer: Writer, load_id: str, first: int, stop: int) -> None:
        """Note the files of these positions as read by a load; the guard of the commit counts them."""
        files = enumerate(self._plan.read(first - self._first, stop - self._first), first)
        while some := list(islice(files, FILES_PER_BATCH)):
            with ledger.fenced(self._connection, writer) as cursor:
                execute_values(
                    cursor,
                    sql.SQL("insert into {} (stream_id, position, path, size, sha256, _dlt_load_id) values %s").format(
                        sql.Identifier(self.feed.source, "_files")
                    ),
                    [
                        (self.stream.stream_id, position, file.path, file.size, file.sha256, load_id)
                        for position, file in some
                    ],
                    page_size=FILES_PER_BATCH,
                )


def fetch_known_hashes(
    connection: Connection, feed: FeedSpec, stream_id: int, paths: Sequence[bytes]
) -> dict[bytes, tuple[bytes, str]]:
    """Path -> (hash of the bytes last read there, the committed load that did); paths never read are absent."""
    with connection.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                "select distinct on (path) path, sha256, _dlt_load_id from {files} "
                "where stream_id = %s and sha256(path) = any(%s) and _dlt_load_id in (select load_id from {loads}) "
                "order by path, position desc"
            ).format(files=sql.Identifier(feed.source, "_files"), loads=sql.Identifier(feed.source, "_dlt_loads")),
            (stream_id, [hashlib.sha256(path).digest() for path in paths]),
        )
        return {bytes(path): (bytes(sha256), load_id) for path, sha256, load_id in cursor.fetchall()}

"""The embedded Postgres: one cluster per home, run as a child of the supervisor.

Data flow: `EmbeddedPostgres.start` -> (first time) initdb, (always) the server on 127.0.0.1 -> a DSN. TCP only, scram
with a random password, fsync and synchronous commit on. The port is chosen once and kept while it is free;
`<home>/postgres.json` (0600) remembers it with the password. Alone: `python -m orchestration.services.supervisor`
is the only thing that runs this; it holds the lock that makes it the only one per home.

Refuses: data of another major version, a data folder that is not this user's, a machine without the programs. What an
earlier, killed supervisor left (a running server, a stale postmaster.pid) is ended and taken over.
"""

import contextlib
import ctypes
import json
import logging
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ingestion.errors import ConfigurationError, TransientError, WarehouseError
from orchestration.services.postgres_binaries import (
    SETTING,
    Binaries,
    find_binaries,
    find_major,
    reachable_binaries,
)
from orchestration.services.postgres_orphans import end_orphans
from orchestration.services.postgres_place import Place, choose_place, system_account
from orchestration.services.state import (
    Paths,
    log_tail,
    rotate,
    write_private,
)

USER = DATABASE = "warehouse"

# Below every system's range for outgoing connections, which would take a port we want to keep.
PORTS = range(20_000, 30_000)

# Appended to postgresql.conf once, so that `alter system` still has the last word.
CONFIGURATION = """
# The payments warehouse. Change them with: alter system set ...
wal_level = logical
shared_buffers = 256MB
max_wal_size = 2GB
max_connections = 100
synchronous_commit = on
fsync = on
timezone = 'UTC'
log_timezone = 'UTC'
"""

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_CRASHED_NEIGHBOUR = ("pre-existing shared memory block", 'lock file "postmaster.pid" already exists')
_PORT_TAKEN = ("could not bind", "could not create any TCP/IP sockets")


class _PortTaken(Exception):
    """Another program took the port between our look and the server's."""


@dataclass(frozen=True)
class Record:
    """What must outlive the supervisor: the password, and the port people may have written down."""

    password: str = field(repr=False)
    port: int | None
    data: str

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            return cls(password=str(document["password"]), port=int(document["port"]), data=str(document["data"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        write_private(path, json.dumps(asdict(self)) + "\n")


class EmbeddedPostgres:
    """A server of one home. Not thread-safe; `start` and `stop` may follow each other."""

    def __init__(self, paths: Paths, *, binaries: str | None = None) -> None:
        """`binaries`: the folder with Postgres' programs, None to find one."""
        self._paths = paths
        self._explicit = binaries
        self._process: subprocess.Popen[bytes] | None = None
        self._place: Place | None = None
        self._record: Record | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def address(self) -> str:
        assert self._record is not None
        return f"127.0.0.1:{self._record.port}"

    @property
    def dsn(self) -> str:
        assert self._record is not None
        return f"postgresql://{USER}:{self._record.password}@{self.address}/{DATABASE}"

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, *, cancelled: Callable[[], bool] = lambda: False, timeout: float = 120.0) -> None:
        """Start the server, making the cluster and the database where they are missing.

        Returns when the database answers. `cancelled` is asked while waiting; `timeout` in seconds bounds the wait
        for a server that recovers from a crash.
        """
        account = system_account() if os.geteuid() == 0 else None
        place = self._place = choose_place(self._paths.home, account)
        record = Record.read(self._paths.postgres_record)
        require_own_data(self._paths, record, place)
        place.make()
        binaries = reachable_binaries(find_binaries(self._explicit), place)
        end_orphans(place.data)
        self._record = self._make_cluster(place, binaries, record)
        self._require_same_major(place, binaries)
        rotate(self._paths.postgres_log)
        deadline = time.monotonic() + timeout
        while True:
            port = pick_port(self._record.port)
            current = replace(self._record, port=port, data=str(place.data))
            if current != record:
                current.write(self._paths.postgres_record)
            self._record = current
            try:
                self._launch(place, binaries, port, cancelled, deadline)
                break
            except _PortTaken:
                self._record = replace(self._record, port=None)
        try:
            self._ensure_database()
        except BaseException:
            self.stop()
            raise

    def stop(self, *, timeout: float = 30.0) -> None:
        """Stop the server: at once for its clients, cleanly for its data; harder after `timeout` seconds."""
        process, self._process = self._process, None
        if process is None:
            return
        for number, patience in ((signal.SIGINT, timeout), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                return

    def _make_cluster(self, place: Place, binaries: Binaries, record: Record | None) -> Record:
        """The record of the cluster that is there, or of a new one."""
        with contextlib.suppress(FileNotFoundError), _clear_errors(place.data):
            (place.data / "PG_VERSION").stat()
            if record is not None:
                return record
            if place.base == self._paths.postgres:
                raise ConfigurationError(
                    f"{self._paths.postgres_record} is missing or damaged: without it nobody knows the password of "
                    f"the database in {place.data}.",
                    hint=f"Restore the file, or begin with an empty database: rm -r {place.base}",
                )
            # The home was deleted and with it the password: its owner began anew. One generation is kept.
            replaced = place.base / "data.replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            place.data.rename(replaced)
            _log.warning("%s belonged to an earlier %s: moved to %s", place.data, self._paths.home, replaced)
        if record is None:
            record = Record(secrets.token_hex(24), pick_port(None), str(place.data))
        # First: data without its password would be of no use.
        record.write(self._paths.postgres_record)
        self._initialise(place, binaries, record.password)
        return record

    def _initialise(self, place: Place, binaries: Binaries, password: str) -> None:
        """initdb in a draft that becomes the data folder in one step: a killed start leaves no half cluster."""
        for old in place.base.glob("data.draft-*"):
            shutil.rmtree(old, ignore_errors=True)
        draft = place.base / f"data.draft-{secrets.token_hex(4)}"
        password_file = place.base / f"{draft.name}.password"
        try:
            with _clear_errors(draft):
                draft.mkdir(mode=0o700)
                place.give(draft)
                descriptor = os.open(password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w") as file:
                    file.write(password)
                place.give(password_file)
                answer = subprocess.run(
                    [
                        *(binaries.program("initdb"), "-D", str(draft), "-U", USER, "-E", "UTF8"),
                        *("-A", "scram-sha-256", "--pwfile", str(password_file)),
                        *_locale_options(binaries.major),
                    ],
                    **place.process_options,
                    cwd="/",
                    env=_clean_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    check=False,
                )
                if answer.returncode != 0:
                    raise _failure("Postgres could not make its data folder", answer.stderr, draft)
                with (draft / "postgresql.conf").open("a") as file:
                    file.write(CONFIGURATION)
                draft.rename(place.data)
        finally:
            password_file.unlink(missing_ok=True)
            shutil.rmtree(draft, ignore_errors=True)

    def _require_same_major(self, place: Place, binaries: Binaries) -> None:
        with _clear_errors(place.data):
            made_by = (place.data / "PG_VERSION").read_text().strip()
        if made_by != str(binaries.major):
            match = find_major(int(made_by)) if made_by.isdigit() else None
            raise ConfigurationError(
                f"{place.data} was made by Postgres {made_by}; the programs here are {binaries.version} "
                f"({binaries.origin}, {binaries.folder}).",
                hint=(
                    f"Set {SETTING}={match} to go on with it, or delete the folder to begin anew."
                    if match
                    else f"Set {SETTING} to the programs of version {made_by}, or delete the folder to begin anew."
                ),
            )

    def _launch(
        self, place: Place, binaries: Binaries, port: int, cancelled: Callable[[], bool], deadline: float
    ) -> None:
        """Start the server on this port and wait until it takes connections."""
        neighbour_patience = time.monotonic() + 20.0
        while True:
            with self._paths.postgres_log.open("ab") as log:
                offset = log.tell()
                self._process = subprocess.Popen(
                    [
                        *(binaries.program("postgres"), "-D", str(place.data), "-p", str(port)),
                        *("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="),
                        *_shared_memory_options(),
                    ],
                    **place.process_options,
                    preexec_fn=_end_with_parent(),
                    umask=0o077,
                    cwd="/",
                    env=_clean_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            try:
                if self._wait_until_ready(place, cancelled, deadline):
                    return
            except BaseException:
                self.stop()
                raise
            code, self._process = self._process.returncode, None
            said = _read_from(self._paths.postgres_log, offset)
            if any(text in said for text in _PORT_TAKEN):
                raise _PortTaken
            if any(text in said for text in _CRASHED_NEIGHBOUR) and time.monotonic() < neighbour_patience:
                # The last processes of a killed server are still leaving.
                time.sleep(0.2)
                continue
            raise _failure(f"Postgres ended while it started (exit code {code})", said, place.data)

    def _wait_until_ready(self, place: Place, cancelled: Callable[[], bool], deadline: float) -> bool:
        """True when the server takes connections, False when it ended."""
        pidfile = place.data / "postmaster.pid"
        assert self._process is not None
        while self._process.poll() is None:
            lines: list[str] = []
            with contextlib.suppress(OSError):
                lines = pidfile.read_text(errors="replace").splitlines()
            if len(lines) >= 8 and lines[0] == str(self._process.pid) and lines[7].strip() == "ready":
                return True
            if cancelled():
                raise TransientError("Postgres was asked to stop before it was ready.")
            if time.monotonic() > deadline:
                tail = log_tail(self._paths.postgres_log)
                raise TransientError(
                    f"Postgres was not ready in time. Its last words:\n{tail}",
                    hint=f"It may still be recovering from a crash: try again. Log: {self._paths.postgres_log}",
                )
            time.sleep(0.01)
        return False

    def _ensure_database(self) -> None:
        import psycopg2

        assert self._record is not None
        try:
            connection = psycopg2.connect(
                host="127.0.0.1",
                port=self._record.port,
                user=USER,
                password=self._record.password,
                dbname="postgres",
                connect_timeout=10,
                # The user's own PG* variables are about other servers.
                sslmode="disable",
                gssencmode="disable",
                options="",
                application_name="warehouse services",
            )
        except psycopg2.OperationalError as error:
            assert self._place is not None
            raise ConfigurationError(
                f"The embedded Postgres refused its own password: {str(error).strip()}",
                hint=f"{self._paths.postgres_record} does not belong to {self._place.data}. Restore the one that "
                "does, or delete both to begin anew.",
            ) from None
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("select 1 from pg_database where datname = %s", (DATABASE,))
                if cursor.fetchone() is None:
                    cursor.execute(f"create database {DATABASE}")
        except psycopg2.Error as error:
            raise _failure("Postgres could not create its database", str(error), self._paths.home) from None
        finally:
            connection.close()


def pick_port(preferred: int | None) -> int:
    """The preferred port if it is free, else a random free one of `PORTS`."""
    candidates = [preferred] if preferred else []
    candidates += random.sample(PORTS, 50)
    for port in candidates:
        with socket.socket() as probe:
            # As the server does: connections of an earlier run in TIME_WAIT do not count as taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                probe.listen(1)
                return port
    raise TransientError(f"No free port between {PORTS.start} and {PORTS.stop} on 127.0.0.1.")


def require_own_data(paths: Paths, record: Record | None, place: Place) -> None:
    """Refuse to begin an empty database beside the one this home had before it was moved or copied."""
    if record is None or record.data == str(place.data) or place.data.exists():
        return
    if Path(record.data).exists():
        raise ConfigurationError(
            f"The database of {paths.home} lies in {record.data}, not in {place.data}.",
            hint=f"After a move of the project: mkdir -p {place.base} && mv {record.data} {place.data}. "
            f"After a copy, to begin with an empty database: rm {paths.postgres_record}",
        )


def _end_with_parent() -> Callable[[], None] | None:
    """Ask Linux to stop the server, in its fast and clean way, when the supervisor dies however it dies."""
    if sys.platform != "linux":
        return None
    # Looked up here: between fork and exec only what is already there is safe to use.
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def set_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGINT), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return set_signal


def _clean_environment() -> dict[str, str]:
    """PG* variables and locales of the user are about other servers."""
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


def _locale_options(major: int) -> list[str]:
    # The wheel has no ICU; the builtin provider came with version 17 and does not depend on the system.
    if major >= 17:
        return ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
    return ["--locale=C"]


def _shared_memory_options() -> list[str]:
    """Containers have a /dev/shm of 64 MB, in which a parallel hash join fails: use System V memory there."""
    with contextlib.suppress(OSError):
        found = os.statvfs("/dev/shm")
        if found.f_frsize * found.f_blocks < 256 * 1024**2:
            return ["-c", "dynamic_shared_memory_type=sysv"]
    return []


def _read_from(path: Path, offset: int) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(offset)
        return file.read(100_000).decode("utf-8", errors="replace")
    return ""


def _failure(what: str, said: str, folder: Path) -> WarehouseError:
    """One error of what Postgres said, with the way out for what can be recognised."""
    lines = [line for line in said.strip().splitlines() if line.strip()][-6:]
    tail = "".join(f"\n    {line}" for line in lines)
    if "No space left on device" in said or "Disk quota exceeded" in said:
        free = _free_megabytes(folder)
        return ConfigurationError(
            f"{what}: the disk is full.{tail}",
            hint=f"{free} MB are free at {folder.parent}; Postgres needs 200 MB to start and room for the data. Free "
            "some, or set WAREHOUSE_HOME to another disk.",
        )
    return WarehouseError(f"{what}.{tail}", hint="The whole log is logs/postgres.log in the home folder.")


def _free_megabytes(folder: Path) -> int:
    for path in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            found = os.statvfs(path)
            return found.f_frsize * found.f_bavail // 1024**2
    return 0


@contextlib.contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    """Name the folder in an operating system's error; an absent file stays the caller's question."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno is not None and error.errno in (28, 122):
            raise _failure("Postgres could not make its data folder", "No space left on device", folder) from None
        raise ConfigurationError(
            f"{folder} cannot be used for Postgres' data: {error.strerror}",
            hint="It belongs to another user. Set WAREHOUSE_HOME to a folder of your own, or remove it.",
        ) from None

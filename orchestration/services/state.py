"""What the embedded services leave on disk, and who may act on it.

Data flow: the supervisor -> `<home>/services.json` (0600, replaced atomically, there only while services run) ->
every client. Two file locks order the processes: `services.lock` belongs to the supervisor for its whole life,
`services.start.lock` to the client that is starting one.

Refuses: a home this user cannot write, and a state file that names a process which is not there any more.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingestion.errors import ConfigurationError

# Raised whenever a client and a supervisor of different code could misunderstand each other.
PROTOCOL = 1


@dataclass(frozen=True)
class Paths:
    """Where everything of one project's services lies."""

    home: Path

    @property
    def state(self) -> Path:
        return self.home / "services.json"

    @property
    def lock(self) -> Path:
        return self.home / "services.lock"

    @property
    def start_lock(self) -> Path:
        return self.home / "services.start.lock"

    @property
    def log(self) -> Path:
        return self.home / "logs" / "services.log"

    @property
    def postgres_log(self) -> Path:
        return self.home / "logs" / "postgres.log"

    @property
    def postgres_record(self) -> Path:
        return self.home / "postgres.json"

    @property
    def postgres(self) -> Path:
        return self.home / "postgres"

    def make(self) -> None:
        """Create the home and its log folder, or `ConfigurationError` when this user cannot."""
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.unusable(error) from None
        if not os.access(self.home, os.W_OK | os.X_OK):
            raise self.unusable("no permission to write there")

    def unusable(self, reason: object) -> ConfigurationError:
        return ConfigurationError(
            f"{self.home} cannot be used: {reason}",
            hint="It belongs to another user or is read-only. Set WAREHOUSE_HOME to a folder of your own.",
        )


@dataclass(frozen=True)
class SupervisorState:
    """The content of `services.json`."""

    pid: int
    started: str
    port: int
    secret: str = field(repr=False)
    since: str
    stays: bool
    services: tuple[Mapping[str, Any], ...]
    # Service -> the settings that name it.
    environment: Mapping[str, Mapping[str, str]] = field(repr=False)

    def write(self, path: Path) -> None:
        document = {
            "protocol": PROTOCOL,
            "pid": self.pid,
            "started": self.started,
            "port": self.port,
            "secret": self.secret,
            "since": self.since,
            "stays": self.stays,
            "services": list(self.services),
            "environment": {name: dict(values) for name, values in self.environment.items()},
        }
        write_private(path, json.dumps(document, indent=2) + "\n")

    @classmethod
    def read(cls, paths: Paths) -> "SupervisorState | None":
        """The state of a supervisor that is alive; None when none is.

        Raises:
            ConfigurationError: the file belongs to another user, or to a supervisor of another version.
        """
        try:
            document = json.loads(paths.state.read_text(encoding="utf-8"))
            state = cls(
                pid=int(document["pid"]),
                started=str(document["started"]),
                port=int(document["port"]),
                secret=str(document["secret"]),
                since=str(document["since"]),
                stays=bool(document["stays"]),
                services=tuple(document["services"]),
                environment=dict(document["environment"]),
            )
            protocol = document["protocol"]
        except PermissionError as error:
            raise paths.unusable(error.strerror) from None
        except (OSError, ValueError, KeyError, TypeError):
            # Absent, or not ours: replaced as a whole by the next supervisor.
            return None
        # A pid alone is not proof: it may have been given to another process since.
        if process_identity(state.pid) != state.started:
            return None
        if protocol != PROTOCOL:
            raise ConfigurationError(
                f"The services of {paths.home} were started by another version (process {state.pid}).",
                hint=f"Stop them with that version, or with: kill {state.pid}",
            )
        return state


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically; only its owner may read it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ConfigurationError(
            f"{path} cannot be written: {error.strerror}.",
            hint="Free some space there, or set WAREHOUSE_HOME to another disk.",
        ) from None
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def process_identity(pid: int) -> str | None:
    """Text that no later process with the same pid shares; None when there is no such running process."""
    if pid <= 0:
        return None
    if sys.platform == "linux":
        try:
            # The name, in parentheses, may hold blanks; the fields after it do not.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        state, start_ticks = fields[0], fields[19]
        # A zombie still answers to kill(pid, 0); in a container without an init it does so for ever.
        return None if state in "ZX" else start_ticks
    answer = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.strip()
    state, _, started = answer.partition(" ")
    return started.strip() if answer and not state.startswith("Z") else None


class FileLock:
    """An exclusive lock on a file that the kernel frees when its holder dies, however it dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        if self._descriptor is not None:
            return True
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise Paths(self.path.parent).unusable(error.strerror) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        if not self.is_held:
            # The home was deleted meanwhile: this lock guards a file nobody else will open.
            self.release()
            return False
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def is_held(self) -> bool:
        """Whether this is still the lock others would find: a deleted file guards nothing."""
        with contextlib.suppress(OSError):
            return self._descriptor is not None and os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        return False


def log_tail(path: Path, *, offset: int = 0, lines: int = 6) -> str:
    """The last lines of a log from `offset` bytes on, indented for a message; empty when there are none."""
    try:
        with path.open("rb") as file:
            file.seek(max(offset, path.stat().st_size - 16_384))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])


def rotate(path: Path, *, limit: int = 5_000_000) -> None:
    """Set a log of more than `limit` bytes aside as `<name>.1`, over the one before it."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > limit:
            path.replace(path.with_name(path.name + ".1"))

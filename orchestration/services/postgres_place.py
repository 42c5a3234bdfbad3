"""Where the embedded Postgres keeps its data, and which user runs it.

A normal user: `<home>/postgres`, as that user. Root, whom Postgres refuses: an unprivileged user, in `<home>/postgres`
if that user can get there, else in `/var/tmp/payments-warehouse-<hash of home>`. No mode of a folder that is not
ours is ever changed.

Refuses a folder under /var/tmp that somebody else made: its name can be guessed, and who owns it owns the data.
"""

import hashlib
import os
import pwd
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingestion.errors import ConfigurationError

SHARED = Path("/var/tmp")


@dataclass(frozen=True)
class Account:
    """A user to run a program as; only root can."""

    name: str
    uid: int
    gid: int

    @property
    def process_options(self) -> dict[str, Any]:
        """Keyword arguments of `subprocess` that drop to this user."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def can_run(self, command: Sequence[str]) -> bool:
        try:
            return (
                subprocess.run(
                    command,
                    **self.process_options,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=10,
                    check=False,
                ).returncode
                == 0
            )
        except (OSError, subprocess.SubprocessError):
            return False

    def can_enter(self, folder: Path) -> bool:
        return self.can_run(["/bin/sh", "-c", 'cd -- "$0"', str(folder)])


@dataclass(frozen=True)
class Place:
    """`base` holds the data folder and, where needed, copied programs; `account` is None to stay who we are."""

    base: Path
    account: Account | None

    @property
    def data(self) -> Path:
        return self.base / "data"

    @property
    def process_options(self) -> dict[str, Any]:
        return self.account.process_options if self.account else {}

    def give(self, path: Path) -> None:
        """Hand a file or folder of ours to the user that runs Postgres."""
        if self.account:
            os.chown(path, self.account.uid, self.account.gid)

    def make(self) -> None:
        """Create the base, or check the one that is there.

        Raises:
            ConfigurationError: it is not a folder of this user alone.
        """
        try:
            self.base.mkdir(exist_ok=True)
            found = self.base.lstat()
        except OSError as error:
            raise ConfigurationError(f"{self.base} cannot be used for Postgres' data: {error}") from None
        trusted = found.st_uid == os.geteuid() or (self.account and found.st_uid == self.account.uid)
        if not stat.S_ISDIR(found.st_mode) or not trusted or stat.S_IMODE(found.st_mode) & 0o022:
            raise ConfigurationError(
                f"{self.base} is not a folder that only this user can write.",
                hint="Somebody else made it. Remove it, or set WAREHOUSE_HOME to another folder.",
            )
        if self.account and found.st_uid == os.geteuid():
            # The user Postgres runs as passes through; what lies inside is closed by itself.
            self.base.chmod(0o755)


def system_account(names: tuple[str, ...] = ("postgres", "nobody")) -> Account:
    """The unprivileged user that runs Postgres when we are root."""
    for name in names:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise ConfigurationError(
        f"Postgres does not run as root, and there is no user {' or '.join(names)} to run it.",
        hint="Run the command as a normal user, or set WAREHOUSE_DSN to a server of your own.",
    )


def shared_base(home: Path) -> Path:
    """The folder under /var/tmp that belongs to this home."""
    return SHARED / f"payments-warehouse-{hashlib.sha256(str(home).encode()).hexdigest()[:12]}"


def choose_place(home: Path, account: Account | None) -> Place:
    """Where Postgres of this home lies; `account` is the user to drop to, None when we are not root."""
    own = home / "postgres"
    if account is None:
        return Place(own, None)
    owner = _owner(own / "data")
    if owner is not None and owner.uid != 0:
        # Made by the project's normal user, or by an earlier start as root: its owner goes on running it.
        return Place(own, owner)
    shared = shared_base(home)
    if (shared / "data").exists() or not account.can_enter(home):
        return Place(shared, account)
    return Place(own, account)


def _owner(folder: Path) -> Account | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    try:
        name = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        name = str(found.st_uid)
    return Account(name, found.st_uid, found.st_gid)

"""A Postgres whose supervisor is gone: found by the data folder it works in, ended, and its traces removed.

Refuses to touch any process that is not Postgres on exactly this folder.
"""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from orchestration.services.state import process_identity

_log = logging.getLogger(__name__)


def end_orphans(data: Path) -> None:
    """End the server an earlier supervisor left on this data folder, and remove a stale postmaster.pid.

    The caller holds the home's lock, so whatever runs on the folder has lost its supervisor.
    """
    pidfile = data / "postmaster.pid"
    try:
        recorded = int(pidfile.read_text(errors="replace").splitlines()[0])
    except (OSError, ValueError, IndexError):
        recorded = 0
    postmaster = recorded if recorded in set(_processes_on(data)) else 0
    if postmaster:
        _log.warning("ending the server %d of a supervisor that is gone", postmaster)
        _signal_and_wait([postmaster], signal.SIGINT, 20.0)
    # What a killed postmaster left leaves by itself, but a new server does not start before it has.
    remaining = list(_processes_on(data))
    if remaining:
        _signal_and_wait(remaining, signal.SIGQUIT, 5.0)
        _signal_and_wait(list(_processes_on(data)), signal.SIGKILL, 5.0)
    if recorded and recorded not in set(_processes_on(data)):
        # Postgres takes any living process with that pid for the owner, also one that came after a reboot.
        pidfile.unlink(missing_ok=True)


def _processes_on(data: Path) -> Iterator[int]:
    """Postgres processes that work in this data folder (every one of them has it as working directory)."""
    if sys.platform != "linux":
        yield from _postmaster_by_ps(data)
        return
    real = os.path.realpath(data)
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        # Processes of other users cannot be read, and cannot be ours.
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{entry.name}/cwd") == real:
                name = Path(f"/proc/{entry.name}/comm").read_text().strip()
                pid = int(entry.name)
                if name in ("postgres", "postmaster") and process_identity(pid) is not None:
                    yield pid


def _postmaster_by_ps(data: Path) -> Iterator[int]:
    answer = subprocess.run(["ps", "-axo", "pid=,command="], capture_output=True, text=True, check=False)
    for line in answer.stdout.splitlines():
        pid, _, command = line.strip().partition(" ")
        if re.search(rf"postgres -D {re.escape(str(data))}(\s|$)", command):
            yield int(pid)


def _signal_and_wait(pids: list[int], number: signal.Signals, timeout: float) -> None:
    waiting = {pid: process_identity(pid) for pid in pids}
    for pid, identity in waiting.items():
        if identity is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if all(identity is None or process_identity(pid) != identity for pid, identity in waiting.items()):
            return
        time.sleep(0.02)

"""What the services leave on disk is believed only as far as it is true."""

import json
import os
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ingestion.errors import AuthenticationError, ConfigurationError, TransientError, WarehouseError
from orchestration.services.state import (
    FileLock,
    Paths,
    SupervisorState,
    log_tail,
    process_identity,
    rotate,
    write_private,
)
from orchestration.services.wire import BrokenConnection, encode, exchange, pack_error, unpack_error


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    made = Paths(tmp_path / "home")
    made.make()
    return made


@pytest.fixture
def state() -> SupervisorState:
    identity = process_identity(os.getpid())
    assert identity is not None
    return SupervisorState(
        pid=os.getpid(),
        started=identity,
        port=1,
        secret="s3cret",
        since="2026-01-05T00:00:00+00:00",
        stays=True,
        services=({"name": "postgres"},),
        environment={"postgres": {"WAREHOUSE_DSN": "postgresql://u:s3cret@h/d"}},
    )


def test_a_state_is_read_as_it_was_written(paths: Paths, state: SupervisorState) -> None:
    state.write(paths.state)
    assert SupervisorState.read(paths) == state
    assert stat.S_IMODE(paths.state.stat().st_mode) == 0o600
    assert sorted(p.name for p in paths.home.iterdir()) == ["logs", "services.json"]


def test_secrets_are_not_printed(state: SupervisorState) -> None:
    assert "s3cret" not in repr(state)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": "x"}', "null", "\x00"])
def test_a_damaged_state_counts_as_none(paths: Paths, text: str) -> None:
    paths.state.write_text(text)
    assert SupervisorState.read(paths) is None


def test_a_reused_pid_is_not_the_supervisor(paths: Paths, state: SupervisorState) -> None:
    replace(state, started="another").write(paths.state)
    assert SupervisorState.read(paths) is None


def test_another_version_is_named(paths: Paths, state: SupervisorState) -> None:
    state.write(paths.state)
    document = json.loads(paths.state.read_text())
    write_private(paths.state, json.dumps({**document, "protocol": 0}))
    with pytest.raises(ConfigurationError, match=f"another version .process {os.getpid()}."):
        SupervisorState.read(paths)


def test_a_dead_process_has_no_identity_and_a_zombie_neither() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    first = process_identity(process.pid)
    assert first is not None
    assert process_identity(process.pid) == first
    process.kill()
    # Not waited for yet: kill(pid, 0) still finds it.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    os.kill(process.pid, 0)
    assert process_identity(process.pid) is None
    process.communicate()
    assert process_identity(process.pid) is None
    assert process_identity(0) is None


def test_a_lock_has_one_holder(paths: Paths) -> None:
    first, second = FileLock(paths.lock), FileLock(paths.lock)
    assert first.try_acquire()
    assert first.try_acquire()
    assert not second.try_acquire()
    first.release()
    assert second.try_acquire()
    assert not first.is_held


def test_a_deleted_lock_guards_nothing(paths: Paths) -> None:
    first, second = FileLock(paths.lock), FileLock(paths.lock)
    assert first.try_acquire()
    paths.lock.unlink()
    assert not first.is_held
    assert second.try_acquire()
    assert second.is_held


def test_a_lock_dies_with_its_process(paths: Paths) -> None:
    code = (
        "import sys; from pathlib import Path; from orchestration.services.state import FileLock\n"
        "lock = FileLock(Path(sys.argv[1])); print(lock.try_acquire(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(paths.lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "True"
        assert not FileLock(paths.lock).try_acquire()
        process.kill()
        process.wait()
        assert FileLock(paths.lock).try_acquire()


def test_a_home_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(ConfigurationError, match="home cannot be used") as caught:
        Paths(tmp_path / "home").make()
    assert "WAREHOUSE_HOME" in caught.value.hint


def test_a_failed_write_leaves_the_old_file(paths: Paths) -> None:
    write_private(paths.state, "old")
    with pytest.raises(UnicodeEncodeError):
        write_private(paths.state, "\udc80")
    assert paths.state.read_text() == "old"
    assert [p.name for p in paths.home.iterdir() if p.name.startswith(".")] == []


def test_a_log_tail_is_short_and_starts_where_asked(paths: Paths) -> None:
    paths.log.write_bytes(b"old\n" + b"".join(b"line %d \xff\n" % n for n in range(10)))
    assert log_tail(paths.log, offset=4, lines=2) == "    line 8 �\n    line 9 �"
    assert "old" not in log_tail(paths.log, offset=4, lines=50)
    assert log_tail(paths.home / "absent") == ""


def test_a_large_log_is_set_aside(paths: Paths) -> None:
    paths.log.write_text("x" * 11)
    rotate(paths.log, limit=11)
    assert paths.log.exists()
    rotate(paths.log, limit=10)
    assert not paths.log.exists()
    assert (paths.log.parent / "services.log.1").read_text() == "x" * 11
    rotate(paths.log)


@pytest.mark.parametrize("kind", [WarehouseError, ConfigurationError, TransientError, AuthenticationError])
def test_an_error_keeps_its_class_over_the_wire(kind: type[WarehouseError]) -> None:
    error = unpack_error(json.loads(encode(pack_error(kind("what", hint="how")))))
    assert type(error) is kind
    assert (error.message, error.hint) == ("what", "how")


@pytest.mark.parametrize("answer", [b"", b"no JSON\n", b"[]\n", b"half"])
def test_an_answer_that_is_none_is_a_broken_connection(answer: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(BrokenConnection):
            exchange(ours, {"op": "status"}, timeout=1)


def test_silence_is_a_broken_connection() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(BrokenConnection, match="timed out"):
        exchange(ours, {"op": "status"}, timeout=0.01)

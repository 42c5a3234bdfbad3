"""The `warehouse` command in a process forked from one that has imported everything: what a command does, without the
seconds its imports take.

    zygote (python -m tests.harness.warm SOCKET) -> a keeper for each command -> the command

The whole of `orchestration.cli.main` runs, in a process of its own with its own environment, as the installed command
would; only the start of the interpreter is not its own. Tests of that start the installed one (`start_warehouse`).
"""

import atexit
import contextlib
import faulthandler
import functools
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

TIMEOUT_S = 180
START_S = 60


def run_warm(arguments: Sequence[str], folder: Path | None, environment: Mapping[str, str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command; a signal's number is negative, as subprocess has it."""
    with tempfile.TemporaryDirectory(prefix="warm-") as scratch, socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(_zygote())
        order = {
            "arguments": list(arguments),
            "folder": str(folder or os.getcwd()),
            "environment": dict(environment),
            "output": [f"{scratch}/out", f"{scratch}/err"],
        }
        lines = connection.makefile("rw")
        lines.write(json.dumps(order) + "\n")
        lines.flush()
        pid = int(lines.readline())
        try:
            code = int(lines.readline())
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise
        out, err = (Path(path).read_text(encoding="utf-8", errors="replace") for path in order["output"])
        return code, out, err


@functools.cache
def _zygote() -> str:
    """The socket of this process's zygote, which ends with it."""
    folder = tempfile.mkdtemp(prefix="warm-")
    path = f"{folder}/socket"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.harness.warm", path], stdin=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )

    def end() -> None:
        process.kill()
        process.wait()
        with contextlib.suppress(OSError):
            os.unlink(path)
            os.rmdir(folder)

    atexit.register(end)
    deadline = time.monotonic() + START_S
    while not os.path.exists(path):
        assert process.poll() is None, "the zygote did not start"
        assert time.monotonic() < deadline, "the zygote is not ready"
        time.sleep(0.02)
    return path


def serve(path: str) -> None:
    """Import what commands need, then fork a keeper for every order."""
    import pyarrow.csv  # type: ignore[import-untyped]  # noqa: F401
    from dbt.cli.main import dbtRunner  # noqa: F401

    import orchestration.cli
    import orchestration.run  # noqa: F401

    gc.freeze()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.new")
        server.listen()
        os.rename(f"{path}.new", path)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _keep(connection)
            connection.close()


def _keep(connection: socket.socket) -> None:
    """The keeper: tells the command's process id, waits for its end, tells its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    lines = connection.makefile("rw")
    order = json.loads(lines.readline())
    pid = os.fork()
    if pid == 0:
        connection.detach()
        _command(order)
    lines.write(f"{pid}\n")
    lines.flush()
    _, status = os.waitpid(pid, 0)
    lines.write(f"{os.waitstatus_to_exitcode(status)}\n")
    lines.flush()
    os._exit(0)


def _command(order: dict) -> None:
    """The life of a command. Never returns: what the zygote would do at its end is not the command's."""
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in zip((1, 2), order["output"], strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), number)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(number, "wb"), "utf-8", "backslashreplace") for number in (1, 2)
    )
    sys.argv = ["warehouse", *order["arguments"]]
    faulthandler.enable()
    # As a shell starts it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        from orchestration.cli import main

        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])

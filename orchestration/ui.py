"""Dagster on this machine: code server, daemon and web interface as processes of one command, on the same warehouse.

    warehouse ui -> <home>/dagster (dagster.yaml, history) -> code server -> daemon, webserver -> http://127.0.0.1

The code server stays warm between runs and each run is a process of it, as in docker/compose.yml. Processes end with
the command that started them, in whatever way it ends. Listens on 127.0.0.1 only.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ingestion.errors import ConfigurationError, WarehouseError
from ingestion.settings import Settings
from orchestration.instance import apply_pools, write_instance

LOCATION = "payments_warehouse"
# Loading the project takes about ten seconds, parsing it on a fresh clone some more.
START_S = 180.0
STOP_S = 30.0

# Ends the process when its parent is gone, however that ended (PR_SET_PDEATHSIG, Linux); a plain exec elsewhere.
_END_WITH_PARENT = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the command that started this has gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass
class Server:
    """A process of ours and its log."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def require_alive(self) -> None:
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-15:])
            raise WarehouseError(
                f"Dagster's {self.name} ended with {self.process.returncode}:\n{tail}", hint=f"{self.log}"
            )

    def stop(self) -> None:
        """Ask it and the runs it started to end; after a while they are ended."""
        for how, patience in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, how)
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
            return


@dataclass
class Servers:
    """Dagster's processes for one DAGSTER_HOME."""

    home: Path
    environment: Mapping[str, str]
    running: list[Server] = field(default_factory=list)

    def start(self, name: str, *arguments: str) -> Server:
        # Beside those of the embedded services; Dagster clears a folder `logs` of its own.
        log = self.home.parent / "logs" / f"dagster-{name.replace(' ', '-')}.log"
        log.parent.mkdir(exist_ok=True)
        script = str(Path(sys.executable).with_name(arguments[0]))
        command = [sys.executable, "-I", "-S", "-c", _END_WITH_PARENT, str(os.getpid()), script, *arguments[1:]]
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                # Ctrl-C in a terminal is for the command, which then stops them in order.
                start_new_session=True,
            )
        self.running.append(Server(name, process, log))
        return self.running[-1]

    def start_code_server(self) -> Server:
        """The server that holds the definitions; ready when this returns."""
        port = free_port()
        workspace = {"load_from": [{"grpc_server": {"host": "127.0.0.1", "port": port, "location_name": LOCATION}}]}
        (self.home / "workspace.yaml").write_text(yaml.safe_dump(workspace), "utf-8")
        where = ("--host", "127.0.0.1", "--port", str(port))
        module = ("--module-name", "orchestration.definitions", "--location-name", LOCATION)
        server = self.start("code server", "dagster", "api", "grpc", *where, *module)
        wait_for_port(server, port)
        return server

    def start_daemon(self) -> Server:
        """Evaluates schedules and sensors, launches what is queued, watches runs."""
        return self.start("daemon", "dagster-daemon", "run", "--workspace", str(self.home / "workspace.yaml"))

    def start_webserver(self, port: int) -> Server:
        where = ("--host", "127.0.0.1", "--port", str(port))
        server = self.start("webserver", "dagster-webserver", *where, "--workspace", str(self.home / "workspace.yaml"))
        wait_for_port(server, port)
        return server

    def stop(self) -> None:
        while self.running:
            self.running.pop().stop()


@contextlib.contextmanager
def dagster_servers(settings: Settings) -> Iterator[Servers]:
    """The processes' environment and home; what is started inside ends with the block."""
    home = write_instance(settings, settings.home.absolute() / "dagster")
    apply_pools(settings, home)
    environment = {
        **settings.env,
        "DAGSTER_HOME": str(home),
        "WAREHOUSE_PROJECT_DIR": str(settings.project_dir),
        "WAREHOUSE_HOME": str(settings.home.absolute()),
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{settings.env.get('PATH', os.defpath)}",
    }
    servers = Servers(home, environment)
    try:
        yield servers
    finally:
        servers.stop()


def serve_ui(settings: Settings, port: int) -> None:
    """Start Dagster, print its address, and stay until interrupted.

    Raises:
        ConfigurationError: somebody else listens on the port.
        WarehouseError: a process did not start, or ended; the message has the end of its log.
    """
    port = port or free_port()
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ConfigurationError(f"Port {port} is taken.", hint="--port names another; 0 takes a free one.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with dagster_servers(settings) as servers:
        print("Dagster is starting ...", file=sys.stderr, flush=True)
        servers.start_code_server()
        servers.start_daemon()
        servers.start_webserver(port)
        print(f"http://127.0.0.1:{port}", flush=True)
        print(f"history in {servers.home}, logs beside it; Ctrl-C stops it", file=sys.stderr, flush=True)
        while True:
            for server in servers.running:
                server.require_alive()
            time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(server: Server, port: int) -> None:
    """Return once the server listens."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        server.require_alive()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise WarehouseError(f"Dagster's {server.name} does not listen after {START_S:.0f} s.", hint=f"{server.log}")

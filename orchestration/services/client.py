"""The clients' side: find the supervisor or start one, hold a lease, ask for status, stop.

Data flow: settings -> plan -> (services.json -> lease on the running supervisor | a new supervisor) -> the settings
that name its services. A lease is an open connection; it ends with the process that holds it.

Refuses: to stop services other commands use, unless forced.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingestion.errors import ConfigurationError, TransientError, WarehouseError
from ingestion.settings import Settings
from orchestration.services.plan import DEFAULT_SEED, KAFKA, SETTING_OF, plan_services
from orchestration.services.state import FileLock, Paths, SupervisorState, log_tail, rotate
from orchestration.services.wire import BrokenConnection, encode, exchange, receive, unpack_error

if TYPE_CHECKING:
    from orchestration.services.postgres_place import Place

EMBEDDED_SETTING = "WAREHOUSE_EMBEDDED"
SEED_SETTING = "WAREHOUSE_SAMPLE_SEED"

# A first start takes about a second; a recovery after a crash may take minutes.
START_SECONDS = 180.0
STATUS_SECONDS = 0.15
STOP_SECONDS = 60.0


@dataclass(frozen=True)
class ServiceState:
    """One embedded service that runs: where it listens, in which process, since when (ISO 8601, UTC)."""

    name: str
    address: str
    pid: int
    since: str


@dataclass(frozen=True)
class Lease:
    """A command that uses the services."""

    pid: int
    command: str
    since: str


@dataclass(frozen=True)
class ServicesStatus:
    """What runs for one home.

    `stays` is True when the services outlive the last lease (`services start`); `configured` names the services that
    settings give an address, which are never embedded; `environment` holds the settings, passwords included, that
    name what runs.
    """

    running: bool
    stays: bool = False
    supervisor_pid: int | None = None
    since: str | None = None
    services: tuple[ServiceState, ...] = ()
    leases: tuple[Lease, ...] = ()
    configured: tuple[str, ...] = ()
    log: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: everything but the secrets."""
        return {
            "running": self.running,
            "stays": self.stays,
            "supervisor_pid": self.supervisor_pid,
            "since": self.since,
            "services": [vars(service) for service in self.services],
            "leases": [vars(lease) for lease in self.leases],
            "configured": list(self.configured),
            "log": str(self.log) if self.log else None,
        }


@contextlib.contextmanager
def running(settings: Settings, *, topics: Mapping[str, int] | None = None) -> Iterator[Settings]:
    """Settings in which every service has an address, valid inside the `with` block.

    What no setting names runs embedded: it is started if it does not run, and kept by a lease until the block ends,
    in whatever way. `topics` (name -> partitions) are created in the embedded broker; None takes the declared feeds'.
    Adds WAREHOUSE_EMBEDDED, the embedded services' names.

    Raises:
        ConfigurationError: a service cannot start here; the message says why.
        TransientError: it did not start in time.
    """
    plan = plan_services(settings)
    if not plan.embedded:
        yield settings.with_env(**plan.defaults)
        return
    connection, answer = _lease(settings, plan.embedded, topics, stay=False)
    try:
        # It may run more than this command needs: what a setting names stays as it is.
        values = _environment_of(answer, plan.embedded)
        yield settings.with_env(**plan.defaults, **values, **{EMBEDDED_SETTING: ",".join(plan.embedded)})
    finally:
        connection.close()


def start(settings: Settings, *, topics: Mapping[str, int] | None = None) -> ServicesStatus:
    """Start what no setting names and let it run until `stop`; says what runs, also when nothing had to start."""
    plan = plan_services(settings)
    if not plan.embedded:
        return status(settings)
    connection, answer = _lease(settings, plan.embedded, topics, stay=True)
    connection.close()
    answer["leases"] = [lease for lease in answer["leases"] if lease["pid"] != os.getpid()]
    return _status_of(settings, answer)


def status(settings: Settings) -> ServicesStatus:
    """What runs now. Starts nothing, and answers at once even when the supervisor hangs."""
    paths = Paths(settings.home.absolute())
    state = SupervisorState.read(paths)
    if state is not None:
        try:
            with _connect(state, STATUS_SECONDS) as connection:
                return _status_of(settings, _ask(connection, state, {"op": "status"}, STATUS_SECONDS))
        except ConnectionRefusedError:
            # It stopped listening: it is on its way out.
            pass
        except (BrokenConnection, OSError):
            return _status_of(
                settings,
                {
                    "pid": state.pid,
                    "since": state.since,
                    "stays": state.stays,
                    "services": state.services,
                    "environment": state.environment,
                    "leases": [],
                },
            )
    return ServicesStatus(running=False, configured=_configured(settings), log=paths.log)


def stop(settings: Settings, *, force: bool = False) -> bool:
    """Stop everything of this home and wait until it is down; False when nothing ran.

    Raises:
        TransientError: other commands hold leases and `force` is False, or it is not down after a minute.
    """
    paths = Paths(settings.home.absolute())
    if not paths.lock.exists():
        return False
    lock = FileLock(paths.lock)
    asked = False
    deadline = time.monotonic() + STOP_SECONDS
    while not lock.try_acquire():
        # The lock counts: its holder may still be starting, or leaving by itself.
        state = SupervisorState.read(paths)
        if state is not None and not asked:
            with contextlib.suppress(BrokenConnection, OSError), _connect(state, 5.0) as connection:
                _ask(connection, state, {"op": "stop", "force": force, "pid": os.getpid()}, 30.0)
                asked = True
        if time.monotonic() > deadline:
            raise TransientError(
                f"The services of {paths.home} are not down after {STOP_SECONDS:.0f} s.",
                hint=f"See {paths.log}" + (f"; if it hangs: kill {state.pid}" if state else ""),
            )
        time.sleep(0.02)
    try:
        return _clear_remains(paths) or asked
    finally:
        lock.release()


def erase(settings: Settings, *, force: bool = False) -> None:
    """Stop everything and delete the embedded Postgres' data, wherever it lies. There is no way back."""
    stop(settings, force=force)
    paths = Paths(settings.home.absolute())
    base = _postgres_place(paths).base
    if not base.exists() and not paths.postgres_record.exists():
        return
    paths.make()
    lock = FileLock(paths.lock)
    if not lock.try_acquire():
        raise TransientError(f"The services of {paths.home} were started again meanwhile: nothing was deleted.")
    try:
        shutil.rmtree(base, ignore_errors=True)
        paths.postgres_record.unlink(missing_ok=True)
    finally:
        lock.release()


def _clear_remains(paths: Paths) -> bool:
    """End what a killed supervisor left; we hold its lock. False when it left nothing."""
    if not paths.state.exists():
        return False
    from orchestration.services.postgres_orphans import end_orphans

    end_orphans(_postgres_place(paths).data)
    paths.state.unlink(missing_ok=True)
    return True


def _postgres_place(paths: Paths) -> "Place":
    # Imported here: to ask for status neither hashes nor accounts are needed.
    from orchestration.services.postgres_place import choose_place, system_account

    return choose_place(paths.home, system_account() if os.geteuid() == 0 else None)


def _lease(
    settings: Settings, need: tuple[str, ...], topics: Mapping[str, int] | None, *, stay: bool
) -> tuple[socket.socket, dict[str, Any]]:
    """A connection that holds a lease on a supervisor that runs what is needed, and its description."""
    paths = Paths(settings.home.absolute())
    paths.make()
    request: dict[str, Any] = {
        "op": "lease",
        "need": need,
        "topics": dict(topics if topics is not None else _declared_topics(settings, need)),
        "seed": _seed(settings),
        "postgres_bin": settings.get("WAREHOUSE_POSTGRES_BIN"),
        "stay": stay,
        "pid": os.getpid(),
        "command": _command(),
    }
    start_lock = FileLock(paths.start_lock)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        taken = _take_lease(paths, request)
        if taken is None and start_lock.try_acquire():
            try:
                # Somebody may have been quicker between our look and our lock.
                taken = _take_lease(paths, request) or _spawn(paths, request)
            finally:
                start_lock.release()
        if taken is not None:
            return taken
        time.sleep(0.02)
    raise TransientError(
        f"The services of {paths.home} did not come up within {START_SECONDS:.0f} s.",
        hint=f"See {paths.log}:\n{log_tail(paths.log)}",
    )


def _take_lease(paths: Paths, request: dict[str, Any]) -> tuple[socket.socket, dict[str, Any]] | None:
    """A lease on the supervisor that runs; None when there is none to be had now."""
    state = SupervisorState.read(paths)
    if state is None:
        return None
    try:
        connection = _connect(state, 5.0)
    except OSError:
        return None
    try:
        answer = _ask(connection, state, request, START_SECONDS)
    except BaseException as error:
        connection.close()
        if isinstance(error, BrokenConnection):
            return None
        raise
    return connection, answer


def _spawn(paths: Paths, request: dict[str, Any]) -> tuple[socket.socket, dict[str, Any]] | None:
    """Start a supervisor; its first connection is our lease. None when another one was there after all."""
    rotate(paths.log)
    ours, theirs = socket.socketpair()
    command = [
        *(sys.executable, "-P", "-m", "orchestration.services.supervisor"),
        *("--home", str(paths.home), "--client", str(theirs.fileno())),
    ]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        with theirs, paths.log.open("ab") as log:
            offset = log.tell()
            subprocess.run(
                command,
                pass_fds=[theirs.fileno()],
                cwd=paths.home,
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                check=False,
            )
        ours.sendall(encode(request))
        answer = receive(ours, timeout=START_SECONDS)
    except (BrokenConnection, OSError) as error:
        ours.close()
        raise WarehouseError(
            f"The services did not start: {error}. Their last words:\n{log_tail(paths.log, offset=offset)}",
            hint=f"The whole log: {paths.log}",
        ) from None
    except BaseException:
        ours.close()
        raise
    if answer.get("ok"):
        return ours, answer
    ours.close()
    if answer.get("retry"):
        return None
    raise unpack_error(answer)


def _connect(state: SupervisorState, timeout: float) -> socket.socket:
    return socket.create_connection(("127.0.0.1", state.port), timeout=timeout)


def _ask(connection: socket.socket, state: SupervisorState, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    answer = exchange(connection, {**request, "secret": state.secret}, timeout=timeout)
    if not answer.get("ok"):
        raise unpack_error(answer)
    return answer


def _environment_of(answer: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, str]:
    """The settings that name these services."""
    return {setting: value for name in names for setting, value in answer["environment"].get(name, {}).items()}


def _configured(settings: Settings) -> tuple[str, ...]:
    return tuple(name for name, setting in SETTING_OF.items() if settings.get(setting) is not None)


def _status_of(settings: Settings, answer: Mapping[str, Any]) -> ServicesStatus:
    return ServicesStatus(
        running=True,
        stays=bool(answer["stays"]),
        supervisor_pid=int(answer["pid"]),
        since=str(answer["since"]),
        services=tuple(ServiceState(**service) for service in answer["services"]),
        leases=tuple(Lease(**lease) for lease in answer["leases"]),
        configured=_configured(settings),
        log=Paths(settings.home).log,
        environment=_environment_of(answer, tuple(answer["environment"])),
    )


def _declared_topics(settings: Settings, need: tuple[str, ...]) -> Mapping[str, int]:
    """The topics of the declared Kafka feeds. Imported here: a YAML parser is not needed to ask for status."""
    if KAFKA not in need:
        return {}
    from ingestion.feeds import KafkaOrigin, load_feeds
    from orchestration.services.broker import DEFAULT_PARTITIONS

    return {
        feed.origin.topic: DEFAULT_PARTITIONS for feed in load_feeds(settings) if isinstance(feed.origin, KafkaOrigin)
    }


def _seed(settings: Settings) -> int:
    text = settings.get(SEED_SETTING)
    try:
        return int(text) if text is not None else DEFAULT_SEED
    except ValueError:
        raise ConfigurationError(f"{SEED_SETTING} must be a whole number, not {text!r}.") from None


def _command() -> str:
    """How this process was called, short enough for a message; arguments may hold secrets and stay out."""
    name = Path(sys.argv[0] or "python").name
    words = [word for word in sys.argv[1:2] if word.isidentifier()]
    return " ".join([name, *words])

"""The supervisor: one process per home that runs the embedded services while somebody holds a lease.

Data flow: first request (a socket inherited from the client that starts it) -> Postgres as a child, the broker and the
sample rates inside this process -> `services.json` -> leases over 127.0.0.1. When the last lease ends and nobody asked
it to stay, everything stops and the process exits; so it does on SIGTERM, and when its home is deleted.
Alone: `python -m orchestration.services.supervisor --home FOLDER` starts everything and stays until SIGTERM.

Refuses to run beside another supervisor of the same home, and requests without the secret.
"""

import argparse
import contextlib
import logging
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingestion.errors import TransientError, WarehouseError
from orchestration.services.hosted import HostedPostgres, Options, Service, host, now
from orchestration.services.plan import DEFAULT_SEED, KAFKA, POSTGRES, RATES
from orchestration.services.state import FileLock, Paths, SupervisorState, process_identity
from orchestration.services.wire import (
    MAX_LINE,
    BrokenConnection,
    decode,
    encode,
    pack_error,
    receive,
)

_log = logging.getLogger("services")

TICK_SECONDS = 1.0
SILENCE_SECONDS = 10.0
RESTARTS_PER_HOUR = 5


class _AnotherRuns(Exception):
    """The home has a supervisor already."""


@dataclass
class _Client:
    """A control connection; `lease` says who holds one, None while it only asks."""

    connection: socket.socket
    opened: float
    received: bytes = b""
    lease: Mapping[str, Any] | None = None


class Supervisor:
    """Everything that runs for one home. Single-threaded but for the services' own threads."""

    def __init__(self, paths: Paths, lock: FileLock) -> None:
        self.paths = paths
        self.lock = lock
        self.stopping = threading.Event()
        self.since = now()
        self.stays = False
        self.secret = secrets.token_hex(24)
        self.identity = process_identity(os.getpid()) or ""
        self.services: dict[str, Service] = {}
        self.clients: dict[socket.socket, _Client] = {}
        self.restarts: list[float] = []
        self.selector = selectors.DefaultSelector()
        self.listener: socket.socket | None = None

    def run(self, first: socket.socket | None, request: Mapping[str, Any]) -> None:
        """Start what the first request needs, answer it, and serve until nobody is left."""
        self._watch_signals()
        try:
            self._start_needed(Options.of(request))
            self.stays = bool(request.get("stay"))
            self.listener = socket.create_server(("127.0.0.1", 0))
            self.listener.setblocking(False)
            self.selector.register(self.listener, selectors.EVENT_READ)
            self._publish()
            if first is not None:
                client = self._admit(first)
                client.lease = _holder(request)
                self._answer(client, self._describe())
            while not self.stopping.is_set() and (self.stays or self._leases() or self._asking()):
                self._serve_once()
        finally:
            self._stop_all()

    def _leases(self) -> list[_Client]:
        return [client for client in self.clients.values() if client.lease is not None]

    def _asking(self) -> bool:
        # Who has just connected may be about to take a lease.
        return any(client.lease is None for client in self.clients.values())

    def _watch_signals(self) -> None:
        wake, woken = socket.socketpair()
        for end in (wake, woken):
            end.setblocking(False)
        # Held by the selector's registration and by this attribute: closed with the process.
        self._wake = wake
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: self.stopping.set())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # A terminal's Ctrl-C and hang-up are for the command in front, which then gives its lease back.
        # (An ignored signal would stay ignored in Postgres; a handler does not.)
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGHUP, lambda *_: None)
        self.selector.register(woken, selectors.EVENT_READ)

    def _start_needed(self, options: Options) -> None:
        for name in options.need:
            running = self.services.get(name)
            if running is not None:
                running.adapt(options)
                continue
            began = time.monotonic()
            service = host(name, self.paths, options, self.stopping)
            self.services[name] = service
            _log.info("%s runs at %s (%.0f ms)", name, service.address, (time.monotonic() - began) * 1000)
            if self.stopping.is_set():
                raise TransientError("The services were asked to stop while they started.")

    def _publish(self) -> None:
        assert self.listener is not None
        SupervisorState(
            pid=os.getpid(),
            started=self.identity,
            port=self.listener.getsockname()[1],
            secret=self.secret,
            since=self.since,
            stays=self.stays,
            services=tuple(self._described_services()),
            environment=self._environment(),
        ).write(self.paths.state)

    def _described_services(self) -> list[dict[str, Any]]:
        return [{"name": s.name, "address": s.address, "pid": s.pid, "since": s.since} for s in self.services.values()]

    def _environment(self) -> dict[str, dict[str, str]]:
        return {name: dict(service.environment) for name, service in self.services.items()}

    def _describe(self) -> dict[str, Any]:
        return {
            "ok": True,
            "pid": os.getpid(),
            "since": self.since,
            "stays": self.stays,
            "services": self._described_services(),
            "environment": self._environment(),
            "leases": [dict(client.lease or {}) for client in self._leases()],
        }

    def _serve_once(self) -> None:
        for key, _ in self.selector.select(TICK_SECONDS):
            source = key.fileobj
            assert isinstance(source, socket.socket)
            if source is self.listener:
                with contextlib.suppress(OSError):
                    self._admit(source.accept()[0])
            elif source in self.clients:
                self._receive(self.clients[source])
            else:
                with contextlib.suppress(OSError):
                    source.recv(4096)
        self._check()

    def _check(self) -> None:
        """What no message tells: a server that died, a home that was deleted, a client that says nothing."""
        silent_since = time.monotonic() - SILENCE_SECONDS
        for client in list(self.clients.values()):
            if client.lease is None and client.opened < silent_since:
                self._drop(client)
        if not self.lock.is_held:
            _log.warning("%s was deleted: stopping", self.paths.home)
            self.stopping.set()
            return
        postgres = self.services.get(POSTGRES)
        if isinstance(postgres, HostedPostgres) and not postgres.server.is_alive and not self.stopping.is_set():
            self._restart(postgres)

    def _restart(self, postgres: HostedPostgres) -> None:
        moment = time.monotonic()
        self.restarts = [*(past for past in self.restarts if past > moment - 3600), moment]
        if len(self.restarts) > RESTARTS_PER_HOUR:
            _log.error("Postgres ended %d times within an hour: giving up", len(self.restarts))
            self.stopping.set()
            return
        _log.error("Postgres ended by itself: starting it again")
        try:
            postgres.server.start(cancelled=self.stopping.is_set)
        except WarehouseError as error:
            _log.error("Postgres did not start again: %s", error.message)
            self.stopping.set()
            return
        postgres.since = now()
        self._publish()

    def _admit(self, connection: socket.socket) -> _Client:
        connection.setblocking(False)
        client = self.clients[connection] = _Client(connection, time.monotonic())
        self.selector.register(connection, selectors.EVENT_READ)
        return client

    def _drop(self, client: _Client) -> None:
        if client.lease is not None:
            _log.info("lease of %s ended", client.lease)
        self.selector.unregister(client.connection)
        self.clients.pop(client.connection).connection.close()

    def _receive(self, client: _Client) -> None:
        try:
            chunk = client.connection.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        client.received += chunk
        if not chunk or len(client.received) > MAX_LINE:
            self._drop(client)
            return
        while b"\n" in client.received:
            line, _, client.received = client.received.partition(b"\n")
            try:
                request = decode(line)
                if not secrets.compare_digest(str(request.get("secret")).encode(), self.secret.encode()):
                    raise BrokenConnection("wrong secret")
                answer = self._handle(client, request)
            except BrokenConnection as error:
                _log.warning("a control connection was refused: %s", error)
                self._drop(client)
                return
            except WarehouseError as error:
                answer = pack_error(error)
            except Exception as error:
                _log.exception("a request failed")
                answer = pack_error(_internal(error))
            if not self._answer(client, answer):
                return

    def _answer(self, client: _Client, answer: Mapping[str, Any]) -> bool:
        try:
            client.connection.sendall(encode(dict(answer)))
        except OSError:
            self._drop(client)
            return False
        return True

    def _handle(self, client: _Client, request: Mapping[str, Any]) -> dict[str, Any]:
        match request.get("op"):
            case "status":
                return self._describe()
            case "lease":
                self._start_needed(Options.of(request))
                self.stays = self.stays or bool(request.get("stay"))
                self._publish()
                client.lease = _holder(request)
                _log.info("lease for %s", client.lease)
                return self._describe()
            case "stop":
                held = [other for other in self._leases() if other is not client]
                if held and not request.get("force"):
                    users = ", ".join(f"{o.lease['command']} (process {o.lease['pid']})" for o in held if o.lease)
                    raise TransientError(
                        f"The services are in use by {users}.",
                        hint="Wait until it has finished, or stop them by force; the run in progress then fails.",
                    )
                _log.info("asked to stop by process %s", request.get("pid"))
                self.stopping.set()
                return {"ok": True}
        raise WarehouseError(f"The services do not know the request {request.get('op')!r}.")

    def _stop_all(self) -> None:
        """Stop in the reverse order; first of all, let nobody find us any more."""
        self._unpublish()
        if self.listener is not None:
            self.listener.close()
        for client in self.clients.values():
            client.connection.close()
        self.clients.clear()
        for service in reversed(list(self.services.values())):
            try:
                service.stop()
                _log.info("%s stopped", service.name)
            except Exception:
                _log.exception("%s did not stop cleanly", service.name)
        self.services.clear()

    def _unpublish(self) -> None:
        # A home that was deleted and made again may already have another supervisor.
        if self.lock.is_held:
            with contextlib.suppress(OSError):
                self.paths.state.unlink(missing_ok=True)


def _holder(request: Mapping[str, Any]) -> dict[str, Any]:
    return {"pid": request.get("pid"), "command": request.get("command"), "since": now()}


def _internal(error: Exception) -> WarehouseError:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return WarehouseError(
        f"The services failed: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno}).",
        hint="The whole story is in logs/services.log in the home folder.",
    )


def _become_only_one(paths: Paths, lock: FileLock, *, patience: float = 60.0) -> bool:
    """Take the home's lock. False when another supervisor runs; one that is leaving is waited for."""
    deadline = time.monotonic() + patience
    while not lock.try_acquire():
        if SupervisorState.read(paths) is not None:
            return False
        if time.monotonic() > deadline:
            raise TransientError(
                f"Another process has held {lock.path} for {patience:.0f} s without serving.",
                hint=f"See who it is with: fuser {lock.path}",
            )
        time.sleep(0.03)
    return True


def _detach() -> None:
    """Leave the client: an own session for the terminal's signals, no zombie in the client when we end."""
    if os.fork():
        os._exit(0)
    os.setsid()


def _first_request(first: socket.socket | None) -> dict[str, Any]:
    if first is None:
        return {"need": [POSTGRES, KAFKA, RATES], "stay": True, "seed": DEFAULT_SEED}
    return receive(first, timeout=10.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the embedded services of one home.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--client", type=int, help="descriptor of the connection of the client that starts it")
    options = parser.parse_args(arguments)
    first = None
    if options.client is not None:
        first = socket.socket(fileno=options.client)
        first.set_inheritable(False)
        _detach()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"%(asctime)s [{os.getpid()}] %(name)s: %(message)s"
    )
    os.umask(0o077)
    paths = Paths(options.home)
    lock = FileLock(paths.lock)
    try:
        request = _first_request(first)
        paths.make()
        if not _become_only_one(paths, lock):
            raise _AnotherRuns
        Supervisor(paths, lock).run(first, request)
        _log.info("everything is down")
        return 0
    except _AnotherRuns:
        _log.info("another supervisor runs: leaving")
        answer: dict[str, Any] = {"ok": False, "retry": True}
    except BrokenConnection:
        return 1
    except WarehouseError as error:
        _log.error("%s %s", error.message, error.hint)
        answer = pack_error(error)
    except Exception as error:
        _log.exception("the supervisor failed")
        answer = pack_error(_internal(error))
    if first is not None:
        with contextlib.suppress(OSError):
            first.setblocking(True)
            first.sendall(encode(answer))
    return 1


if __name__ == "__main__":
    sys.exit(main())

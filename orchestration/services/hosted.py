"""The services a supervisor hosts, behind one face: start on creation, address, settings that name them, stop."""

import datetime as dt
import os
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ingestion.errors import ConfigurationError
from orchestration.services.broker import MockCluster
from orchestration.services.plan import DEFAULT_SEED, KAFKA, POSTGRES, RATES, SETTING_OF
from orchestration.services.postgres import EmbeddedPostgres
from orchestration.services.state import Paths


def now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Options:
    """What a request says about the services it needs."""

    need: tuple[str, ...]
    topics: Mapping[str, int]
    seed: int
    postgres_bin: str | None

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> "Options":
        return cls(
            need=tuple(request.get("need") or ()),
            topics={str(name): int(count) for name, count in (request.get("topics") or {}).items()},
            seed=int(request.get("seed", DEFAULT_SEED)),
            postgres_bin=request.get("postgres_bin"),
        )


class Service(Protocol):
    name: str
    since: str

    @property
    def address(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def environment(self) -> Mapping[str, str]: ...
    def adapt(self, options: Options) -> None:
        """Take up what a later client needs of a service that runs."""

    def stop(self) -> None: ...


class HostedPostgres:
    name = POSTGRES

    def __init__(self, paths: Paths, options: Options, stopping: threading.Event) -> None:
        self.server = EmbeddedPostgres(paths, binaries=options.postgres_bin)
        self.server.start(cancelled=stopping.is_set)
        self.since = now()

    @property
    def address(self) -> str:
        return self.server.address

    @property
    def pid(self) -> int:
        return self.server.pid

    @property
    def environment(self) -> Mapping[str, str]:
        return {SETTING_OF[POSTGRES]: self.server.dsn}

    def adapt(self, options: Options) -> None:
        pass

    def stop(self) -> None:
        self.server.stop()


class HostedKafka:
    name = KAFKA

    def __init__(self, options: Options) -> None:
        self.cluster = MockCluster(options.topics)
        self.address = self.cluster.address
        self.pid = os.getpid()
        self.since = now()
        self.environment: Mapping[str, str] = {
            SETTING_OF[KAFKA]: self.address,
            # Its offsets begin at 0 at every start: whoever kept positions must see that it is another log.
            "KAFKA_CLUSTER_INCARNATION": f"embedded-{uuid.uuid4()}",
        }

    def adapt(self, options: Options) -> None:
        self.cluster.ensure_topics(options.topics)

    def stop(self) -> None:
        self.cluster.stop()


class HostedRates:
    name = RATES

    def __init__(self, options: Options) -> None:
        from orchestration.sample.rates_api import serve

        self.server = serve("127.0.0.1", 0, options.seed)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        # `shutdown` waits for the end of a poll; the default one is half a second.
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.1}, name="rates", daemon=True
        ).start()
        self.pid = os.getpid()
        self.since = now()
        self.environment: Mapping[str, str] = {SETTING_OF[RATES]: self.address}

    def adapt(self, options: Options) -> None:
        pass

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def host(name: str, paths: Paths, options: Options, stopping: threading.Event) -> Service:
    """Start one service by name; `stopping` cuts a long start short."""
    match name:
        case "postgres":
            return HostedPostgres(paths, options, stopping)
        case "kafka":
            return HostedKafka(options)
        case "rates":
            return HostedRates(options)
    raise ConfigurationError(f"There is no embedded service {name!r}.")

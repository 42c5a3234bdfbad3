"""Where scenarios play: one Apache Kafka, one Postgres, one fork server of loaders; a site of its own per scenario.

A site is a fresh database, a fresh topic with a tallying producer, and the loader's local disk. Everything on
127.0.0.1, everything ended and removed at the end; only processes started here are ever signalled.
"""

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from random import Random
from typing import Any

import psycopg2
import psycopg2.extensions
from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import OffsetSpec

from ingestion import ledger
from ingestion.database import connect
from ingestion.ddl import ensure_schema
from orchestration.services.postgres import EmbeddedPostgres
from orchestration.services.postgres_place import choose_place, system_account
from orchestration.services.state import Paths
from tests.harness.apache_kafka import ApacheKafka
from tests.prove.loader import Orders, run
from tests.prove.tally import Tally, TallyingProducer
from tests.prove.verify import Comparison, Verdict

PARTITIONS = 6
# Sessions that are not the suite's own.
OTHERS = "datname = current_database() and application_name <> 'prove'"
# No scenario waits longer for one thing; a wait that ends here is a finding, not a hang.
PATIENCE_S = 90.0
TRIES = 40


class StuckError(RuntimeError):
    """Something that must happen did not happen in time."""


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S, every_s: float = 0.01) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise StuckError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(every_s)


@dataclass
class Loader:
    """One run of the loader."""

    process: ForkServerProcess
    result_path: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive()

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """The exit code."""
        self.process.join(timeout_s)
        if self.code is None:
            raise StuckError(f"loader {self.process.pid} did not end within {timeout_s:.0f} s")
        return self.code

    def pause(self, seconds: float) -> None:
        """Until that instant of its life, or its own end."""
        self.process.join(seconds)

    @property
    def seconds(self) -> float:
        """Its age; asked as soon as it ended, how long it ran."""
        return time.monotonic() - self.started

    def kill(self) -> bool:
        """kill -9; whether it was still running."""
        self.process.kill()
        return self.wait() < 0

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self.is_alive and self.process.pid:
            os.kill(self.process.pid, number)

    @property
    def result(self) -> dict[str, Any]:
        """What it did or why it failed; empty when it was killed."""
        try:
            found: dict[str, Any] = json.loads(self.result_path.read_text())
        except FileNotFoundError:
            return {}
        return found

    @property
    def error_class(self) -> str:
        return str(self.result.get("error_class", ""))

    @property
    def message(self) -> str:
        return str(self.result.get("message", ""))


class Database:
    """A fresh database of a site: queries that survive a restart of the server, and the lock that stops a loader."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._connection: psycopg2.extensions.connection | None = None

    def query(self, statement: Any, *values: object) -> list[tuple[Any, ...]]:
        for attempt in range(2):
            if self._connection is None or self._connection.closed:
                self._connection = psycopg2.connect(self.dsn, application_name="prove", options="-c timezone=UTC")
                self._connection.autocommit = True
            try:
                with self._connection.cursor() as cursor:
                    cursor.execute(statement, values or None)
                    return cursor.fetchall() if cursor.description else []
            except (psycopg2.OperationalError, psycopg2.InterfaceError):
                if attempt or not self._connection.closed:
                    raise
        raise AssertionError

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


class Site:
    """One scenario's database, topic, tally and loaders."""

    def __init__(self, stage: "Stage", name: str, database: Database, topic: str, records_per_load: int) -> None:
        self.stage = stage
        self.name = name
        self.database = database
        self.topic = topic
        self.home = stage.folder / "homes" / topic
        self.orders = Orders(database.dsn, stage.kafka.bootstrap, self.home, topic, records_per_load)
        self.tallies = [Tally()]
        self.ends: list[dict[int, int]] = []
        self.loaders: list[Loader] = []
        self._producer: TallyingProducer | None = None
        self._comparison = Comparison(self.query)

    @property
    def query(self) -> Callable[..., list[tuple[Any, ...]]]:
        return self.database.query

    @property
    def producer(self) -> TallyingProducer:
        """The producer of the topic's present incarnation."""
        if self._producer is None:
            seed = Random(f"{self.stage.seed}/{self.name}/{len(self.tallies)}").randrange(2**31)
            self._producer = TallyingProducer(
                self.stage.kafka.bootstrap, self.topic, PARTITIONS, seed, self.tallies[-1]
            )
        return self._producer

    def send(self, records: int) -> None:
        """Offer that many more records, and wait until the broker counts all of them as committed."""
        self.producer.send(records)
        wait_until(
            lambda: self._offsets(OffsetSpec.latest(), IsolationLevel.READ_COMMITTED) == self.log_ends(),
            "the last transaction's markers",
        )

    def recreate_topic(self) -> None:
        """The topic anew under its old name; a tally anew for it."""
        self.ends.append(self.log_ends())
        self.stage.kafka.delete_topic(self.topic)
        self.stage.kafka.create_topic(self.topic, PARTITIONS, {"retention.ms": "-1"})
        self.tallies.append(Tally())
        self._producer = None

    def start(self, **changes: Any) -> Loader:
        """A loader with these changes of its orders."""
        self.loaders = [loader for loader in self.loaders if loader.is_alive]
        self.loaders.append(self.stage.start(replace(self.orders, **changes)))
        return self.loaders[-1]

    def run(self, **changes: Any) -> Loader:
        """A run to its end."""
        loader = self.start(**changes)
        loader.wait()
        return loader

    def prepare(self) -> None:
        """Every table in place, so that triggers can be put on them."""
        connection = connect(self.orders.settings)
        ensure_schema(connection, [self.orders.spec])
        connection.close()

    def accept_losses(self, reason: str) -> list[str]:
        connection = connect(self.orders.settings)
        try:
            return ledger.accept_losses(connection, self.orders.spec, reason)
        finally:
            connection.close()

    def elsewhere(self, name: object = "another") -> Path:
        """The local disk of another machine."""
        return self.home.with_name(f"{self.topic}-of-{name}")

    def wipe(self) -> None:
        """The loader's machine burnt down: its local disk is empty."""
        shutil.rmtree(self.home, ignore_errors=True)

    def settle(self, verdict: Verdict, *, until_idle: bool = True, **changes: Any) -> int:
        """Run until a run succeeds, or (`until_idle`) until one finds nothing to land or to sweep; the number of runs.

        Transient failures are tried again; others become problems.
        """
        odd: Counter[str] = Counter()
        for count in range(1, TRIES + 1):
            loader = self.run(**changes)
            if loader.code == 0:
                if not until_idle or not (loader.result["swept"] or loader.result["loads"]):
                    return count
                continue
            if loader.error_class not in ("transient", "busy"):
                odd[f"{loader.error_class}: {loader.message or 'killed by a stranger?'}"] += 1
                if odd.total() >= 5:
                    break
            time.sleep(0.05)
        for text in odd or [f"not done after {TRIES} runs: {loader.error_class} {loader.message}"]:
            verdict.note(f"the loader does not get on: {text}")
        return count

    def log_ends(self) -> dict[int, int]:
        """Partition -> end of the log, asked from the broker."""
        return self._offsets(OffsetSpec.latest())

    def log_starts(self) -> dict[int, int]:
        return self._offsets(OffsetSpec.earliest())

    def _offsets(self, spec: OffsetSpec, isolation: IsolationLevel = IsolationLevel.READ_UNCOMMITTED) -> dict[int, int]:
        found: dict[int, int] = {}

        def ask() -> bool:
            admin = self.stage.kafka.admin()
            partitions = admin.list_topics(self.topic, timeout=15).topics[self.topic].partitions
            futures = admin.list_offsets(
                {TopicPartition(self.topic, partition): spec for partition in partitions},
                isolation_level=isolation,
                request_timeout=15,
            )
            # A partition that was just made, or a broker that just came back, has no leader for a moment.
            with suppress(KafkaException):
                found.update({place.partition: future.result().offset for place, future in futures.items()})
            return len(found) == len(partitions)

        wait_until(ask, f"the offsets of {self.topic}", every_s=0.05)
        return found

    def read_log(self) -> dict[int, set[int]]:
        """The offsets the broker delivers now, per partition, read to the end."""
        consumer = Consumer(
            {
                "bootstrap.servers": self.stage.kafka.bootstrap,
                "group.id": "prove",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "isolation.level": "read_committed",
            }
        )
        found: dict[int, set[int]] = {partition: set() for partition in self.log_ends()}
        consumer.assign([TopicPartition(self.topic, partition, 0) for partition in found])
        ended: set[int] = set()
        while len(ended) < len(found):
            for message in consumer.consume(1000, 0.2):
                if message.error() is None:
                    found[message.partition() or 0].add(message.offset() or 0)
                elif message.error().code() == KafkaError._PARTITION_EOF:
                    ended.add(message.partition() or 0)
        consumer.close()
        return found

    def compare(self, *, committed_only: bool = True, leftovers: bool = True) -> Verdict:
        """The whole of the site."""
        comparison = Comparison(self.query, committed_only=committed_only)
        return comparison.verdict(self.tallies, [*self.ends, self.log_ends()], leftovers=leftovers)

    def compare_new(self) -> Verdict:
        """What was committed since it was last asked; of the rest that it is still complete."""
        return self._comparison.verdict(self.tallies, [*self.ends, self.log_ends()])


class Stage:
    """The servers of all scenarios. `seed` decides everything random that is ours to decide."""

    def __init__(self, folder: Path, seed: int, kafka: ApacheKafka, postgres: EmbeddedPostgres) -> None:
        self.folder = folder
        self.seed = seed
        self.kafka = kafka
        self.postgres = postgres
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.prove.preload"])
        self._started = 0

    def start(self, orders: Orders) -> Loader:
        self._started += 1
        result = self.folder / f"result-{self._started}.json"
        process = self._context.Process(target=run, args=(orders, result, self.folder / "loaders.log"), daemon=True)
        process.start()
        return Loader(process, result)

    def postgres_stop_immediately(self) -> None:
        """As a power cut would: no checkpoint, every session dead, recovery from the log at the next start."""
        os.kill(self.postgres.pid, signal.SIGQUIT)
        wait_until(lambda: not self.postgres.is_alive, "Postgres to stop")

    @contextmanager
    def site(self, name: str, *, records_per_load: int = 100) -> Iterator[Site]:
        """A fresh database, topic and home; all gone afterwards."""
        topic = f"{name}_{uuid.uuid4().hex[:6]}"
        server = Database(self.postgres.dsn)
        server.query(f"create database {topic}")
        self.kafka.create_topic(topic, PARTITIONS, {"retention.ms": "-1"})
        database = Database(f"{self.postgres.dsn.rpartition('/')[0]}/{topic}")
        site = Site(self, name, database, topic, records_per_load)
        try:
            yield site
        finally:
            for loader in site.loaders:
                loader.process.kill()
            database.close()
            with suppress(psycopg2.Error):
                server.query(f"drop database {topic} with (force)")
            server.close()
            with suppress(Exception):
                self.kafka.delete_topic(topic)


def _kafka_config(folder: Path) -> dict[str, str]:
    """Two disks, one of which can be lost while the broker runs, and servants that do not sleep for minutes."""
    return {
        "log.dirs": f"{folder / 'data'},{folder / 'disk'}",
        "log.retention.check.interval.ms": "500",
        "log.cleaner.backoff.ms": "500",
        "replica.high.watermark.checkpoint.interval.ms": "500",
    }


@contextmanager
def opened(seed: int) -> Iterator[Stage]:
    """The servers up, and gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="warehouse-prove-") as name:
        folder = Path(name)
        # Postgres run as root drops to an unprivileged user, who has to pass.
        folder.chmod(0o755)
        home = folder / "postgres-home"
        paths = Paths(home)
        paths.make()
        postgres = EmbeddedPostgres(paths)
        kafka = ApacheKafka(folder / "kafka", config=_kafka_config(folder / "kafka"))
        try:
            postgres.start()
            # Processes die here, machines do not: what the kernel was given is not lost, and a restart costs no sync.
            server = Database(postgres.dsn)
            server.query("alter system set fsync = off")
            server.query("select pg_reload_conf()")
            server.close()
            kafka.start()
            yield Stage(folder, seed, kafka, postgres)
        finally:
            kafka.close()
            postgres.stop()
            account = system_account() if os.geteuid() == 0 else None
            shutil.rmtree(choose_place(home, account).base, ignore_errors=True)

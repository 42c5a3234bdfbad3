"""Where scenarios play: one Apache Kafka, one Postgres, one fork server of loaders; a site of its own per scenario.

A site is a fresh database, a fresh topic with a tallying producer, and the loader's local disk. Everything on
127.0.0.1, everything ended and removed at the end; only processes started here are ever signalled.
"""

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
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
from ingestion.settings import Settings, load_settings
from orchestration.services.postgres import EmbeddedPostgres
from orchestration.services.postgres_place import choose_place, system_account
from orchestration.services.state import Paths
from tests.harness.apache_kafka import ApacheKafka
from tests.prove.loader import PROJECT, feed_from
from tests.prove.tally import Tally, TallyingProducer
from tests.prove.verify import Verdict, compare

PAYMENTS = "raw_payments.transaction_created"
PARTITIONS = 6
FOREIGN = ("WAREHOUSE_", "KAFKA_", "FX_API_", "PROVE_", "PG")
# No scenario waits longer for one thing; a wait that ends here is a finding, not a hang.
PATIENCE_S = 90.0


class StuckError(RuntimeError):
    """Something that must happen did not happen in time."""


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S, every_s: float = 0.002) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise StuckError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(every_s)


class Loaders:
    """Client of the fork server (`tests.prove.loader --serve`)."""

    def __init__(self, folder: Path) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        env |= {"DLT_DATA_DIR": str(folder / "dlt"), "WAREHOUSE_PROJECT_DIR": str(PROJECT)}
        self.folder = folder
        self._log = (folder / "loaders.log").open("ab")
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.prove.loader", "--serve"],
            cwd=PROJECT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._started: queue.Queue[int] = queue.Queue()
        self._ended: dict[int, int] = {}
        self._count = 0
        threading.Thread(target=self._listen, daemon=True).start()
        if self._started.get(timeout=60) != self._server.pid:
            raise StuckError("the fork server did not start")

    def _listen(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            said = json.loads(line)
            if "ended" in said:
                self._ended[said["ended"]] = said["code"]
            else:
                self._started.put(said.get("started") or said["ready"])

    def _tell(self, order: dict[str, Any]) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()

    def start(self, env: dict[str, str]) -> "Loader":
        self._count += 1
        result = self.folder / f"result-{self._count}.json"
        log = self.folder / "loaders.log"
        self._tell({"env": {**env, "PROVE_RESULT": str(result), "PROVE_LOG": str(log)}})
        pid = self._started.get(timeout=30)
        self._ended.pop(pid, None)
        return Loader(self, pid, result)

    def signal(self, pid: int, number: int) -> None:
        self._tell({"signal": number, "pid": pid})

    def code(self, pid: int) -> int | None:
        return self._ended.get(pid)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._server.wait(10)
        if self._server.poll() is None:
            self._server.kill()
            self._server.wait(10)
        self._log.close()


@dataclass
class Loader:
    """One run of the loader."""

    loaders: Loaders
    pid: int
    result_path: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def code(self) -> int | None:
        return self.loaders.code(self.pid)

    @property
    def is_alive(self) -> bool:
        return self.code is None

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """The exit code."""
        wait_until(lambda: not self.is_alive, f"loader {self.pid} to end", timeout_s)
        assert self.code is not None
        return self.code

    def kill(self) -> bool:
        """kill -9; whether it was still running."""
        self.loaders.signal(self.pid, signal.SIGKILL)
        return self.wait() < 0

    def freeze(self) -> None:
        self.loaders.signal(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        self.loaders.signal(self.pid, signal.SIGCONT)

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
    """One scenario's database, topic, tally and loaders. Counts what happened for the report."""

    def __init__(self, stage: "Stage", name: str, database: Database, topic: str, records_per_load: int) -> None:
        self.stage = stage
        self.name = name
        self.database = database
        self.topic = topic
        self.records_per_load = records_per_load
        self.home = stage.folder / "homes" / topic
        self.tallies = [Tally()]
        self.ends: list[dict[int, int]] = []
        self._producer: TallyingProducer | None = None

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
        self.producer.send(records)

    def recreate_topic(self) -> None:
        """The topic anew under its old name; a tally anew for it."""
        self.ends.append(self.log_ends())
        self.stage.kafka.delete_topic(self.topic)
        self.stage.kafka.create_topic(self.topic, PARTITIONS, {"retention.ms": "-1"})
        self.tallies.append(Tally())
        self._producer = None

    def env(self, **changes: str) -> dict[str, str]:
        return {
            "WAREHOUSE_DSN": self.database.dsn,
            "KAFKA_BOOTSTRAP_SERVERS": self.stage.kafka.bootstrap,
            "FX_API_BASE": "http://127.0.0.1:9",
            "WAREHOUSE_HOME": str(self.home),
            "WAREHOUSE_RETRY_SECONDS": "0",
            "WAREHOUSE_EMBEDDED": "",
            "KAFKA_CLUSTER_INCARNATION": "",
            "PROVE_FEED": PAYMENTS,
            "PROVE_TOPIC": self.topic,
            "PROVE_RECORDS_PER_LOAD": str(self.records_per_load),
            **changes,
        }

    def settings(self) -> Settings:
        settings = load_settings(PROJECT)
        return replace(settings, home=self.home, env={**self.env()})

    def start(self, **changes: str) -> Loader:
        return self.stage.loaders.start(self.env(**changes))

    def run(self, **changes: str) -> Loader:
        """A run to its end."""
        loader = self.start(**changes)
        loader.wait()
        return loader

    def prepare(self) -> None:
        """Every table in place, so that triggers can be put on them."""
        connection = connect(self.settings())
        ensure_schema(connection, [feed_from(self.env())])
        connection.close()

    def accept_losses(self, reason: str) -> list[str]:
        connection = connect(self.settings())
        try:
            return ledger.accept_losses(connection, feed_from(self.env()), reason)
        finally:
            connection.close()

    def wipe(self) -> None:
        """The loader's machine burnt down: its local disk is empty."""
        shutil.rmtree(self.home, ignore_errors=True)

    def settle(self, verdict: Verdict, tries: int = 40, **changes: str) -> int:
        """Run until there is nothing more to land or to sweep; the number of runs. Failures become problems."""
        odd: Counter[str] = Counter()
        for run in range(1, tries + 1):
            loader = self.run(**changes)
            result = loader.result
            if loader.code == 0 and not result["swept"] and not result["loads"]:
                return run
            if loader.code == 0:
                continue
            if loader.error_class not in ("transient", "busy"):
                odd[f"{loader.error_class}: {result.get('message', 'killed by a stranger?')}"] += 1
                if odd.total() >= 5:
                    break
            time.sleep(0.05)
        for text in odd or [f"not done after {tries} runs: {result.get('error_class')} {result.get('message')}"]:
            verdict.note(f"the loader does not get on: {text}")
        return run

    def log_ends(self) -> dict[int, int]:
        """Partition -> end of the log, asked from the broker."""
        return self._offsets(OffsetSpec.latest())

    def log_starts(self) -> dict[int, int]:
        return self._offsets(OffsetSpec.earliest())

    def _offsets(self, spec: OffsetSpec) -> dict[int, int]:
        found: dict[int, int] = {}

        def ask() -> bool:
            admin = self.stage.kafka.admin()
            partitions = admin.list_topics(self.topic, timeout=15).topics[self.topic].partitions
            futures = admin.list_offsets(
                {TopicPartition(self.topic, partition): spec for partition in partitions},
                isolation_level=IsolationLevel.READ_UNCOMMITTED,
                request_timeout=15,
            )
            # A partition that was just made, or a broker that just came back, has no leader for a moment.
            with suppress(KafkaException):
                found.update({place.partition: future.result().offset for place, future in futures.items()})
            return len(found) == len(partitions)

        wait_until(ask, f"the offsets of {self.topic}", every_s=0.1)
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

    def compare(self, **options: bool) -> Verdict:
        return compare(self.query, self.tallies, [*self.ends, self.log_ends()], **options)


class Stage:
    """The servers of all scenarios. `seed` decides everything random that is ours to decide."""

    def __init__(self, folder: Path, seed: int, kafka: ApacheKafka, postgres: EmbeddedPostgres) -> None:
        self.folder = folder
        self.seed = seed
        self.kafka = kafka
        self.postgres = postgres
        self.loaders = Loaders(folder)

    def postgres_stop_immediately(self) -> None:
        """As a power cut would: no checkpoint, every session dead, recovery from the log at the next start."""
        os.kill(self.postgres.pid, signal.SIGQUIT)
        wait_until(lambda: not self.postgres.is_alive, "Postgres to stop")

    @contextmanager
    def site(self, name: str, *, records_per_load: int = 100, partitions: int = PARTITIONS) -> Iterator[Site]:
        """A fresh database, topic and home; all gone afterwards."""
        topic = f"{name}_{uuid.uuid4().hex[:6]}"
        admin = psycopg2.connect(self.postgres.dsn)
        admin.autocommit = True
        with admin.cursor() as cursor:
            cursor.execute(f'create database "{topic}"')
        admin.close()
        self.kafka.create_topic(topic, partitions, {"retention.ms": "-1"})
        database = Database(f"{self.postgres.dsn.rpartition('/')[0]}/{topic}")
        site = Site(self, name, database, topic, records_per_load)
        try:
            yield site
        finally:
            database.close()
            site.wipe()
            with suppress(psycopg2.Error):
                admin = psycopg2.connect(self.postgres.dsn)
                admin.autocommit = True
                with admin.cursor() as cursor:
                    cursor.execute(f'drop database "{topic}" with (force)')
                admin.close()
            with suppress(Exception):
                self.kafka.delete_topic(topic)


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
        kafka = ApacheKafka(config={"log.retention.check.interval.ms": "500", "log.cleaner.backoff.ms": "500"})
        stage = None
        try:
            postgres.start()
            kafka.start()
            stage = Stage(folder, seed, kafka, postgres)
            yield stage
        finally:
            if stage is not None:
                stage.loaders.close()
            kafka.close()
            postgres.stop()
            account = system_account() if os.geteuid() == 0 else None
            shutil.rmtree(choose_place(home, account).base, ignore_errors=True)

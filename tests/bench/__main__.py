"""`make bench`: what landing, building and starting cost, as ratios to a limit measured in the same run.

    python -m tests.bench [--parts landing growth models fixed dagster] [--rounds 3]
                          [--sizes 200000 1000000] [--contestants limit dlt warehouse] [--pasts 0 1000000 20000000]

    landing   generated transactions from Apache Kafka by every contestant, interleaved, one at a time in a process of
              its own (its start-up counts) into a database of its own; others from PyPI by name: tests/bench/peers
    growth    the same by ours, into tables that hold so many rows already
    models    a build after a day's new rows, with so many there already
    fixed     what a command costs before it does any work
    dagster   what the same run costs more through Dagster

Everything on this machine: Apache Kafka from Maven, the embedded Postgres. Writes `.warehouse/bench/<time>.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2
import psycopg2.extensions

from ingestion.settings import Settings, load_settings
from orchestration.sample import TRANSACTIONS, SampleSpec, generate, to_kafka
from orchestration.services import erase, running
from tests.bench import fixed as fixed_costs
from tests.bench import models as builds
from tests.bench import overhead, peers
from tests.bench.contestants import CONTESTANTS, PROJECT, TABLES, Task
from tests.bench.history import fill as fill_past
from tests.bench.report import FOLDER, Runs, describe_machine, render_growth, render_landing, summarise
from tests.harness import apache_kafka

PARTITIONS = 8


@contextmanager
def database(server_dsn: str, name: str) -> Iterator[str]:
    """A fresh database, gone afterwards."""
    connection = psycopg2.connect(server_dsn)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f"drop database if exists {name} with (force)")
        cursor.execute(f"create database {name}")
        cursor.execute("checkpoint")
    try:
        # A URL: plain dlt takes no other form.
        parts = {key: quote(value, safe="") for key, value in psycopg2.extensions.parse_dsn(server_dsn).items()}
        yield "postgresql://{user}:{password}@{host}:{port}/{name}".format(**parts, name=name)
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"drop database if exists {name} with (force)")
        connection.close()


def measure(name: str, task: Task) -> dict[str, Any]:
    """Run one contestant in a process of its own."""
    command: list[Any] = [sys.executable, "-m", "tests.bench.contestants", name]
    if name in peers.NAMES:
        command = [peers.ensure_python(name, FOLDER / "peers"), peers.HOME / name / "land.py"]
    command += [str(time.time()), json.dumps(asdict(task))]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    rows = count_rows(task.dsn, TABLES.get(name, peers.TABLE))
    if rows != task.already + task.records:
        raise SystemExit(f"{name} brought {rows - task.already:,} of {task.records:,} rows")
    return result


def count_rows(dsn: str, table: str) -> int:
    connection = psycopg2.connect(dsn)
    with connection.cursor() as cursor:
        cursor.execute(f"select count(*) from {table}")
        (rows,) = cursor.fetchone() or (0,)
    connection.close()
    return int(rows)


@dataclass
class Servers:
    """What all parts share: the brokers, the Postgres, and topics filled once."""

    kafka: apache_kafka.ApacheKafka
    settings: Settings
    folder: Path
    _filled: set[str] = field(default_factory=set)

    @property
    def dsn(self) -> str:
        return self.settings.require("WAREHOUSE_DSN", "the embedded Postgres has one")

    def topic(self, records: int) -> str:
        """A topic with so many messages."""
        name = f"bench_{records}"
        if name not in self._filled:
            print(f"filling a topic with {records:,} messages in {PARTITIONS} partitions", file=sys.stderr)
            fill(self.kafka, name, records)
            self._filled.add(name)
        return name


def fill(kafka: apache_kafka.ApacheKafka, topic: str, records: int) -> None:
    # The messages' own time is long past: the broker's retention would remove them within a minute.
    kafka.create_topic(topic, PARTITIONS, {"retention.ms": "-1"})
    spec = SampleSpec(records=records, seed=1, start=datetime(2026, 1, 5, tzinfo=UTC), bad_share=0.0)
    sent = to_kafka(generate(spec, TRANSACTIONS), kafka.bootstrap, lambda _: topic)
    assert sum(sent.values()) == records, "the broker has every message"


def landing(options: argparse.Namespace, servers: Servers) -> dict[str, Any]:
    """Rows a second by every contestant, interleaved."""
    results: Runs = {name: {} for name in options.contestants}
    for size in options.sizes:
        topic = servers.topic(size)
        for round_ in range(options.rounds):
            for name in options.contestants:
                print(f"{name}: {size:,} records, round {round_ + 1}", file=sys.stderr)
                with database(servers.dsn, "bench") as dsn, tempfile.TemporaryDirectory(dir=servers.folder) as work:
                    task = Task(servers.kafka.bootstrap, topic, size, dsn, work)
                    results[name].setdefault(size, []).append(measure(name, task))
    return summarise(results, options.sizes)


def growth(options: argparse.Namespace, servers: Servers) -> dict[str, Any]:
    """Seconds to land the smallest and the largest size into tables with the fewest and the most rows, interleaved."""
    seconds: dict[int, dict[int, list[float]]] = {}
    with ExitStack() as stack:
        tables = {}
        for past in (min(options.pasts), max(options.pasts)):
            dsn = stack.enter_context(database(servers.dsn, f"bench_{past}"))
            connection = psycopg2.connect(dsn, options="-c timezone=UTC")
            stack.callback(connection.close)
            fill_past(servers.settings, connection, past)
            connection.autocommit = True
            tables[past] = (dsn, connection)
        already = dict.fromkeys(tables, 0)
        for _ in range(options.rounds):
            for size in (min(options.sizes), max(options.sizes)):
                topic = servers.topic(size)
                for past, (dsn, connection) in tables.items():
                    held = past + already[past]
                    print(f"{size:,} records into {held:,}", file=sys.stderr)
                    with tempfile.TemporaryDirectory(dir=servers.folder) as work:
                        task = Task(servers.kafka.bootstrap, topic, size, dsn, work, held)
                        seconds.setdefault(past, {}).setdefault(size, []).append(measure("warehouse", task)["seconds"])
                    already[past] += size
                    with connection.cursor() as cursor:
                        # The same messages are new ones once more.
                        cursor.execute("update raw_payments._streams set origin = 'embedded-' || stream_id")
                        cursor.execute("checkpoint")
    return {
        str(past): {str(size): statistics.median(runs) for size, runs in by_size.items()}
        for past, by_size in seconds.items()
    }


def models(options: argparse.Namespace, servers: Servers) -> dict[str, Any]:
    """Seconds of a build after a day's new rows, by how many are there."""
    with ExitStack() as stack:
        dsns = {
            past: stack.enter_context(database(servers.dsn, f"bench_{past}")) for past in filter(None, options.pasts)
        }
        return builds.measure(servers.settings, dsns, options.rounds)


def fixed(options: argparse.Namespace, servers: Servers) -> dict[str, Any]:
    """Seconds before any work."""
    with database(servers.dsn, "bench") as dsn:
        return fixed_costs.measure(
            servers.settings.with_env(WAREHOUSE_DSN=dsn),
            servers.kafka.bootstrap,
            lambda topic: servers.kafka.create_topic(topic, PARTITIONS, {"retention.ms": "-1"}),
            options.rounds,
        )


def dagster(options: argparse.Namespace, servers: Servers) -> dict[str, Any]:
    """Seconds of a run with nothing new, by the command and through Dagster."""
    with database(servers.dsn, "bench") as dsn:
        settings = servers.settings.with_env(WAREHOUSE_DSN=dsn)
        return overhead.measure(settings, servers.folder / "overhead", options.rounds)


# Name -> what measures it, and what prints it.
PARTS: dict[str, tuple[Callable[[argparse.Namespace, Servers], dict[str, Any]], Callable[[Any], str]]] = {
    "landing": (landing, render_landing),
    "growth": (growth, render_growth),
    "models": (models, builds.render),
    "fixed": (fixed, fixed_costs.render),
    "dagster": (dagster, overhead.render),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[200_000, 1_000_000], help="records to land")
    parser.add_argument("--pasts", type=int, nargs="+", default=[0, 1_000_000, 5_000_000, 20_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    names = [*CONTESTANTS, *peers.NAMES]
    parser.add_argument("--contestants", nargs="+", choices=names, default=list(CONTESTANTS))
    options = parser.parse_args()
    reason = apache_kafka.available()
    if reason is not None:
        raise SystemExit(f"The bench needs Apache Kafka: {reason}")

    report: dict[str, Any] = {"machine": describe_machine()}
    with tempfile.TemporaryDirectory(prefix="warehouse-bench-") as folder, apache_kafka.ApacheKafka() as kafka:
        home = replace(load_settings(PROJECT), home=Path(folder) / "home", env={"PATH": os.environ["PATH"]})
        with running(home) as settings:
            servers = Servers(kafka, settings, Path(folder))
            for part in options.parts:
                run, render = PARTS[part]
                report[part] = run(options, servers)
                print(render(report[part]) + "\n", flush=True)
        erase(home, force=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    target = FOLDER / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    target.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {target.relative_to(PROJECT)}")


if __name__ == "__main__":
    main()

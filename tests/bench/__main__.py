"""`make bench`: lands generated transactions from Apache Kafka by every contestant, interleaved, and prints ratios.

    python -m tests.bench [--sizes 200000 1000000] [--rounds 1] [--contestants limit dlt warehouse]

Everything on this machine: Apache Kafka from Maven, the embedded Postgres, one contestant at a time in a process of
its own (its start-up counts) into a database of its own. Writes `.warehouse/bench/<time>.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2
import psycopg2.extensions

from ingestion.settings import load_settings
from orchestration.sample import TRANSACTIONS, SampleSpec, generate, to_kafka
from orchestration.services import erase, running
from tests.bench.contestants import CONTESTANTS, PROJECT, Task
from tests.bench.report import FOLDER, Runs, describe_machine, render_landing, summarise
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
    command = [sys.executable, "-m", "tests.bench.contestants", name, str(time.time()), json.dumps(asdict(task))]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def fill(kafka: apache_kafka.ApacheKafka, topic: str, records: int) -> None:
    # The messages' own time is long past: the broker's retention would remove them within a minute.
    kafka.create_topic(topic, PARTITIONS, {"retention.ms": "-1"})
    spec = SampleSpec(records=records, seed=1, start=datetime(2026, 1, 5, tzinfo=UTC), bad_share=0.0)
    sent = to_kafka(generate(spec, TRANSACTIONS), kafka.bootstrap, lambda _: topic)
    assert sum(sent.values()) == records, "the broker has every message"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--sizes", type=int, nargs="+", default=[200_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    options = parser.parse_args()
    reason = apache_kafka.available()
    if reason is not None:
        raise SystemExit(f"The bench needs Apache Kafka: {reason}")

    results: Runs = {name: {} for name in options.contestants}
    with tempfile.TemporaryDirectory(prefix="warehouse-bench-") as folder, apache_kafka.ApacheKafka() as kafka:
        home = replace(load_settings(PROJECT), home=Path(folder) / "home", env={"PATH": os.environ["PATH"]})
        with running(home) as settings:
            server = settings.require("WAREHOUSE_DSN", "the embedded Postgres has one")
            for size in options.sizes:
                topic = f"bench_{size}"
                print(f"filling a topic with {size:,} messages in {PARTITIONS} partitions", file=sys.stderr)
                fill(kafka, topic, size)
                for round_ in range(options.rounds):
                    for name in options.contestants:
                        print(f"{name}: {size:,} records, round {round_ + 1}", file=sys.stderr)
                        with (
                            database(server, "bench") as dsn,
                            tempfile.TemporaryDirectory(dir=folder) as work,
                        ):
                            task = Task(kafka.bootstrap, topic, size, dsn, work)
                            results[name].setdefault(size, []).append(measure(name, task))
        erase(home, force=True)
    report = {"machine": describe_machine(), "landing": summarise(results, options.sizes)}
    print(render_landing(report["landing"]))
    FOLDER.mkdir(parents=True, exist_ok=True)
    target = FOLDER / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    target.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {target.relative_to(PROJECT)}")


if __name__ == "__main__":
    main()

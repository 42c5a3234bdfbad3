"""What a command costs before it does any work: start-up, a look at the state, a run with nothing new."""

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from statistics import median

from ingestion.feeds import KafkaOrigin, load_feeds, select_feeds
from ingestion.landing import land_feed
from ingestion.settings import Settings
from orchestration.console import render_table
from orchestration.sample import TRANSACTIONS, SampleSpec, generate, to_kafka
from tests.harness.project_copy import COMMAND, PROJECT

LIMITS = {
    "warehouse --help": 0.4,
    "warehouse status": 1.0,
    "warehouse run, nothing new": 8.0,
    "warm, nothing new": 0.15,
    "warm, 1,000 messages": 0.3,
}


def measure(settings: Settings, bootstrap: str, make_topic: Callable[[str], None], rounds: int) -> dict[str, float]:
    """Medians in seconds. `warm` is a feed landed in this process, imports done.

    Args:
        settings: of a warehouse with all services, in a database of its own.
        bootstrap: an Apache Kafka, for the warm runs; `make_topic` makes a topic on it.
    """
    feeds = load_feeds(settings)
    start = datetime(2026, 1, 5, tzinfo=UTC)
    broker = str(settings.kafka_bootstrap)
    for feed in feeds:
        if isinstance(feed.origin, KafkaOrigin):
            spec = SampleSpec(records=2_000, seed=1, start=start, bad_share=0.0)
            to_kafka(generate(spec, feed.name), broker, {feed.name: feed.origin.topic}.__getitem__)
    _command(settings, "run")
    figures = {
        "warehouse --help": median(_command(settings, "--help") for _ in range(rounds)),
        "warehouse status": median(_command(settings, "status") for _ in range(rounds)),
        "warehouse run, nothing new": median(_command(settings, "run") for _ in range(rounds)),
    }
    (declared,) = select_feeds(feeds, ["raw_payments.transaction_created"])
    assert isinstance(declared.origin, KafkaOrigin)
    warm = replace(declared, origin=replace(declared.origin, topic="bench_warm"))
    make_topic("bench_warm")
    own = settings.with_env(KAFKA_BOOTSTRAP_SERVERS=bootstrap, KAFKA_CLUSTER_INCARNATION="", WAREHOUSE_EMBEDDED="")

    def land(records: int, seed: int) -> float:
        spec = SampleSpec(records=records, seed=seed, start=start, bad_share=0.0)
        if records:
            to_kafka(generate(spec, TRANSACTIONS), bootstrap, lambda _: "bench_warm")
        started = time.monotonic()
        landed = land_feed(own, warm).landed
        assert landed == records
        return time.monotonic() - started

    land(1_000, 1)
    figures["warm, nothing new"] = median(land(0, 0) for _ in range(rounds))
    figures["warm, 1,000 messages"] = median(land(1_000, 2 + number) for number in range(rounds))
    return figures


def _command(settings: Settings, *arguments: str) -> float:
    started = time.monotonic()
    done = subprocess.run(
        [COMMAND, *arguments],
        cwd=PROJECT,
        env={**os.environ, **settings.env, "WAREHOUSE_HOME": str(settings.home)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"warehouse {' '.join(arguments)} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return time.monotonic() - started


def render(figures: dict[str, float]) -> str:
    """The table: seconds, and what they should stay under."""
    rows = [(name, f"{seconds:.2f} s", f"{LIMITS[name]:.2f} s") for name, seconds in figures.items()]
    return render_table(("fixed cost", "median", "limit"), rows, indent="")

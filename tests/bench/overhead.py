"""What Dagster costs: the same run, with nothing new, by `warehouse run` and through a daemon and a warm code server.

Measured from asking until the run has ended: the queue, the start of the run's process, its imports, its books. Both
write the lineage page in the first round and leave it alone afterwards.
"""

import os
import subprocess
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from ingestion.feeds import KafkaOrigin, load_feeds
from ingestion.settings import Settings
from orchestration.console import render_table
from orchestration.sample import SampleSpec, generate, to_kafka
from orchestration.ui import Servers, dagster_servers, free_port
from tests.harness.project_copy import COMMAND, PROJECT

LIMIT_S = 5.0


def measure(settings: Settings, home: Path, rounds: int) -> dict[str, float]:
    """Medians in seconds, interleaved.

    Args:
        settings: of a warehouse with all services, in a database of its own.
        home: a folder for Dagster's history.
    """
    import dagster as dg

    own = replace(settings, home=home)
    start = datetime(2026, 1, 5, tzinfo=UTC)
    for feed in load_feeds(own):
        if isinstance(feed.origin, KafkaOrigin):
            spec = SampleSpec(records=2_000, seed=1, start=start, bad_share=0.0)
            to_kafka(generate(spec, feed.name), str(own.kafka_bootstrap), {feed.name: feed.origin.topic}.__getitem__)
    seconds: dict[str, list[float]] = {"warehouse run": [], "through Dagster": [], "of it in the run": []}
    with dagster_servers(own) as servers:
        servers.start_code_server()
        servers.start_daemon()
        port = free_port()
        servers.start_webserver(port)
        _command(own)
        with dg.DagsterInstance.from_config(str(servers.home)) as instance:
            _through_dagster(servers, instance, port)
            for _ in range(rounds):
                seconds["warehouse run"].append(_command(own))
                whole, inside = _through_dagster(servers, instance, port)
                seconds["through Dagster"].append(whole)
                seconds["of it in the run"].append(inside)
    figures = {name: median(several) for name, several in seconds.items()}
    return {**figures, "more": figures["through Dagster"] - figures["warehouse run"]}


def _command(settings: Settings) -> float:
    started = time.monotonic()
    environment = {**os.environ, **settings.env, "WAREHOUSE_HOME": str(settings.home)}
    done = subprocess.run([COMMAND, "run"], cwd=PROJECT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"warehouse run failed:\n{done.stderr[-2000:]}")
    return time.monotonic() - started


def _through_dagster(servers: Servers, instance: object, port: int) -> tuple[float, float]:
    """Seconds from the click to the end of the run, and of those the run's own."""
    from dagster import DagsterInstance
    from dagster_graphql import DagsterGraphQLClient

    assert isinstance(instance, DagsterInstance)
    client = DagsterGraphQLClient("127.0.0.1", port_number=port)
    started = time.monotonic()
    run_id = client.submit_job_execution("warehouse")
    while True:
        record = instance.get_run_record_by_id(run_id)
        if record is not None and record.dagster_run.is_finished:
            break
        for server in servers.running:
            server.require_alive()
        time.sleep(0.05)
    whole = time.monotonic() - started
    if not record.dagster_run.is_success:
        raise SystemExit(f"run {run_id} ended as {record.dagster_run.status.value}")
    return whole, (record.end_time or 0.0) - (record.start_time or 0.0)


def render(figures: dict[str, float]) -> str:
    """The table: seconds, and how much more Dagster may cost."""
    rows = [
        (name, f"{seconds:.2f} s", f"{LIMIT_S:.2f} s" if name == "more" else "") for name, seconds in figures.items()
    ]
    return render_table(("nothing new", "median", "limit"), rows, indent="")

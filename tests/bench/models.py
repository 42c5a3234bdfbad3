"""What a build costs after a day's new rows, by how many are there already."""

import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psycopg2
import pytest

from ingestion.settings import Settings
from orchestration.console import render_table
from tests.bench.history import PER_DAY, fill, new_day
from tests.harness.models import TRANSACTIONS, Dbt, RawLog, failures

DATA_ONLY = ("--exclude-resource-type", "unit_test")


def measure(settings: Settings, dsn: str, transactions: int, days: int) -> dict[str, Any]:
    """Build a past of so many transactions, then day after day; medians of the days, in seconds.

    At the end all data tests look at everything: that nothing is lost or doubled.
    """
    connection = psycopg2.connect(dsn, options="-c timezone=UTC")
    scratch = Path(tempfile.mkdtemp(prefix="warehouse-bench-dbt-"))
    patch = pytest.MonkeyPatch()
    parsed = scratch / "parsed"
    parsed.mkdir()
    dbt = Dbt(dsn, scratch, parsed, patch)
    figures: dict[str, Any] = {}
    try:
        started = time.monotonic()
        fill(settings, connection, transactions)
        print(f"{transactions:,} landed in {time.monotonic() - started:.0f} s", file=sys.stderr)
        started = time.monotonic()
        _build(dbt)
        figures["first"] = time.monotonic() - started
        print(f"{transactions:,} built in {figures['first']:.0f} s", file=sys.stderr)
        log = RawLog(connection)
        log.loads, log.offset = 10, transactions + 1_000_000_000
        runs = []
        for number in range(1, days + 1):
            log.land(TRANSACTIONS, new_day(connection, number))
            started = time.monotonic()
            nodes = _build(dbt)
            wall = time.monotonic() - started
            kinds = {"models": ("model", "seed"), "tests": ("test",)}
            run = {
                kind: sum(seconds for resource, _, seconds in nodes if resource in types)
                for kind, types in kinds.items()
            }
            runs.append({**run, "nodes": run["models"] + run["tests"], "wall": wall})
            print(f"{transactions:,}, day {number}: {runs[-1]}", file=sys.stderr)
            for resource, name, seconds in sorted(nodes, key=lambda node: -node[2])[:8]:
                print(f"    {seconds:6.2f} {resource} {name}", file=sys.stderr)
        figures |= {name: median(run[name] for run in runs) for name in runs[0]}
        figures["runs"] = runs
        succeeded, results = dbt("test", "--select", "test_type:data", "--vars", "full_tests: true")
        if not succeeded:
            raise SystemExit(f"{transactions:,}: " + "; ".join(failures(results)))
    finally:
        patch.undo()
        connection.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return figures


def _build(dbt: Dbt) -> list[tuple[str, str, float]]:
    """(resource type, name, seconds) of each node."""
    succeeded, results = dbt("build", *DATA_ONLY)
    if not succeeded:
        raise SystemExit("; ".join(failures(results)))
    return [(str(r.node.resource_type), r.node.name, r.execution_time) for r in results if hasattr(r.node, "name")]


def render(figures: dict[int, dict[str, Any]]) -> str:
    """The table: seconds of a build after PER_DAY new rows, and their ratio to the smallest past."""
    least = figures[min(figures)]
    rows = [
        (
            f"{size:,} rows",
            *(f"{of_size[kind]:.1f} s" for kind in ("models", "tests", "nodes", "wall")),
            f"{of_size['nodes'] / least['nodes']:.2f}",
        )
        for size, of_size in figures.items()
    ]
    head = (f"build after {PER_DAY:,} new", "models", "tests", "both", "whole command", "to the smallest")
    return render_table(head, rows, indent="")

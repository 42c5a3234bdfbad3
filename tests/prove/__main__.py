"""`make prove`: runs the scenarios and the twins, prints the tables, writes `.warehouse/prove/<time>.json`.

    python -m tests.prove [--minutes 20] [--only NAME ...] [--seed N] [--list]

`--minutes` bounds the whole: every scenario runs at least a little, repeats fill what is left. Exit code 1 when one
record is lost, duplicated or altered, or a twin is not caught.
"""

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestration.console import render_table
from tests.harness import apache_kafka
from tests.prove.catalogue import SCENARIOS, TWINS
from tests.prove.loader import PROJECT
from tests.prove.outcome import Caught, Outcome, Plan
from tests.prove.stage import Stage, StuckError, opened

# However little time is left, each scenario runs so long (on a busy machine the fixed ones take more than their share).
LEAST_S = 10.0


def run_scenario(name: str, stage: Stage, seconds: float) -> Outcome:
    """One scenario within its share of the time."""
    entry = SCENARIOS[name]
    begun = time.monotonic()
    plan = Plan(stage, entry.repeats, entry.records, begun + seconds)
    try:
        outcome = entry.run(plan)
    except Exception as error:
        outcome = Outcome(name)
        outcome.verdict.note(f"the scenario broke: {type(error).__name__}: {error}")
        if not isinstance(error, StuckError):
            import traceback

            traceback.print_exc()
    outcome.seconds = time.monotonic() - begun
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(prog="make prove")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--only", nargs="+", choices=[*SCENARIOS, *TWINS], default=[*SCENARIOS, *TWINS], metavar="NAME")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--list", action="store_true", help="print the names and what they do")
    options = parser.parse_args()
    if options.list:
        for name, entry in {**SCENARIOS, **TWINS}.items():
            print(f"{name:24} {(entry.run.__doc__ or '').splitlines()[0]}")
        return
    reason = apache_kafka.available()
    if reason is not None:
        raise SystemExit(f"make prove needs Apache Kafka: {reason}")

    started = time.monotonic()
    # Twins and start-up take about an eighth.
    budget = options.minutes * 60 * 0.87
    chosen = [name for name in SCENARIOS if name in options.only]
    outcomes: dict[str, Outcome] = {}
    caught: list[Caught] = []
    print(f"seed {options.seed}, at most {options.minutes:g} minutes", flush=True)
    with opened(options.seed) as stage:
        for index, name in enumerate(chosen):
            left = budget - (time.monotonic() - started)
            share = SCENARIOS[name].weight / sum(SCENARIOS[other].weight for other in chosen[index:])
            outcomes[name] = outcome = run_scenario(name, stage, max(left * share, LEAST_S))
            print(f"{'ok  ' if outcome.verdict.is_clean else 'FAIL'} {name} in {outcome.seconds:.0f} s", flush=True)
            for problem in outcome.verdict.problems:
                print(f"     {problem}", flush=True)
        for name in (name for name in TWINS if name in options.only):
            found = TWINS[name].run(stage)
            caught.append(found)
            print(f"{'ok  ' if found.is_caught else 'FAIL'} twin {name}", flush=True)
    minutes = (time.monotonic() - started) / 60
    report = build_report(options.seed, minutes, outcomes, caught)
    path = PROJECT / ".warehouse" / "prove" / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(f"\n{render(outcomes, caught)}\n\n{minutes:.1f} minutes, seed {options.seed}, {_shown(path)}")
    sys.exit(0 if report["is_clean"] else 1)


def build_report(seed: int, minutes: float, outcomes: dict[str, Outcome], caught: list[Caught]) -> dict[str, Any]:
    """The content of the JSON file."""
    return {
        "seed": seed,
        "minutes": round(minutes, 2),
        "cores": os.cpu_count(),
        "apache_kafka": apache_kafka.kafka_version(),
        "is_clean": all(o.verdict.is_clean for o in outcomes.values()) and all(c.is_caught for c in caught),
        "scenarios": {name: outcome.document() for name, outcome in outcomes.items()},
        "twins": [entry.document() for entry in caught],
    }


def render(outcomes: dict[str, Outcome], caught: list[Caught]) -> str:
    """Both tables."""
    rows = [
        (
            outcome.name,
            outcome.runs,
            f"{outcome.repeats}/{outcome.wanted}" if outcome.wanted else "-",
            outcome.verdict.records,
            outcome.kills,
            outcome.verdict.lost,
            outcome.verdict.duplicate,
            outcome.verdict.altered,
            "; ".join(outcome.notes) if outcome.verdict.is_clean else f"FAILED: {outcome.verdict.problems[:1]}",
        )
        for outcome in outcomes.values()
    ]
    header = ("scenario", "runs", "repeats", "records", "kills", "lost", "duplicate", "altered", "")
    text = render_table(header, rows, indent="") if rows else ""
    if caught:
        lines = [(entry.name, "caught" if entry.is_caught else "NOT CAUGHT", entry.seen) for entry in caught]
        text += "\n\n" + render_table(("guarantee taken away", "", "seen"), lines, indent="")
    return text.strip()


def _shown(path: Path) -> str:
    return str(path.relative_to(PROJECT))


if __name__ == "__main__":
    main()

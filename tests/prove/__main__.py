"""`make prove`: runs the scenarios and the twins, prints the tables, writes `.warehouse/prove/<time>.json`.

    python -m tests.prove [--minutes 20] [--only NAME ...] [--seed N] [--list]

`--minutes` bounds the whole. A scenario that did not reach its full count says so. Exit code 1 when a record is lost,
duplicated or altered, a twin is not caught, or a count is not reached.
"""

import argparse
import json
import os
import sys
import time
import traceback
from datetime import UTC, datetime
from typing import Any

from orchestration.console import render_table
from tests.harness import apache_kafka
from tests.prove.catalogue import SCENARIOS, TWIN_SECONDS, TWINS
from tests.prove.loader import PROJECT
from tests.prove.outcome import Caught, Outcome, Plan
from tests.prove.stage import Stage, StuckError, opened

# However little time is left, each scenario runs so long.
LEAST_S = 5.0


def run_scenario(name: str, stage: Stage, seconds: float) -> Outcome:
    """One scenario within its share of the time."""
    entry = SCENARIOS[name]
    begun = time.monotonic()
    outcome = Outcome(entry.repeats)
    try:
        entry.run(Plan(stage, entry.repeats, entry.records, begun + seconds), outcome)
    except Exception as error:
        outcome.verdict.note(f"the scenario broke: {_describe(error)}")
    outcome.seconds = time.monotonic() - begun
    return outcome


def run_twin(name: str, stage: Stage) -> Caught:
    """One twin; one that broke shows nothing."""
    try:
        return TWINS[name](stage)
    except Exception as error:
        return Caught(name, False, f"the twin broke: {_describe(error)}")


def _describe(error: Exception) -> str:
    if not isinstance(error, StuckError):
        traceback.print_exc()
    return f"{type(error).__name__}: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make prove")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--only", nargs="+", choices=[*SCENARIOS, *TWINS], default=[*SCENARIOS, *TWINS], metavar="NAME")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--list", action="store_true", help="print the names and what they do")
    options = parser.parse_args()
    if options.list:
        for name, run in {**{name: entry.run for name, entry in SCENARIOS.items()}, **TWINS}.items():
            print(f"{name:24} {(run.__doc__ or '').splitlines()[0]}")
        return
    reason = apache_kafka.available()
    if reason is not None:
        raise SystemExit(f"make prove needs Apache Kafka: {reason}")

    chosen = [name for name in SCENARIOS if name in options.only]
    twins = [name for name in TWINS if name in options.only]
    started = time.monotonic()
    end = started + options.minutes * 60 - len(twins) * TWIN_SECONDS
    outcomes: dict[str, Outcome] = {}
    caught: dict[str, Caught] = {}
    print(f"seed {options.seed}, at most {options.minutes:g} minutes", flush=True)
    with opened(options.seed) as stage:
        for index, name in enumerate(chosen):
            # Who needs less than the share leaves the rest to those behind.
            share = SCENARIOS[name].seconds / sum(SCENARIOS[other].seconds for other in chosen[index:])
            outcome = run_scenario(name, stage, max((end - time.monotonic()) * share, LEAST_S))
            outcomes[name] = outcome
            state = ("ok" if outcome.is_reached else "CUT") if outcome.verdict.is_clean else "FAIL"
            print(f"{state:4} {name} {outcome.repeats}/{outcome.wanted} in {outcome.seconds:.0f} s", flush=True)
            for problem in outcome.verdict.problems:
                print(f"     {problem}", flush=True)
        for name in twins:
            caught[name] = run_twin(name, stage)
            print(f"{'ok  ' if caught[name].is_caught else 'FAIL'} {name}", flush=True)
    minutes = (time.monotonic() - started) / 60
    report = build_report(options.seed, minutes, outcomes, caught)
    path = PROJECT / ".warehouse" / "prove" / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(f"\n{render(outcomes, caught)}\n\n{minutes:.1f} minutes, seed {options.seed}, {path.relative_to(PROJECT)}")
    sys.exit(0 if report["is_clean"] and report["is_reached"] else 1)


def build_report(seed: int, minutes: float, outcomes: dict[str, Outcome], caught: dict[str, Caught]) -> dict[str, Any]:
    """The content of the JSON file."""
    return {
        "seed": seed,
        "minutes": round(minutes, 2),
        "cores": os.cpu_count(),
        "apache_kafka": apache_kafka.kafka_version(),
        "is_clean": all(o.verdict.is_clean for o in outcomes.values()) and all(c.is_caught for c in caught.values()),
        "is_reached": all(outcome.is_reached for outcome in outcomes.values()),
        "scenarios": {name: outcome.document() for name, outcome in outcomes.items()},
        "twins": {name: entry.document() for name, entry in caught.items()},
    }


def render(outcomes: dict[str, Outcome], caught: dict[str, Caught]) -> str:
    """Both tables."""
    rows = [
        (
            name,
            f"{outcome.repeats}/{outcome.wanted}",
            outcome.runs,
            outcome.verdict.records,
            outcome.kills,
            outcome.verdict.lost,
            outcome.verdict.duplicate,
            outcome.verdict.altered,
            _remark(outcome),
        )
        for name, outcome in outcomes.items()
    ]
    header = ("scenario", "reached", "runs", "records", "kills", "lost", "duplicate", "altered", "")
    lines = [
        (name, entry.what, "caught" if entry.is_caught else "NOT CAUGHT", entry.seen) for name, entry in caught.items()
    ]
    tables = [
        *([render_table(header, rows, indent="")] if rows else []),
        *([render_table(("twin", "guarantee taken away", "", "seen"), lines, indent="")] if lines else []),
    ]
    return "\n\n".join(tables)


def _remark(outcome: Outcome) -> str:
    if not outcome.verdict.is_clean:
        return f"FAILED: {'; '.join(outcome.verdict.problems[:1])[:160]}"
    return "; ".join([*([] if outcome.is_reached else ["NOT REACHED"]), *outcome.notes])


if __name__ == "__main__":
    main()

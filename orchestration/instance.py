"""Dagster's instance: what its dagster.yaml says for these settings, and the sizes of pools.

    settings -> dagster.yaml (limits, retries of killed runs, monitoring)       python -m orchestration.instance FOLDER
             -> pools larger than one, in the instance's storage

How large: the runs that are at work at the busiest time, plus 20 %, rounded up. Two topics and the models behind them
are three runs, so four. Postgres needs a connection for each run, one more for its history, and dbt's threads.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ingestion.errors import ConfigurationError
from ingestion.feeds import FeedSpec, KafkaOrigin, load_feeds
from ingestion.settings import Settings, load_settings

# Runs at once: each takes slots of the database, and a process.
RUNS_SETTING, RUNS = "WAREHOUSE_DATABASE_SLOTS", 4
# Runs that ask one API at once.
API_SETTING, API_RUNS = "WAREHOUSE_API_SLOTS", 1


def pool_of(feed: FeedSpec) -> str:
    """The pool a landing takes: of its feed, which has one writer; of its API, which all its feeds share."""
    return feed.pipeline_name if isinstance(feed.origin, KafkaOrigin) else f"api__{feed.origin.base_url.lower()}"


def build_instance_config(settings: Settings) -> dict[str, Any]:
    """The part of dagster.yaml that is the same wherever Dagster keeps its history."""
    return {
        "telemetry": {"enabled": False},
        "concurrency": {
            # A run waits in the queue for every pool it needs, and not in a process of its own.
            "pools": {"default_limit": 1, "granularity": "run"},
            "runs": {"max_concurrent_runs": _slots(settings, RUNS_SETTING, RUNS)},
        },
        "run_coordinator": {
            "module": "dagster.core.run_coordinator",
            "class": "QueuedRunCoordinator",
            "config": {
                "dequeue_interval_seconds": 1,
                # A run that finds the code server being replaced goes back into the queue, for ten minutes.
                "max_user_code_failure_retries": 40,
                "user_code_failure_retry_delay": 15,
            },
        },
        "run_launcher": {"module": "orchestration.launcher", "class": "CheckedRunLauncher"},
        "run_monitoring": {
            "enabled": True,
            "start_timeout_seconds": 300,
            # A run that hangs keeps its pools: after two hours it has failed.
            "max_runtime_seconds": 7200,
            "poll_interval_seconds": 15,
        },
        # Of runs whose process died. A step that failed has said itself whether trying again can help.
        "run_retries": {"enabled": True, "max_retries": 2, "retry_on_asset_or_op_failure": False},
    }


def pool_sizes(settings: Settings, feeds: Sequence[FeedSpec]) -> Mapping[str, int]:
    """Pools with another size than one, which is that of a feed's writer, of dbt and of backfills."""
    size = _slots(settings, API_SETTING, API_RUNS)
    return {pool_of(feed): size for feed in feeds if not isinstance(feed.origin, KafkaOrigin)}


def _slots(settings: Settings, name: str, default: int) -> int:
    number = settings.number(name, default)
    if number < 1 or number != int(number):
        raise ConfigurationError(
            f"{name} must be a whole number of 1 or more, not {number:g}.", hint="See .env.example."
        )
    return int(number)


def write_instance(settings: Settings, folder: Path) -> Path:
    """dagster.yaml in a DAGSTER_HOME: what base.yaml there says, if there is one, and the above. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base.yaml"
    config = yaml.safe_load(base.read_text(encoding="utf-8")) if base.is_file() else {}
    text = yaml.safe_dump({**config, **build_instance_config(settings)}, sort_keys=False)
    (folder / "dagster.yaml").write_text(f"# Written by orchestration/instance.py at every start.\n{text}", "utf-8")
    return folder


def apply_pools(settings: Settings, folder: Path) -> None:
    """Give the instance's pools their sizes."""
    import dagster as dg

    with dg.DagsterInstance.from_config(str(folder)) as instance:
        for pool, size in pool_sizes(settings, load_feeds(settings)).items():
            instance.event_log_storage.set_concurrency_slots(pool, size)


def main() -> None:
    """What a container does before its server starts; `--pools` in one of them."""
    folder, settings = Path(sys.argv[1]), load_settings()
    write_instance(settings, folder)
    if "--pools" in sys.argv:
        apply_pools(settings, folder)


if __name__ == "__main__":
    main()

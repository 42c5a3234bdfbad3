"""What Dagster loads: feeds, models and checks as assets, the jobs over them, what starts them.

    dagster definitions validate            is the code location sound?
    warehouse ui                            the web interface and the daemon on this machine, history kept
    dagster dev                             the same by Dagster's own command

Loading needs the declarations and dbt's manifest, and no server: on a fresh clone, or after a change of the dbt
project, the first process to load parses it once (`orchestration.manifest`); importing this module does nothing yet.
Without servers in the settings a run brings up the embedded ones and gives them up when it ends.

Whose DAGSTER_HOME is set has Dagster's history there; without one `dagster dev` keeps none, and the project's
dagster.yaml holds: no telemetry.
"""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from ingestion.feeds import FeedSpec, KafkaOrigin, load_feeds
from ingestion.settings import Settings, load_settings
from orchestration.assets import (
    build_dbt_assets,
    build_feed_assets,
    build_lineage_asset,
    build_reconciliation_checks,
    build_source_specs,
)
from orchestration.backfill_jobs import IN_MEMORY, build_backfill_job
from orchestration.lineage.build import load_graph
from orchestration.manifest import attach_tests, load_manifest
from orchestration.session import FULL_TESTS_TAG, RESOURCE_KEY, build_session_resource
from orchestration.triggers import (
    build_backlog_sensor,
    build_follow_sensor,
    build_schedule,
    build_watch_sensor,
    feed_key,
)
from orchestration.unattended import Trigger

JOB = "warehouse"
INGEST_JOB = "ingest"
DAILY_JOB = "rates_and_reports"
FULL_TESTS_JOB = "full_tests"

# The European Central Bank publishes the day's rates at 16:00 of its time, which is 15:00 UTC in winter.
DAILY_CRON = "30 15 * * *"

# Where an instance retries runs, that is for killed ones: a failed step has said what may be retried.
RUN_TAGS = {"dagster/retry_on_asset_or_op_failure": "false"}


def build_definitions(settings: Settings) -> dg.Definitions:
    """The code location for these settings.

    Raises:
        ConfigurationError: a declaration cannot be understood, or the dbt project does not parse.
    """
    feeds = load_feeds(settings)
    manifest = attach_tests(load_manifest(settings))
    # One process a run: dlt and dbt each take seconds to import, and steps of a process each would pay it every time.
    executor = dg.in_process_executor
    dbt = build_dbt_assets(manifest, load_graph(settings))
    reconciliation = build_reconciliation_checks(feeds, manifest)
    everything = dg.AssetSelection.all() | dg.AssetSelection.all_asset_checks()
    polled = [feed for feed in feeds if not isinstance(feed.origin, KafkaOrigin)]
    jobs: list[Any] = [
        dg.define_asset_job(
            JOB,
            selection=everything,
            description="Ingest every feed, build and test every model, write the lineage page.",
            executor_def=executor,
            tags=RUN_TAGS,
        ),
        dg.define_asset_job(
            INGEST_JOB,
            selection=_landings(feeds),
            description="Ingest feeds; the models follow by themselves where that is on.",
            executor_def=executor,
            tags=RUN_TAGS,
        ),
        dg.define_asset_job(
            DAILY_JOB,
            selection=_landings(polled) | _models_behind(polled, dbt),
            description="Ingest what is asked for by the day (rates); build and test what stands on it, and reports.",
            executor_def=executor,
            tags=RUN_TAGS,
        ),
        dg.define_asset_job(
            FULL_TESTS_JOB,
            selection=dg.AssetSelection.checks(*dbt.check_keys),
            description="Every data test over everything, and not only over what loads brought since it last passed.",
            executor_def=executor,
            tags={FULL_TESTS_TAG: "true", **RUN_TAGS},
        ),
        *(build_backfill_job(feed, executor) for feed in feeds),
    ]
    readers = {JOB: feeds, INGEST_JOB: feeds, DAILY_JOB: polled}
    follows = dg.AssetSelection.assets(*dbt.keys) | dg.AssetSelection.checks(
        *dbt.check_keys, *reconciliation.check_keys
    )
    return dg.Definitions(
        assets=[
            *build_source_specs(feeds),
            *build_feed_assets(feeds, manifest),
            dbt,
            build_lineage_asset(manifest),
        ],
        asset_checks=[reconciliation],
        jobs=jobs,
        schedules=[
            build_schedule(settings, Trigger.HOURLY, JOB, "0 * * * *"),
            build_schedule(settings, Trigger.DAILY, DAILY_JOB, DAILY_CRON),
            build_schedule(settings, Trigger.NIGHTLY, FULL_TESTS_JOB, "30 3 * * *"),
        ],
        sensors=[
            build_backlog_sensor(settings, feeds, INGEST_JOB, readers),
            build_follow_sensor(settings, follows),
            build_watch_sensor(settings),
        ],
        resources={RESOURCE_KEY: build_session_resource(settings), IN_MEMORY: dg.mem_io_manager},
        executor=executor,
    )


def _landings(feeds: Sequence[FeedSpec]) -> dg.AssetSelection:
    """Feeds with their ledgers' checks, without dbt's tests of them."""
    keys = [feed_key(feed) for feed in feeds]
    return dg.AssetSelection.assets(*keys).without_checks() | dg.AssetSelection.checks(
        *(dg.AssetCheckKey(key, "ledger") for key in keys)
    )


def _models_behind(feeds: Sequence[FeedSpec], dbt: dg.AssetsDefinition) -> dg.AssetSelection:
    """What dbt builds from these feeds and tests of them, and every report with its tests."""
    behind = dg.AssetSelection.assets(*(feed_key(feed) for feed in feeds)).downstream()
    reports = [key for key in dbt.keys if key.path[-1].startswith("rpt_")]
    chosen = (behind | dg.AssetSelection.assets(*reports)) & dg.AssetSelection.assets(*dbt.keys)
    tests = [key for key in dbt.check_keys if key.asset_key in {feed_key(feed) for feed in feeds}]
    return chosen | dg.AssetSelection.checks(*tests)


@dg.definitions
def defs() -> dg.Definitions:
    return build_definitions(load_settings())

"""What Dagster loads: feeds, models and checks as assets, the jobs over them, their schedules.

    dagster definitions validate            is the code location sound?
    dagster dev                             the web interface and the daemon on this machine

Loading needs the declarations and dbt's manifest, and no server: on a fresh clone, or after a change of the dbt
project, the first process to load parses it once (`orchestration.manifest`); importing this module does nothing yet.
Without servers in the settings a run brings up the embedded ones and gives them up when it ends.

Whose DAGSTER_HOME is set has Dagster's history there; without one `dagster dev` keeps none, and the project's
dagster.yaml holds: no telemetry.
"""

import dagster as dg

from ingestion.feeds import load_feeds
from ingestion.settings import Settings, load_settings
from orchestration.assets import build_dbt_assets, build_feed_assets
from orchestration.lineage.build import load_graph
from orchestration.manifest import attach_tests, load_manifest
from orchestration.session import FULL_TESTS_TAG, RESOURCE_KEY, TRIGGER_TAG, build_session_resource

JOB = "warehouse"
FULL_TESTS_JOB = "full_tests"


def build_definitions(settings: Settings) -> dg.Definitions:
    """The code location for these settings.

    Raises:
        ConfigurationError: a declaration cannot be understood, or the dbt project does not parse.
    """
    feeds = load_feeds(settings)
    manifest = attach_tests(load_manifest(settings))
    # One process a run: dlt and dbt each take seconds to import, and steps of a process each would pay it every time.
    executor = dg.in_process_executor
    job = dg.define_asset_job(
        JOB,
        selection=dg.AssetSelection.all() | dg.AssetSelection.all_asset_checks(),
        description="Ingest every feed, build and test every model.",
        executor_def=executor,
        # Where an instance retries runs, that is for killed ones: a failed step has said what may be retried.
        tags={"dagster/retry_on_asset_or_op_failure": "false"},
    )
    full_tests = dg.define_asset_job(
        FULL_TESTS_JOB,
        selection=dg.AssetSelection.all_asset_checks(),
        description="Every data test over everything, and not only over what loads brought since it last passed.",
        executor_def=executor,
        tags={FULL_TESTS_TAG: "true", "dagster/retry_on_asset_or_op_failure": "false"},
    )
    return dg.Definitions(
        assets=[*build_feed_assets(feeds, manifest), build_dbt_assets(manifest, load_graph(settings))],
        jobs=[job, full_tests],
        schedules=[_schedule("hourly", JOB, "0 * * * *"), _schedule("nightly", FULL_TESTS_JOB, "30 3 * * *")],
        resources={RESOURCE_KEY: build_session_resource(settings)},
        executor=executor,
    )


def _schedule(name: str, job: str, cron: str) -> dg.ScheduleDefinition:
    return dg.ScheduleDefinition(
        name=name,
        job_name=job,
        cron_schedule=cron,
        execution_timezone="UTC",
        tags={TRIGGER_TAG: "schedule"},
        # To open the web interface on a laptop must not start to read a production topic. Whoever deploys turns it on.
        default_status=dg.DefaultScheduleStatus.STOPPED,
    )


@dg.definitions
def defs() -> dg.Definitions:
    return build_definitions(load_settings())

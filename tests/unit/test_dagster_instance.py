"""Dagster's instance: one place says its limits, settings size the pools, a run whose server is gone is found out."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.launcher import WorkerStatus
from dagster._grpc.types import CanCancelExecutionResult
from dagster._serdes import serialize_value

from ingestion.errors import ConfigurationError
from ingestion.feeds import load_feeds
from ingestion.settings import Settings
from orchestration.definitions import build_definitions
from orchestration.instance import apply_pools, build_instance_config, pool_of, pool_sizes, write_instance
from orchestration.launcher import CheckedRunLauncher

PROJECT = Path(__file__).resolve().parents[2]


def test_the_projects_own_instance_says_the_same(clean_settings: Settings) -> None:
    assert yaml.safe_load((PROJECT / "dagster.yaml").read_text()) == build_instance_config(clean_settings)


def test_settings_size_runs_and_pools_where_dagster_reads_them(clean_settings: Settings, tmp_path: Path) -> None:
    settings = clean_settings.with_env(WAREHOUSE_DATABASE_SLOTS="6", WAREHOUSE_API_SLOTS="2")
    home = write_instance(settings, tmp_path)
    apply_pools(settings, home)

    with dg.DagsterInstance.from_config(str(home)) as instance:
        queue = instance.get_concurrency_config()
        assert queue.run_queue_config is not None
        assert queue.run_queue_config.max_concurrent_runs == 6
        assert queue.pool_config.default_pool_limit == 1
        limits = {pool.name: pool.limit for pool in instance.event_log_storage.get_pool_limits()}
        assert isinstance(instance.run_launcher, CheckedRunLauncher)
        assert instance.run_launcher.supports_check_run_worker_health
    assert limits == {"api__fx_api_base": 2}


def test_what_stands_in_base_yaml_stays(clean_settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("local_artifact_storage: {module: m, class: c}\n")
    written = yaml.safe_load((write_instance(clean_settings, tmp_path) / "dagster.yaml").read_text())
    assert written == {
        "local_artifact_storage": {"module": "m", "class": "c"},
        **build_instance_config(clean_settings),
    }


@pytest.mark.parametrize("slots", ["0", "1.5", "many"])
def test_slots_that_are_no_number_of_runs_are_refused(clean_settings: Settings, slots: str) -> None:
    with pytest.raises(ConfigurationError, match="WAREHOUSE_DATABASE_SLOTS"):
        build_instance_config(clean_settings.with_env(WAREHOUSE_DATABASE_SLOTS=slots))


def test_every_step_that_writes_takes_a_pool(clean_settings: Settings) -> None:
    definitions = build_definitions(clean_settings)
    feeds = load_feeds(clean_settings)
    job = definitions.resolve_job_def("warehouse")
    pools = {node.name: node.definition.pools for node in job.nodes}
    for feed in feeds:
        assert pools[feed.pipeline_name] == {pool_of(feed)}
        assert definitions.resolve_job_def(f"backfill__{feed.pipeline_name}").nodes[0].definition.pools == {"backfill"}
    assert pools["dbt"] == pools["docs__lineage"] == {"dbt"}
    # One writer a feed: only an API's pool may be larger, and its feeds' own lock holds then.
    assert set(pool_sizes(clean_settings, feeds)) == {"api__fx_api_base"}


class CodeServer:
    """Answers for a code server whether it has a run; None: does not answer."""

    def __init__(self, has_run: bool | None) -> None:
        self.has_run = has_run

    def can_cancel_execution(self, *_: Any, **__: Any) -> str:
        if self.has_run is None:
            raise ConnectionError
        return serialize_value(CanCancelExecutionResult(can_cancel=self.has_run))


@pytest.fixture
def launcher() -> CheckedRunLauncher:
    return CheckedRunLauncher()


@pytest.mark.parametrize(
    ("has_run", "status"),
    [(True, WorkerStatus.RUNNING), (False, WorkerStatus.FAILED), (None, WorkerStatus.RUNNING)],
)
def test_a_run_its_code_server_does_not_know_is_over(
    launcher: CheckedRunLauncher, monkeypatch: pytest.MonkeyPatch, has_run: bool | None, status: WorkerStatus
) -> None:
    monkeypatch.setattr(launcher, "_get_grpc_client_for_termination", lambda _: CodeServer(has_run))
    assert launcher.check_run_worker_health(dg.DagsterRun(job_name="j", run_id="r")).status is status


def test_dagsters_own_launcher_still_has_no_such_check() -> None:
    # When it has, orchestration/launcher.py can go.
    assert not dg.DefaultRunLauncher().supports_check_run_worker_health

"""The code location as Dagster loads it: keys that join, tests that are checks, and the whole graph in a snapshot.

python tests/unit/test_definitions.py        writes the snapshot again; its diff is the review of a lineage change
"""

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ingestion.errors import (
    ConfigurationError,
    DataError,
    FeedBusyError,
    SourceLossError,
    TransientError,
    WarehouseError,
)
from ingestion.feeds import load_feeds
from ingestion.settings import Settings, load_settings
from orchestration import manifest as manifests
from orchestration import transform
from orchestration.asset_lineage import COLUMN_LINEAGE, column_lineage
from orchestration.assets import UNIQUE_ID
from orchestration.definitions import build_definitions
from orchestration.lineage.build import load_graph
from orchestration.lineage.graph import ColumnId
from orchestration.manifest import Manifest, attach_tests, fingerprint, load_manifest
from orchestration.session import TRIGGER_TAG, WarehouseSession, to_failure

PROJECT = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).parent / "snapshots" / "asset_graph.json"


@pytest.fixture(scope="module")
def definitions(clean_settings: Settings) -> dg.Definitions:
    return build_definitions(clean_settings)


@pytest.fixture(scope="module")
def manifest(clean_settings: Settings) -> Manifest:
    return load_manifest(clean_settings)


def specs_of(definitions: dg.Definitions) -> dict[str, dg.AssetSpec]:
    return {spec.key.to_user_string(): spec for spec in definitions.resolve_all_asset_specs()}


def test_assets_say_what_their_columns_are_made_of(definitions: dg.Definitions, clean_settings: Settings) -> None:
    """For every model, as the graph has it; counted rows and the own rows of a model are no columns of an asset."""
    graph = load_graph(clean_settings)
    of_model = {
        str(spec.metadata[UNIQUE_ID]): spec.metadata.get(COLUMN_LINEAGE)
        for spec in definitions.resolve_all_asset_specs()
        if UNIQUE_ID in spec.metadata
    }
    models = [one for one in graph.datasets.values() if one.kind == "model"]
    for model in models:
        found = of_model[model.id]
        assert isinstance(found, dg.TableColumnLineage), model.name
        assert set(found.deps_by_column) == {name for name in model.columns if name != "*"}
        for name, deps in found.deps_by_column.items():
            said = {f"{dep.asset_key.path[-1]}.{dep.column_name}" for dep in deps}
            assert said == {
                f"{graph.datasets[edge.source.dataset].name.rpartition('.')[2]}.{edge.source.column}"
                for edge in graph.into.get(ColumnId(model.id, name), ())
                if edge.direct
                and edge.source.column != "*"
                and edge.source.dataset != model.id
                and graph.datasets[edge.source.dataset].kind != "external"
            }, f"{model.name}.{name}"
    assert len(models) >= 23
    # Without the graph there is none.
    assert column_lineage(graph, "seed.payments_warehouse.currencies", {}) is None


def checks_of(definitions: dg.Definitions) -> list[dg.AssetCheckSpec]:
    return [
        check
        for asset in [*(definitions.assets or []), *(definitions.asset_checks or [])]
        if isinstance(asset, dg.AssetsDefinition)
        for check in asset.check_specs
    ]


def snapshot_of(definitions: dg.Definitions) -> dict[str, Any]:
    """What a change of lineage changes: keys, dependencies, groups, checks, jobs, schedules, sensors."""
    checks: dict[str, list[str]] = {}
    for check in checks_of(definitions):
        checks.setdefault(check.asset_key.to_user_string(), []).append(check.name)
    jobs = [definitions.resolve_job_def(job.name) for job in definitions.jobs or []]
    return {
        "assets": {
            key: {
                "group": spec.group_name,
                "condition": spec.automation_condition.get_label() if spec.automation_condition else None,
                "depends_on": sorted(dep.asset_key.to_user_string() for dep in spec.deps),
                "checks": sorted(checks.get(key, [])),
            }
            for key, spec in sorted(specs_of(definitions).items())
        },
        "jobs": {
            job.name: {
                "executor": job.executor_def.name,
                "steps": sorted(node.name for node in job.nodes),
                "tags": dict(sorted(job.tags.items())),
            }
            for job in jobs
        },
        "schedules": {
            schedule.name: {
                "cron": schedule.cron_schedule,
                "timezone": schedule.execution_timezone,
                "job": schedule.job_name,
                "default_status": schedule.default_status.name,
            }
            for schedule in definitions.schedules or []
            if isinstance(schedule, dg.ScheduleDefinition)
        },
        "sensors": {
            sensor.name: {
                "type": sensor.sensor_type.name,
                "seconds": sensor.minimum_interval_seconds,
                "jobs": sorted(job.name for job in sensor.jobs) if sensor.has_jobs else [],
                "default_status": sensor.default_status.name,
            }
            for sensor in definitions.sensors or []
        },
        "pools": pools_of(definitions),
    }


def pools_of(definitions: dg.Definitions) -> dict[str, list[str]]:
    """Step -> the pools it takes."""
    jobs = [definitions.resolve_job_def(job.name) for job in definitions.jobs or []]
    return {node.name: sorted(node.definition.pools) for job in jobs for node in job.nodes if node.definition.pools}


def test_the_asset_graph_is_the_reviewed_one(definitions: dg.Definitions) -> None:
    found = snapshot_of(definitions)
    expected = json.loads(SNAPSHOT.read_text(encoding="utf-8"))

    assert found == expected, (
        "The asset graph changed. If it was meant to: python tests/unit/test_definitions.py, and review the diff."
    )


def test_every_feed_is_upstream_of_a_staging_model(definitions: dg.Definitions, clean_settings: Settings) -> None:
    specs = specs_of(definitions)
    staged = {
        dep.asset_key.to_user_string() for spec in specs.values() if spec.group_name == "staging" for dep in spec.deps
    }
    for feed in load_feeds(clean_settings):
        assert f"{feed.source}/{feed.table}" in specs
        assert f"{feed.source}/{feed.table}" in staged


def test_every_data_test_is_a_check(definitions: dg.Definitions, manifest: Manifest) -> None:
    tests = {unique_id for unique_id, node in manifest["nodes"].items() if node["resource_type"] == "test"}
    assert tests
    own = {"ledger", "reconciliation"}
    assert tests == {(check.metadata or {})[UNIQUE_ID] for check in checks_of(definitions) if check.name not in own}


def test_every_model_and_seed_is_an_asset(definitions: dg.Definitions, manifest: Manifest) -> None:
    nodes = {
        unique_id
        for unique_id, node in manifest["nodes"].items()
        if node["resource_type"] in ("model", "seed") and node["config"]["materialized"] != "ephemeral"
    }
    assert nodes <= {spec.metadata.get(UNIQUE_ID) for spec in specs_of(definitions).values()}


def test_a_scheduled_run_says_that_a_schedule_asked_for_it(definitions: dg.Definitions) -> None:
    for schedule in definitions.schedules or []:
        assert isinstance(schedule, dg.ScheduleDefinition)
        with dg.instance_for_test() as instance, dg.build_schedule_context(instance=instance) as context:
            (request,) = schedule.evaluate_tick(context).run_requests or []
        assert request.tags[TRIGGER_TAG] == "schedule"


def data_test(name: str, *parents: str, **more: Any) -> dict[str, Any]:
    return {"resource_type": "test", "name": name, "depends_on": {"nodes": list(parents)}, **more}


def attached(*tests: dict[str, Any]) -> list[str | None]:
    """What each test ends attached to, in a project of three models and a source."""
    models = {
        f"model.p.{name}": {"resource_type": "model", "name": name}
        for name in ("fct_payments", "fct_payments__daily", "dim_users")
    }
    nodes = {**models, **{f"test.p.{number}": test for number, test in enumerate(tests)}}
    found = attach_tests({"nodes": nodes, "sources": {"source.p.raw.users": {}}})["nodes"]
    return [found[f"test.p.{number}"].get("attached_node") for number in range(len(tests))]


def test_a_singular_test_belongs_to_the_model_it_is_named_after() -> None:
    both = ("model.p.fct_payments", "model.p.fct_payments__daily", "source.p.raw.users", "model.p.dim_users")

    assert attached(
        data_test("fct_payments__sums", *both),
        data_test("fct_payments__daily__sums", *both),
        # Its name is no model's, or the model it names is not one it reads.
        data_test("payments_add_up", *both),
        data_test("dim_users__sums", "model.p.fct_payments", "model.p.fct_payments__daily"),
    ) == ["model.p.fct_payments", "model.p.fct_payments__daily", None, None]


def test_a_generic_test_of_a_source_belongs_to_the_source() -> None:
    generic = {"test_metadata": {"name": "relationships"}}

    assert attached(
        data_test("source_relationships_raw_users", "source.p.raw.users", "model.p.dim_users", **generic),
        # dbt has attached it.
        data_test("dim_users__in_raw", "source.p.raw.users", attached_node="model.p.dim_users", **generic),
    ) == ["source.p.raw.users", "model.p.dim_users"]


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (DataError("two tests failed", hint="look"), False),
        (ConfigurationError("no topic"), False),
        (SourceLossError("offsets 3 to 7 are gone"), False),
        (WarehouseError("ours"), False),
        (TransientError("the broker does not answer"), True),
        (FeedBusyError("held by another"), True),
    ],
)
def test_only_what_can_pass_later_may_be_retried(error: WarehouseError, retried: bool) -> None:
    failure = to_failure(error)

    assert failure.allow_retries is retried
    assert failure.description == error.message
    assert failure.metadata["error_class"].value == error.error_class.value
    assert ("hint" in failure.metadata) == bool(error.hint)


@pytest.fixture
def outcomes(clean_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """What the run history would see of sessions: their failure, or None."""
    outcomes: list[BaseException | None] = []

    @contextlib.contextmanager
    def recorded() -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            outcomes.append(error)
            raise
        outcomes.append(None)

    def open_(session: WarehouseSession) -> tuple[Settings, Any]:
        session._stack.enter_context(recorded())
        session._opened = (clean_settings, None)  # type: ignore[assignment]
        return clean_settings, None

    monkeypatch.setattr(WarehouseSession, "_open", open_)
    return outcomes


def test_a_run_failed_when_work_failed_for_good(clean_settings: Settings, outcomes: list[BaseException | None]) -> None:
    def attempt(session: WarehouseSession, work: str, error: WarehouseError | None) -> None:
        with contextlib.suppress(WarehouseError), session.attempt(work):
            if error is not None:
                raise error

    down = TransientError("down")
    for works in (
        [("a", None), ("b", None)],
        [("a", down), ("b", None)],
        [("a", down), ("b", None), ("a", None)],
    ):
        session = WarehouseSession(clean_settings, "test", "manual")
        session._open()
        for work, error in works:
            attempt(session, work, error)
        session.close()

    assert outcomes == [None, down, None]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_terminated_run_is_an_interrupted_one(
    clean_settings: Settings, outcomes: list[BaseException | None], number: signal.Signals
) -> None:
    session = WarehouseSession(clean_settings, "test", "manual")
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]

    def work() -> None:
        with session.attempt("build"):
            os.kill(os.getpid(), number)
            time.sleep(10)

    with pytest.raises(dg.DagsterExecutionInterruptedError):
        work()
    session.close()

    assert [type(outcome) for outcome in outcomes] == [KeyboardInterrupt]
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_an_interrupt_inside_dbt_is_no_result(project: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from dbt.cli.main import dbtRunner, dbtRunnerResult

    monkeypatch.setattr(dbtRunner, "invoke", lambda *_: dbtRunnerResult(success=False, exception=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        transform.run_build(project.with_env(WAREHOUSE_DSN="postgresql://u:p@127.0.0.1:1/w"))


def test_commands_of_one_process_do_not_slow_each_other(project: Settings, tmp_path: Path) -> None:
    """The list of flags does not grow from one to the next; as the twin without our care for it does."""
    from dbt.adapters.base import impl

    def parse_and_count(times: int) -> list[int]:
        counts = []
        for _ in range(times):
            transform.parse(project, tmp_path / "target")
            counts.append(len(impl.DEFAULT_BASE_BEHAVIOR_FLAGS))
        return counts

    _, second, third = parse_and_count(3)
    assert second == third
    with pytest.MonkeyPatch.context() as patch:
        runner = transform.load_runner()
        patch.setattr(transform, "load_runner", lambda: runner)
        first, second, third = parse_and_count(3)
    assert first < second < third


@pytest.fixture
def project(clean_settings: Settings, tmp_path: Path) -> Settings:
    """A small dbt project of the test's own."""
    root = tmp_path / "project"
    (root / "models").mkdir(parents=True)
    (root / "models" / "a.sql").write_text("select 1 as id")
    (root / "dbt_project.yml").write_text("name: p\nversion: '1.0'\nprofile: payments_warehouse\n")
    shutil.copyfile(PROJECT / "profiles.yml.example", root / "profiles.yml.example")
    return replace(clean_settings, project_dir=root, home=tmp_path / "home")


def test_the_manifest_is_parsed_again_when_a_file_changed(project: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def parse(settings: Settings, target: Path) -> Path:
        parsed.append((settings.project_dir / "models" / "a.sql").read_text())
        (target / "manifest.json").write_text(json.dumps({"sql": parsed[-1]}))
        return target / "manifest.json"

    monkeypatch.setattr(transform, "parse", parse)
    model = project.project_dir / "models" / "a.sql"

    assert load_manifest(project) == {"sql": "select 1 as id"}
    os.utime(model, (0, 0))
    assert load_manifest(project) == {"sql": "select 1 as id"}
    assert len(parsed) == 1
    model.write_text("select 2 as id")
    assert load_manifest(project) == {"sql": "select 2 as id"}
    for number in range(3, 10):
        model.write_text(f"select {number} as id")
        load_manifest(project)
    # The last few stay, and nothing of the parsing.
    kept = sorted(path.name for path in (project.home / "dbt").iterdir())
    assert len(kept) == manifests.KEPT
    assert f"manifest-{fingerprint(project)}.json" in kept


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "models" / "b.sql").write_text("select 1 as id"),
        lambda root: (root / "models" / "a.sql").rename(root / "models" / "c.sql"),
        lambda root: (root / "dbt_project.yml").write_text("name: q\nversion: '1'\nprofile: p\n"),
        lambda root: (root / "profiles.yml").write_text("p: {}"),
    ],
)
def test_the_fingerprint_follows_what_dbt_parses(project: Settings, change: Callable[[Path], object]) -> None:
    before = fingerprint(project)
    change(project.project_dir)
    assert fingerprint(project) != before


def test_a_project_that_does_not_parse_is_one_clear_error(project: Settings) -> None:
    (project.project_dir / "models" / "a.sql").write_text("select * from {{ ref('nowhere') }}")

    with pytest.raises(ConfigurationError, match="nowhere"):
        load_manifest(project)
    assert list((project.home / "dbt").iterdir()) == []
    assert not (project.project_dir / "target").exists()
    assert not (project.project_dir / "logs").exists()


def test_a_project_file_that_is_not_yaml_is_named(project: Settings) -> None:
    (project.project_dir / "dbt_project.yml").write_text("name: [")
    with pytest.raises(ConfigurationError, match=r"dbt_project\.yml"):
        manifests.fingerprint(project)


def write_snapshot() -> None:
    with tempfile.TemporaryDirectory() as home:
        settings = replace(load_settings(PROJECT), home=Path(home))
        found = snapshot_of(build_definitions(settings))
    SNAPSHOT.parent.mkdir(exist_ok=True)
    SNAPSHOT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{SNAPSHOT}: {len(found['assets'])} assets")


if __name__ == "__main__":
    write_snapshot()

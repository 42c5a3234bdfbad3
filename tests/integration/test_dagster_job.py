"""The job in process, on the embedded services it brings up itself: from a topic to a mart, and what a failure does.

The dbt project is a copy of the test's own, so that neither `target/` nor `profiles.yml` of the real one is touched.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import psycopg2
import pytest

from ingestion.settings import Settings
from orchestration.console import Reporter
from orchestration.definitions import FULL_TESTS_JOB, JOB, build_definitions
from orchestration.demo import send_sample
from orchestration.services import running
from orchestration.session import TRIGGER_TAG
from tests.harness.project_copy import copy_project

PAYMENTS = "raw_payments.transaction_created"
USERS = "raw_users.user_events"
FEEDS = {"raw_payments/transaction_created", "raw_users/user_events", "raw_fx/daily_rates"}


@pytest.fixture(scope="module")
def unconfigured(clean_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings that name no server, a home and a copy of the project of the module's own."""
    root = copy_project(tmp_path_factory.mktemp("project"))
    return replace(clean_settings, project_dir=root, home=tmp_path_factory.mktemp("dagster") / "home")


@pytest.fixture(scope="module")
def definitions(unconfigured: Settings) -> dg.Definitions:
    return build_definitions(unconfigured)


@dataclass(frozen=True)
class Warehouse:
    """The services the job finds running, because the test holds a lease of its own."""

    settings: Settings
    definitions: dg.Definitions

    def send(self, feed: str, records: int, seed: int) -> int:
        start = datetime.now(UTC).replace(microsecond=0) - timedelta(days=3)
        return send_sample(
            self.settings,
            Reporter(quiet=True),
            feed,
            records=records,
            seed=seed,
            bad_share=0.05,
            start=start,
            days=2,
        )

    def run(self, **options: Any) -> dg.ExecuteInProcessResult:
        job = self.definitions.resolve_job_def(JOB)
        return job.execute_in_process(raise_on_error=False, **options)

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        connection = psycopg2.connect(self.settings.require("WAREHOUSE_DSN", "embedded"))
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()


@pytest.fixture(scope="module")
def warehouse_with_rows(unconfigured: Settings, definitions: dg.Definitions) -> Iterator[tuple[Warehouse, Any]]:
    """Sample messages sent and the job run once on them. The broker forgets when the last lease ends: hold one."""
    with running(unconfigured) as settings:
        warehouse = Warehouse(settings, definitions)
        warehouse.send(PAYMENTS, 400, seed=1)
        warehouse.send(USERS, 100, seed=1)
        yield warehouse, warehouse.run(tags={TRIGGER_TAG: "schedule"})


def materialized(result: dg.ExecuteInProcessResult) -> dict[str, dict[str, Any]]:
    """Asset key -> metadata values."""
    found: dict[str, dict[str, Any]] = {}
    for event in result.get_asset_materialization_events():
        key = event.asset_key
        assert key is not None
        found[key.to_user_string()] = {name: value.value for name, value in event.materialization.metadata.items()}
    return found


def nodes_run(warehouse: Warehouse) -> set[str]:
    """dbt's ids of what its last command ran, from its own artifact."""
    results = json.loads((warehouse.settings.project_dir / "target" / "run_results.json").read_text())
    ids = {result["unique_id"] for result in results["results"]}
    return {unique_id for unique_id in ids if not unique_id.startswith("operation.")}


def attempts(result: dg.ExecuteInProcessResult, step: str) -> int:
    return sum(event.step_key == step and event.is_step_start for event in result.all_events)


def test_the_job_brings_what_the_topic_held_to_the_marts(
    warehouse_with_rows: tuple[Warehouse, dg.ExecuteInProcessResult],
) -> None:
    warehouse, result = warehouse_with_rows
    assert result.success

    made = materialized(result)
    assets = warehouse.definitions.assets or []
    definitions = [asset for asset in assets if isinstance(asset, dg.AssetsDefinition)]
    assert set(made) == {key.to_user_string() for asset in definitions for key in asset.keys}
    evaluations = result.get_asset_check_evaluations()
    reconciliation = warehouse.definitions.asset_checks or []
    assert {evaluation.asset_check_key for evaluation in evaluations} == {
        check.key for asset in [*definitions, *reconciliation] for check in asset.check_specs
    }
    assert all(evaluation.passed for evaluation in evaluations)
    books = {
        (evaluation.check_name, evaluation.asset_key.to_user_string())
        for evaluation in evaluations
        if evaluation.check_name in ("ledger", "reconciliation")
    }
    assert books == {(name, feed) for name in ("ledger", "reconciliation") for feed in FEEDS}
    # dbt's unit tests look at the SQL, and not at the data.
    assert not any(node.startswith("unit_test.") for node in nodes_run(warehouse))

    payments = made["raw_payments/transaction_created"]
    assert payments["offered"] == payments["landed"] + payments["dead"] + payments["tombstones"]
    assert payments["dead"] == sum(payments["reasons"].values()) > 0
    ((landed, loads),) = warehouse.query(f"select count(*), array_agg(distinct _dlt_load_id) from {PAYMENTS}")
    assert (payments["landed"], payments["loads"]) == (landed, loads)
    ((transactions, facts),) = warehouse.query(
        f"select (select count(distinct transaction_id) from {PAYMENTS}), (select count(*) from marts.fct_transactions)"
    )
    assert facts == transactions > 0


def test_a_run_of_dagster_is_in_the_run_history(
    warehouse_with_rows: tuple[Warehouse, dg.ExecuteInProcessResult],
) -> None:
    warehouse, result = warehouse_with_rows
    run_id = materialized(result)["raw_payments/transaction_created"]["run"]

    assert warehouse.query(f"select command, trigger, outcome, message from ops.runs where run_id = '{run_id}'") == [
        ("dagster warehouse", "schedule", "success", None)
    ]
    steps = warehouse.query(f"select step, feed, outcome, finished_at from ops.run_steps where run_id = '{run_id}'")
    assert {step[:3] for step in steps} == {("build", "", "success"), ("docs", "", "success")} | {
        ("ingest", feed.replace("/", "."), "success") for feed in FEEDS
    }
    assert all(finished for *_, finished in steps)


def test_a_part_of_the_models_runs_as_that_part(
    warehouse_with_rows: tuple[Warehouse, dg.ExecuteInProcessResult],
) -> None:
    warehouse, _ = warehouse_with_rows
    key = dg.AssetKey(["marts", "dim_currencies"])

    result = warehouse.run(asset_selection=[key])

    assert result.success
    assert set(materialized(result)) == {"marts/dim_currencies"}
    checks = result.get_asset_check_evaluations()
    assert {evaluation.asset_key for evaluation in checks} == {key}
    ran = nodes_run(warehouse)
    assert len(ran) == 1 + len(checks)
    assert {node for node in ran if not node.startswith("test.")} == {"model.payments_warehouse.dim_currencies"}
    assert warehouse.query("select trigger, outcome from ops.runs order by started_at desc limit 1") == [
        ("manual", "success")
    ]


@pytest.fixture
def broken_row(warehouse_with_rows: tuple[Warehouse, Any]) -> Iterator[None]:
    """A landed payment that no longer fits its contract, as no loader would land it."""
    warehouse, _ = warehouse_with_rows
    ((transaction, status),) = warehouse.query(f"select transaction_id, status from {PAYMENTS} limit 1")
    change = f"update {PAYMENTS} set status = '%s' where transaction_id = '{transaction}' and status = '%s'"
    warehouse.query(change % ("bogus", status))
    warehouse.query(f"delete from audit.tested_loads where relation = '{PAYMENTS}'")
    yield
    warehouse.query(change % (status, "bogus"))


def test_a_failed_data_test_fails_its_check_once_and_stops_what_stands_on_it(
    warehouse_with_rows: tuple[Warehouse, dg.ExecuteInProcessResult], broken_row: None
) -> None:
    warehouse, _ = warehouse_with_rows
    state = "select count(*), max(_last_load_id), max(xmin::text::bigint) from staging.stg_payments__transactions"
    facts = "select count(*), max(xmin::text::bigint) from marts.fct_transactions"
    before = warehouse.query(state) + warehouse.query(facts)
    warehouse.send(PAYMENTS, 50, seed=2)

    result = warehouse.run()

    assert not result.success
    made = materialized(result)
    assert made["raw_payments/transaction_created"]["landed"] > 0
    failed = [evaluation for evaluation in result.get_asset_check_evaluations() if not evaluation.passed]
    (check,) = failed
    assert check.asset_key.to_user_string() == "raw_payments/transaction_created"
    assert "accepted_values" in check.check_name
    assert check.metadata["failing_rows"].value == 1

    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert failure.step_key == "dbt"
    data = failure.step_failure_data.user_failure_data
    assert data is not None
    assert data.metadata["error_class"].value == "data"
    assert "accepted_values" in (data.description or "")
    assert attempts(result, "dbt") == 1
    assert not any(event.is_step_up_for_retry for event in result.all_events)

    # Nothing that stands on the broken table was touched; what does not went on.
    assert not {"staging/stg_payments__transactions", "marts/fct_transactions"} & set(made)
    assert "staging/stg_users__events" in made
    assert warehouse.query(state) + warehouse.query(facts) == before
    assert warehouse.query(
        "select r.outcome, r.error_class, s.outcome, s.error_class from ops.runs r join ops.run_steps s using (run_id) "
        "where s.step = 'build' order by r.started_at desc limit 1"
    ) == [("failed", "data", "failed", "data")]


def test_the_nightly_job_looks_at_what_passed_before(
    warehouse_with_rows: tuple[Warehouse, dg.ExecuteInProcessResult], broken_row: None
) -> None:
    warehouse, _ = warehouse_with_rows
    warehouse.query(f"insert into audit.tested_loads values ('{PAYMENTS}', '_dlt_load_id', '9')")
    assert warehouse.run().success

    nightly = warehouse.definitions.resolve_job_def(FULL_TESTS_JOB)
    result = nightly.execute_in_process(raise_on_error=False)

    assert not result.success
    assert materialized(result) == {}
    evaluations = result.get_asset_check_evaluations()
    assert len(evaluations) > 100
    failed = {evaluation.check_name.partition("_raw_")[0] for evaluation in evaluations if not evaluation.passed}
    assert failed == {"source_accepted_values", "stg_payments__transactions__conserves_amounts"}


@pytest.mark.parametrize(
    ("setting", "value", "error_class", "words"),
    [
        ("WAREHOUSE_DSN", "postgresql://nobody:secret@127.0.0.1:1/nowhere", "transient", "does not answer"),
        ("FX_API_BASE", "no address at all", "configuration", "FX_API_BASE"),
    ],
)
def test_a_landing_that_fails_says_why_and_stops_the_models(
    warehouse_with_rows: tuple[Warehouse, dg.ExecuteInProcessResult],
    unconfigured: Settings,
    setting: str,
    value: str,
    error_class: str,
    words: str,
) -> None:
    definitions = build_definitions(unconfigured.with_env(**{setting: value}, WAREHOUSE_RUN_RETRIES="0"))

    result = definitions.resolve_job_def(JOB).execute_in_process(raise_on_error=False)

    assert not result.success
    failures = {
        event.step_key: event.step_failure_data.user_failure_data
        for event in result.all_events
        if event.is_step_failure
    }
    failure = failures["raw_fx__daily_rates"]
    assert failure is not None
    assert failure.metadata["error_class"].value == error_class
    assert words in (failure.description or "")
    assert "secret" not in str(result.all_events)
    assert attempts(result, "dbt") == 0

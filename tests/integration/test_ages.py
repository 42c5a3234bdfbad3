"""The age of tables is that of their data: a partition that stops is seen while every job is green.

Real landings on the embedded broker with source times of the test's choosing, real builds; only "now" is the test's.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import psycopg2.extensions
import pytest
from confluent_kafka import Producer

from ingestion.database import connect
from ingestion.feeds import FeedSpec, KafkaOrigin
from ingestion.settings import Settings
from orchestration.ages import Lineage, TableAge, measure, record_ages
from orchestration.console import Reporter
from orchestration.history import recorded_run
from orchestration.manifest import load_manifest
from orchestration.run import ingest, prepare
from tests.harness.models import Dbt
from tests.harness.records import payment

Connection = psycopg2.extensions.connection
Query = Callable[..., list[tuple]]

PAYMENTS = "raw_payments.transaction_created"
RATES = "raw_fx.daily_rates"
FACTS = "marts.fct_transactions"
PARTITIONS = range(4)
FROZEN = 3
MODELS = ("--select", "+fct_transactions", "--exclude-resource-type", "test", "--exclude-resource-type", "unit_test")


class Pipeline:
    """Produces with source times, and runs what is to be green: landing and build, recorded as a run."""

    def __init__(self, settings: Settings, feeds: list[FeedSpec], dbt: Dbt) -> None:
        self.settings, self.feeds, self.dbt = settings, feeds, dbt

    def produce(self, partition: int, at: datetime) -> None:
        (origin,) = [feed.origin for feed in self.feeds if isinstance(feed.origin, KafkaOrigin)]
        producer = Producer({"bootstrap.servers": self.settings.kafka_bootstrap, "broker.address.family": "v4"})
        producer.produce(origin.topic, payment(), partition=partition, timestamp=int(at.timestamp() * 1000))
        assert producer.flush(30) == 0

    def run(self, build: bool = True) -> None:
        connection = connect(self.settings)
        try:
            with recorded_run(connection, "run", "schedule", self.settings.project_dir) as run:
                ingest(self.settings, self.feeds, run, Reporter(quiet=True))
                if build:
                    with run.step("build"):
                        succeeded, results = self.dbt("build", *MODELS)
                        assert succeeded, results
        finally:
            connection.close()


@pytest.fixture
def pipeline(
    warehouse: Settings, own_topic: Callable[[str], FeedSpec], feed_named: Callable[[str], FeedSpec], dbt: Dbt
) -> Pipeline:
    prepare(warehouse)
    return Pipeline(warehouse, [feed_named(RATES), own_topic(PAYMENTS)], dbt)


@pytest.mark.filterwarnings("ignore:Function `build_last_update_freshness_checks` is superseded")
def test_a_partition_that_stops_is_a_miss_while_every_job_is_green(
    pipeline: Pipeline, clean_settings: Settings, connection: Connection, query: Query
) -> None:
    manifest = load_manifest(clean_settings)
    lineage = Lineage(manifest)
    now = datetime.now(UTC).replace(microsecond=0)

    def tick(at: datetime, by: Lineage = lineage) -> dict[str, TableAge]:
        ages = measure(by, connection, at)
        if by is lineage:
            record_ages(connection, ages, at)
        return {age.table: age for age in ages}

    assert {age.state for age in tick(now - timedelta(days=2)).values()} == {"unknown"}

    for partition in PARTITIONS:
        pipeline.produce(partition, now - timedelta(hours=26))
    pipeline.run()
    before = tick(now - timedelta(hours=26) + timedelta(minutes=5))
    assert (before[PAYMENTS].state, before[PAYMENTS].age) == ("pass", timedelta(minutes=5))
    assert (before[FACTS].state, before[FACTS].age) == ("pass", timedelta(minutes=5))

    for partition in PARTITIONS:
        if partition != FROZEN:
            pipeline.produce(partition, now - timedelta(minutes=1))
    pipeline.run()
    after = tick(now)
    for table in (PAYMENTS, FACTS):
        assert after[table].state == "error"
        assert after[table].age == timedelta(hours=26)
        assert after[table].hop == PAYMENTS
        assert after[table].held_by.startswith(f"{PAYMENTS} partition {FROZEN}: newest record 1d 2h old, read ")
    assert after[RATES].state == "pass"
    # The ticks kept it: from pass to error in one.
    kept = query("select state from ops.table_ages where table_name = %s order by measured_at", FACTS)
    assert kept == [("unknown",), ("pass",), ("error",)]

    # All jobs are green, and what looks at jobs is content.
    assert query("select distinct outcome from ops.runs union select distinct outcome from ops.run_steps") == [
        ("success",)
    ]
    _, fresh = pipeline.dbt("source", "freshness", "--select", "source:raw_payments", "source:raw_fx")
    sources = {
        f"{one.node.source_name}.{one.node.name}": str(one.status)
        for one in fresh
        if one.node.resource_type == "source"
    }
    assert sources == {PAYMENTS: "pass", RATES: "pass"}
    assert dagster_freshness(query) == {f"{PAYMENTS}": True, f"{FACTS}": True}

    # The twin: the mark of the newest partition instead of the oldest, as where idle partitions are declared normal.
    declared = manifest["sources"]["source.payments_warehouse.raw_payments.transaction_created"]["meta"]["feed"]
    declared["idle_partitions"] = "normal"
    blind = tick(now, Lineage(manifest))
    assert (blind[PAYMENTS].state, blind[PAYMENTS].age) == ("pass", timedelta(minutes=1))
    assert blind[FACTS].state == "pass"

    # The partition flows again, the models are not built: the hop is the first of them now.
    pipeline.produce(FROZEN, now - timedelta(minutes=2))
    pipeline.run(build=False)
    landed = tick(now + timedelta(seconds=1))
    assert landed[PAYMENTS].state == "pass"
    assert (landed[FACTS].state, landed[FACTS].hop) == ("error", "stg_payments__transactions")
    assert f"its newest of {PAYMENTS} partition {FROZEN} is 1d 2h old" in landed[FACTS].held_by
    # Staging alone is built, and the next model is what holds the mart back.
    pipeline.dbt.run("--select", "stg_payments__transactions")
    staged = tick(now + timedelta(seconds=2))
    assert (staged[FACTS].state, staged[FACTS].hop) == ("error", "int_payments__transactions_converted")
    pipeline.run()
    over = tick(now + timedelta(seconds=3))
    assert over[FACTS].state == "pass"
    assert over[FACTS].age == timedelta(minutes=2, seconds=3)


def dagster_freshness(query: Query) -> dict[str, bool]:
    """Dagster's own freshness checks of 24 hours, over the materializations the green runs would have left it."""
    instance = dg.DagsterInstance.ephemeral()
    keys = {name: dg.AssetKey(name.split(".")) for name in (PAYMENTS, FACTS)}
    ((finished,),) = query("select max(finished_at) from ops.runs where outcome = 'success'")
    assert datetime.now(UTC) - finished < timedelta(hours=1)
    for key in keys.values():
        instance.report_runless_asset_event(dg.AssetMaterialization(key))
    assets: list[Any] = [dg.AssetSpec(key) for key in keys.values()]
    checks = dg.build_last_update_freshness_checks(assets=list(keys.values()), lower_bound_delta=timedelta(hours=24))
    job = dg.Definitions(assets=assets, asset_checks=checks).resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(instance=instance)
    passed = {evaluation.asset_key: evaluation.passed for evaluation in result.get_asset_check_evaluations()}
    return {name: passed[key] for name, key in keys.items()}


def test_a_source_time_from_the_future_hides_nothing(
    pipeline: Pipeline, warehouse: Settings, connection: Connection, clean_settings: Settings
) -> None:
    pipeline.feeds = [feed for feed in pipeline.feeds if feed.name == PAYMENTS]
    now = datetime.now(UTC).replace(microsecond=0)
    pipeline.produce(0, now + timedelta(days=300))
    pipeline.run(build=False)
    ages = {age.table: age for age in measure(Lineage(load_manifest(clean_settings)), connection, now)}
    later = {
        age.table: age for age in measure(Lineage(load_manifest(clean_settings)), connection, now + timedelta(hours=30))
    }
    assert (ages[PAYMENTS].state, later[PAYMENTS].state) == ("pass", "error")


def test_what_never_landed_is_unknown_and_asking_changes_nothing(
    warehouse: Settings, connection: Connection, clean_settings: Settings, query: Query
) -> None:
    """Before the first command there are no tables, and none are made."""
    ages = measure(Lineage(load_manifest(clean_settings)), connection, datetime.now(UTC))
    assert {age.state for age in ages} == {"unknown"}
    assert {age.held_by for age in ages if age.table == PAYMENTS} == {f"{PAYMENTS}: nothing landed yet"}
    assert query("select count(*) from pg_namespace where nspname in ('ops', 'raw_payments')") == [(0,)]

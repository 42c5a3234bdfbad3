"""Dagster left to itself, on an Apache Kafka: what is produced reaches the mart; outages and deaths are got over, once.

The daemon and the code server are processes, as `warehouse ui` starts them; broker, Postgres and runs are real. What
needs no daemon is evaluated in this process on a temporary instance.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import psycopg2
import pytest

from ingestion.settings import Settings
from orchestration.definitions import INGEST_JOB, JOB, build_definitions
from orchestration.run import prepare
from orchestration.sample import SampleSpec, generate, to_kafka
from orchestration.triggers import UNFINISHED
from orchestration.ui import Servers, dagster_servers
from tests.harness.apache_kafka import ApacheKafka
from tests.harness.project_copy import copy_project

PAYMENTS = "raw_payments.transaction_created"
USERS = "raw_users.user_events"
TOPICS = {PAYMENTS: "payments_transaction_created", USERS: "user_events"}
KEY = dg.AssetKey(["raw_payments", "transaction_created"])
# Far longer than it takes: a test that waits for something else fails by this.
PATIENCE_S = 250.0
pytestmark = pytest.mark.timeout(600)


@dataclass
class Site:
    """A warehouse of the module's own: project, database, topics."""

    settings: Settings
    kafka: ApacheKafka
    sent: int = 0

    def produce(self, records: int, feed: str = PAYMENTS) -> None:
        self.sent += records if feed == PAYMENTS else 0
        start = datetime.now(UTC).replace(microsecond=0) - timedelta(days=2)
        spec = SampleSpec(records=records, seed=self.sent, start=start, bad_share=0.0)
        to_kafka(generate(spec, feed), self.kafka.bootstrap, TOPICS.__getitem__)

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        connection = psycopg2.connect(self.settings.require("WAREHOUSE_DSN", "the test has one"))
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def count(self, relation: str) -> int:
        ((there,),) = self.query(f"select to_regclass('{relation}') is not null")
        return int(self.query(f"select count(*) from {relation}")[0][0]) if there else 0

    @property
    def landed(self) -> int:
        """Messages that landed, once each: a second copy would have the same coordinates."""
        ((rows, distinct),) = self.query(
            f"select count(*), count(distinct (_kafka_partition, _kafka_offset)) from {PAYMENTS} "
            "where _dlt_load_id in (select load_id from raw_payments._dlt_loads)"
        )
        assert rows == distinct
        return int(rows)


@pytest.fixture(scope="module")
def site(services: Settings, kafka: ApacheKafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = copy_project(tmp_path_factory.mktemp("project"))
    declared = root / "models/staging/payments/_payments__sources.yml"
    text = declared.read_text()
    assert "{messages: 1000, seconds: 60}" in text
    declared.write_text(text.replace("{messages: 1000, seconds: 60}", "{messages: 1, seconds: 0}"))
    server = services.require("WAREHOUSE_DSN", "the embedded Postgres has one")
    name = f"unattended_{os.getpid()}"
    admin = psycopg2.connect(server)
    admin.autocommit = True
    admin.cursor().execute(f"create database {name}")
    settings = services.with_env(
        WAREHOUSE_DSN=psycopg2.extensions.make_dsn(server, dbname=name),
        KAFKA_BOOTSTRAP_SERVERS=kafka.bootstrap,
        KAFKA_CLUSTER_INCARNATION="",
        WAREHOUSE_EMBEDDED="",
        WAREHOUSE_ENVIRONMENT="production",
        WAREHOUSE_SENSOR_SECONDS="5",
    )
    settings = replace(settings, project_dir=root, home=tmp_path_factory.mktemp("home"))
    for topic in TOPICS.values():
        kafka.create_topic(topic, partitions=2)
    prepare(settings)
    yield Site(settings, kafka)
    admin.cursor().execute(f"drop database if exists {name} with (force)")
    admin.close()


@pytest.fixture(scope="module")
def definitions(site: Site) -> dg.Definitions:
    return build_definitions(site.settings)


def wait_for(what: str, reached: Callable[[], bool], servers: Servers) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        if time.monotonic() > deadline:
            logs = "\n".join(server.log.read_text("utf-8", "replace")[-3000:] for server in servers.running)
            pytest.fail(f"not within {PATIENCE_S:.0f} s: {what}\n{logs}")
        time.sleep(0.1)


# --- an outage, without a daemon --------------------------------------------------------------------------------------


def test_a_broker_that_is_down_is_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.produce(20)
    hurried = site.settings.with_env(
        WAREHOUSE_RETRY_SECONDS="0", WAREHOUSE_RUN_RETRY_SECONDS="0.5", WAREHOUSE_RUN_RETRIES="12"
    )
    job = build_definitions(hurried).resolve_job_def(INGEST_JOB)
    monkeypatch.setattr("ingestion.kafka.REQUEST_TIMEOUT_S", 1.0)
    site.kafka.stop()
    outcome: list[dg.ExecuteInProcessResult] = []
    run = threading.Thread(target=lambda: outcome.append(job.execute_in_process(raise_on_error=False)))
    run.start()
    time.sleep(5)
    site.kafka.start()
    run.join(PATIENCE_S)

    (result,) = outcome
    assert result.success
    waits: dict[str, list[float]] = {}
    for event in result.all_events:
        if event.is_step_up_for_retry:
            waits.setdefault(str(event.step_key), []).append(event.step_retry_data.seconds_to_wait or 0.0)
    print(f"waited between tries: {waits}")
    assert waits
    for step in waits.values():
        assert all(0 <= wait <= 0.5 * 2**number for number, wait in enumerate(step))
    assert site.landed == site.sent
    assert site.count("ops.dead_letters") == 0


def test_an_error_that_cannot_pass_is_one_attempt(site: Site) -> None:
    broken = site.settings.with_env(KAFKA_SECURITY_PROTOCOL="NONSENSE", WAREHOUSE_RUN_RETRIES="12")
    job = build_definitions(broken).resolve_job_def(INGEST_JOB)
    result = job.execute_in_process(raise_on_error=False)
    assert not result.success
    starts = [event.step_key for event in result.all_events if event.is_step_start]
    assert sorted(starts) == ["raw_fx__daily_rates", "raw_payments__transaction_created", "raw_users__user_events"]


# --- no work twice, without a daemon ----------------------------------------------------------------------------------


def sensor_requests(definitions: dg.Definitions, instance: dg.DagsterInstance, cursor: str | None = None) -> Any:
    repository = definitions.get_repository_def()
    with dg.build_sensor_context(instance=instance, cursor=cursor, repository_def=repository) as context:
        return repository.get_sensor_def("backlog").evaluate_tick(context)


def test_a_feed_that_is_queued_is_not_asked_for_again(site: Site, definitions: dg.Definitions) -> None:
    site.produce(5)
    job = definitions.resolve_job_def(INGEST_JOB)
    with dg.instance_for_test() as instance:
        tick = sensor_requests(definitions, instance)
        asked = {request.run_key for request in tick.run_requests or []}
        assert [key for key in asked if key.startswith(f"{PAYMENTS}@")]
        # A daemon that died before it noted that asks the same: Dagster makes one run of a key.
        assert asked == {request.run_key for request in sensor_requests(definitions, instance).run_requests or []}

        assert dg.DagsterRunStatus.QUEUED in UNFINISHED
        run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTING, asset_selection=frozenset({KEY}))
        again = sensor_requests(definitions, instance)
        assert not [request for request in again.run_requests or [] if request.run_key.startswith(PAYMENTS)]
        assert "queued or running" in (again.skip_message or "queued or running")
        instance.report_run_failed(run)

        # The same of the job that reads every feed; and its schedule leaves a tick out while one is going.
        whole = instance.create_run_for_job(definitions.resolve_job_def(JOB), status=dg.DagsterRunStatus.STARTED)
        assert not sensor_requests(definitions, instance).run_requests
        hourly = definitions.get_repository_def().get_schedule_def("hourly")
        with dg.build_schedule_context(instance=instance, repository_def=definitions.get_repository_def()) as context:
            assert not hourly.evaluate_tick(context).run_requests
            instance.report_run_failed(whole)
            assert len(hourly.evaluate_tick(context).run_requests or []) == 1


def test_models_follow_a_landing_once(definitions: dg.Definitions) -> None:
    feeds = [["raw_payments", "transaction_created"], ["raw_users", "user_events"], ["raw_fx", "daily_rates"]]
    chosen = dg.AssetSelection.assets(*feeds).downstream(include_self=False).without_checks()
    chosen |= dg.AssetSelection.assets(["reference", "currencies"]).without_checks()
    seed, staged = dg.AssetKey(["reference", "currencies"]), dg.AssetKey(["staging", "stg_payments__transactions"])
    users, mart = dg.AssetKey(["staging", "stg_users__events"]), dg.AssetKey(["marts", "fct_transactions"])
    repository = definitions.get_repository_def()
    keys = [key for key in chosen.resolve(repository.asset_graph) if key.path[0] != "docs"]

    def tick(cursor: Any) -> tuple[set[dg.AssetKey], Any]:
        result = dg.evaluate_automation_conditions(definitions, instance, asset_selection=chosen, cursor=cursor)
        return {key for key in keys if result.get_num_requested(key)}, result.cursor

    def materialize(*made: Any) -> None:
        for key in made:
            instance.report_runless_asset_event(dg.AssetMaterialization(key))

    with dg.instance_for_test() as instance:
        # Nothing has landed: what stands on seeds alone, and once.
        first, cursor = tick(None)
        assert seed in first
        assert staged not in first
        assert tick(cursor)[0] == set()
        # Landed and built.
        materialize(*feeds)
        _, cursor = tick(cursor)
        materialize(*keys)
        _, cursor = tick(cursor)
        materialize(KEY)
        followed, cursor = tick(cursor)
        assert {staged, mart} <= followed
        assert users not in followed
        # What was asked for is not asked for again, whether it succeeds or a data test fails.
        assert tick(cursor)[0] == set()


def test_the_look_of_every_minute_measures_while_nothing_runs(site: Site, definitions: dg.Definitions) -> None:
    repository = definitions.get_repository_def()
    runs, looked = "select count(*) from ops.runs", "select count(*) from ops.queue_depths"
    before, depths = site.query(runs), site.query(looked)
    with dg.instance_for_test() as instance, dg.build_sensor_context(instance, repository_def=repository) as context:
        tick = repository.get_sensor_def("watch").evaluate_tick(context)
    assert not tick.run_requests
    assert "could not look" not in (tick.skip_message or "")
    assert site.query(looked) > depths
    assert site.query(runs) == before


# --- the daemon itself ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def servers(site: Site) -> Iterator[Servers]:
    with dagster_servers(site.settings) as servers:
        servers.start_code_server()
        servers.start_daemon()
        yield servers


@pytest.fixture
def instance(servers: Servers) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(servers.home)) as instance:
        yield instance


def landings(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Runs that landed payments, the oldest first."""
    runs = instance.get_runs(dg.RunsFilter(job_name=INGEST_JOB))
    return [run for run in reversed(runs) if KEY in (run.asset_selection or ())]


def test_what_is_produced_reaches_the_mart_without_any_command(
    site: Site, servers: Servers, instance: dg.DagsterInstance
) -> None:
    site.produce(30, USERS)
    site.produce(100)
    wait_for("the first rows in the mart", lambda: site.count("marts.fct_transactions") > 0, servers)
    idle = dg.RunsFilter(statuses=UNFINISHED)
    wait_for("nothing left to do", lambda: not instance.get_runs(idle), servers)

    before = site.count("marts.fct_transactions")
    started = time.monotonic()
    site.produce(50)
    wait_for("the new rows in the mart", lambda: site.count("marts.fct_transactions") > before, servers)
    print(f"from produce to mart: {time.monotonic() - started:.1f} s")
    assert site.landed == site.sent
    assert {run.tags["warehouse/trigger"] for run in instance.get_runs()} <= {"sensor", "automation", "schedule"}


def test_a_killed_run_is_marked_failed_and_the_next_one_sweeps(
    site: Site, servers: Servers, instance: dg.DagsterInstance
) -> None:
    done = {run.run_id for run in landings(instance)}
    site.produce(3_000)

    def kill() -> bool:
        for run in landings(instance):
            if run.run_id not in done and run.status is dg.DagsterRunStatus.STARTED:
                events = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
                pids = [word for event in events for word in event.message.split("pid: ")[1:]]
                if pids:
                    os.kill(int(pids[0].split(")")[0]), signal.SIGKILL)
                    return True
        return False

    wait_for("a run to kill", kill, servers)
    wait_for("all of it landed", lambda: site.landed == site.sent, servers)

    killed, *later = [run for run in landings(instance) if run.run_id not in done]
    failed = instance.get_run_by_id(killed.run_id)
    assert failed is not None
    assert failed.status is dg.DagsterRunStatus.FAILURE
    assert later
    ((held,),) = site.query("select count(*) from pg_locks where locktype = 'advisory' and not granted")
    assert held == 0


def test_a_daemon_that_died_catches_up_without_a_doubled_run(
    site: Site, servers: Servers, instance: dg.DagsterInstance
) -> None:
    wait_for("nothing left to do", lambda: not instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)), servers)
    daemon = servers.running.pop()
    assert daemon.name == "daemon"
    daemon.process.kill()
    daemon.process.wait(10)
    before = {run.run_id for run in landings(instance)}
    site.produce(40)
    servers.start_daemon()
    wait_for("what was produced meanwhile", lambda: site.landed == site.sent, servers)
    wait_for("nothing left to do", lambda: not instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)), servers)

    new = [run for run in landings(instance) if run.run_id not in before]
    assert [run.status for run in new] == [dg.DagsterRunStatus.SUCCESS]
    # A killed run that is run again carries the key of the first.
    asked = [run for run in instance.get_runs() if "dagster/run_key" in run.tags and run.parent_run_id is None]
    keys = [run.tags["dagster/run_key"] for run in asked]
    assert len(keys) == len(set(keys))


def test_a_backfill_shows_its_plan_and_lands_when_told_to(
    site: Site, servers: Servers, instance: dg.DagsterInstance, definitions: dg.Definitions
) -> None:
    job = definitions.resolve_job_def("backfill__raw_payments__transaction_created")
    site.query(f"delete from {PAYMENTS} where _kafka_offset < 3 and _kafka_partition = 0")
    assert site.landed == site.sent - 3
    today = datetime.now(UTC).date()

    def run(apply: bool) -> dg.ExecuteInProcessResult:
        config = {"from_day": f"{today - timedelta(days=4)}", "to_day": f"{today}", "apply": apply}
        ops = {"plan__raw_payments__transaction_created": {"config": config}}
        return job.execute_in_process(run_config={"ops": ops}, instance=instance)

    plan = run(False)
    (output,) = [event for event in plan.all_events if event.is_successful_output and event.step_key.startswith("plan")]
    assert "to restore" in str(output.step_output_data.metadata["plan"].value)
    assert site.landed == site.sent - 3
    run(True)
    assert site.landed == site.sent

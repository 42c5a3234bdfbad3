"""`warehouse status`: what a feed with loss, dead letters and lag shows, and what is shown when a server keeps silent.

Loss and lag on an Apache Kafka, the rest on what is embedded; the command as it is installed.
"""

import json
import socket
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition
from psycopg2.extensions import make_dsn

from ingestion import ledger
from ingestion.database import connect
from ingestion.errors import ConfigurationError, SourceLossError, TransientError
from ingestion.feeds import FeedSpec, KafkaOrigin, load_feeds
from ingestion.landing import land_feed
from ingestion.settings import Settings
from orchestration.run import prepare
from orchestration.status import answering_services, fetch_status, render_status
from tests.harness.apache_kafka import ApacheKafka
from tests.harness.models import TRANSACTIONS, USER_EVENTS, Dbt, RawLog, make_payments, make_user_events
from tests.harness.project_copy import copy_project, run_warehouse
from tests.harness.records import payment

PAYMENTS = "raw_payments.transaction_created"
USERS = "raw_users.user_events"

Query = Callable[..., list[tuple]]


@pytest.fixture
def on_kafka(warehouse: Settings, kafka: ApacheKafka) -> Settings:
    return warehouse.with_env(
        KAFKA_BOOTSTRAP_SERVERS=kafka.bootstrap, WAREHOUSE_EMBEDDED="", KAFKA_CLUSTER_INCARNATION=""
    )


@pytest.fixture
def feed(own_topic: Callable[[str], FeedSpec], kafka: ApacheKafka) -> FeedSpec:
    """Payments on a topic of two partitions nobody else uses."""
    made = own_topic(PAYMENTS)
    assert isinstance(made.origin, KafkaOrigin)
    kafka.create_topic(made.origin.topic, 2)
    return made


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def produce(kafka: ApacheKafka, feed: FeedSpec, partition: int, values: list[bytes]) -> None:
    assert isinstance(feed.origin, KafkaOrigin)
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for value in values:
        producer.produce(feed.origin.topic, value=value, partition=partition)
    assert producer.flush(30) == 0


def delete_records(kafka: ApacheKafka, settings: Settings, feed: FeedSpec, before: int) -> None:
    """As retention does it, and wait until the broker says so."""
    assert isinstance(feed.origin, KafkaOrigin)
    place = TopicPartition(feed.origin.topic, 0, before)
    kafka.admin().delete_records([place])[place].result()


def test_loss_dead_letters_and_lag_are_told_with_what_to_do(
    on_kafka: Settings, kafka: ApacheKafka, feed: FeedSpec, query: Query
) -> None:
    produce(kafka, feed, 0, [payment() for _ in range(5)] + [b"{broken", b"{", b"["])
    assert land_feed(on_kafka, feed).dead == 3
    produce(kafka, feed, 0, [payment() for _ in range(10)])
    delete_records(kafka, on_kafka, feed, 12)

    # Before a run has met it: named, but not recorded yet.
    (one,) = fetch_status(on_kafka, [feed]).feeds
    assert (one.lag, one.at_broker) == (6, 6)
    assert [detail.partition(" lost ")[2] for detail in one.unrecorded] == [
        "offsets 8 to 11 before they were read (retention)"
    ]
    assert f"{feed.name}: records were lost" in render_status(fetch_status(on_kafka, [feed]))

    assert land_feed(on_kafka, feed).open_losses
    produce(kafka, feed, 1, [payment() for _ in range(7)])
    query("update raw_payments._dead_letters set failed_at = now() - interval '3 days 4 hours' where _kafka_offset = 6")
    status = fetch_status(on_kafka, [feed])
    (one,) = status.feeds
    assert one.account is not None
    assert (one.lag, one.unrecorded, one.account.lost, len(one.account.open_losses)) == (7, (), 4, 1)
    for width in (80, 120):
        said = render_status(status, width)
        lines = said.splitlines()
        assert max(len(line) for line in lines if not line.startswith("    warehouse")) <= width
        assert "  14 offered = 11 landed + 3 dead letters" in lines
        assert "  4 lost by the source before they were read, nobody has accepted it" in lines
        assert f'    warehouse feeds accept-loss {feed.name} --reason "..."' in lines
        assert "  3 dead letters open, the oldest for 3d 4h" in lines
        assert f"    warehouse dead-letters list --feed {feed.name}" in lines
        assert any(line.endswith("7 waiting at the broker") for line in lines)
        assert lines[-1] == f"! {feed.name}: records were lost"

    connection = connect(on_kafka)
    ledger.accept_losses(connection, feed, "known")
    with ledger.writing(connection, feed):
        status = fetch_status(on_kafka, [feed])
    said = render_status(status)
    assert "  4 lost by the source before they were read, accepted\n" in said
    assert f"  being written by {ledger.holder_name()} for 0s" in said
    assert "records were lost" not in said
    connection.close()
    (one,) = fetch_status(on_kafka, [feed]).feeds
    assert one.account is not None
    assert one.account.holder is None


def test_a_topic_that_is_another_one_is_told_before_a_run_refuses_it(
    on_kafka: Settings, kafka: ApacheKafka, feed: FeedSpec, own_topic: Callable[[str], FeedSpec]
) -> None:
    produce(kafka, feed, 0, [payment()])
    land_feed(on_kafka, feed)
    assert isinstance(feed.origin, KafkaOrigin)
    other = own_topic(PAYMENTS)
    assert isinstance(other.origin, KafkaOrigin)
    kafka.create_topic(other.origin.topic, 1)
    (one,) = fetch_status(on_kafka, [other]).feeds
    assert one.unrecorded == (
        f"topic {other.origin.topic} is not the one read before: re-created, or of another cluster",
    )
    with pytest.raises(SourceLossError):
        land_feed(on_kafka, other)
    (one,) = fetch_status(on_kafka, [other]).feeds
    assert one.account is not None
    assert (len(one.account.open_losses), one.unrecorded) == (1, ())


def test_topics_are_asked_for_together_and_one_that_is_missing_is_named(
    on_kafka: Settings, kafka: ApacheKafka, feed: FeedSpec, own_topic: Callable[[str], FeedSpec]
) -> None:
    missing = replace(own_topic(USERS), table="user_events")
    produce(kafka, feed, 1, [payment()] * 3)
    there, not_there = fetch_status(on_kafka, [feed, missing]).feeds
    assert (there.lag, there.problem) == (3, None)
    assert isinstance(missing.origin, KafkaOrigin)
    assert not_there.problem is not None
    assert f"has no topic {missing.origin.topic}" in not_there.problem


# --- the reconciliation's verdict -------------------------------------------------------------------------------------


def test_the_verdict_of_the_last_reconciliation(
    dbt: Dbt, log: RawLog, warehouse: Settings, query: Query, clean_settings: Settings
) -> None:
    feeds = [one for one in load_feeds(clean_settings) if one.name in (PAYMENTS, USERS)]
    alone = warehouse.with_env(KAFKA_BOOTSTRAP_SERVERS="")

    def said() -> str:
        return render_status(fetch_status(alone, feeds), 200)

    assert "Reconciliation: not built yet" in said()
    log.land(TRANSACTIONS, make_payments(61, 20, ["USD"])[0][0])
    log.land(USER_EVENTS, make_user_events(62, 20)[0])
    for command in ("seed", "run"):
        assert dbt(command)[0]
    assert "every day adds up, through 2025-06-01" in said()
    later = make_payments(63, 20, ["USD"])[0][0]
    log.loads += 12
    log.land(TRANSACTIONS, later)
    assert f"{len(later)} landed rows not in the models yet" in said()

    query("delete from raw_payments.transaction_created where _loaded_at::date = '2025-06-01'")
    dbt.run()
    dbt.run("--full-refresh", "--select", "audit_loads+", "audit_amounts+")
    text = said()
    assert f"{PAYMENTS} does not add up on 1 day, first on 2025-06-01" in text
    assert "select * from audit.audit_reconciliation where not adds_up" in text
    assert f"! {PAYMENTS}: does not add up" in text
    found = fetch_status(alone, feeds).as_dict()
    assert found["reconciliation"] == {"built": True, "adds_up": False, "first_broken_day": "2025-06-01"}
    assert [one["reconciliation"]["adds_up"] for one in found["feeds"]] == [False, True]


# --- what it costs, and what it does without --------------------------------------------------------------------------


def test_no_raw_table_is_read(warehouse: Settings, log: RawLog, query: Query, clean_settings: Settings) -> None:
    """A user who may not read them gets the same answer; so it does not take longer the more has landed."""
    log.land(TRANSACTIONS, make_payments(64, 20, ["USD"])[0][0], dead=2)
    feeds = load_feeds(clean_settings)
    role = f"reader_{uuid.uuid4().hex[:8]}"
    query(f"create role {role} login password 'reader'")
    try:
        for schema in ("ops", "raw_payments", "raw_users", "raw_fx"):
            query(f"grant usage on schema {schema} to {role}; grant select on all tables in schema {schema} to {role}")
        for one in feeds:
            query(f"revoke select on {one.name} from {role}")
        dsn = make_dsn(warehouse.env["WAREHOUSE_DSN"], user=role, password="reader")
        reader = warehouse.with_env(WAREHOUSE_DSN=dsn)
        assert [_without_time(one) for one in fetch_status(reader, feeds).as_dict()["feeds"]] == [
            _without_time(one) for one in fetch_status(warehouse, feeds).as_dict()["feeds"]
        ]
        query(f"revoke select on raw_payments._ledger from {role}")
        with pytest.raises(Exception, match="permission denied"):  # twin: what it does read it needs
            fetch_status(reader, feeds)
    finally:
        query(f"drop owned by {role}; drop role {role}")


def _without_time(one: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in one.items() if not name.endswith("_seconds")}


@pytest.mark.parametrize("broker_too", [False, True], ids=["database", "both"])
def test_a_database_that_keeps_silent(
    warehouse: Settings, silent: str, clean_settings: Settings, broker_too: bool
) -> None:
    settings = warehouse.with_env(WAREHOUSE_DSN=f"postgresql://u:p@{silent}/x")
    if broker_too:
        settings = settings.with_env(KAFKA_BOOTSTRAP_SERVERS=silent)
    status = fetch_status(settings, load_feeds(clean_settings))
    assert isinstance(status.problem, TransientError)
    assert status.problem.message == f"Postgres at {silent}/x does not answer within 0.4 s."
    said = render_status(status, 80)
    assert "Reconciliation: not known." in said
    assert said.count(f"the broker at {silent} does not answer within 0.4 s") == int(broker_too)
    assert PAYMENTS in said


def test_a_broker_that_keeps_silent_hides_nothing_else(
    warehouse: Settings, silent: str, log: RawLog, clean_settings: Settings
) -> None:
    log.land(TRANSACTIONS, make_payments(65, 20, ["USD"])[0][0])
    settings = warehouse.with_env(KAFKA_BOOTSTRAP_SERVERS=silent, WAREHOUSE_STATUS_SECONDS="0.2")
    status = fetch_status(settings, load_feeds(clean_settings))
    assert status.problem is None
    said = render_status(status, 200)
    assert f"{len(log.landed)} offered = {len(log.landed)} landed" in said
    assert said.count(f"! the broker at {silent} does not answer within 0.2 s") == 1
    assert "what waits at the broker is not known" in said


def test_the_command_shows_what_it_knows_and_says_what_failed(tmp_path: Path, warehouse: Settings, silent: str) -> None:
    project = copy_project(tmp_path / "project")
    named = {
        "WAREHOUSE_DSN": f"postgresql://u:p@{silent}/x",
        "KAFKA_BOOTSTRAP_SERVERS": warehouse.env["KAFKA_BOOTSTRAP_SERVERS"],
        "FX_API_BASE": warehouse.env["FX_API_BASE"],
    }
    result = run_warehouse(project, "status", **named)
    assert result.returncode == 4
    assert result.stderr.startswith(f"error: Postgres at {silent}/x does not answer within 0.4 s.\n  ")
    assert result.stdout.startswith("raw_fx.daily_rates\n")
    result = run_warehouse(project, "status", "--json", **named)
    assert result.returncode == 4
    found = json.loads(result.stdout)
    assert found["problem"] == f"Postgres at {silent}/x does not answer within 0.4 s."
    assert {one["offered"] for one in found["feeds"]} == {None}


def test_a_setting_that_is_no_number(warehouse: Settings, clean_settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="WAREHOUSE_STATUS_SECONDS must be a number"):
        fetch_status(warehouse.with_env(WAREHOUSE_STATUS_SECONDS="soon"), load_feeds(clean_settings))


def test_what_never_ran_is_not_started_to_be_asked(clean_settings: Settings, tmp_path: Path) -> None:
    """With nothing configured: no server, no folder, and an answer all the same."""
    home = tmp_path / "home"
    feeds = load_feeds(clean_settings)
    with answering_services(replace(clean_settings, home=home)) as settings:
        status = fetch_status(settings, feeds)
    assert not home.exists()
    assert render_status(status).count("nothing offered yet") == len(feeds)


def test_only_the_database_is_started_to_be_asked(clean_settings: Settings, tmp_path: Path) -> None:
    from orchestration import services

    own = replace(clean_settings, home=tmp_path / "home")
    feeds = load_feeds(clean_settings)
    try:
        with services.running(own) as settings:
            prepare(settings)
        services.stop(own, force=True)  # waits until it is down
        with answering_services(own) as settings:
            assert {one.name for one in services.status(own).services} == {"postgres"}
            status = fetch_status(settings, feeds)
        assert status.problem is None
        assert {one.problem for one in status.feeds} == {None}
    finally:
        services.erase(own, force=True)

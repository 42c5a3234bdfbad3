"""A window of time read again from an Apache Kafka, which knows the offset of a time, transactions and compaction."""

import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from confluent_kafka import Producer

from ingestion.feeds import AcceptedValues, FeedSpec, KafkaOrigin
from ingestion.landing import land_feed
from ingestion.replay_window import TimeWindow, WindowReplay, replay_window
from ingestion.settings import Settings
from tests.harness.apache_kafka import ApacheKafka

PAYMENTS = "raw_payments.transaction_created"
FIRST = datetime(2026, 1, 5, tzinfo=UTC)

Query = Callable[..., list[tuple]]


@pytest.fixture
def on_kafka(warehouse: Settings, kafka: ApacheKafka) -> Settings:
    return warehouse.with_env(
        KAFKA_BOOTSTRAP_SERVERS=kafka.bootstrap, KAFKA_CLUSTER_INCARNATION="", WAREHOUSE_EMBEDDED="postgres"
    )


@pytest.fixture
def feed(kafka: ApacheKafka, feed_named: Callable[[str], FeedSpec]) -> FeedSpec:
    declared = feed_named(PAYMENTS)
    assert isinstance(declared.origin, KafkaOrigin)
    topic = f"payments_{uuid.uuid4().hex[:8]}"
    kafka.create_topic(topic, partitions=2)
    return replace(declared, origin=replace(declared.origin, topic=topic))


def payment(currency: str = "USD") -> bytes:
    record = {
        "transaction_id": str(uuid.uuid4()), "amount": 1, "currency": currency, "user_id": "usr_123456",
        "merchant_id": "mer_12345", "country": "US", "created_at": "2026-01-02T03:04:05Z", "status": "completed",
    }  # fmt: skip
    return json.dumps(record).encode()


def produce(kafka: ApacheKafka, feed: FeedSpec, records: list[tuple[int, datetime, bytes | None]]) -> None:
    """(partition, time, value), in one transaction, so that markers stand between."""
    assert isinstance(feed.origin, KafkaOrigin)
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": uuid.uuid4().hex})
    producer.init_transactions(30)
    producer.begin_transaction()
    for partition, at, value in records:
        producer.produce(
            feed.origin.topic, key=b"k", value=value, partition=partition, timestamp=int(at.timestamp() * 1000)
        )
    producer.commit_transaction(30)


def relaxed(feed: FeedSpec) -> FeedSpec:
    columns = tuple(
        replace(c, rules=(AcceptedValues(frozenset({"USD", "CHF"})),)) if c.name == "currency" else c
        for c in feed.columns
    )
    return replace(feed, columns=columns)


def days(result: WindowReplay) -> dict[str, dict[str, int]]:
    return {day: {k: v for k, v in counts.items() if v} for day, counts in sorted(result.days.items())}


def test_a_time_window_is_read_again_day_by_day(
    on_kafka: Settings, kafka: ApacheKafka, feed: FeedSpec, query: Query
) -> None:
    def hour(day: int, hours: float = 12) -> datetime:
        return FIRST + timedelta(days=day, hours=hours)

    produce(
        kafka,
        feed,
        [
            *((p, hour(day), payment()) for day in range(4) for p in (0, 1)),
            *((0, hour(day), payment("CHF")) for day in range(4)),
            # Late: of the second day, and behind records of later ones.
            (1, hour(1, 20), payment("CHF")),
            (1, hour(1, 21), None),
            (0, hour(2), b"{broken"),
        ],
    )
    landing = land_feed(on_kafka, feed)
    assert (landing.landed, landing.dead, landing.tombstones) == (8, 6, 1)
    query(f"delete from {PAYMENTS} where _kafka_partition = 1 and _kafka_timestamp = %s", hour(2))
    produce(kafka, feed, [(1, hour(2), payment())])  # not read yet: the normal run's

    window = TimeWindow(FIRST + timedelta(days=1), FIRST + timedelta(days=3))
    forecast = replay_window(on_kafka, relaxed(feed), window)
    assert days(forecast) == {
        "2026-01-06": {"read": 5, "unchanged": 2, "landed": 2, "empty": 1},
        "2026-01-07": {"read": 4, "unchanged": 1, "landed": 1, "failed": 1, "restored": 1},
    }
    assert forecast.reasons == {"malformed_json": 1}
    outcome = replay_window(on_kafka, relaxed(feed), window, apply=True)
    assert days(outcome) == days(forecast)
    again = replay_window(on_kafka, relaxed(feed), window, apply=True)
    assert (again.landed, again.restored, again.load_ids) == (0, 0, [])

    assert query("select status, count(*)::int from ops.dead_letters group by 1 order by 1") == [
        ("open", 3),
        ("replayed", 3),
    ]
    assert query("select sum(landed)::int, sum(dead)::int, sum(restored)::int from ops.ledger") == [(11, 3, 1)]
    assert query(f"select count(*)::int, count(distinct (_kafka_partition, _kafka_offset))::int from {PAYMENTS}") == [
        (11, 11)
    ]
    assert land_feed(on_kafka, relaxed(feed)).landed == 1


def test_what_the_topic_no_longer_holds_is_said(
    on_kafka: Settings, kafka: ApacheKafka, feed: FeedSpec, query: Query
) -> None:
    assert isinstance(feed.origin, KafkaOrigin)
    produce(kafka, feed, [(0, FIRST + timedelta(hours=h), payment()) for h in range(10)])
    land_feed(on_kafka, feed)
    from confluent_kafka import TopicPartition

    kafka.admin().delete_records([TopicPartition(feed.origin.topic, 0, 4)])
    deadline = datetime.now(UTC) + timedelta(seconds=15)
    window = TimeWindow(FIRST, FIRST + timedelta(days=1))
    while (result := replay_window(on_kafka, feed, window)).gone == 0:
        assert datetime.now(UTC) < deadline
    assert (result.gone, result.read, result.unchanged) == (4, 6, 6)

"""What a broker is asked before a topic is read: all at once, and nothing a mock broker leaves unanswered."""

import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient  # type: ignore[attr-defined]

from ingestion.errors import TransientError
from ingestion.feeds import FeedSpec, KafkaOrigin
from ingestion.kafka import TopicReader
from ingestion.landing import land_feed
from ingestion.settings import Settings
from tests.harness.apache_kafka import ApacheKafka
from tests.harness.records import payment

PAYMENTS = "raw_payments.transaction_created"


@pytest.fixture
def by_hand(warehouse: Settings) -> Settings:
    """The embedded broker, named by a setting as a user would: nothing says that it is a mock."""
    return warehouse.with_env(WAREHOUSE_EMBEDDED="postgres", KAFKA_CLUSTER_INCARNATION="")


def test_a_mock_broker_named_by_hand_is_not_asked_what_it_leaves_unanswered(
    by_hand: Settings, own_topic: Callable[[str], FeedSpec], send: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = own_topic(PAYMENTS)
    send(feed, [(b"k", payment()) for _ in range(3)], 0)
    # An answer that never comes would end this in an error.
    monkeypatch.setattr("ingestion.kafka.REQUEST_TIMEOUT_S", 2.0)
    assert land_feed(by_hand, feed).landed == 3
    # Twin: asked all the same, it never answers.
    monkeypatch.setattr("ingestion.kafka.MOCK_CLUSTER", "no such cluster")
    with pytest.raises(TransientError, match="does not answer"):
        land_feed(by_hand, feed)


class WatchedFuture:
    def __init__(self, future: "Future[Any]", log: list[str]) -> None:
        self._future = future
        self._log = log

    def result(self) -> Any:
        self._log.append("waited")
        return self._future.result()


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the broker and when an answer is waited for, in order."""
    log: list[str] = []

    class Watched(AdminClient):
        def list_offsets(self, *arguments: Any, **options: Any) -> Any:
            log.append("offsets")
            return {k: WatchedFuture(v, log) for k, v in super().list_offsets(*arguments, **options).items()}

        def describe_topics(self, *arguments: Any, **options: Any) -> Any:
            log.append("topic")
            return {k: WatchedFuture(v, log) for k, v in super().describe_topics(*arguments, **options).items()}

    monkeypatch.setattr("ingestion.kafka.AdminClient", Watched)
    return log


def test_a_broker_is_asked_everything_at_once(
    warehouse: Settings, feed_named: Callable[[str], FeedSpec], kafka: ApacheKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = feed_named(PAYMENTS)
    assert isinstance(declared.origin, KafkaOrigin)
    name = f"payments_{uuid.uuid4().hex[:8]}"
    feed = replace(declared, origin=replace(declared.origin, topic=name))
    kafka.create_topic(name, partitions=3)
    log = watch(monkeypatch)
    settings = warehouse.with_env(
        KAFKA_BOOTSTRAP_SERVERS=kafka.bootstrap, KAFKA_CLUSTER_INCARNATION="", WAREHOUSE_EMBEDDED=""
    )
    reader = TopicReader(settings, feed)
    try:
        topic = reader.fetch_topic()
        asked, after = log[:3], log[3:]
        log.clear()
        ask = TopicReader._ask_offsets

        def impatient(*arguments: Any) -> Any:
            answers = ask(*arguments)
            for answer in answers.values():
                answer.result()
            return answers

        monkeypatch.setattr(TopicReader, "_ask_offsets", impatient)
        reader.fetch_topic()
    finally:
        reader.close()
    assert topic.bounds == {0: (0, 0), 1: (0, 0), 2: (0, 0)}
    assert topic.incarnation
    assert topic.cluster
    assert sorted(asked) == ["offsets", "offsets", "topic"]
    assert set(after) == {"waited"}
    # Twin: one answer waited for before the next question.
    assert sorted(log[:3]) != ["offsets", "offsets", "topic"]

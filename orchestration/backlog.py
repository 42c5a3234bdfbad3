"""What waits at the broker: the topics of all feeds, asked at once by one client within a time limit.

    feeds -> one AdminClient: metadata -> identity, start and end of every log -> a Topic or a problem for each feed

Reads no record, makes no topic and starts nothing.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient, OffsetSpec

from ingestion.feeds import FeedSpec, KafkaOrigin
from ingestion.kafka import MOCK_CLUSTER, REFUSALS, Offsets, Topic, ask_offsets, client_config, take_topic_id
from ingestion.settings import Settings


def fetch_topics(settings: Settings, feeds: Sequence[FeedSpec], timeout_s: float) -> dict[str, Topic | str]:
    """For each Kafka feed its topic as the broker has it now, or what is wrong, in words."""
    reader = _Broker(settings, timeout_s)
    try:
        return reader.fetch({feed.name: feed.origin.topic for feed in feeds if isinstance(feed.origin, KafkaOrigin)})
    except KafkaException as error:
        problem = reader.name(error.args[0])
        return {feed.name: problem for feed in feeds if isinstance(feed.origin, KafkaOrigin)}


class _Broker:
    def __init__(self, settings: Settings, timeout_s: float) -> None:
        self._settings = settings
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._refused: KafkaError | None = None
        self._admin = AdminClient({**client_config(settings), "error_cb": self._on_error})

    def _on_error(self, error: KafkaError) -> None:
        if error.code() in REFUSALS:
            self._refused = error

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.05)

    def name(self, error: KafkaError) -> str:
        """What went wrong, in words."""
        self._admin.poll(0)
        error = self._refused or error
        broker = f"the broker at {self._settings.kafka_bootstrap}"
        if error.code() in REFUSALS:
            return f"{broker} refused us ({error.name()}); check KAFKA_SECURITY_PROTOCOL, KAFKA_SASL_ and KAFKA_SSL_"
        if error.code() == KafkaError._INVALID_ARG:
            return f"a KAFKA_ setting is not valid: {error.str()}; see .env.example"
        return (
            f"{broker} does not answer within {self._timeout_s:g} s ({error.name()}); "
            "WAREHOUSE_STATUS_SECONDS gives it longer"
        )

    def fetch(self, topics: Mapping[str, str]) -> dict[str, Topic | str]:
        """Feed -> its topic, or what is wrong with it."""
        # Of all topics: to be asked for one, some brokers make it.
        metadata = self._admin.list_topics(timeout=self._left())
        found: dict[str, Topic | str] = {}
        partitions: dict[str, list[int]] = {}
        for feed, topic in topics.items():
            known = metadata.topics.get(topic)
            if known is None or known.error is not None:
                found[feed] = (
                    f"the broker at {self._settings.kafka_bootstrap} has no topic {topic}, or does not show it to us"
                )
            else:
                partitions[topic] = sorted(known.partitions)
        cluster = metadata.cluster_id or ""
        described: dict[str, Future[Any]] = {}
        if partitions and not cluster.startswith(MOCK_CLUSTER):
            described = self._admin.describe_topics(TopicCollection(list(partitions)), request_timeout=self._left())
        bounds = [
            ask_offsets(self._admin, partitions, spec, self._left())
            for spec in (OffsetSpec.earliest(), OffsetSpec.latest())
        ]
        for feed, topic in topics.items():
            if topic in partitions:
                try:
                    start, end = (self._take(asked, topic) for asked in bounds)
                    found[feed] = Topic(
                        self._settings.get("KAFKA_CLUSTER_INCARNATION") or cluster,
                        take_topic_id(described[topic]) if described else "",
                        {partition: (start[partition], end[partition]) for partition in partitions[topic]},
                    )
                except KafkaException as error:
                    found[feed] = self.name(error.args[0])
        return found

    @staticmethod
    def _take(asked: Offsets, topic: str) -> dict[int, int]:
        return {place.partition: answer.result().offset for place, answer in asked.items() if place.topic == topic}

"""Reading a Kafka topic: the warehouse's own positions, a bounded run, no consumer group.

A run reads each partition from its committed position to the end offset it saw at the start, and stops there. Before a
row is read the positions are compared with the log and the topic's identity, so that lost records are named, never
skipped.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from confluent_kafka import (
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ListOffsetsResultInfo, OffsetSpec, TopicDescription

from ingestion.errors import (
    AuthenticationError,
    ConfigurationError,
    TransientError,
    WarehouseError,
)
from ingestion.feeds import FeedSpec, KafkaOrigin
from ingestion.settings import Settings

REQUEST_TIMEOUT_S = 15.0
# A broker that sends nothing for this long while records are due is an outage.
STALL_TIMEOUT_S = 60.0
MESSAGES_PER_CALL = 10_000
# How the cluster id of librdkafka's mock begins. It knows no topic ids, and leaves a question for one unanswered.
MOCK_CLUSTER = "mockCluster"

PASSED_ON = {
    "KAFKA_SECURITY_PROTOCOL": "security.protocol",
    "KAFKA_SASL_MECHANISM": "sasl.mechanism",
    "KAFKA_SASL_USERNAME": "sasl.username",
    "KAFKA_SASL_PASSWORD": "sasl.password",
    "KAFKA_SSL_CA_LOCATION": "ssl.ca.location",
}

# The broker's ways to say no, which another try does not change.
REFUSALS = (
    KafkaError._AUTHENTICATION,
    KafkaError._SSL,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
)

Offsets = dict[TopicPartition, Future[ListOffsetsResultInfo]]


@dataclass(frozen=True)
class Topic:
    """What the broker says of a topic now: identity, and per partition (start, end) of the log."""

    cluster: str
    incarnation: str
    bounds: Mapping[int, tuple[int, int]]


def client_config(settings: Settings) -> dict[str, Any]:
    """librdkafka's settings for the configured broker."""
    config: dict[str, Any] = {
        "bootstrap.servers": settings.require("KAFKA_BOOTSTRAP_SERVERS", "Kafka feeds need a broker"),
        "client.id": "payments-warehouse",
        "broker.address.family": "v4" if "127.0.0.1" in (settings.kafka_bootstrap or "") else "any",
        "log_level": 0,
        # A first connection waits half of it (50 ms) too. After failures it grows as ever.
        "reconnect.backoff.ms": 1,
    }
    for setting, name in PASSED_ON.items():
        value = settings.get(setting)
        if value is not None:
            config[name] = value
    return config


def ask_offsets(
    admin: AdminClient, partitions: Mapping[str, Iterable[int]], spec: OffsetSpec, timeout_s: float
) -> Offsets:
    """Ask for an offset of each partition, topic -> partitions; the answers come later, all at once.

    The end is that of what is committed: records of an open transaction are not offered yet.
    """
    places = {TopicPartition(topic, partition): spec for topic, numbers in partitions.items() for partition in numbers}
    if not places:
        return {}
    asked: Offsets = admin.list_offsets(
        places, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=timeout_s
    )
    return asked


def take_topic_id(described: Future[TopicDescription]) -> str:
    """Which incarnation of its name a topic is; empty where the broker does not know (before 2.8).

    Raises:
        KafkaException: the broker does not say.
    """
    try:
        return str(described.result().topic_id)
    except KafkaException as error:
        if error.args[0].code() in (KafkaError._UNSUPPORTED_FEATURE, KafkaError.UNSUPPORTED_VERSION):
            return ""
        raise


@dataclass(frozen=True)
class Loss:
    """Offsets first..last of a partition that the source lost, or that it now gives to other records."""

    kind: Literal["retention", "truncated"]
    partition: int
    first_position: int
    last_position: int
    detail: str


class TopicReader:
    """One topic, read once from given positions to the ends seen at the start."""

    def __init__(self, settings: Settings, feed: FeedSpec) -> None:
        assert isinstance(feed.origin, KafkaOrigin)
        self.feed = feed
        self.topic = feed.origin.topic
        self._settings = settings
        self._fatal: KafkaError | None = None
        self._config = {
            **client_config(settings),
            "group.id": "payments-warehouse-never-joined",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "fetch.queue.backoff.ms": 10,
            # Behind the last record may stand a transaction's marker only: the broker is to say so at once.
            "fetch.wait.max.ms": 10,
            "queued.max.messages.kbytes": 16_384,
            "fetch.max.bytes": 8 << 20,
            "error_cb": self._on_error,
        }
        self._consumer: Consumer | None = None

    def _on_error(self, error: KafkaError) -> None:
        if error.code() in (KafkaError._AUTHENTICATION, KafkaError._SSL):
            self._fatal = error

    def close(self) -> None:
        if self._consumer is not None:
            self._consumer.close()

    def fetch_topic(self) -> Topic:
        """Ask the broker who it is, which incarnation of the topic it holds, and where each log starts and ends."""
        try:
            self._consumer = self._consumer or Consumer(self._config)
            metadata = self._consumer.list_topics(self.topic, timeout=REQUEST_TIMEOUT_S)
        except KafkaException as error:
            raise self._classify(error.args[0]) from None
        topic = metadata.topics[self.topic]
        if topic.error is not None:
            raise self._classify(topic.error)
        admin = AdminClient({**client_config(self._settings), "error_cb": self._on_error})
        cluster = metadata.cluster_id or ""
        partitions = sorted(topic.partitions)
        # All at once: each answer is a round trip away.
        described: dict[str, Future[TopicDescription]] = (
            {}
            if cluster.startswith(MOCK_CLUSTER)
            else admin.describe_topics(TopicCollection([self.topic]), request_timeout=REQUEST_TIMEOUT_S)
        )
        starts = self._ask_offsets(admin, partitions, OffsetSpec.earliest())
        ends = self._ask_offsets(admin, partitions, OffsetSpec.latest())
        try:
            incarnation = take_topic_id(described[self.topic]) if described else ""
        except KafkaException as error:
            raise self._classify(error.args[0]) from None
        first, after = self._take_offsets(starts), self._take_offsets(ends)
        return Topic(
            self._settings.get("KAFKA_CLUSTER_INCARNATION") or cluster,
            incarnation,
            {partition: (first[partition], after[partition]) for partition in partitions},
        )

    def _ask_offsets(self, admin: AdminClient, partitions: Iterable[int], spec: OffsetSpec) -> Offsets:
        return ask_offsets(admin, {self.topic: partitions}, spec, REQUEST_TIMEOUT_S)

    def _take_offsets(self, asked: Offsets) -> dict[int, int]:
        try:
            return {place.partition: future.result().offset for place, future in asked.items()}
        except KafkaException as error:
            raise self._classify(error.args[0]) from None

    def find_offsets(self, topic: Topic, at: datetime) -> dict[int, int]:
        """Per partition the first offset whose record is of this time or later; the log's end where there is none.

        Raises:
            ConfigurationError: the broker cannot look up offsets by time, as the embedded one.
        """
        admin = AdminClient({**client_config(self._settings), "error_cb": self._on_error})
        filled = [partition for partition, (start, end) in topic.bounds.items() if start < end]
        if filled and all(found < 0 for found in self._offsets_at(admin, filled, 0).values()):
            raise ConfigurationError(
                f"{self.feed.name}: the broker at {self._settings.kafka_bootstrap} cannot look up offsets by time"
                + (" (the embedded one never can)." if "kafka" in self._settings.embedded else "."),
                hint="Name offsets instead: --partition P --from-offset A --to-offset B.",
            )
        found = self._offsets_at(admin, filled, int(at.timestamp() * 1000))
        return {
            partition: end if found.get(partition, -1) < 0 else found[partition]
            for partition, (_, end) in topic.bounds.items()
        }

    def _offsets_at(self, admin: AdminClient, partitions: list[int], milliseconds: int) -> dict[int, int]:
        if not partitions:
            return {}
        return self._take_offsets(self._ask_offsets(admin, partitions, OffsetSpec.for_timestamp(milliseconds)))

    def find_losses(self, topic: Topic, positions: Mapping[int, int]) -> list[Loss]:
        """What the log no longer holds of what comes next; empty when reading can simply go on.

        A compacted topic and transaction markers leave gaps inside the log and raise nothing here.
        """
        losses = []
        for partition, position in sorted(positions.items()):
            place = f"{self.topic} partition {partition}"
            if partition not in topic.bounds:
                losses.append(
                    Loss("truncated", partition, 0, position - 1, f"{place} is gone; it was read up to {position}")
                )
                continue
            start, end = topic.bounds[partition]
            if position < start:
                detail = f"{place} lost offsets {position} to {start - 1} before they were read (retention)"
                losses.append(Loss("retention", partition, position, start - 1, detail))
            elif position > end:
                detail = f"{place} ends at {end}, and was read up to {position} (the log was cut)"
                losses.append(Loss("truncated", partition, end, position - 1, detail))
        return losses

    def read(
        self, topic: Topic, positions: Mapping[int, int], batch_size: int = MESSAGES_PER_CALL
    ) -> Iterator[list[Message]]:
        """Messages from the positions to the ends, in batches; each partition in offset order.

        Yields messages only (no events); partitions without a position are read from their start. After the
        iterator ends every partition was read to its end.
        """
        assert self._consumer is not None, "fetch_topic comes first"
        consumer = self._consumer
        due = {
            partition: end for partition, (start, end) in topic.bounds.items() if positions.get(partition, start) < end
        }
        reached = {partition: positions.get(partition, topic.bounds[partition][0]) for partition in due}
        consumer.assign([TopicPartition(self.topic, partition, position) for partition, position in reached.items()])
        last_progress = time.monotonic()
        while due:
            # Asked for more than there are, it waits out its time. Some of them may be nobody's: markers, compacted.
            left = sum(end - reached[partition] for partition, end in due.items())
            events = consumer.consume(min(batch_size, MESSAGES_PER_CALL, left), 0.05)
            if self._fatal is not None:
                raise self._classify(self._fatal)
            # The last event of each partition tells whether all of them are messages from before the end.
            last = {event.partition(): event for event in events}
            reached |= {partition: event.offset() + 1 for partition, event in last.items() if event.error() is None}
            if all(
                event.offset() < due.get(partition, 0) - 1 and event.error() is None
                for partition, event in last.items()
            ) and not any(event.error() for event in events):
                batch = events
            else:
                batch = self._sort_events(consumer, events, due)
            if batch or not due:
                last_progress = time.monotonic()
            elif time.monotonic() - last_progress > STALL_TIMEOUT_S:
                raise TransientError(
                    f"{self.feed.name}: the broker has sent nothing of {self.topic} for {STALL_TIMEOUT_S:.0f} s; "
                    f"partitions {sorted(due)} are not read to their end.",
                    hint="Is the broker up? `warehouse doctor` checks. What was committed stays.",
                )
            if batch:
                yield batch
                # Not two batches at once in memory.
                del batch, events, last
        consumer.unassign()

    def _sort_events(self, consumer: Consumer, events: list[Message], due: dict[int, int]) -> list[Message]:
        """The messages from before the ends; partitions that reached theirs are no longer due."""
        batch: list[Message] = []
        for event in events:
            partition = event.partition()
            error = event.error()
            if error is not None:
                if error.code() == KafkaError._PARTITION_EOF:
                    if partition in due and event.offset() >= due[partition]:
                        del due[partition]
                elif not self._is_passing(error):
                    raise self._classify(error)
                continue
            end = due.get(partition)
            if end is None:
                continue
            offset = event.offset()
            if offset < end:
                batch.append(event)
            if offset >= end - 1:
                del due[partition]
                consumer.incremental_unassign([TopicPartition(self.topic, partition)])
        return batch

    @staticmethod
    def _is_passing(error: KafkaError) -> bool:
        """Errors librdkafka recovers from by itself; a stall ends the wait."""
        return bool(error.retriable()) or error.code() in (
            KafkaError._TRANSPORT,
            KafkaError._ALL_BROKERS_DOWN,
            KafkaError._TIMED_OUT,
            KafkaError.LEADER_NOT_AVAILABLE,
            KafkaError.NOT_LEADER_FOR_PARTITION,
        )

    def _classify(self, error: KafkaError) -> WarehouseError:
        broker = self._settings.kafka_bootstrap
        if self._fatal is not None:
            error = self._fatal
        code = error.code()
        if code in (KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART):
            return ConfigurationError(
                f"{self.feed.name}: the broker at {broker} has no topic {self.topic}.",
                hint=f"Create the topic, or correct it in {self.feed.file}:{self.feed.line}.",
            )
        if code in REFUSALS:
            return AuthenticationError(
                f"{self.feed.name}: the broker at {broker} refused us for {self.topic} ({error.name()}).",
                hint="Check KAFKA_SECURITY_PROTOCOL and the KAFKA_SASL_ and KAFKA_SSL_ settings.",
            )
        if code in (KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._AUTO_OFFSET_RESET):
            return TransientError(
                f"{self.feed.name}: {self.topic} lost records while they were being read (retention).",
                hint="The next try compares the positions with the log and names the loss.",
            )
        if code == KafkaError._INVALID_ARG:
            return ConfigurationError(
                f"{self.feed.name}: a KAFKA_ setting is not valid: {error.str()}", hint="See .env.example."
            )
        return TransientError(
            f"{self.feed.name}: the broker at {broker} does not answer for {self.topic} ({error.name()}).",
            hint="Is it up and reachable? `warehouse doctor` checks.",
        )

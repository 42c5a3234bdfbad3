"""What was really offered: the producer's own account of every record, kept apart from the warehouse.

sample messages -> transactions, some aborted -> topic; per partition the offset, bytes, key, headers and time of every
committed record, and what must become of it. What else the log holds between start and end is control or aborted.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from random import Random
from typing import Any

from confluent_kafka import Message, Producer

from orchestration.sample import TRANSACTIONS, SampleMessage, SampleSpec, generate

BAD_SHARE = 0.03
TOMBSTONE_SHARE = 0.01
ABORT_SHARE = 0.2
PLAIN_SHARE = 0.2  # of the batches go without a transaction
BATCH = 60


@dataclass(frozen=True)
class Sent:
    """One committed record."""

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    timestamp_ms: int
    expected: str
    defect: str | None


@dataclass
class Tally:
    """One incarnation of a topic. `gone` holds what the log lost for good before anybody could read it."""

    partitions: dict[int, dict[int, Sent]] = field(default_factory=dict)
    aborted: int = 0

    def count(self, expected: str | None = None, partition: int | None = None) -> int:
        chosen = self.partitions.values() if partition is None else [self.partitions.get(partition, {})]
        return sum(expected in (None, sent.expected) for records in chosen for sent in records.values())


def sample(seed: int) -> Iterator[SampleMessage]:
    """Endless sample payments: 3 % bad or odd, 1 % tombstones."""
    rng = Random(f"{seed}/tombstones")
    spec = SampleSpec(records=10_000_000, seed=seed, start=datetime(2026, 1, 5, tzinfo=UTC), bad_share=BAD_SHARE)
    for message in generate(spec, TRANSACTIONS):
        if message.defect is None and rng.random() < TOMBSTONE_SHARE:
            message = replace(message, value=None, expected="tombstone", defect="tombstone")
        yield message


class TallyingProducer:
    """Writes to one topic, partly in transactions, and keeps the tally."""

    def __init__(self, bootstrap: str, topic: str, partitions: int, seed: int, tally: Tally) -> None:
        self.topic = topic
        self.tally = tally
        self.partitions = partitions
        self.messages = sample(seed)
        self._rng = Random(f"{seed}/{topic}/producer")
        config: dict[str, Any] = {
            "bootstrap.servers": bootstrap,
            "broker.address.family": "v4",
            "linger.ms": 1,
            "enable.idempotence": True,
            "reconnect.backoff.max.ms": 250,
            "message.max.bytes": 4_000_000,
            "log_level": 0,
        }
        self._plain = Producer(config)
        self._transactional = Producer({**config, "transactional.id": f"prove-{topic}"})
        self._transactional.init_transactions(30)

    def send(self, records: int, *, keys: int | None = None) -> None:
        """Offer that many committed records, with aborted ones between them. `keys`: draw from so few keys."""
        sent = 0
        while sent < records:
            size = min(records - sent, self._rng.randrange(1, 2 * BATCH))
            draw = self._rng.random()
            batch = list(itertools.islice(self.messages, size))
            if keys is not None:
                batch = [replace(message, key=f"key-{self._rng.randrange(keys)}".encode()) for message in batch]
            if draw < ABORT_SHARE:
                self._transactional.begin_transaction()
                self.tally.aborted += len(self._produce(self._transactional, batch))
                self._transactional.abort_transaction(30)
                continue
            if draw < ABORT_SHARE + PLAIN_SHARE:
                delivered = self._produce(self._plain, batch)
            else:
                self._transactional.begin_transaction()
                delivered = self._produce(self._transactional, batch)
                self._transactional.commit_transaction(30)
            for partition, offset, record in delivered:
                self.tally.partitions.setdefault(partition, {})[offset] = record
            sent += size

    def refresh(self) -> None:
        """Learn of partitions that were added."""
        for producer in (self._plain, self._transactional):
            producer.list_topics(self.topic, timeout=15)

    def _produce(self, producer: Producer, batch: list[SampleMessage]) -> list[tuple[int, int, Sent]]:
        delivered: list[tuple[int, int, Sent]] = []
        failed: list[str] = []
        for message in batch:
            record = Sent(
                message.key, message.value, message.headers, message.timestamp_ms, message.expected, message.defect
            )

            def note(error: Any, answer: Message, record: Sent = record) -> None:
                if error is not None:
                    failed.append(error.name())
                else:
                    delivered.append((answer.partition() or 0, answer.offset() or 0, record))

            producer.produce(
                self.topic,
                key=message.key,
                value=message.value,
                headers=message.headers or None,  # type: ignore[arg-type]
                timestamp=message.timestamp_ms,
                partition=self._rng.randrange(self.partitions),
                on_delivery=note,
            )
        producer.flush(30)
        if failed or len(delivered) != len(batch):
            raise RuntimeError(f"the producer delivered {len(delivered)} of {len(batch)} records: {failed[:3]}")
        return delivered

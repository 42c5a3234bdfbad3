"""Sample messages through a file and through a broker: every byte comes back, every failure is one clear error."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import confluent_kafka
import pytest
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition

from ingestion.errors import ConfigurationError, DataError, TransientError
from orchestration.sample import (
    FEEDS,
    TRANSACTIONS,
    SampleMessage,
    SampleSpec,
    generate,
    output,
    read_jsonl,
    to_jsonl,
    to_kafka,
)

START = datetime(2026, 1, 5, tzinfo=UTC)


def sample(records: int, bad_share: float = 0.3) -> Iterator[SampleMessage]:
    for feed in FEEDS:
        yield from generate(SampleSpec(records=records, seed=11, start=START, bad_share=bad_share), feed)


def message(value: bytes | None = b"{}", key: bytes | None = b"k") -> SampleMessage:
    return SampleMessage(TRANSACTIONS, key, value, 1_767_600_000_000, [], None, "landed")


def test_file_gives_back_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "sample.jsonl"
    assert to_jsonl(sample(500), path) == 1000
    assert list(read_jsonl(path)) == list(sample(500))
    assert path.read_bytes().isascii()
    assert path.read_bytes().count(b"\n") == 1000
    assert [p.name for p in path.parent.iterdir()] == ["sample.jsonl"]


def test_file_keeps_bytes_that_are_no_text(tmp_path: Path) -> None:
    values = [None, b"", b"\xff\xfe\x00", b"a\x00b", "é漢😀\u2028\ufeff".encode(), bytes(range(256)), b"\r\n"]
    messages = [message(value, value) for value in values]
    messages.append(SampleMessage(TRANSACTIONS, b"k", b"v", 1, [("h", b"\xff"), ("h", b"")], "tombstone", "tombstone"))
    to_jsonl(messages, tmp_path / "f.jsonl")
    assert list(read_jsonl(tmp_path / "f.jsonl")) == messages


def test_interrupted_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    to_jsonl([message()], path)

    def broken() -> Iterator[SampleMessage]:
        yield message()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_jsonl(broken(), path)
    assert len(list(read_jsonl(path))) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["f.jsonl"]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "not json",
        "[]",
        "{}",
        '{"feed": "f", "timestamp_ms": 1, "key": "k"}',
        '{"feed": "f", "timestamp_ms": "soon", "key": "k", "value": "v"}',
        '{"feed": "f", "timestamp_ms": 1, "key": "k", "value": 7}',
        '{"feed": "f", "timestamp_ms": 1, "key": "k", "value": {"base64": "*"}}',
        '{"feed": "f", "timestamp_ms": 1, "key": "k", "value": "v", "defect": "d", "expected": "lost"}',
    ],
)
def test_unreadable_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(f"{output.render_line(message())}\n{line}\n")
    with pytest.raises(DataError, match=rf"{path}:2: not a sample message"):
        list(read_jsonl(path))


@pytest.fixture(scope="module")
def bootstrap() -> Iterator[str]:
    """A broker inside librdkafka, as long as its client lives."""
    owner = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "unused", "log_level": 0})
    broker = next(iter(owner.list_topics(timeout=10).brokers.values()))
    yield f"{broker.host}:{broker.port}"
    del owner


def read_topic(bootstrap: str, topic: str) -> list[confluent_kafka.Message]:
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "unused", "enable.partition.eof": True})
    try:
        partitions = list(consumer.list_topics(topic, timeout=10).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
        found = []
        ended = 0
        while ended < len(partitions):
            polled = consumer.poll(10)
            assert polled is not None
            if polled.error() is None:
                found.append(polled)
            else:
                assert polled.error().code() == KafkaError._PARTITION_EOF
                ended += 1
        return found
    finally:
        consumer.close()


def test_broker_gets_every_byte_once(bootstrap: str) -> None:
    progress: list[int] = []
    topics = dict(zip(FEEDS, ("all_bytes_payments", "all_bytes_users"), strict=True))
    sent = to_kafka(sample(2500), bootstrap, topics.__getitem__, on_delivered=progress.append)
    assert sent == dict.fromkeys(topics.values(), 2500)
    assert progress == sorted(progress)
    assert progress[-1] == 5000
    for feed, topic in topics.items():
        found = [(m.key(), m.value(), m.timestamp()[1], tuple(m.headers() or [])) for m in read_topic(bootstrap, topic)]
        wanted = [(m.key, m.value, m.timestamp_ms, tuple(m.headers)) for m in sample(2500) if m.feed == feed]
        assert sorted(found, key=repr) == sorted(wanted, key=repr)


def test_events_of_one_key_keep_their_order(bootstrap: str) -> None:
    stream = list(generate(SampleSpec(records=8000, seed=3, start=START, bad_share=0), TRANSACTIONS))
    to_kafka(stream, bootstrap, lambda feed: "ordered")
    order: dict[bytes, list[bytes]] = {}
    partitions: dict[bytes, set[int]] = {}
    for found in read_topic(bootstrap, "ordered"):
        order.setdefault(found.key(), []).append(found.value())
        partitions.setdefault(found.key(), set()).add(found.partition())
    wanted: dict[bytes | None, list[bytes | None]] = {}
    for m in stream:
        wanted.setdefault(m.key, []).append(m.value)
    assert order == wanted
    assert sum(len(values) > 1 for values in wanted.values()) > 100
    assert all(len(used) == 1 for used in partitions.values())


def test_megabyte_record_passes(bootstrap: str) -> None:
    assert to_kafka([message(b"x" * 1_000_300)], bootstrap, lambda feed: "bulky") == {"bulky": 1}


def test_nothing_to_send_needs_no_broker() -> None:
    assert to_kafka([], "127.0.0.1:1", lambda feed: "none") == {}


def test_broker_that_does_not_answer_is_one_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "CONNECT_TIMEOUT", 0.5)
    with pytest.raises(TransientError, match=r"127\.0\.0\.1:1 does not answer") as caught:
        to_kafka([message()], "127.0.0.1:1", lambda feed: "t")
    assert "KAFKA_BOOTSTRAP_SERVERS" in caught.value.hint
    assert capfd.readouterr().err == ""


def test_setting_the_client_refuses_is_one_error(bootstrap: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no\.such\.setting"):
        to_kafka([message()], bootstrap, lambda feed: "t", {"no.such.setting": 1})


def test_message_the_broker_refuses_is_one_error(bootstrap: str) -> None:
    with pytest.raises(TransientError, match="did not take a message for small"):
        to_kafka([message(b"x" * 5000)], bootstrap, lambda feed: "small", {"message.max.bytes": 1000})


class _BrokenProducer:
    """Stands in for a broker that fails in ways the embedded one cannot be made to."""

    topic_error: object = None
    delivery_error: object = None
    delivers = True

    def __init__(self, conf: object) -> None:
        pass

    def list_topics(self, topic: str, timeout: float) -> object:
        entry = type("Topic", (), {"error": self.topic_error})
        return type("Metadata", (), {"topics": {topic: entry}})

    def produce(self, topic: str, on_delivery: object, **rest: object) -> None:
        if self.delivers:
            sent = type("Sent", (), {"topic": lambda self: topic})()
            on_delivery(self.delivery_error, sent)  # type: ignore[operator]

    def poll(self, timeout: float) -> None:
        pass

    def flush(self, timeout: float) -> None:
        pass

    def purge(self) -> None:
        pass


def test_missing_topic_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_BrokenProducer, "topic_error", KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART))
    monkeypatch.setattr(confluent_kafka, "Producer", _BrokenProducer)
    with pytest.raises(ConfigurationError, match="has no topic payments"):
        to_kafka([message()], "b:1", lambda feed: "payments")


def test_failed_delivery_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_BrokenProducer, "delivery_error", KafkaError(KafkaError._MSG_TIMED_OUT))
    monkeypatch.setattr(confluent_kafka, "Producer", _BrokenProducer)
    with pytest.raises(TransientError, match="did not take a message for payments"):
        to_kafka([message()] * 3, "b:1", lambda feed: "payments")


def test_unconfirmed_message_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_BrokenProducer, "delivers", False)
    monkeypatch.setattr(confluent_kafka, "Producer", _BrokenProducer)
    with pytest.raises(TransientError, match="confirmed 0 of 3"):
        to_kafka([message()] * 3, "b:1", lambda feed: "payments")


def test_lines_are_json_objects_a_stranger_can_read() -> None:
    line = json.loads(output.render_line(message(b'{"a": 1}')))
    assert line == {"feed": TRANSACTIONS, "timestamp_ms": 1_767_600_000_000, "key": "k", "value": '{"a": 1}'}

"""Sample messages out: to a file of JSON lines, or to Kafka; and back from the file.

A line holds one message. `key` and `value` are text where the bytes are UTF-8, else `{"base64": ...}`, so every value
comes back byte for byte; a value of null is a tombstone. `headers`, `defect` and `expected` stand only where a message
has headers or a defect.

    {"feed": "raw_users.user_events", "timestamp_ms": 1767600000123, "key": "usr_000001", "value": "{\"event_id\": ..."}
"""

import base64
import binascii
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from ingestion.errors import ConfigurationError, DataError, TransientError, WarehouseError
from orchestration.sample.model import Expected, SampleMessage

# How long a broker may take to answer at all, and to take one message, in seconds.
CONNECT_TIMEOUT = 15
DELIVERY_TIMEOUT = 60

_PRODUCER_DEFAULTS: dict[str, Any] = {
    "compression.type": "zstd",
    # Larger batches compress better, and a partition of the embedded broker holds 5 MB.
    "linger.ms": 20,
    "batch.size": 1_000_000,
    # One key's events keep their order through a retry, and none comes twice.
    "enable.idempotence": True,
    # The catalogue has a record of a megabyte; the limit counts before compression.
    "message.max.bytes": 4_000_000,
    # Java's partitioner, so that a key lands where its other producers put it.
    "partitioner": "murmur2_random",
    "message.timeout.ms": DELIVERY_TIMEOUT * 1000,
}


def to_jsonl(messages: Iterable[SampleMessage], path: Path) -> int:
    """Write messages to a file, one a line, and return their number. A file under that name is replaced at the end."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="ascii", newline="\n") as file:
            for message in messages:
                file.write(render_line(message) + "\n")
                count += 1
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def render_line(message: SampleMessage) -> str:
    """A message as one line of JSON in ASCII, without the line's end."""
    record: dict[str, Any] = {
        "feed": message.feed,
        "timestamp_ms": message.timestamp_ms,
        "key": _encode(message.key),
        "value": _encode(message.value),
    }
    if message.headers:
        record["headers"] = [[name, _encode(value)] for name, value in message.headers]
    if message.defect is not None:
        record["defect"] = message.defect
        record["expected"] = message.expected
    return json.dumps(record)


def read_jsonl(path: Path) -> Iterator[SampleMessage]:
    """The messages of a file `to_jsonl` wrote. `DataError` with file and line for one that cannot be read."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                message = SampleMessage(
                    feed=record["feed"],
                    key=_decode(record["key"]),
                    value=_decode(record["value"]),
                    timestamp_ms=int(record["timestamp_ms"]),
                    headers=[(name, _decode(value) or b"") for name, value in record.get("headers", [])],
                    defect=record.get("defect"),
                    expected=record.get("expected", "landed"),
                )
                if message.expected not in get_args(Expected):
                    raise ValueError(f"expected is {message.expected!r}")
            except (ValueError, KeyError, TypeError, binascii.Error) as error:
                raise DataError(
                    f"{path}:{number}: not a sample message: {error!r}",
                    hint="Every line is a JSON object with feed, timestamp_ms, key and value.",
                ) from None
            yield message


def to_kafka(
    messages: Iterable[SampleMessage],
    bootstrap: str,
    topic_of: Callable[[str], str],
    conf: Mapping[str, Any] | None = None,
    on_delivered: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Send messages to Kafka and wait until the broker has every one of them.

    `topic_of` names the topic of a feed; `conf` is producer configuration over ours (security settings, compression);
    `on_delivered` is called now and then with the number of messages the broker has so far. Returns messages by topic.
    `ConfigurationError` for a missing topic or a setting librdkafka refuses, `TransientError` for a broker that does
    not answer or refuses a message; the first failure ends the sending.
    """
    # Imported here: --help must not load a Kafka client.
    from confluent_kafka import KafkaError, KafkaException, Message, Producer

    try:
        producer = Producer({**_PRODUCER_DEFAULTS, **(conf or {}), "bootstrap.servers": bootstrap, "logger": _silent()})
    except (KafkaException, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"The Kafka client refuses its settings: {_reason(error)}", hint="See KAFKA_* in .env.example."
        ) from None

    sent: dict[str, int] = {}
    topics: dict[str, str] = {}
    delivered = 0
    failure: WarehouseError | None = None

    def done(error: KafkaError | None, message: Message) -> None:
        nonlocal delivered, failure
        if error is None:
            delivered += 1
        elif failure is None:
            failure = TransientError(
                f"Kafka at {bootstrap} did not take a message for {message.topic()}: {error.str()}",
                hint="Messages before it may have arrived. Check the broker and its limits, then send again.",
            )

    def require_topic(topic: str) -> None:
        try:
            metadata = producer.list_topics(topic, timeout=CONNECT_TIMEOUT).topics.get(topic)
        except KafkaException as error:
            raise TransientError(
                f"Kafka at {bootstrap} does not answer: {_reason(error)}",
                hint="Check KAFKA_BOOTSTRAP_SERVERS and that the broker runs.",
            ) from None
        # A broker that makes topics on demand reports a leader that is still missing: let it.
        missing = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_AUTHORIZATION_FAILED)
        if metadata is not None and metadata.error is not None and metadata.error.code() in missing:
            raise ConfigurationError(
                f"Kafka at {bootstrap} has no topic {topic}: {metadata.error.str()}", hint="Create the topic first."
            )

    try:
        for message in messages:
            topic = topics.get(message.feed)
            if topic is None:
                topic = topics[message.feed] = topic_of(message.feed)
                require_topic(topic)
                sent[topic] = 0
            while True:
                try:
                    producer.produce(
                        topic,
                        value=message.value,
                        key=message.key,
                        timestamp=message.timestamp_ms,
                        headers=list[tuple[str, str | bytes | None]](message.headers),
                        on_delivery=done,
                    )
                    break
                except BufferError:
                    producer.poll(0.1)
                except KafkaException as error:
                    raise TransientError(
                        f"Kafka at {bootstrap} did not take a message for {topic}: {_reason(error)}"
                    ) from None
            sent[topic] += 1
            if sent[topic] % 1000 == 0:
                producer.poll(0)
                if failure is not None:
                    raise failure
                if on_delivered is not None:
                    on_delivered(delivered)
        producer.flush(DELIVERY_TIMEOUT + CONNECT_TIMEOUT)
        if failure is not None:
            raise failure
    except BaseException:
        producer.purge()
        raise
    total = sum(sent.values())
    if delivered != total:
        raise TransientError(
            f"Kafka at {bootstrap} confirmed {delivered} of {total} messages.",
            hint="Check the broker, then send again.",
        )
    if on_delivered is not None:
        on_delivered(delivered)
    return sent


def _silent() -> logging.Logger:
    """librdkafka would write connection errors to stderr; what matters is raised."""
    logger = logging.getLogger("orchestration.sample.kafka")
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return logger


def _reason(error: BaseException) -> str:
    inner = error.args[0] if error.args else error
    return str(inner.str()) if hasattr(inner, "str") else str(inner)


def _encode(data: bytes | None) -> str | dict[str, str] | None:
    if data is None:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


def _decode(data: str | dict[str, str] | None) -> bytes | None:
    if data is None:
        return None
    if isinstance(data, str):
        return data.encode()
    return base64.b64decode(data["base64"], validate=True)

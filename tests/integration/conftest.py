"""Fixtures of the integration tests: topics of their own on the embedded broker, the test's database, and dbt."""

import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import psycopg2.extensions
import pytest
from confluent_kafka import Producer

from ingestion.ddl import ensure_schema
from ingestion.feeds import FeedSpec, KafkaOrigin, load_feeds
from ingestion.settings import Settings
from tests.harness.apache_kafka import ApacheKafka, available
from tests.harness.models import Dbt, RawLog

Connection = psycopg2.extensions.connection


@pytest.fixture(scope="module")
def kafka() -> Iterator[ApacheKafka]:
    """An Apache Kafka for the tests of a file; they are skipped where it cannot run."""
    reason = available()
    if reason:
        pytest.skip(reason)
    with ApacheKafka() as running:
        yield running


@pytest.fixture
def own_topic(feed_named: Callable[[str], FeedSpec]) -> Callable[[str], FeedSpec]:
    """A declared Kafka feed, reading a topic nobody else uses (the embedded broker makes it on first use)."""

    def make(name: str) -> FeedSpec:
        feed = feed_named(name)
        assert isinstance(feed.origin, KafkaOrigin)
        return replace(feed, origin=replace(feed.origin, topic=f"test_{uuid.uuid4().hex[:12]}"))

    return make


@pytest.fixture
def send(services: Settings) -> Callable[..., None]:
    """Send (key, value) pairs to a feed's topic and wait until the broker has them."""

    def send_all(
        feed: FeedSpec, records: Iterable[tuple[bytes | None, bytes | None]], partition: int | None = None
    ) -> None:
        assert isinstance(feed.origin, KafkaOrigin)
        producer = Producer(
            {
                "bootstrap.servers": services.kafka_bootstrap,
                "broker.address.family": "v4",
                "message.max.bytes": 4_000_000,
                "compression.type": "lz4",
            }
        )
        failed: list[object] = []
        for key, value in records:
            place = {} if partition is None else {"partition": partition}
            producer.produce(
                feed.origin.topic,
                key=key,
                value=value,
                on_delivery=lambda error, _: failed.append(error) if error else None,
                **place,
            )
        assert producer.flush(30) == 0
        assert not failed, failed

    return send_all


@pytest.fixture
def query(connection: Connection) -> Callable[..., list[tuple]]:
    """Rows of a statement."""

    def ask(statement: str, *values: object) -> list[tuple]:
        with connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    return ask


@pytest.fixture
def log(connection: Connection, clean_settings: Settings) -> RawLog:
    """Writes loads into the raw tables of the test's database, past the loaders."""
    ensure_schema(connection, load_feeds(clean_settings))
    return RawLog(connection)


@pytest.fixture(scope="session")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the parsed project outlives a test."""
    return tmp_path_factory.mktemp("parsed")


@pytest.fixture
def dbt(database_dsn: str, tmp_path: Path, parsed: Path, monkeypatch: pytest.MonkeyPatch) -> Dbt:
    """dbt in this process, against the test's database."""
    return Dbt(database_dsn, tmp_path, parsed, monkeypatch)

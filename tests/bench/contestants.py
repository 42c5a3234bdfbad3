"""Ways to bring one topic into Postgres, each run alone in a process of its own: `python -m tests.bench.contestants`.

    warehouse   ours: contract, dead letters, ledger, fence
    unguarded   ours without the guarantee: no ledger rows, no note of a load, no lock or token, no guard of the commit
    dlt         plain dlt: dicts, default loader, settings as installed
    limit       consume and binary COPY of coordinates and raw value, nothing parsed: what the machine allows

Prints one JSON line: seconds of the whole process from its start, peak memory.
"""

import json
import os
import resource
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Task:
    """What to land: `records` of a topic, from `bootstrap` into the database of `dsn`, which holds `already` rows."""

    bootstrap: str
    topic: str
    records: int
    dsn: str
    folder: str
    already: int = 0


def consume(task: Task) -> Iterator[list[Any]]:
    """The topic once, in batches, with the settings our own loader reads with."""
    from confluent_kafka import Consumer, KafkaError, TopicPartition

    consumer = Consumer(
        {
            "bootstrap.servers": task.bootstrap,
            "broker.address.family": "v4",
            "group.id": "bench",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "fetch.queue.backoff.ms": 10,
        }
    )
    partitions = consumer.list_topics(task.topic).topics[task.topic].partitions
    consumer.assign([TopicPartition(task.topic, partition, 0) for partition in partitions])
    left = len(partitions)
    while left:
        batch = []
        for message in consumer.consume(20_000, 0.05):
            if message.error() is None:
                batch.append(message)
            elif message.error().code() == KafkaError._PARTITION_EOF:
                left -= 1
            else:
                raise RuntimeError(message.error().str())
        if batch:
            yield batch
    consumer.close()


def land_limit(task: Task) -> None:
    import io

    import psycopg2

    connection = psycopg2.connect(task.dsn)
    copy = "copy raw_limit from stdin (format binary)"
    with connection, connection.cursor() as cursor:
        cursor.execute("create table raw_limit (partition int not null, position bigint not null, value bytea)")
        for batch in consume(task):
            parts = [b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0)]
            for message in batch:
                value = message.value()
                parts.append(struct.pack("!hiiiqi", 3, 4, message.partition(), 8, message.offset(), len(value)))
                parts.append(value)
            parts.append(struct.pack("!h", -1))
            cursor.copy_expert(copy, io.BytesIO(b"".join(parts)), size=1 << 20)
    connection.close()


def land_dlt(task: Task) -> None:
    os.environ["RUNTIME__DLTHUB_TELEMETRY"] = "false"
    import dlt

    @dlt.resource(name="transaction_created", write_disposition="append")
    def transaction_created() -> Iterator[dict[str, Any]]:
        for batch in consume(task):
            for message in batch:
                yield json.loads(message.value())

    pipeline = dlt.pipeline(
        "bench",
        pipelines_dir=task.folder,
        destination=dlt.destinations.postgres(task.dsn),
        dataset_name="raw_payments",
    )
    pipeline.run(transaction_created())


def land_warehouse(task: Task) -> None:
    from ingestion.landing import land_feed

    settings, feed = declared(task)
    landing = land_feed(settings, feed)
    if landing.landed != task.records:
        raise RuntimeError(f"landed {landing.landed} of {task.records}: {landing}")


def declared(task: Task) -> tuple[Any, Any]:
    """Settings and the declared transactions feed, reading the task's topic."""
    from ingestion.feeds import load_feeds, select_feeds
    from ingestion.settings import load_settings

    settings = load_settings(PROJECT).with_env(WAREHOUSE_DSN=task.dsn, KAFKA_BOOTSTRAP_SERVERS=task.bootstrap)
    (feed,) = select_feeds(load_feeds(settings), ["raw_payments.transaction_created"])
    origin: Any = feed.origin
    return replace(settings, home=Path(task.folder)), replace(feed, origin=replace(origin, topic=task.topic))


def land_unguarded(task: Task) -> None:
    """The same code, with each part of the guarantee taken out of it."""
    from contextlib import contextmanager

    import psycopg2

    from ingestion import ddl, landing, ledger
    from ingestion.database import connect
    from ingestion.package import Package
    from ingestion.poison import Suspicion

    settings, feed = declared(task)
    connection = connect(settings, purpose="bench")
    ddl.ensure_schema(connection, [feed])
    with connection, connection.cursor() as cursor:
        cursor.execute("drop trigger _guard_commit on raw_payments._dlt_loads")
    connection.close()

    @contextmanager
    def writing(connection: psycopg2.extensions.connection, feed: Any, **_: Any) -> Iterator[ledger.Writer]:
        connection.autocommit = True
        yield ledger.Writer(feed, 1)

    def add_interval(package: Package, interval: Any) -> None:
        package.intervals.append(interval)

    for owner, name, without in (
        (ledger, "writing", writing),
        (ledger, "sweep", lambda connection, feed: []),
        (ledger, "begin_load", lambda connection, writer, load_id: None),
        (ledger, "find_open_losses", lambda connection, feed: []),
        (landing, "ensure_schema", lambda connection, feeds: None),
        (Package, "add_interval", add_interval),
        (Suspicion, "note_batch", lambda *_: None),
        (Suspicion, "note_read", lambda *_: None),
    ):
        assert hasattr(owner, name)
        setattr(owner, name, without)
    done = landing.land_feed(settings, feed)
    if done.landed != task.records:
        raise RuntimeError(f"landed {done.landed} of {task.records}: {done}")


CONTESTANTS = {"limit": land_limit, "dlt": land_dlt, "warehouse": land_warehouse, "unguarded": land_unguarded}
TABLES = {
    "limit": "public.raw_limit",
    "dlt": "raw_payments.transaction_created",
    "warehouse": "raw_payments.transaction_created",
    "unguarded": "raw_payments.transaction_created",
}


def main() -> None:
    name, started, document = sys.argv[1], float(sys.argv[2]), json.loads(sys.argv[3])
    task = Task(**document)
    CONTESTANTS[name](task)
    seconds = time.time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak}))


if __name__ == "__main__":
    main()

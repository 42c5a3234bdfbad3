"""The loader under test: lands one feed once, as the command line does, in a process that may be killed anywhere.

`run` is the whole life of such a process, forked from a server that has imported everything: a kill is to strike
the loader at work, not the second it takes to import dlt. Exit code 0: done; 3: a failure the warehouse names; 1: any
other.
"""

import ctypes
import itertools
import json
import os
import signal
import sys
import traceback
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from confluent_kafka import Consumer, TopicPartition

import ingestion.kafka
import ingestion.landing
import ingestion.package
from ingestion import ledger
from ingestion.errors import WarehouseError
from ingestion.feeds import AcceptedValues, FeedSpec, KafkaOrigin, load_feeds, select_feeds
from ingestion.landing import land_feed
from ingestion.retry import policy_of, retrying
from ingestion.settings import Settings, load_settings
from ingestion.topic import loss_error

PROJECT = Path(__file__).resolve().parents[2]
PAYMENTS = "raw_payments.transaction_created"
FAILED = 3


@dataclass(frozen=True)
class Orders:
    """What a loader is told.

    `refuses`: an accepted value its contract does not know yet. `without`: what a twin takes away: "sweep"; "schema",
    which would put a missing guard back; "sessions", the end of a predecessor's sessions (a machine cut off by its
    network keeps them, and the fence alone stands). `dies_at`: before which of its changes of the local disk it dies,
    counting those of paths that hold `dies_on`.
    """

    dsn: str
    bootstrap: str
    home: Path
    topic: str
    records_per_load: int
    feed: str = PAYMENTS
    api: str = "http://127.0.0.1:9"
    action: Literal["land", "forecast", "replay", "plain"] = "land"
    retry_seconds: int = 0
    take_over: bool = False
    refuses: str = ""
    without: tuple[str, ...] = ()
    dies_at: int = 0
    dies_on: str = ""

    @property
    def settings(self) -> Settings:
        """The product's settings; nothing of the machine's own environment."""
        env = {
            "WAREHOUSE_DSN": self.dsn,
            "KAFKA_BOOTSTRAP_SERVERS": self.bootstrap,
            "FX_API_BASE": self.api,
            "WAREHOUSE_RETRY_SECONDS": str(self.retry_seconds),
        }
        return Settings(PROJECT, self.home, env)

    @property
    def spec(self) -> FeedSpec:
        """The declared feed, reading the scenario's own topic."""
        (feed,) = select_feeds(declared(), [self.feed])
        if isinstance(feed.origin, KafkaOrigin):
            feed = replace(feed, origin=replace(feed.origin, topic=self.topic))
        columns = [
            replace(column, rules=tuple(_without_value(rule, self.refuses) for rule in column.rules))
            for column in feed.columns
        ]
        return replace(feed, columns=tuple(columns))


@lru_cache
def declared() -> tuple[FeedSpec, ...]:
    """Every feed of the project."""
    return tuple(load_feeds(load_settings(PROJECT)))


def _without_value(rule: Any, value: str) -> Any:
    if isinstance(rule, AcceptedValues) and value:
        return replace(rule, values=type(rule.values)(known for known in rule.values if known != value))
    return rule


def land(orders: Orders) -> dict[str, Any]:
    """One run with the product's retries; what it did, for the scenario."""
    records = orders.records_per_load
    # Small batches and files: many commits and several files a load from few records.
    ingestion.kafka.MESSAGES_PER_CALL = records
    ingestion.package.ROWS_PER_FILE = max(records // 3, 1)
    if "sweep" in orders.without:
        ledger.sweep = lambda connection, feed: []
    if "schema" in orders.without:
        ingestion.landing.ensure_schema = lambda connection, feeds: None
    if "sessions" in orders.without:
        ledger._end_load_sessions = lambda cursor, feed: None
    retries: list[str] = []
    result = retrying(
        lambda: land_feed(orders.settings, orders.spec, records_per_load=records, take_over=orders.take_over),
        policy_of(orders.settings),
        on_retry=lambda error, delay: retries.append(error.message),
    )
    # Not asdict: it takes a Counter's items for elements to count.
    document = vars(result) | {"reasons": dict(result.reasons), "offered": result.offered, "retries": len(retries)}
    if result.open_losses:
        error = loss_error(orders.feed, result.open_losses)
        document |= {"error_class": error.error_class.value, "message": error.message}
    return document


def replay(orders: Orders) -> dict[str, Any]:
    """All open dead letters again."""
    from ingestion.replay import Selection, replay_dead_letters

    apply = orders.action == "replay"
    done = replay_dead_letters(orders.settings, orders.spec, Selection(), apply=apply, because="prove")
    return {"landed": done.landed, "failed": done.failed}


def land_plain(orders: Orders) -> dict[str, Any]:
    """The twin of the whole product: dicts appended by plain dlt, its position in dlt's state, pending work resumed."""
    import dlt

    @dlt.resource(name="plain", write_disposition="append")
    def records() -> Any:
        positions = dlt.current.resource_state().setdefault("positions", {})
        consumer = Consumer(
            {
                "bootstrap.servers": orders.bootstrap,
                "broker.address.family": "v4",
                "group.id": "plain",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
            }
        )
        partitions = consumer.list_topics(orders.topic, timeout=15).topics[orders.topic].partitions
        consumer.assign([TopicPartition(orders.topic, p, positions.get(str(p), 0)) for p in partitions])
        ended: set[int] = set()
        while len(ended) < len(partitions):
            for message in consumer.consume(500, 0.1):
                if message.error() is not None:
                    ended.add(message.partition())
                    continue
                positions[str(message.partition())] = message.offset() + 1
                yield {"partition": message.partition(), "position": message.offset(), "value": message.value()}
        consumer.close()

    os.environ["RUNTIME__DLTHUB_TELEMETRY"] = "false"
    pipeline = dlt.pipeline(
        "plain",
        pipelines_dir=str(orders.home / "plain"),
        destination=dlt.destinations.postgres(orders.dsn),
        dataset_name="plain",
    )
    pipeline.run(records())
    return {}


def _die_at(number: int, part: str) -> None:
    """kill -9 of this process right before that change of the local disk."""
    changes = itertools.count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        is_change = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if is_change and part in f"{arguments[:2]}" and next(changes) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def run(orders: Orders, result: Path, log: Path) -> None:
    """The life of one loader process. Never returns: it is a copy of the fork server, whose clean-up is not its own."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["DLT_DATA_DIR"] = str(log.parent / "dlt")
    action = {"land": land, "plain": land_plain}.get(orders.action, replay)
    if orders.dies_at:
        _die_at(orders.dies_at, orders.dies_on)
    code = 0
    try:
        document = action(orders)
        code = FAILED if "error_class" in document else 0
    except WarehouseError as error:
        document = {"error_class": error.error_class.value, "message": error.message}
        code = FAILED
    except BaseException as error:
        traceback.print_exc()
        document = {"error_class": f"unnamed {type(error).__name__}", "message": " ".join(str(error).split())[:500]}
        code = 1
    partial = result.with_suffix(".partial")
    partial.write_text(json.dumps(document, default=str))
    partial.replace(result)
    os._exit(code)

"""The loader under test: lands one feed once, as the command line does, in a process that may be killed anywhere.

Settings come from the environment (`WAREHOUSE_DSN`, `KAFKA_BOOTSTRAP_SERVERS`, `WAREHOUSE_HOME`, ... and `PROVE_*`
below). Exit code 0: done; 3: a failure the warehouse names; 1: any other. `PROVE_RESULT` names a file for the result.

    python -m tests.prove.loader            one run
    python -m tests.prove.loader --serve    a fork server: importing dlt takes a second, a fork some milliseconds

The fork server reads JSON lines ({"env": {...}} starts a run, {"signal": n, "pid": n} sends a signal to one of its
own children) and answers with {"started": pid} and {"ended": pid, "code": n}.
"""

import ctypes
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, TopicPartition

import ingestion.kafka
import ingestion.package
from ingestion import landing as landing_module
from ingestion import ledger
from ingestion.errors import WarehouseError
from ingestion.feeds import AcceptedValues, FeedSpec, KafkaOrigin, load_feeds, select_feeds
from ingestion.landing import land_feed
from ingestion.retry import policy_of, retrying
from ingestion.settings import Settings, load_settings
from ingestion.topic import loss_error

PROJECT = Path(__file__).resolve().parents[2]
FAILED = 3


@lru_cache
def declared() -> tuple[FeedSpec, ...]:
    return tuple(load_feeds(load_settings(PROJECT)))


def feed_from(env: dict[str, str]) -> FeedSpec:
    """The declared feed, reading the scenario's own topic."""
    (feed,) = select_feeds(declared(), [env["PROVE_FEED"]])
    if isinstance(feed.origin, KafkaOrigin):
        feed = replace(feed, origin=replace(feed.origin, topic=env["PROVE_TOPIC"]))
    refused = env.get("PROVE_REFUSES")
    if refused:
        # A contract that does not know one accepted value yet: good records for the dead letters.
        columns = [
            replace(
                column,
                rules=tuple(
                    replace(rule, values=type(rule.values)(v for v in rule.values if v != refused))
                    if isinstance(rule, AcceptedValues)
                    else rule
                    for rule in column.rules
                ),
            )
            for column in feed.columns
        ]
        feed = replace(feed, columns=tuple(columns))
    return feed


def land(settings: Settings) -> dict[str, Any]:
    """One run with the product's retries; what it did, for the scenario."""
    env = dict(settings.env)
    records = int(env["PROVE_RECORDS_PER_LOAD"])
    # Small batches and files: many commits and several files a load from few records.
    ingestion.kafka.MESSAGES_PER_CALL = records
    ingestion.package.ROWS_PER_FILE = max(records // 3, 1)
    ingestion.kafka.STALL_TIMEOUT_S = float(env.get("PROVE_STALL_S") or ingestion.kafka.STALL_TIMEOUT_S)
    if "sweep" in (env.get("PROVE_WITHOUT") or ""):
        ledger.sweep = lambda connection, feed: []
    if "schema" in (env.get("PROVE_WITHOUT") or ""):
        # Each run puts a missing guard back; a twin that took it away needs it away.
        landing_module.ensure_schema = lambda connection, feeds: None
    if "sessions" in (env.get("PROVE_WITHOUT") or ""):
        # A machine cut off by its network: its sessions are not ended, and the fence alone stands.
        ledger._end_load_sessions = lambda cursor, feed: None
    assert landing_module.ledger is ledger
    feed = feed_from(env)
    take_over = bool(env.get("PROVE_TAKE_OVER"))
    retries: list[str] = []
    result = retrying(
        lambda: land_feed(settings, feed, records_per_load=records, take_over=take_over),
        policy_of(settings),
        on_retry=lambda error, delay: retries.append(error.message),
    )
    # Not asdict: it takes a Counter's items for elements to count.
    document = vars(result) | {"reasons": dict(result.reasons), "offered": result.offered, "retries": len(retries)}
    if result.open_losses:
        error = loss_error(feed.name, result.open_losses)
        document |= {"error_class": error.error_class.value, "message": error.message}
    return document


def replay(settings: Settings) -> dict[str, Any]:
    """All open dead letters again; `PROVE_REPLAY` is `apply` or `dry`."""
    from ingestion.replay import Selection, replay_dead_letters

    apply = settings.get("PROVE_REPLAY") == "apply"
    done = replay_dead_letters(settings, feed_from(dict(settings.env)), Selection(), apply=apply, because="prove")
    return {"landed": done.landed, "failed": done.failed, "offered": 0}


def land_plain(settings: Settings) -> dict[str, Any]:
    """The twin of the whole product: dicts appended by plain dlt, its position in dlt's state, pending work resumed."""
    import dlt

    topic = settings.require("PROVE_TOPIC", "to read")

    @dlt.resource(name="plain", write_disposition="append")
    def records() -> Any:
        positions = dlt.current.resource_state().setdefault("positions", {})
        consumer = Consumer(
            {
                "bootstrap.servers": settings.kafka_bootstrap,
                "broker.address.family": "v4",
                "group.id": "plain",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
            }
        )
        partitions = consumer.list_topics(topic, timeout=15).topics[topic].partitions
        consumer.assign([TopicPartition(topic, p, positions.get(str(p), 0)) for p in partitions])
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
        pipelines_dir=str(settings.home / "plain"),
        destination=dlt.destinations.postgres(settings.dsn),
        dataset_name="plain",
    )
    resumed = pipeline.has_pending_data
    pipeline.run(records())
    return {"offered": 0, "landed": 0, "resumed": resumed}


def _action(settings: Settings) -> Callable[[Settings], dict[str, Any]]:
    if settings.get("PROVE_PLAIN"):
        return land_plain
    return replay if settings.get("PROVE_REPLAY") else land


def main() -> int:
    """One run; the exit code."""
    settings = load_settings(PROJECT)
    result: dict[str, Any]
    code = 0
    try:
        result = _action(settings)(settings)
        code = FAILED if "error_class" in result else 0
    except WarehouseError as error:
        result = {"error_class": error.error_class.value, "message": error.message}
        code = FAILED
    except Exception as error:
        traceback.print_exc()
        result = {"error_class": f"unnamed {type(error).__name__}", "message": " ".join(str(error).split())[:500]}
        code = 1
    target = settings.get("PROVE_RESULT")
    if target:
        partial = Path(f"{target}.partial")
        partial.write_text(json.dumps(result, default=str))
        partial.replace(target)
    return code


def _run_child(env: dict[str, str], parent: int) -> None:
    """In the forked process: never returns."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        log = os.open(env["PROVE_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(env)
        code = main()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        # Without the parent's clean-up: this process is a copy of it.
        os._exit(code)


def serve() -> None:
    """The fork server; ends with its standard input, and takes its children along."""
    declared()
    children: set[int] = set()
    buffer = b""
    answer = sys.stdout

    def say(**what: int) -> None:
        answer.write(json.dumps(what) + "\n")
        answer.flush()

    say(ready=os.getpid())
    while True:
        ready, _, _ = select.select([0], [], [], 0.005 if children else 1.0)
        if ready:
            chunk = os.read(0, 65536)
            if not chunk:
                break
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                order = json.loads(line)
                if "env" in order:
                    parent = os.getpid()
                    pid = os.fork()
                    if pid == 0:
                        _run_child(order["env"], parent)
                    children.add(pid)
                    say(started=pid)
                elif order["pid"] in children:
                    os.kill(order["pid"], order["signal"])
        for pid in list(children):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                children.discard(pid)
                say(ended=pid, code=os.waitstatus_to_exitcode(status))
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve()
    else:
        sys.exit(main())

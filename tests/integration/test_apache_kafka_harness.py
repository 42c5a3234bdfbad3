"""The Apache Kafka harness keeps what the other integration tests lean on.

Each property here is one that librdkafka's mock cluster does not have: if the harness lost it, tests of transactions,
re-created topics or outages would pass for the wrong reason.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaException,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from tests.harness import apache_kafka
from tests.harness.apache_kafka import ApacheKafka, HarnessError, available, parse_java_version

PROJECT = Path(__file__).parents[2]


def skip_unless_available() -> None:
    reason = available()
    if reason:
        pytest.skip(reason)


def produce(kafka: ApacheKafka, topic: str, values: list[bytes], timestamp_ms: int = 0) -> None:
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "enable.idempotence": True})
    for index, value in enumerate(values):
        # A timestamp of 0 means now.
        producer.produce(topic, value, partition=0, timestamp=timestamp_ms and timestamp_ms + index * 1000)
    assert producer.flush(30) == 0


def consume(kafka: ApacheKafka, topic: str, isolation: str = "read_committed") -> list[Message]:
    """Read partition 0 to its end."""
    consumer = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap,
            "group.id": "unused",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": isolation,
        }
    )
    consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
    messages: list[Message] = []
    deadline = time.monotonic() + 30
    try:
        while time.monotonic() < deadline:
            message = consumer.poll(1)
            if message is None:
                continue
            if message.error():
                return messages
            messages.append(message)
    finally:
        consumer.close()
    raise AssertionError(f"the end of {topic} was not reached within 30 s")


def topic_id(kafka: ApacheKafka, topic: str) -> str:
    described = kafka.admin().describe_topics(TopicCollection([topic]))[topic].result(timeout=15)
    return str(described.topic_id)


def listening_addresses(pid: int) -> set[str]:
    """Return the "address:port" of every socket on which a process listens, from Linux's /proc."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            inodes.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, _, port = fields[1].rpartition(":")
                # Each 32-bit word stands in the machine's byte order.
                words = [int(address[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(address), 8)]
                parsed = ipaddress.ip_address(b"".join(words))
                mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
                found.add(f"{mapped or parsed}:{int(port, 16)}")
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_listens_on_the_loopback_address_only(kafka: ApacheKafka) -> None:
    assert kafka.pid is not None
    addresses = listening_addresses(kafka.pid)
    assert kafka.bootstrap in addresses
    assert len(addresses) == 2
    assert {address.rpartition(":")[0] for address in addresses} == {"127.0.0.1"}


def test_creates_topics_with_their_settings_and_never_by_itself(kafka: ApacheKafka) -> None:
    kafka.create_topic("compacted", partitions=3, config={"cleanup.policy": "compact"})
    topics = kafka.admin().list_topics(timeout=10).topics
    assert len(topics["compacted"].partitions) == 3

    producer = Producer({"bootstrap.servers": kafka.bootstrap, "message.timeout.ms": 1500, "log_level": 0})
    failures: list[str] = []
    producer.produce("never_created", b"x", on_delivery=lambda error, _: failures.append(str(error)))
    producer.flush(10)
    assert failures != ["None"]
    assert len(failures) == 1
    assert "never_created" not in kafka.admin().list_topics(timeout=10).topics


def test_an_aborted_transaction_is_seen_only_by_an_uncommitted_read(kafka: ApacheKafka) -> None:
    kafka.create_topic("transactional")
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": "harness"})
    producer.init_transactions(30)
    for value, finish in [
        (b"kept", producer.commit_transaction),
        (b"aborted", producer.abort_transaction),
        (b"kept too", producer.commit_transaction),
    ]:
        producer.begin_transaction()
        producer.produce("transactional", value, partition=0)
        assert producer.flush(30) == 0
        finish(30)

    committed = consume(kafka, "transactional")
    assert [m.value() for m in committed] == [b"kept", b"kept too"]
    # Offsets 1, 3 and 5 are the markers of commit, abort and commit: taken, and never delivered.
    assert [m.offset() for m in committed] == [0, 4]
    everything = consume(kafka, "transactional", "read_uncommitted")
    assert [m.value() for m in everything] == [b"kept", b"aborted", b"kept too"]


def test_finds_offsets_by_time(kafka: ApacheKafka) -> None:
    kafka.create_topic("timed")
    first_ms = 1_700_000_000_000
    produce(kafka, "timed", [b"a", b"b", b"c"], timestamp_ms=first_ms)
    partition = TopicPartition("timed", 0)

    def offset_of(spec: OffsetSpec) -> int:
        return int(kafka.admin().list_offsets({partition: spec})[partition].result(timeout=15).offset)

    assert offset_of(OffsetSpec.for_timestamp(first_ms + 1)) == 1
    assert offset_of(OffsetSpec.for_timestamp(first_ms + 3_600_000)) == -1
    assert offset_of(OffsetSpec.earliest()) == 0  # type: ignore[no-untyped-call]
    assert offset_of(OffsetSpec.latest()) == 3  # type: ignore[no-untyped-call]


def test_a_recreated_topic_has_another_identity(kafka: ApacheKafka) -> None:
    kafka.create_topic("recreated")
    first = topic_id(kafka, "recreated")
    assert topic_id(kafka, "recreated") == first
    produce(kafka, "recreated", [b"of the first life"])
    kafka.delete_topic("recreated")
    kafka.create_topic("recreated")
    assert topic_id(kafka, "recreated") != first
    assert consume(kafka, "recreated") == []


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_comes_back_after_an_outage_with_address_data_and_identity(kafka: ApacheKafka, end: str) -> None:
    topic = f"durable_{end}"
    kafka.create_topic(topic)
    produce(kafka, topic, [b"before"])
    bootstrap, identity, old_pid = kafka.bootstrap, topic_id(kafka, topic), kafka.pid

    getattr(kafka, end)()
    assert kafka.pid is None
    assert not Path(f"/proc/{old_pid}").exists()
    host, _, port = bootstrap.partition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=2)

    kafka.start()
    assert kafka.pid not in (None, old_pid)
    assert kafka.bootstrap == bootstrap
    assert topic_id(kafka, topic) == identity
    produce(kafka, topic, [b"after"])
    assert [m.value() for m in consume(kafka, topic)] == [b"before", b"after"]


def test_a_kept_folder_is_taken_up_again_and_a_temporary_one_removed(tmp_path: Path) -> None:
    skip_unless_available()
    with ApacheKafka(tmp_path / "kept") as first:
        first.create_topic("kept")
        bootstrap, identity = first.bootstrap, topic_id(first, "kept")
        with pytest.raises(HarnessError, match="already runs"):
            first.start()
    second = ApacheKafka.started(tmp_path / "kept")
    try:
        assert (second.bootstrap, topic_id(second, "kept")) == (bootstrap, identity)
    finally:
        second.close()
    assert second.log_path.exists()

    temporary = ApacheKafka()
    assert temporary.work_dir.exists()
    temporary.close()
    assert not temporary.work_dir.exists()


def test_a_server_that_cannot_start_says_why_and_leaves_nothing_behind() -> None:
    skip_unless_available()
    kafka = ApacheKafka(config={"offsets.topic.num.partitions": "none"})
    with pytest.raises(HarnessError, match=r"offsets\.topic\.num\.partitions"), kafka:
        pass
    assert kafka.pid is None
    assert not kafka.work_dir.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at the parent's death is Linux's")
def test_the_server_dies_with_a_killed_parent(tmp_path: Path) -> None:
    skip_unless_available()
    script = (
        "import sys, threading; from pathlib import Path; from tests.harness.apache_kafka import ApacheKafka\n"
        "kafka = ApacheKafka.started(Path(sys.argv[1]))\n"
        "print(kafka.pid, flush=True)\n"
        "threading.Event().wait()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "orphan")], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    try:
        server = int(parent.stdout.readline())
        assert server != parent.pid
        os.kill(server, 0)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
        parent.stdout.close()
    deadline = time.monotonic() + 10
    while is_running(server):
        assert time.monotonic() < deadline, f"Kafka {server} outlived the killed process that started it"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """A zombie that waits to be reaped by init counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_two_processes_may_fill_an_empty_cache_at_once(tmp_path: Path) -> None:
    skip_unless_available()
    script = "from tests.harness.apache_kafka import require_jars; print(require_jars())"
    environment = os.environ | {apache_kafka.CACHE_SETTING: str(tmp_path / "cache")}
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = {rival.communicate(timeout=200)[0].strip() for rival in rivals}
    assert [rival.returncode for rival in rivals] == [0, 0]
    assert len(answers) == 1
    folder = Path(answers.pop())
    assert list(folder.glob("kafka_2.13-*.jar"))
    assert sorted(p.name for p in folder.parent.iterdir()) == [".lock", folder.name]


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Let available() look again, and leave no answer of a changed environment behind."""
    apache_kafka.require_java.cache_clear()
    apache_kafka.require_jars.cache_clear()
    yield
    apache_kafka.require_java.cache_clear()
    apache_kafka.require_jars.cache_clear()


def fake_tool(folder: Path, name: str, script: str) -> None:
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


@pytest.mark.usefixtures("forgetful")
def test_says_why_it_is_not_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv(apache_kafka.CACHE_SETTING, str(tmp_path / "cache"))
    assert "no java" in (available() or "")

    fake_tool(tools, "java", "echo 'openjdk version \"11.0.2\" 2019-01-15' >&2")
    assert "java is 11" in (available() or "")

    fake_tool(tools, "java", "echo 'openjdk version \"21.0.2\" 2024-01-16' >&2")
    assert "no mvn on PATH" in (available() or "")

    fake_tool(tools, "mvn", "echo '[ERROR] Could not resolve the host'; exit 1")
    assert "Could not resolve the host" in (available() or "")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ('openjdk version "17.0.15" 2025-04-15', 17),
        ('java version "1.8.0_402"', 8),
        ('openjdk version "25" 2025-09-16', 25),
        ("no such tool", None),
    ],
)
def test_reads_the_java_version(text: str, version: int | None) -> None:
    assert parse_java_version(text) == version


def test_an_admin_call_fails_while_the_server_is_down(kafka: ApacheKafka) -> None:
    kafka.stop()
    try:
        with pytest.raises(KafkaException):
            kafka.admin().list_topics(timeout=1)
    finally:
        kafka.start()

"""A real Apache Kafka for tests and benchmarks: one process, no docker.

Data flow: `kafka/pom.xml` -> Maven, once -> jars in a per-user cache -> `kafka.tools.StorageTool format` ->
`kafka.Kafka server.properties` in KRaft mode, broker and controller combined, on 127.0.0.1 only.

It proves what librdkafka's mock cluster cannot: look-up of offsets by time, transactions, compaction, retention,
the identity of a re-created topic, a broker that goes away and comes back with its data.

    reason = available()                     # None, or why Kafka cannot run on this machine
    with ApacheKafka() as kafka:
        kafka.create_topic("payments", partitions=3)
        ...                                  # kafka.bootstrap, kafka.admin()
        kafka.stop()                         # an outage: same ports and same data after the next start()
        kafka.start()

Alone: `python -m tests.harness.apache_kafka` runs a broker and prints its address until Ctrl-C.

The cache is `$WAREHOUSE_KAFKA_CACHE`, else `$XDG_CACHE_HOME/payments-warehouse`, else `~/.cache/payments-warehouse`;
it holds one folder `kafka-<version>-<digest of the pom>` per content of the pom.

What it refuses: Java older than 17, a Kafka that does not answer in time (the error carries the end of its log),
to start twice. It never stops a process it did not start.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import functools
import hashlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

POM = Path(__file__).parent / "kafka" / "pom.xml"
CACHE_SETTING = "WAREHOUSE_KAFKA_CACHE"
OLDEST_JAVA = 17
MAVEN_TIMEOUT_S = 300.0
PORT_TRIES = 3

# PR_SET_PDEATHSIG has to be set in the process that becomes the JVM. A tiny exec'ing interpreter does it rather than
# `preexec_fn`, which may deadlock in a parent with threads, and librdkafka always has threads.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that asked for Kafka has gone")
os.execv(sys.argv[2], sys.argv[2:])
"""

_LOGGING = (
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=info",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSXXX",
    # Every client and server prints some 300 lines of its configuration.
    "-Dorg.slf4j.simpleLogger.log.org.apache.kafka.common.config.AbstractConfig=warn",
)


class HarnessError(RuntimeError):
    """Kafka could not be fetched, started or stopped; the message says which and shows the end of its log."""


def available() -> str | None:
    """Return None when a broker can be started here, else the reason, fit for `pytest.skip`.

    The first call on a machine fetches the jars (about 45 MB); later ones find them in the cache.
    """
    try:
        require_java()
        require_jars()
    except HarnessError as error:
        return str(error)
    return None


@functools.cache
def require_java() -> str:
    """Return the path of a `java` of at least version 17, from JAVA_HOME or PATH."""
    home = os.environ.get("JAVA_HOME")
    found = (home and shutil.which("java", path=str(Path(home) / "bin"))) or shutil.which("java")
    if not found:
        raise HarnessError(f"Apache Kafka needs Java {OLDEST_JAVA} or newer: no java in JAVA_HOME or on PATH")
    answer = subprocess.run([found, "-version"], capture_output=True, text=True, timeout=60, check=False)
    version = parse_java_version(answer.stderr + answer.stdout)
    if version is None or version < OLDEST_JAVA:
        raise HarnessError(
            f"Apache Kafka needs Java {OLDEST_JAVA} or newer: {found} is {version or 'of an unknown version'}"
        )
    return found


def parse_java_version(text: str) -> int | None:
    """Return the feature version in the output of `java -version`: 17 for "17.0.15", 8 for "1.8.0_402"."""
    match = re.search(r'version "(?:1\.)?(\d+)', text)
    return int(match.group(1)) if match else None


def kafka_version(pom: Path = POM) -> str:
    """Return the version of Kafka that the pom names."""
    version = ET.parse(pom).findtext(".//{*}kafka.version")
    if not version:
        raise HarnessError(f"{pom} has no property kafka.version")
    return version


def cache_folder(pom: Path = POM) -> Path:
    """Return the folder of the jars of this pom, whether they are there or not."""
    chosen = os.environ.get(CACHE_SETTING)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "payments-warehouse"
    digest = hashlib.sha256(pom.read_bytes()).hexdigest()[:12]
    return (Path(chosen) if chosen else base) / f"kafka-{kafka_version(pom)}-{digest}"


@functools.cache
def require_jars(pom: Path = POM) -> Path:
    """Return the folder with the jars of `pom`, fetched by Maven at the first call on this machine.

    The folder appears in one rename, so what exists is complete. A failure is not remembered.
    """
    folder = cache_folder(pom)
    if folder.is_dir():
        return folder
    maven = shutil.which("mvn")
    if not maven:
        raise HarnessError(f"Apache Kafka is not in {folder} and there is no mvn on PATH to fetch it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _only_one_at_a_time(folder.parent):
            if not folder.is_dir():
                _fetch_jars(maven, pom, folder)
    except OSError as error:
        raise HarnessError(
            f"cannot keep Apache Kafka in {folder}: {error}; name a folder in {CACHE_SETTING}"
        ) from error
    return folder


def _fetch_jars(maven: str, pom: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent) as scratch:
        jars = Path(scratch) / "jars"
        command = [maven, "-B", "-q", "-f", str(pom), "dependency:copy-dependencies"]
        command += ["-DincludeScope=runtime", f"-DoutputDirectory={jars}"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=MAVEN_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise HarnessError(f"mvn did not fetch Apache Kafka within {MAVEN_TIMEOUT_S:.0f} s") from error
        if done.returncode != 0 or not any(jars.glob("kafka_2.13-*.jar")):
            errors = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR" in line]
            raise HarnessError(f"mvn could not fetch Apache Kafka {kafka_version(pom)}: {' '.join(errors[:2])[:500]}")
        # A rival without the lock (another host on a shared home) may have won: its folder is as good.
        with contextlib.suppress(FileExistsError, OSError):
            jars.rename(folder)
    if not folder.is_dir():
        raise HarnessError(f"Apache Kafka was fetched but {folder} could not be made")


@contextlib.contextmanager
def _only_one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold a lock file: two Mavens filling one local repository at once can leave half a jar in it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class ApacheKafka:
    """One Kafka server: broker and controller in one JVM, plaintext, on 127.0.0.1.

    Args:
        work_dir: where the configuration, the data and the log go, kept afterwards; None: a temporary folder,
            removed by `close()` or at the end of the `with` block. An existing one is taken up with its data.
        heap: the JVM's heap limit, as `-Xmx` takes it.
        config: server settings over the harness's own, e.g. {"log.retention.check.interval.ms": "500"}.
        startup_timeout_s: how long to wait for an answer.

    Topics are not created by themselves, internal topics have one partition and one replica, and a group's first
    rebalance does not wait.

    A JVM started from the main thread dies with this process, whatever ended it (Linux). The kernel ties that signal
    to the starting thread, so from another thread only a regular exit stops the JVM.
    """

    def __init__(
        self,
        work_dir: Path | None = None,
        *,
        heap: str = "512m",
        config: Mapping[str, str] | None = None,
        startup_timeout_s: float = 60.0,
    ) -> None:
        self._temporary = work_dir is None
        self.work_dir = work_dir if work_dir is not None else Path(tempfile.mkdtemp(prefix="apache-kafka-"))
        self.log_path = self.work_dir / "server.log"
        self._heap = heap
        self._config = dict(config or {})
        self._timeout = startup_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._admin: AdminClient | None = None
        self._ports = _read_ports(self._properties)

    @classmethod
    def started(cls, work_dir: Path | None = None, *, config: Mapping[str, str] | None = None) -> ApacheKafka:
        """Return a running server; the caller ends it with `close()`."""
        kafka = cls(work_dir, config=config)
        try:
            kafka.start()
        except BaseException:
            kafka.close()
            raise
        return kafka

    @property
    def bootstrap(self) -> str:
        """The value for `bootstrap.servers`; the same after every restart."""
        if self._ports is None:
            raise HarnessError("Apache Kafka has no address before its first start()")
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def pid(self) -> int | None:
        """The JVM's process id while it runs, else None."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start the server and return when it answers; after a `stop()` with the same ports and data."""
        if self.pid is not None:
            raise HarnessError(f"Apache Kafka already runs with process id {self.pid}")
        jars = require_jars()
        if self._ports is not None:
            self._launch(jars)
            return
        self.work_dir.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, PORT_TRIES + 1):
            self._ports = _free_ports()
            self._format(jars, self._ports)
            try:
                self._launch(jars)
                return
            except HarnessError:
                # Another process took a port between the probe and the server's bind.
                if attempt == PORT_TRIES or "Address already in use" not in self.log_tail(400):
                    raise

    def stop(self, timeout_s: float = 8.0) -> None:
        """End the server in order (SIGTERM), after `timeout_s` by force; data and ports stay for the next start()."""
        self._end(signal.SIGTERM, timeout_s)

    def kill(self) -> None:
        """End the server as a crash would (SIGKILL); data and ports stay for the next start()."""
        self._end(signal.SIGKILL, 10.0)

    def close(self) -> None:
        """Stop the server and, when the folder is its own temporary one, remove it."""
        self.stop()
        self._admin = None
        if self._temporary:
            shutil.rmtree(self.work_dir, ignore_errors=True)

    def __enter__(self) -> ApacheKafka:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def admin(self) -> AdminClient:
        """Return an admin client of this server; one for the life of the harness."""
        if self._admin is None:
            # Without the low back-off a client may take 10 s to notice that a stopped broker is back, and without
            # the log level librdkafka prints each refused connection of an intended outage.
            self._admin = AdminClient(
                {"bootstrap.servers": self.bootstrap, "reconnect.backoff.max.ms": 250, "log_level": 0}
            )
        return self._admin

    def create_topic(self, name: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> None:
        """Create a topic and return when every partition of it has a leader that answers for it."""
        topic = NewTopic(name, num_partitions=partitions, replication_factor=1, config=dict(config or {}))
        self.admin().create_topics([topic], operation_timeout=10)[name].result(timeout=15)
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            found = self.admin().list_topics(timeout=10).topics.get(name)
            if found and len(found.partitions) == partitions and self._leaders_answer(name, partitions):
                return
            time.sleep(0.02)
        raise HarnessError(f"topic {name} has no leader for each of its {partitions} partitions after 15 s")

    def _leaders_answer(self, name: str, partitions: int) -> bool:
        """Whether the log of every partition can be asked; its leader is named a moment before it takes over."""
        places: dict[TopicPartition, OffsetSpec] = {
            TopicPartition(name, partition): OffsetSpec.latest() for partition in range(partitions)
        }
        try:
            for answer in self.admin().list_offsets(places, request_timeout=10).values():
                answer.result()
        except KafkaException:
            return False
        return True

    def delete_topic(self, name: str) -> None:
        """Delete a topic and return when it is gone from the metadata, so that it can be created anew."""
        self.admin().delete_topics([name], operation_timeout=10)[name].result(timeout=15)
        deadline = time.monotonic() + 15
        while name in self.admin().list_topics(timeout=10).topics:
            if time.monotonic() > deadline:
                raise HarnessError(f"topic {name} is still there 15 s after its deletion")
            time.sleep(0.02)

    def log_tail(self, lines: int = 30) -> str:
        """Return the last lines of the server's log."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    @property
    def _properties(self) -> Path:
        return self.work_dir / "server.properties"

    def _format(self, jars: Path, ports: tuple[int, int]) -> None:
        """Write the configuration and lay an empty storage with a fresh cluster id."""
        data = self.work_dir / "data"
        shutil.rmtree(data, ignore_errors=True)
        settings = server_settings(ports, data) | self._config
        self._properties.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        command = [require_java(), "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{jars}/*"]
        command += ["kafka.tools.StorageTool", "format", "-t", _new_cluster_id(), "-c", str(self._properties)]
        with self.log_path.open("ab") as log:
            code = subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, timeout=60).returncode
        if code != 0:
            self._ports = None
            self._properties.unlink()
            raise HarnessError(f"kafka.tools.StorageTool ended with code {code}:\n{self.log_tail()}")

    def _launch(self, jars: Path) -> None:
        command = [require_java(), f"-Xmx{self._heap}", "-XX:+UseSerialGC", *_LOGGING, "-cp", f"{jars}/*"]
        command += ["kafka.Kafka", str(self._properties)]
        if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
            command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        with self.log_path.open("ab") as log:
            # A session of its own: Ctrl-C in a terminal must reach the test run first, which then stops Kafka.
            self._process = subprocess.Popen(
                command, cwd=self.work_dir, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        atexit.register(self.close)
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.kill()
            raise

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise HarnessError(f"Apache Kafka ended with code {process.returncode}:\n{self.log_tail()}")
            if self._answers():
                return
            time.sleep(0.05)
        raise HarnessError(f"Apache Kafka did not answer within {self._timeout:.0f} s:\n{self.log_tail()}")

    def _answers(self) -> bool:
        host, _, port = self.bootstrap.partition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return len(self.admin().list_topics(timeout=2).brokers) == 1
        except (OSError, KafkaException):
            return False

    def _end(self, how: signal.Signals, timeout_s: float) -> None:
        process, self._process = self._process, None
        atexit.unregister(self.close)
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(how)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def server_settings(ports: tuple[int, int], data: Path) -> dict[str, str]:
    """Return the server.properties of a single combined node on (broker port, controller port) of 127.0.0.1."""
    broker, controller = ports
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "listeners": f"BROKER://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": f"BROKER://127.0.0.1:{broker}",
        "listener.security.protocol.map": "BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "BROKER",
        "controller.listener.names": "CONTROLLER",
        "controller.quorum.voters": f"1@127.0.0.1:{controller}",
        "log.dirs": str(data),
        "auto.create.topics.enable": "false",
        "group.initial.rebalance.delay.ms": "0",
        "offsets.topic.num.partitions": "1",
        "offsets.topic.replication.factor": "1",
        "transaction.state.log.num.partitions": "1",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "1",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        # After a crash the node may register again only when its old session is over: 9 s by default.
        "broker.session.timeout.ms": "4000",
        "broker.heartbeat.interval.ms": "500",
        # The default of 128 MB is a quarter of the heap, for a compaction buffer that tests never fill.
        "log.cleaner.dedupe.buffer.size": "16777216",
    }


def _read_ports(properties: Path) -> tuple[int, int] | None:
    """Return the ports that an existing work folder was formatted with, so that its address stays."""
    if not properties.exists():
        return None
    match = re.search(
        r"^listeners=BROKER://127\.0\.0\.1:(\d+),CONTROLLER://127\.0\.0\.1:(\d+)$", properties.read_text(), re.M
    )
    return (int(match.group(1)), int(match.group(2))) if match else None


def _free_ports() -> tuple[int, int]:
    """Return two ports on which nobody listens, outside the range that outgoing connections draw from.

    Inside that range a client that retries a stopped broker can be given the broker's port as its own and then
    connects to itself, which keeps the broker from coming back.
    """
    first_outgoing = 32768
    with contextlib.suppress(OSError, ValueError):
        first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(20000, first_outgoing) if first_outgoing >= 22000 else range(62000, 65000)
    found: list[int] = []
    for port in random.SystemRandom().sample(candidates, 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == 2:
            return found[0], found[1]
    raise HarnessError("no two free ports on 127.0.0.1 among 200 tried")


def _new_cluster_id() -> str:
    """Return a fresh KRaft cluster id; one that starts with a dash would be read as an option."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not text.startswith("-"):
            return text


def main() -> None:
    """Run a broker until Ctrl-C or SIGTERM."""
    reason = available()
    if reason:
        sys.exit(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begun = time.monotonic()
    with ApacheKafka() as kafka, contextlib.suppress(KeyboardInterrupt):
        print(f"Apache Kafka {kafka_version()} answers at {kafka.bootstrap} after {time.monotonic() - begun:.1f} s")
        print(f"process {kafka.pid}, log {kafka.log_path}; Ctrl-C stops it and removes its data", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()

"""The embedded broker: librdkafka's mock cluster, driven by ctypes on the library inside confluent-kafka's wheel.

Data flow: declared topics -> `MockCluster` -> any Kafka client on this machine. Offsets, watermarks, headers,
groups and compression behave as in Kafka. What it cannot do: keep anything after it stops, keep more than 5 MB a
partition (the oldest batches go), look up offsets by time, choose its port, create topics over the wire (an unknown
topic is created on first use, with 4 partitions).

Refuses a topic name Kafka would refuse, and a wheel without the library.
"""

import ctypes
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from ingestion.errors import ConfigurationError, WarehouseError

DEFAULT_PARTITIONS = 6

_PRODUCER = 0
_CONF_OK = 0
_TOPIC_ALREADY_EXISTS = 36
_TOPIC_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}")


def require_topics(topics: Mapping[str, int]) -> Mapping[str, int]:
    """The topics (name -> partitions) as given, or `ConfigurationError`: the mock cluster takes any name."""
    for name, partitions in topics.items():
        if not _TOPIC_NAME.fullmatch(name) or name in (".", ".."):
            raise ConfigurationError(
                f"Topic {name!r}: Kafka takes letters, digits, '.', '_' and '-', at most 249.",
                hint="Correct the feed's topic in its source declaration.",
            )
        if not 1 <= partitions <= 1000:
            raise ConfigurationError(f"Topic {name}: {partitions} partitions; there can be 1 to 1000.")
    return topics


def find_library() -> Path:
    """The librdkafka that confluent-kafka brings. The package itself is not imported: it costs 100 ms."""
    spec = importlib.util.find_spec("confluent_kafka")
    if spec is not None and spec.origin is not None:
        package = Path(spec.origin).parent
        for pattern in ("../confluent_kafka.libs/librdkafka*.so*", ".dylibs/librdkafka*.dylib"):
            found = sorted(package.glob(pattern))
            if found:
                return found[0].resolve()
    raise ConfigurationError(
        f"The embedded broker needs librdkafka from confluent-kafka's wheel, and {sys.executable} has none.",
        hint="Install the pinned requirements, or set KAFKA_BOOTSTRAP_SERVERS to a broker of your own.",
    )


def _load_library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(find_library()))
    except OSError as error:
        raise ConfigurationError(
            f"librdkafka cannot be loaded: {error}",
            hint="Reinstall confluent-kafka, or set KAFKA_BOOTSTRAP_SERVERS to a broker of your own.",
        ) from None
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    # Without these ctypes takes every value for a 32-bit int and cuts pointers.
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "rd_kafka_conf_new": (pointer, []),
        "rd_kafka_conf_set": (number, [pointer, text, text, text, ctypes.c_size_t]),
        "rd_kafka_new": (pointer, [number, pointer, text, ctypes.c_size_t]),
        "rd_kafka_destroy": (None, [pointer]),
        "rd_kafka_err2str": (text, [number]),
        "rd_kafka_mock_cluster_new": (pointer, [pointer, number]),
        "rd_kafka_mock_cluster_bootstraps": (text, [pointer]),
        "rd_kafka_mock_cluster_destroy": (None, [pointer]),
        "rd_kafka_mock_topic_create": (number, [pointer, text, number, number]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class MockCluster:
    """One broker on 127.0.0.1, alive until `stop` or the end of the process."""

    def __init__(self, topics: Mapping[str, int]) -> None:
        """Start it with these topics (name -> partitions)."""
        self._library = _load_library()
        problem = ctypes.create_string_buffer(512)
        configuration = self._library.rd_kafka_conf_new()
        # The handle itself connects to nothing; librdkafka would warn about just that.
        settings = {b"client.id": b"embedded-broker", b"log_level": b"3"}
        for name, value in settings.items():
            if self._library.rd_kafka_conf_set(configuration, name, value, problem, 512) != _CONF_OK:
                raise WarehouseError(f"The embedded broker did not start: {problem.value.decode()}")
        self._handle: int | None = self._library.rd_kafka_new(_PRODUCER, configuration, problem, 512)
        if not self._handle:
            raise WarehouseError(f"The embedded broker did not start: {problem.value.decode()}")
        self._cluster: int | None = self._library.rd_kafka_mock_cluster_new(self._handle, 1)
        if not self._cluster:
            self.stop()
            raise WarehouseError("The embedded broker did not start: librdkafka could not open a port.")
        self.address: str = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()
        self._known: set[str] = set()
        self.ensure_topics(topics)

    def ensure_topics(self, topics: Mapping[str, int]) -> None:
        """Create the topics that are not there; one that is keeps its partitions."""
        for name, partitions in require_topics(topics).items():
            # The cluster's thread sometimes takes a second to notice a request.
            if name in self._known:
                continue
            code = self._library.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, 1)
            if code not in (0, _TOPIC_ALREADY_EXISTS):
                reason = self._library.rd_kafka_err2str(code).decode()
                raise WarehouseError(f"The embedded broker did not create topic {name}: {reason}")
            self._known.add(name)

    def stop(self) -> None:
        """Give the port and the memory back; what the topics held is gone."""
        if self._cluster:
            self._library.rd_kafka_mock_cluster_destroy(self._cluster)
            self._cluster = None
        if self._handle:
            self._library.rd_kafka_destroy(self._handle)
            self._handle = None

"""The figures of the service level in Prometheus' text format, printed once or served to be scraped.

    Figures (orchestration/figures.py) -> gauges, made anew for each scrape

Listens on 127.0.0.1 unless told otherwise: names of feeds and tables are nobody else's business. A database that does
not answer is `warehouse_up 0` and nothing else, so that no figure stands still and looks alive.
"""

import contextlib
from collections.abc import Callable, Iterator

import psycopg2
from prometheus_client import CollectorRegistry, MetricsHandler, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ingestion.database import connect
from ingestion.errors import ConfigurationError, WarehouseError
from ingestion.feeds import load_feeds
from ingestion.settings import Settings
from orchestration.docs_server import PageServer
from orchestration.figures import Figures, fetch_figures

PREFIX = "warehouse"
STATES = ("pass", "warn", "error", "unknown")


def build_registry(settings: Settings, on_problem: Callable[[str], None] = lambda _: None) -> CollectorRegistry:
    """A registry that measures whenever it is asked."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Measured(settings, on_problem))
    return registry


def render_metrics(settings: Settings) -> str:
    """One reading as text.

    Raises:
        WarehouseError: the database does not answer, or nothing was built yet.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Fixed(_measure(settings)))
    return generate_latest(registry).decode()


def _measure(settings: Settings) -> Figures:
    connection = connect(settings, purpose="metrics")
    try:
        connection.set_session(readonly=True, autocommit=True)
        return fetch_figures(settings, load_feeds(settings), connection)
    finally:
        connection.close()


class _Measured(Collector):
    def __init__(self, settings: Settings, on_problem: Callable[[str], None]) -> None:
        self._settings = settings
        self._on_problem = on_problem

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        try:
            figures = _measure(self._settings)
        except (WarehouseError, psycopg2.Error) as error:
            self._on_problem(error.message if isinstance(error, WarehouseError) else "the database went away")
            yield GaugeMetricFamily(f"{PREFIX}_up", UP, value=0)
            return
        yield from to_metrics(figures)


class _Fixed(Collector):
    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield from to_metrics(self._figures)


UP = "Whether the warehouse's database answered."


def to_metrics(figures: Figures) -> Iterator[GaugeMetricFamily]:
    """Each figure as a gauge; what is not known has no sample."""
    yield GaugeMetricFamily(f"{PREFIX}_up", UP, value=1)
    yield _gauge(
        "table_age_seconds",
        "Age of the data of a feed or mart: now minus the oldest source time among what it is made of.",
        ("table",),
        [((one.table,), one.age.total_seconds() if one.age is not None else None) for one in figures.ages],
    )
    for name, what in (("warn", "somebody should know"), ("error", "it is a miss")):
        limits = [(one.table, one.warn_after if name == "warn" else one.error_after) for one in figures.ages]
        yield _gauge(
            f"table_age_{name}_seconds",
            f"Age from which {what}.",
            ("table",),
            [((table,), limit.total_seconds() if limit is not None else None) for table, limit in limits],
        )
    yield _gauge(
        "table_state",
        "1 for the state a table is in: pass, warn, error or unknown; hop is the feed or model that holds it back.",
        ("table", "state", "hop"),
        [((one.table, state, one.hop), float(one.state == state)) for one in figures.ages for state in STATES],
    )
    yield _gauge(
        "table_error_budget_left_ratio",
        "Share of a table's error budget that is left; below zero where the objective is broken.",
        ("table",),
        [((table,), left) for table, left in figures.budgets_left.items()],
    )
    queues = figures.queues
    yield _gauge(
        "feed_lag_records", "Offsets that wait at the broker.", ("feed",), [((one.feed,), one.lag) for one in queues]
    )
    yield _gauge(
        "dead_letters_open",
        "Dead letters neither replayed nor discarded.",
        ("feed",),
        [((one.feed,), one.open_dead_letters) for one in queues],
    )
    yield _gauge(
        "dead_letters_oldest_seconds",
        "For how long the oldest open dead letter is open.",
        ("feed",),
        [((one.feed,), one.oldest_dead_letter_seconds) for one in queues],
    )
    pipelines = figures.pipelines
    keys = ("kind", "pipeline")
    yield _gauge(
        "pipeline_runs",
        "Runs that came to an end within the days of the reports.",
        keys,
        [((one.kind, one.name), one.runs) for one in pipelines],
    )
    yield _gauge(
        "pipeline_failed_runs",
        "Those that failed.",
        keys,
        [((one.kind, one.name), one.failed) for one in pipelines],
    )
    yield _gauge(
        "pipeline_failures_per_hundred_runs",
        "Failed runs in a hundred.",
        keys,
        [((one.kind, one.name), one.failures_per_hundred) for one in pipelines],
    )
    yield _gauge(
        "pipeline_misses",
        "Misses that began within the days of the reports and that the pipeline is to blame for.",
        keys,
        [(key, count) for key, count in figures.misses.items()],
    )
    yield _gauge(
        "pipeline_run_seconds",
        "Run time of successful runs, by quantile.",
        (*keys, "quantile"),
        [
            ((one.kind, one.name, quantile), value)
            for one in pipelines
            for quantile, value in (("0.5", one.p50), ("0.95", one.p95), ("0.99", one.p99))
        ],
    )
    yield _gauge(
        "pipeline_last_success_timestamp_seconds",
        "When the last successful run began.",
        keys,
        [((one.kind, one.name), one.last_success.timestamp() if one.last_success else None) for one in pipelines],
    )


def _gauge(
    name: str,
    description: str,
    labels: tuple[str, ...],
    samples: "list[tuple[tuple[str, ...], float | int | None]]",
) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(f"{PREFIX}_{name}", description, labels=labels)
    for values, value in samples:
        if value is not None:
            gauge.add_metric(values, value)
    return gauge


def serve_metrics(settings: Settings, host: str, port: int, on_problem: Callable[[str], None]) -> None:
    """Serve http://host:port/metrics until interrupted, which is how it ends; prints the address first.

    Raises:
        ConfigurationError: the address cannot be used.
    """
    handler = MetricsHandler.factory(build_registry(settings, on_problem))
    try:
        server = PageServer((host, port), handler)
    except OSError as error:
        raise ConfigurationError(
            f"Port {port} of {host} cannot be used: {error.strerror}.", hint="`--port 0` takes a free one."
        ) from None
    with server, contextlib.suppress(KeyboardInterrupt):
        print(f"http://{host}:{server.server_port}/metrics (Ctrl-C ends)", flush=True)
        server.serve_forever()

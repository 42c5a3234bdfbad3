"""The Grafana dashboard asks for metrics there are: every name and label in its queries is one the warehouse serves.

The names come from the figures themselves, made up here and turned into metrics by the code that serves them.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration.accounts import Account
from orchestration.ages import TableAge
from orchestration.figures import Day, Figures, Pipeline
from orchestration.metrics import to_metrics
from orchestration.status import FeedStatus, Status
from orchestration.ticks import Tick

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD = DOCKER / "grafana" / "service_level.json"
NOW = datetime(2026, 3, 1, tzinfo=UTC)
# Words of PromQL that stand where a metric could; functions are told by the bracket behind them.
WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
SETS_OF_LABELS = r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)"

Dashboard = dict[str, Any]


@pytest.fixture(scope="module")
def served() -> dict[str, set[str]]:
    """Each metric with the labels it has."""
    hour = timedelta(hours=1)
    age = TableAge("marts.fct_transactions", hour, hour, 2 * hour, "pass", "a sentence", "raw_payments.x")
    account = Account(open_dead_letters=3, oldest_dead_letter=NOW - hour)
    status = Status((FeedStatus("raw_payments.x", "kafka", account, lag=7),), NOW)
    pipeline = Pipeline("run", "run", 10, 1, 10.0, 1.0, 2.0, 3.0, NOW, NOW)
    day = Day(date(2026, 3, 1), "run", "run", 10, 1, 0, 0, 1.0, 2.0, 3.0)
    figures = Figures(Tick(NOW, [age], status), [pipeline], [day], {age.table: 0.5}, 30, 0.99)
    found: dict[str, set[str]] = {}
    for metric in to_metrics(figures):
        assert metric.samples, f"{metric.name} has no sample to look at"
        for sample in metric.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture
def dashboard() -> Dashboard:
    loaded: Dashboard = json.loads(DASHBOARD.read_text())
    return loaded


def queries(dashboard: Dashboard) -> Iterator[tuple[str, str]]:
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def problems_in(dashboard: Dashboard, served: dict[str, set[str]]) -> list[str]:
    """What a query asks for that is not served, one line each."""
    problems = []
    for title, query in queries(dashboard):
        metrics = set(named_metrics(query))
        for name in sorted(metrics - set(served)):
            problems.append(f"{title}: no metric {name}")
        labels = set().union(*(served.get(name, set()) for name in metrics))
        for label in sorted(set(named_labels(query)) - labels):
            problems.append(f"{title}: no label {label}")
        if not metrics:
            problems.append(f"{title}: asks for nothing")
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            labels = set().union(*(served.get(name, set()) for name in named_metrics(target["expr"])))
            for label in re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"]):
                if label not in labels:
                    problems.append(f"{panel['title']}: no label {label} to name a curve by")
    return problems


def named_metrics(query: str) -> Iterator[str]:
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', query)
    bare = re.sub(r"\{[^}]*\}", " ", bare)
    bare = re.sub(SETS_OF_LABELS, " ", bare)
    bare = re.sub(r"\[[^\]]*\]", " ", bare)
    for match in re.finditer(r"(?<![\w.])([a-zA-Z_:][\w:]*)(\s*\()?", bare):
        if match[2] is None and match[1].lower() not in WORDS:
            yield match[1]


def named_labels(query: str) -> Iterator[str]:
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', query)
    for matchers in re.findall(r"\{([^}]*)\}", bare):
        yield from re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)
    for labels in re.findall(SETS_OF_LABELS, bare):
        yield from re.findall(r"\w+", labels)


def test_queries_ask_for_what_is_served(dashboard: Dashboard, served: dict[str, set[str]]) -> None:
    assert problems_in(dashboard, served) == []


def test_every_metric_is_on_the_dashboard(dashboard: Dashboard, served: dict[str, set[str]]) -> None:
    asked = {name for _, query in queries(dashboard) for name in named_metrics(query)}
    counted_only = {"warehouse_pipeline_runs", "warehouse_pipeline_failed_runs", "warehouse_table_age_warn_seconds"}
    assert set(served) - asked == counted_only


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("warehouse_feed_lag_records)", "warehouse_feed_lag_record)", "no metric warehouse_feed_lag_record"),
        ('quantile="0.95", kind="model"', 'percentile="0.95", kind="model"', "no label percentile"),
        ("sum(warehouse_pipeline_misses)", "sum by (table) (warehouse_pipeline_misses)", "no label table"),
        ("sum(warehouse_dead_letters_open)", "sum(1)", "asks for nothing"),
    ],
)
def test_a_query_that_would_stay_empty_is_caught(
    dashboard: Dashboard, served: dict[str, set[str]], before: str, after: str, problem: str
) -> None:
    spoiled = copy.deepcopy(dashboard)
    targets = [target for panel in spoiled["panels"] for target in panel["targets"]]
    changed = [target for target in targets if before in target["expr"]]
    assert changed
    for target in changed:
        target["expr"] = target["expr"].replace(before, after)
    assert any(problem in found for found in problems_in(spoiled, served))


def test_the_dashboard_the_source_and_the_scrape_belong_together(dashboard: Dashboard) -> None:
    (source,) = yaml.safe_load((DOCKER / "grafana" / "datasources.yml").read_text())["datasources"]
    used = {panel["datasource"]["uid"] for panel in dashboard["panels"]}
    assert used == {source["uid"]}
    services = yaml.safe_load((DOCKER / "compose.yml").read_text())["services"]
    assert source["url"] == "http://prometheus:9090"
    (scrape,) = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    service, port = target.split(":")
    command = services[service]["command"]
    assert command[command.index("--port") + 1] == port
    (provider,) = yaml.safe_load((DOCKER / "grafana" / "dashboards.yml").read_text())["providers"]
    mounted = {volume.split(":")[0]: volume.split(":")[1] for volume in services["grafana"]["volumes"]}
    assert mounted["./grafana/service_level.json"].startswith(provider["options"]["path"])

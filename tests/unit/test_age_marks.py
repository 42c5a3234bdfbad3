"""Marks and budgets without a database: which partition tells the age of a feed, and what an age means."""

import copy
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ingestion.errors import ConfigurationError
from orchestration.ages import Budget, Feed, Lineage, Mark, choose_mark, parse_budget

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
MARKS = {0: NOW - HOUR, 1: NOW - 3 * HOUR, 2: NOW - 2 * HOUR}


def feed(kind: str = "kafka", idle_partitions: bool = False) -> Feed:
    return Feed("raw_shop.orders", kind, Budget(), idle_partitions)


def test_the_partition_furthest_behind_tells_the_age() -> None:
    assert choose_mark(feed(), MARKS) == Mark(NOW - 3 * HOUR, 1)


def test_where_idle_partitions_are_normal_the_newest_does() -> None:
    assert choose_mark(feed(idle_partitions=True), MARKS) == Mark(NOW - HOUR, 0)


def test_an_api_has_no_partitions_and_what_never_landed_no_mark() -> None:
    assert choose_mark(feed("rest"), {0: NOW}) == Mark(NOW, None)
    assert choose_mark(feed(), {}) == Mark(None, None)


def test_an_age_is_held_against_its_budget() -> None:
    budget = parse_budget(
        {"warn_after": {"count": 90, "period": "minute"}, "error_after": {"count": 1, "period": "day"}}, "x"
    )
    assert budget == Budget(1.5 * HOUR, 24 * HOUR)
    assert [budget.state_of(age * HOUR) for age in (1, 1.5, 2, 24, 25)] == ["pass", "pass", "warn", "warn", "error"]
    assert Budget().state_of(1000 * HOUR) == "pass"
    # As dbt has it in the manifest where nothing is declared.
    assert parse_budget({"warn_after": {"count": None, "period": None}, "error_after": None}, "x") == Budget()


@pytest.mark.parametrize(
    "limit", [{"count": 2, "period": "week"}, {"count": 0, "period": "hour"}, {"count": "2 hours"}]
)
def test_a_budget_that_is_not_understood_is_named(limit: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^fct_orders: warn_after is not understood"):
        parse_budget({"warn_after": limit}, "fct_orders")


def node(name: str, layer: str, *parents: str, resource_type: str = "model") -> dict[str, Any]:
    return {
        "resource_type": resource_type,
        "name": name,
        "schema": layer,
        "alias": name,
        "fqn": ["shop", layer, name],
        "config": {"meta": {}},
        "depends_on": {"nodes": list(parents)},
    }


MANIFEST: dict[str, Any] = {
    "sources": {
        "source.shop.raw_shop.orders": {
            "source_name": "raw_shop",
            "name": "orders",
            "meta": {"feed": {"kind": "kafka"}},
            "freshness": None,
        },
        "source.shop.ops.runs": {"source_name": "ops", "name": "runs", "meta": {}, "freshness": None},
    },
    "nodes": {
        "seed.shop.currencies": node("currencies", "reference", resource_type="seed"),
        "model.shop.stg_orders": node("stg_orders", "staging", "source.shop.raw_shop.orders", "seed.shop.currencies"),
        "model.shop.fct_orders": node("fct_orders", "marts", "model.shop.stg_orders", "seed.shop.currencies"),
        "model.shop.dim_currencies": node("dim_currencies", "marts", "seed.shop.currencies"),
        "model.shop.rpt_runs": node("rpt_runs", "marts", "source.shop.ops.runs"),
    },
}


def test_what_is_made_of_seeds_alone_has_no_age() -> None:
    lineage = Lineage(copy.deepcopy(MANIFEST))
    assert lineage.served == ["model.shop.fct_orders"]
    assert lineage.parents["model.shop.fct_orders"] == ["model.shop.stg_orders"]
    assert lineage.feeds_of("model.shop.fct_orders") == ["source.shop.raw_shop.orders"]
    assert lineage.table("model.shop.fct_orders") == "marts.fct_orders"
    assert lineage.name("source.shop.raw_shop.orders") == "raw_shop.orders"

"""The project's own graph: every column traced, in agreement with what was read off the models by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from ingestion.settings import Settings
from orchestration.lineage.build import load_graph
from orchestration.lineage.compiled import load_compiled
from orchestration.lineage.graph import ORIGINS, Graph, without_edges
from orchestration.lineage.impact import find_impact
from orchestration.lineage.incident import upstream_feeds
from orchestration.lineage.names import find_column
from orchestration.lineage.personal import follow_personal_data, require_policy
from orchestration.lineage.row import _in_terms_of_sources

EDGES = Path(__file__).parents[1] / "fixtures" / "lineage" / "edges.txt"


@pytest.fixture(scope="module")
def graph(clean_settings: Settings) -> Graph:
    return load_graph(clean_settings)


def by_hand() -> tuple[set[tuple[str, str]], set[str]]:
    """(source, target) of every edge, and every column, of the models in the file."""
    edges: set[tuple[str, str]] = set()
    columns: set[str] = set()
    for line in EDGES.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            target, sources = line.split(": ")
            columns.add(target)
            edges |= {(source, target) for source in sources.split() if source != "-"}
    return edges, columns


def found_in(graph: Graph, models: set[str]) -> set[tuple[str, str]]:
    return {
        (graph.show(edge.source), graph.show(edge.target))
        for edge in graph.edges
        if edge.direct and not edge.again and graph.datasets[edge.target.dataset].name in models
    }


def agreement(graph: Graph) -> tuple[float, float]:
    """Precision and recall of the graph against the list."""
    edges, columns = by_hand()
    found = found_in(graph, {column.rpartition(".")[0] for column in columns})
    return len(found & edges) / len(found), len(found & edges) / len(edges)


def test_the_graph_agrees_with_what_was_read_by_hand(graph: Graph) -> None:
    edges, columns = by_hand()
    assert len(edges) >= 120
    found = found_in(graph, {column.rpartition(".")[0] for column in columns})
    assert found - edges == set()
    assert edges - found == set()
    assert agreement(graph) == (1.0, 1.0)


def test_a_missing_edge_is_seen(graph: Graph) -> None:
    cut = without_edges(graph, lambda edge: graph.show(edge.target) == "dim_users.country_code")
    precision, recall = agreement(cut)
    assert precision == 1.0
    assert recall < 1.0


def test_the_list_names_every_column_of_its_models(graph: Graph) -> None:
    _, columns = by_hand()
    models = {column.rpartition(".")[0] for column in columns}
    there = {graph.show(where) for where, _ in graph.columns("model") if graph.datasets[where.dataset].name in models}
    assert there == {column for column in columns if not column.endswith(".*")}
    marts = {dataset.name for dataset in graph.datasets.values() if dataset.layer == "marts"}
    assert marts <= models


def test_every_column_is_traced_to_source_fields(graph: Graph) -> None:
    """Unknown 0; each column of a mart has its values from fields of messages, seeds, the loader or the run history, or
    is made of constants, which columns may choose between."""
    assert graph.unknown() == []
    chosen = {edge.target for edge in graph.edges if not edge.direct}
    for where, column in graph.columns("model"):
        if graph.datasets[where.dataset].layer == "marts":
            origins = [graph.datasets[origin.dataset] for origin in graph.origins(where)]
            kinds = {origin.kind for origin in origins if not origin.name.startswith("ops.")}
            assert kinds <= {*ORIGINS, "loader", "seed", "external"}, graph.show(where)
            assert bool(origins) or column.generated or where in chosen, graph.show(where)
            assert not (origins and column.generated), graph.show(where)


def test_a_field_is_followed_to_the_marts(graph: Graph) -> None:
    origins = graph.origins(find_column(graph, "rpt_finance__daily_revenue.reporting_revenue_major"))
    assert {graph.show(one) for one in origins} == {
        "payments_transaction_created $.amount",
        "/v1/{from}..{to} $.rates.{rate_date}.{quote_currency}.*",
        "currencies.minor_unit_exponent",
    }
    amount = find_column(graph, "payments_transaction_created $.amount")
    reached = {graph.show(one) for one in graph.walk(amount, up=False)}
    assert {"fct_transactions.amount_minor", "rpt_finance__daily_revenue.revenue_major"} <= reached
    assert "fct_transactions.status" not in reached


def test_an_incremental_run_adds_the_models_own_rows(graph: Graph) -> None:
    own = {graph.show(edge.target) for edge in graph.edges if edge.again and edge.source == edge.target}
    assert {"stg_users__events.email", "int_users__latest.email", "int_payments__daily_totals.amount_minor"} <= own
    again = {(graph.show(edge.source), graph.show(edge.target)) for edge in graph.edges if edge.again and edge.direct}
    assert ("stg_users__events._last_load_id", "stg_users__events._previous_load_id") in again


def test_what_only_decides_is_marked_so(graph: Graph) -> None:
    indirect = {
        (graph.show(edge.source), graph.show(edge.target)): edge.kinds for edge in graph.edges if not edge.direct
    }
    assert indirect["int_payments__daily_totals.status", "rpt_finance__daily_revenue.*"] == ("filter",)
    assert "filter" in indirect["raw_users._dlt_loads.load_id", "stg_users__events.*"]
    assert "condition" in indirect["stg_users__events.event_type", "int_users__latest.signed_up_at"]


def test_personal_data_ends_before_the_marts(graph: Graph) -> None:
    found = require_policy(graph)
    ends = {graph.show(one.column): one.barrier for one in found.endings}
    assert ends == {"dim_users.user_key": "tokenise", "fct_transactions.user_key": "tokenise"}
    layers = {graph.datasets[one.dataset].layer for one in found.holding}
    assert layers == {"raw", "staging", "intermediate"}
    email = {graph.show(one) for one in found.reached if "email" in graph.show(one)}
    assert email == {
        "user_events $.email",
        "raw_users.user_events.email",
        "stg_users__events.email",
        "int_users__latest.email",
    }
    assert found.exposures == ()


def test_a_declaration_that_is_taken_away_is_missed(graph: Graph) -> None:
    """The twin: one mark less, or a barrier less, and the policy is broken."""
    for name, change in (("int_users__latest.email", {"pii": False}), ("dim_users.user_key", {"barrier": ""})):
        where = find_column(graph, name)
        dataset = graph.datasets[where.dataset]
        columns = {**dataset.columns, where.column: replace(dataset.columns[where.column], **change)}
        changed = replace(graph, datasets={**graph.datasets, dataset.id: replace(dataset, columns=columns)})
        assert [changed.show(one.column) for one in follow_personal_data(changed).violations] == [name]


def test_the_impact_of_a_column(graph: Graph, clean_settings: Settings) -> None:
    manifest = load_compiled(clean_settings)
    where = find_column(graph, "int_payments__daily_totals.reporting_amount_minor")
    found = find_impact(graph, manifest, *where)
    assert [graph.datasets[one.model].name for one in found.broken] == ["rpt_finance__daily_revenue"]
    assert [graph.datasets[one].name for one in found.exposures] == ["finance_daily_revenue"]
    assert "finance" in found.owners
    # Nobody reads it.
    assert find_impact(graph, manifest, *find_column(graph, "dim_dates.iso_week")).broken == ()
    whole = find_impact(graph, manifest, find_column(graph, "dim_currencies.currency_code").dataset)
    assert [graph.datasets[one.model].name for one in whole.broken] == ["rpt_finance__daily_revenue"]


def test_feeds_upstream_of_a_column(graph: Graph) -> None:
    feeds = upstream_feeds(graph, find_column(graph, "rpt_finance__daily_revenue.revenue_minor"))
    assert feeds == ["raw_fx.daily_rates", "raw_payments.transaction_created"]
    assert upstream_feeds(graph, find_column(graph, "int_users__latest.email")) == ["raw_users.user_events"]


def test_a_key_in_terms_of_raw_columns(graph: Graph) -> None:
    ((where, template),) = _in_terms_of_sources(graph, find_column(graph, "fct_transactions.user_key"))
    assert graph.show(where) == "raw_payments.transaction_created.user_id"
    assert template.count("\0") == 1
    assert "SHA256" in template


def test_the_sql_is_compiled_without_a_server(clean_settings: Settings) -> None:
    assert clean_settings.get("WAREHOUSE_DSN") is None
    manifest = load_compiled(clean_settings)
    totals = manifest["nodes"]["model.payments_warehouse.int_payments__user_totals"]
    assert "full outer join known" in totals["incremental_code"]
    assert "known" not in totals["compiled_code"]

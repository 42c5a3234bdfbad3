"""Manifest to graph: self-references, snapshots, seeds, functions, tests; the cache; the folder of any project."""

import json
from pathlib import Path

import pytest

from ingestion.errors import ConfigurationError
from orchestration.lineage.build import Work, read_graph
from orchestration.lineage.graph import ROWS, ColumnId, Graph, graph_from_json
from orchestration.lineage.names import find_column, find_node
from tests.harness.lineage import graph_of, manifest_of, many_models

SOURCES = {"people": {"id": {}, "email": {"pii": True}, "at": {}}}


def direct(graph: Graph, *, again: bool = False) -> set[tuple[str, str]]:
    return {
        (graph.show(edge.source), graph.show(edge.target))
        for edge in graph.edges
        if edge.direct and edge.again == again
    }


def test_an_incremental_model_reads_itself() -> None:
    manifest = manifest_of({"stg": "select id, email, at from raw.people"}, sources=SOURCES)
    manifest["nodes"]["model.p.stg"]["incremental_code"] = (
        "with new as (select id, email, at from raw.people where at > (select max(at) from main.stg)) "
        "select * from new union all select id, email, at from main.stg where id not in (select id from new)"
    )
    graph = graph_of(manifest)
    assert direct(graph) == {
        ("raw.people.id", "stg.id"),
        ("raw.people.email", "stg.email"),
        ("raw.people.at", "stg.at"),
        ("raw.people.*", "stg.*"),
    }
    assert direct(graph, again=True) == {(f"stg.{one}", f"stg.{one}") for one in ("id", "email", "at", "*")}
    assert graph.origins(ColumnId("model.p.stg", "email")) == {ColumnId("source.p.raw.people", "email")}


def test_what_only_an_incremental_run_reads_is_there() -> None:
    manifest = manifest_of({"a": "select id, cast(null as text) as before from raw.people"}, sources=SOURCES)
    manifest["nodes"]["model.p.a"]["incremental_code"] = "select id, email as before from raw.people"
    graph = graph_of(manifest)
    assert direct(graph, again=True) == {("raw.people.email", "a.before")}
    column = graph.column(ColumnId("model.p.a", "before"))
    assert column is not None
    assert not column.generated


def test_a_snapshot_has_dbts_columns() -> None:
    manifest = manifest_of({}, sources=SOURCES)
    node = manifest_of({"snap": "select id, email, at from raw.people"})["nodes"]["model.p.snap"]
    node |= {"resource_type": "snapshot", "config": {"unique_key": "id", "updated_at": "at", "strategy": "timestamp"}}
    manifest["nodes"]["snapshot.p.snap"] = node
    found = direct(graph_of(manifest))
    assert ("raw.people.at", "snap.dbt_valid_from") in found
    assert {source for source, target in found if target == "snap.dbt_scd_id"} == {"raw.people.id", "raw.people.at"}


def test_seeds_have_the_columns_of_their_file(tmp_path: Path) -> None:
    manifest = manifest_of({"stg": "select code, name from main.codes"})
    node = manifest_of({"codes": ""})["nodes"]["model.p.codes"]
    manifest["nodes"]["seed.p.codes"] = node | {"resource_type": "seed", "original_file_path": "seeds/codes.csv"}
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "codes.csv").write_text("\ufeffcode,name\na,b\n", encoding="utf-8")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    graph = read_graph(tmp_path, tmp_path / "home")
    assert {name for name in graph.datasets["seed.p.codes"].columns if name != ROWS} == {"code", "name"}
    assert ("codes.name", "stg.name") in direct(graph)


def test_a_function_of_the_project_brings_what_it_reads() -> None:
    functions = {"function.p.name_of": {"name": "name_of", "compiled_code": "select email from raw.people"}}
    graph = graph_of(
        manifest_of({"a": "select name_of(id) as x from raw.people"}, sources=SOURCES, functions=functions)
    )
    assert {source for source, target in direct(graph) if target == "a.x"} == {"raw.people.id", "raw.people.email"}


def test_what_cannot_be_resolved_is_listed() -> None:
    manifest = manifest_of(
        {"broken": "select from", "lost": "select gone from raw.people", "star": "select * from nowhere.known"},
        sources=SOURCES,
    )
    python = manifest_of({"py": ""}, columns={"py": {"id": {}}})["nodes"]["model.p.py"] | {"language": "python"}
    manifest["nodes"]["model.p.py"] = python
    graph = graph_of(manifest)
    found = {graph.show(where): why for where, why in graph.unknown()}
    assert found.keys() == {"broken.*", "lost.gone", "star.*", "py.id"}
    assert "not understood" in found["broken.*"]
    assert found["py.id"] == "not compiled"


def test_the_graph_is_read_as_it_was_written() -> None:
    graph = graph_of(many_models(20, 5))
    again = graph_from_json(graph.to_json())
    assert again.datasets == graph.datasets
    assert again.edges == graph.edges


def test_a_changed_model_is_the_only_one_read_again(tmp_path: Path) -> None:
    manifest = many_models(60, 6)
    first, second, third = Work(), Work(), Work()
    before = graph_of(manifest, tmp_path, first)
    assert len(first.read) == 60
    assert graph_of(manifest, tmp_path, second).edges == before.edges
    assert second.read == []
    changed = manifest["nodes"]["model.p.m_0030"]
    changed["compiled_code"] = changed["compiled_code"].replace("upper(b.c02)", "lower(b.c02)")
    graph_of(manifest, tmp_path, third)
    assert third.read == ["model.p.m_0030"]
    # A column more is one that others see.
    fourth = Work()
    changed["compiled_code"] = changed["compiled_code"].replace(" from final where", ", c00 as more from final where")
    graph_of(manifest, tmp_path, fourth)
    assert 2 <= len(fourth.read) <= 3


def test_an_unchanged_folder_is_not_read_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(many_models(10, 3)), encoding="utf-8")
    before = read_graph(tmp_path, tmp_path / "home")
    monkeypatch.setattr("orchestration.lineage.build.build_graph", lambda *_: pytest.fail("built again"))
    assert read_graph(tmp_path, tmp_path / "home").edges == before.edges


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"manifest\.json cannot be read"), ("{", "JSON that cannot be read"), ("[]", "no dbt manifest")],
)
def test_a_folder_without_a_manifest_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=message):
        read_graph(tmp_path, tmp_path / "home")


def test_columns_are_found_by_what_people_write() -> None:
    graph = graph_of(manifest_of({"people": "select id, email from raw.people"}, sources=SOURCES))
    model, source = "model.p.people", "source.p.raw.people"
    assert find_node(graph, "people") == (model, "")
    assert find_node(graph, "main.people.email") == (model, "email")
    assert find_node(graph, "raw.people.email") == (source, "email")
    assert find_node(graph, f"{model}.id") == (model, "id")
    with pytest.raises(ConfigurationError, match="people has no column emial") as error:
        find_node(graph, "people.emial")
    assert "email" in error.value.hint
    with pytest.raises(ConfigurationError, match="Nothing is called peple"):
        find_node(graph, "peple.email")
    with pytest.raises(ConfigurationError, match="name a column"):
        find_column(graph, "people")

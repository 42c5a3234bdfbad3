"""A dbt project as manifest and catalog, written down in a few lines; and the graph of one.

manifest_of({"a": "select 1 as id", "b": "select id from main.a"})
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestration.lineage.build import Work, build_graph
from orchestration.lineage.graph import ROWS, Column, ColumnId, Dataset, Edge, Graph

SCHEMA = "main"
SOURCE = "source.p.raw.events"


def manifest_of(
    models: Mapping[str, str],
    *,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    columns: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    **nodes: Any,
) -> dict[str, Any]:
    """A manifest of models with compiled SQL.

    Args:
        models: name -> SQL; a model named in another's SQL is one it reads.
        sources: table -> column -> meta; they lie in schema `raw`.
        columns: model -> column -> meta.
    """
    made: dict[str, Any] = {}
    for name, text in models.items():
        reads = [f"model.p.{other}" for other in models if other != name and f"{SCHEMA}.{other}" in text]
        declared = (columns or {}).get(name, {})
        made[f"model.p.{name}"] = {
            "unique_id": f"model.p.{name}",
            "name": name,
            "alias": name,
            "schema": SCHEMA,
            "resource_type": "model",
            "fqn": ["p", "marts" if name.startswith(("fct_", "dim_")) else "staging", name],
            "original_file_path": f"models/{name}.sql",
            "description": "",
            "columns": {one: {"name": one, "config": {"meta": dict(meta)}} for one, meta in declared.items()},
            "config": {},
            "depends_on": {"nodes": reads},
            "compiled_code": text,
            "language": "sql",
        }
    return {
        "metadata": {"project_name": "p"},
        "nodes": made | nodes.get("more", {}),
        "sources": {
            f"source.p.raw.{table}": {
                "unique_id": f"source.p.raw.{table}",
                "source_name": "raw",
                "name": table,
                "identifier": table,
                "schema": "raw",
                "resource_type": "source",
                "description": "",
                "original_file_path": "models/sources.yml",
                "columns": {one: {"name": one, "meta": dict(meta)} for one, meta in columns.items()},
            }
            for table, columns in (sources or {}).items()
        },
        "exposures": nodes.get("exposures", {}),
        "unit_tests": {},
        "functions": nodes.get("functions", {}),
    }


def graph_of(manifest: Mapping[str, Any], home: Path | None = None, work: Work | None = None) -> Graph:
    """The graph of a manifest without feeds."""
    return build_graph(dict(manifest), [], {}, Path("nowhere"), home, work)


def many_models(count: int, width: int) -> dict[str, Any]:
    """A project of so many models with so many columns each, in layers that read the one before."""
    names = [f"c{number:02d}" for number in range(width)]
    models: dict[str, str] = {}
    breadth = max(1, count // 10)
    for number in range(count):
        layer, place = divmod(number, breadth)
        if layer == 0:
            kept = ", ".join(names[1:])
            models[f"m_{number:04d}"] = f"with s as (select * from raw.events) select c00 as c00, {kept} from s"
            continue
        first = f"{SCHEMA}.m_{(layer - 1) * breadth + place:04d}"
        second = f"{SCHEMA}.m_{(layer - 1) * breadth + (place + 1) % breadth:04d}"
        made = ", ".join(
            f"coalesce(a.{one}, b.{one}) as {one}"
            if at % 3 == 0
            else f"a.{one}"
            if at % 3 == 1
            else f"upper(b.{one}) as {one}"
            for at, one in enumerate(names)
        )
        models[f"m_{number:04d}"] = (
            f"with a as (select * from {first}), b as (select * from {second}), joined as (select {made} from a "
            "left join b on a.c00 = b.c00 where a.c01 is not null), final as (select *, row_number() over "
            "(partition by c00 order by c01 desc) as _rank from joined) select "
            f"{', '.join(names)} from final where _rank = 1"
        )
    personal = {"c03": {"pii": True}}
    return manifest_of(
        models,
        sources={"events": {one: personal.get(one, {}) for one in names}},
        columns={name: personal for name in models},
    )


def wide_graph(count: int, width: int) -> Graph:
    """The graph such a project has, without reading any SQL: each column from the same one of two models before."""
    names = [f"c{number:02d}" for number in range(width)]
    breadth = max(1, count // 10)
    ids = [f"model.p.m_{number:04d}" for number in range(count)]
    columns = {ROWS: Column(ROWS)} | {name: Column(name, pii=name == "c03") for name in names}
    datasets = {SOURCE: Dataset(SOURCE, "raw.events", "source", "raw", "raw.events", columns=columns)}
    edges = []
    for number, unique_id in enumerate(ids):
        layer, place = divmod(number, breadth)
        before = (layer - 1) * breadth
        read = [SOURCE] if layer == 0 else [ids[before + place], ids[before + (place + 1) % breadth]]
        name = unique_id.rpartition(".")[2]
        datasets[unique_id] = Dataset(
            unique_id, name, "model", "staging", f"main.{name}", columns=columns, reads=tuple(sorted(read))
        )
        edges += [
            Edge(ColumnId(one, column), ColumnId(unique_id, column), ("identity",)) for one in read for column in names
        ]
    return Graph("p", datasets, edges)

"""What breaks when a column, or a whole node, goes: models, tests, exposures, and who owns them.

A reader breaks when its SQL names what is gone. One that takes `*` goes on without it and hands the loss to its own
readers. So each reader's SQL is read again without the column: what then refers to nothing fails to build. What stands
on a failed model is not built either, and is named apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestration.lineage.build import BUILT, Tables
from orchestration.lineage.graph import ROWS, ColumnId, Graph


@dataclass(frozen=True)
class Broken:
    """A model that fails to build, and what its SQL refers to in vain."""

    model: str
    reason: str


@dataclass(frozen=True)
class Impact:
    """What a removal does.

    broken:    models that fail to build.
    skipped:   models that are not built because one before them failed.
    changed:   columns that have their value from it, however far.
    tests:     unique ids of tests that read what is gone, or what a broken model makes.
    exposures: what stands on any of these models.
    owners:    of all of them.
    """

    broken: tuple[Broken, ...]
    skipped: tuple[str, ...]
    changed: tuple[ColumnId, ...]
    tests: tuple[str, ...]
    exposures: tuple[str, ...]
    owners: tuple[str, ...]


def find_impact(graph: Graph, manifest: Mapping[str, Any], dataset: str, column: str = "") -> Impact:
    """What breaks without a column of a dataset; without a column named, without the dataset."""
    nodes = manifest["nodes"]
    readers = graph.readers
    # Dataset -> columns it no longer has; ROWS for all of it.
    gone: dict[str, set[str]] = {dataset: {column or ROWS}}
    broken: dict[str, str] = {}
    if column and dataset in nodes:
        reason = _names_itself(nodes[dataset], column)
        if reason:
            broken[dataset] = reason
    waiting = [dataset]
    while waiting:
        lost_from = waiting.pop(0)
        for reader in readers.get(lost_from, ()):
            node = nodes.get(reader)
            if node is None or node["resource_type"] not in BUILT or reader in broken:
                continue
            reason, lost = _read_again(graph, node, gone)
            if reason:
                broken[reader] = reason
            elif lost - gone.get(reader, set()):
                gone[reader] = gone.get(reader, set()) | lost
                waiting.append(reader)
    skipped = _downstream(graph, broken) - set(broken)
    changed = [where for where in _changed(graph, dataset, column) if where.dataset != dataset]
    tests = _tests(graph, gone, {*broken, *skipped})
    touched = {dataset, *broken, *skipped, *(where.dataset for where in changed)}
    exposures = sorted(
        {one for each in touched for one in readers.get(each, ()) if graph.datasets[one].kind == "exposure"}
    )
    owners = sorted({graph.datasets[one].owner for one in {*touched, *exposures} if graph.datasets[one].owner})
    return Impact(
        tuple(Broken(model, broken[model]) for model in sorted(broken)),
        tuple(sorted(skipped)),
        tuple(changed),
        tuple(tests),
        tuple(exposures),
        tuple(owners),
    )


def _read_again(graph: Graph, node: Mapping[str, Any], gone: Mapping[str, set[str]]) -> tuple[str, set[str]]:
    """Why a model fails without what is gone, or the columns it then no longer has."""
    from orchestration.lineage.sql import find_broken, read_statement

    tables: Tables = {}
    text = node.get("compiled_code") or ""
    for one in graph.datasets[node["unique_id"]].reads:
        schema, _, table = graph.datasets[one].relation.partition(".")
        lost = gone.get(one, set())
        if ROWS in lost:
            return f"no {graph.datasets[one].name}", set()
        tables.setdefault(schema, {})[table] = {
            name: column.type or "text"
            for name, column in graph.datasets[one].columns.items()
            if name != ROWS and name not in lost
        }
    vain = find_broken(text, tables)
    if vain:
        return vain[0], set()
    now = read_statement(text, tables)
    lost_here = {name for name in graph.datasets[node["unique_id"]].columns if name != ROWS} - set(now.columns)
    if now.unknown or node["resource_type"] == "snapshot":
        return "", set()
    if lost_here and (node.get("contract") or {}).get("enforced"):
        return f"its contract has {', '.join(sorted(lost_here))}", set()
    return "", lost_here


def _names_itself(node: Mapping[str, Any], column: str) -> str:
    """Why a model fails to build without a column of its own, besides its SQL: an index or a constraint names it."""
    for index in (node.get("config") or {}).get("indexes") or ():
        if column in index.get("columns", ()):
            return f"its index on {', '.join(index['columns'])}"
    for constraint in node.get("constraints") or ():
        if column in (constraint.get("columns") or ()):
            return f"its constraint on {', '.join(constraint['columns'])}"
    return ""


def _downstream(graph: Graph, models: Mapping[str, str]) -> set[str]:
    found: set[str] = set()
    waiting = list(models)
    while waiting:
        for reader in graph.readers.get(waiting.pop(), ()):
            if reader not in found and graph.datasets[reader].kind in BUILT:
                found.add(reader)
                waiting.append(reader)
    return found


def _changed(graph: Graph, dataset: str, column: str) -> list[ColumnId]:
    starts = [column] if column else list(graph.datasets[dataset].columns)
    found: dict[ColumnId, None] = {}
    for name in starts:
        found.update(dict.fromkeys(graph.walk(ColumnId(dataset, name), up=False)))
    return [where for where in found if where.column != ROWS]


def _tests(graph: Graph, gone: Mapping[str, set[str]], unbuilt: set[str]) -> list[str]:
    found = set()
    for dataset in graph.datasets.values():
        lost = gone.get(dataset.id, set())
        for test, columns in dataset.tests:
            if dataset.id in unbuilt or ROWS in lost or lost & set(columns):
                found.add(test)
    return sorted(found)

"""The graph of columns: datasets, their columns and the edges between them. Plain data, without dbt or sqlglot.

An edge is direct when the value (or something made of it) arrives, indirect when it decides only which rows are there
or which value is taken. The column `*` of a dataset stands for its rows: `count(*)` has its value from there, and what
filters, joins or groups a model points there.
"""

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

ROWS = "*"
# Kinds of datasets whose columns are fields of a message or answer.
ORIGINS = ("topic", "endpoint")

# How a value arrives, from the plainest to what says least of it.
DIRECT = ("identity", "transformation", "aggregation", "rows", "count", "predicate")
# What only decides about rows or about which value is taken.
INDIRECT = ("condition", "window", "sort", "filter", "join", "group")
# A count and a comparison say something about a value and do not carry it.
CARRYING = frozenset({"identity", "transformation", "aggregation"})


class ColumnId(NamedTuple):
    """A column of a dataset; `*` for its rows."""

    dataset: str
    column: str


class Edge(NamedTuple):
    """What goes from a column into another.

    kinds:    one of DIRECT, or some of INDIRECT.
    path:     the JSON path inside the source column, where a part of it is taken; '' for all of it.
    barriers: for each way the value takes the barriers it crosses (`hash`, `mask`, `tokenise`, `aggregate:10`).
    again:    found in the incremental form only: the model's own rows, or what only an incremental run reads.
    """

    source: ColumnId
    target: ColumnId
    kinds: tuple[str, ...]
    path: str = ""
    barriers: tuple[tuple[str, ...], ...] = ((),)
    again: bool = False

    @property
    def direct(self) -> bool:
        return self.kinds[0] in DIRECT

    @property
    def carrying(self) -> bool:
        """Whether the source's value, or a part of it, can be read off the target."""
        return self.kinds[0] in CARRYING

    def ends_at(self, barrier: str) -> bool:
        """Whether every way this value takes crosses the barrier."""
        return all(barrier in crossed for crossed in self.barriers)


@dataclass(frozen=True)
class Column:
    """A column of a dataset.

    expressions: how it is made, the last step first, each with the name of its query.
    generated:   made of constants alone: it has no source, and needs none.
    unknown:     why it could not be resolved; '' where it was.
    barrier:     what ends personal data here, as declared: `hash`, `mask`, `tokenise`, `aggregate:10` or ''.
    """

    name: str
    type: str = ""
    description: str = ""
    pii: bool = False
    subject_key: bool = False
    barrier: str = ""
    expressions: tuple[tuple[str, str], ...] = ()
    generated: bool = False
    unknown: str = ""


@dataclass(frozen=True)
class Dataset:
    """A topic, endpoint, raw table, seed, model, snapshot or exposure.

    kind:     topic, endpoint, loader, source, seed, model, snapshot, exposure or external.
    relation: schema.table in the warehouse; '' where it has none.
    tests:    unique ids of the data and unit tests on it, with the columns they read.
    reads:    datasets it reads, also where no column could be resolved.
    """

    id: str
    name: str
    kind: str
    layer: str = ""
    relation: str = ""
    owner: str = ""
    description: str = ""
    file: str = ""
    checksum: str = ""
    columns: Mapping[str, Column] = field(default_factory=dict)
    tests: tuple[tuple[str, tuple[str, ...]], ...] = ()
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """All datasets and edges. `name`: the project."""

    name: str
    datasets: Mapping[str, Dataset]
    edges: Sequence[Edge]

    @cached_property
    def into(self) -> Mapping[ColumnId, Sequence[Edge]]:
        """Column -> edges that end there."""
        return _grouped(self.edges, lambda edge: edge.target)

    @cached_property
    def out_of(self) -> Mapping[ColumnId, Sequence[Edge]]:
        """Column -> edges that begin there."""
        return _grouped(self.edges, lambda edge: edge.source)

    @cached_property
    def readers(self) -> Mapping[str, Sequence[str]]:
        """Dataset -> those that read it, itself left out."""
        found: dict[str, list[str]] = defaultdict(list)
        for one in self.datasets.values():
            for read in one.reads:
                if read != one.id:
                    found[read].append(one.id)
        return found

    def column(self, where: ColumnId) -> Column | None:
        dataset = self.datasets.get(where.dataset)
        return dataset.columns.get(where.column) if dataset else None

    def show(self, where: ColumnId) -> str:
        """`dataset.column`, as people write it; a field of a message as `topic $.field`."""
        dataset = self.datasets.get(where.dataset)
        if dataset is None:
            return f"{where.dataset}.{where.column}"
        if dataset.kind in ORIGINS:
            return f"{dataset.name} {'$' if where.column == ROWS else where.column}"
        return f"{dataset.name}.{where.column}"

    def columns(self, *kinds: str) -> Iterator[tuple[ColumnId, Column]]:
        """Every column of datasets of these kinds (of all for none), without `*`."""
        for dataset in self.datasets.values():
            if not kinds or dataset.kind in kinds:
                for name, column in dataset.columns.items():
                    if name != ROWS:
                        yield ColumnId(dataset.id, name), column

    def unknown(self) -> list[tuple[ColumnId, str]]:
        """Columns that could not be resolved, and why."""
        return [
            (ColumnId(dataset.id, name), column.unknown)
            for dataset in self.datasets.values()
            for name, column in dataset.columns.items()
            if column.unknown
        ]

    def walk(
        self,
        start: ColumnId,
        *,
        up: bool,
        follow: Callable[[Edge], bool] = lambda edge: edge.direct,
    ) -> dict[ColumnId, Edge | None]:
        """Columns reached from `start` (itself included), each with the edge it was first reached by, nearest first."""
        ways = self.into if up else self.out_of
        reached: dict[ColumnId, Edge | None] = {start: None}
        waiting = deque([start])
        while waiting:
            for edge in ways.get(waiting.popleft(), ()):
                next_one = edge.source if up else edge.target
                if next_one not in reached and follow(edge):
                    reached[next_one] = edge
                    waiting.append(next_one)
        return reached

    def origins(self, start: ColumnId) -> set[ColumnId]:
        """Source fields (of topics, endpoints, seeds, tables nobody here makes) a column has its value from."""
        return {where for where in self.walk(start, up=True) if not self.into.get(where) and where != start}

    def to_json(self) -> str:
        return json.dumps(
            {
                "name": self.name,
                "datasets": [asdict(dataset) for dataset in self.datasets.values()],
                "edges": self.edges,
            },
            separators=(",", ":"),
        )


def graph_from_json(text: str | bytes) -> Graph:
    """The graph `to_json` wrote."""
    read: dict[str, Any] = json.loads(text)
    return Graph(
        read["name"],
        {one["id"]: _dataset(one) for one in read["datasets"]},
        tuple(edge_from(one) for one in read["edges"]),
    )


def _dataset(values: dict[str, Any]) -> Dataset:
    columns = {name: column_from(column) for name, column in values["columns"].items()}
    tests = tuple((test, tuple(read)) for test, read in values["tests"])
    return Dataset(**{**values, "columns": columns, "tests": tests, "reads": tuple(values["reads"])})


def column_from(values: dict[str, Any]) -> Column:
    return Column(**{**values, "expressions": tuple((where, text) for where, text in values["expressions"])})


def edge_from(values: Sequence[Any]) -> Edge:
    source, target, kinds, path, barriers, again = values
    return Edge(ColumnId(*source), ColumnId(*target), tuple(kinds), path, tuple(map(tuple, barriers)), again)


def without_edges(graph: Graph, left_out: Callable[[Edge], bool]) -> Graph:
    """The same graph without some edges."""
    return replace(graph, edges=[edge for edge in graph.edges if not left_out(edge)])


def _grouped(edges: Sequence[Edge], key: Callable[[Edge], ColumnId]) -> Mapping[ColumnId, Sequence[Edge]]:
    found: dict[ColumnId, list[Edge]] = defaultdict(list)
    for edge in edges:
        found[key(edge)].append(edge)
    return found

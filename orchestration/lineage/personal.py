"""Personal data along the graph: where it is, how it got there, and where a declared barrier ends it.

    `pii` in the feed declarations -> carried by every edge that hands a value on -> until a column declares a barrier
    and its SQL is that barrier, on every way the value takes

A count, a comparison or a condition says something about a value and does not carry it. What breaks the policy is a
`Violation`: a column that receives personal data without saying so, a barrier that is not in the SQL, a mart that holds
personal data at all, a column nobody can trace where personal data is read.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ingestion.errors import DataError
from ingestion.settings import Settings
from orchestration.lineage.barriers import holds
from orchestration.lineage.graph import ORIGINS, ROWS, ColumnId, Edge, Graph

# Layers that hold no personal data at all.
FREE_OF_IT = frozenset({"marts", "audit"})


@dataclass(frozen=True)
class Ending:
    """A column at which personal data ends, by its declared barrier."""

    column: ColumnId
    barrier: str
    sources: tuple[ColumnId, ...]


@dataclass(frozen=True)
class Violation:
    """What breaks the policy, and the way the data took there."""

    column: ColumnId
    reason: str
    way: tuple[ColumnId, ...] = ()


@dataclass(frozen=True)
class Personal:
    """What the graph says of personal data. `reached`: each column that holds some -> the edge it came by."""

    graph: Graph
    reached: dict[ColumnId, Edge | None]
    endings: tuple[Ending, ...]
    violations: tuple[Violation, ...]
    exposures: tuple[str, ...] = field(default=())

    @cached_property
    def holding(self) -> list[ColumnId]:
        """Columns of tables that hold personal data; fields of messages left out."""
        return [where for where in self.reached if self.graph.datasets[where.dataset].kind not in ORIGINS]

    def way_to(self, column: ColumnId) -> tuple[ColumnId, ...]:
        """From the field of the message to the column."""
        way = [column]
        while (edge := self.reached.get(way[0])) is not None:
            way.insert(0, edge.source)
        return tuple(way)

    def show_way(self, way: Sequence[ColumnId]) -> str:
        return " -> ".join(self.graph.show(one) for one in way)


def follow_personal_data(graph: Graph) -> Personal:
    """Where personal data goes, and what breaks the policy."""
    reached: dict[ColumnId, Edge | None] = {}
    endings: dict[ColumnId, list[ColumnId]] = {}
    wrong: list[Violation] = []
    waiting: deque[ColumnId] = deque()

    def reach(where: ColumnId, edge: Edge | None) -> None:
        if where not in reached:
            reached[where] = edge
            waiting.append(where)

    # Where nothing arrives from elsewhere first, so that ways begin there: fields of messages, sources.
    declared = [where for where, column in graph.columns() if column.pii]
    for where in declared:
        if not any(edge.source != where for edge in graph.into.get(where, ())):
            reach(where, None)
    begun = False
    while waiting or not begun:
        if not waiting:
            # Declared where nothing personal is known to arrive: a table nobody here fills, or a model saying more.
            begun = True
            for where in declared:
                if where not in endings:
                    reach(where, None)
            continue
        here = waiting.popleft()
        for edge in graph.out_of.get(here, ()):
            column = graph.column(edge.target)
            if not edge.carrying or column is None or edge.target.column == ROWS:
                continue
            if column.barrier and all(holds(column.barrier, crossed) for crossed in edge.barriers):
                endings.setdefault(edge.target, []).append(edge.source)
            else:
                reach(edge.target, edge)
    found = Personal(graph, reached, (), ())
    for where, come_by in reached.items():
        wrong += _judge(found, where, come_by)
    holding = {where.dataset for where in reached}
    for where, why in graph.unknown():
        column = graph.column(where)
        if holding & set(graph.datasets[where.dataset].reads) and not (column and column.pii):
            wrong.append(Violation(where, f"cannot be traced ({why}), and personal data is read there"))
    exposures = tuple(
        dataset.id for dataset in graph.datasets.values() if dataset.kind == "exposure" and holding & set(dataset.reads)
    )
    ended = tuple(
        Ending(where, _barrier(graph, where), tuple(come)) for where, come in endings.items() if where not in reached
    )
    return Personal(graph, reached, ended, tuple(wrong), exposures)


def _barrier(graph: Graph, where: ColumnId) -> str:
    column = graph.column(where)
    return column.barrier if column else ""


def _judge(found: Personal, where: ColumnId, edge: Edge | None) -> list[Violation]:
    column = found.graph.column(where)
    dataset = found.graph.datasets[where.dataset]
    if column is None or dataset.kind not in ("model", "snapshot"):
        return []
    way = found.way_to(where)
    wrong = []
    if column.barrier and edge is not None:
        crossed = sorted({barrier for ways in edge.barriers for barrier in ways}) or ["none"]
        wrong.append(
            f"declares the barrier {column.barrier}, and its SQL is not one on every way "
            f"from {found.graph.show(edge.source)} (found: {', '.join(crossed)})"
        )
    elif edge is not None and not column.pii:
        wrong.append("receives personal data without saying so: `config.meta.pii: true`, or a barrier")
    if dataset.layer in FREE_OF_IT and not wrong:
        wrong.append(f"holds personal data in {dataset.layer}, where none may be: a barrier, or leave it out")
    return [Violation(where, reason, way) for reason in wrong]


def describe_violations(found: Personal) -> list[str]:
    """One line for each, with the way."""
    return [
        f"{found.graph.show(one.column)} {one.reason}" + (f"\n    {found.show_way(one.way)}" if one.way else "")
        for one in found.violations
    ]


def guard_policy(settings: Settings, project: object = None) -> None:
    """Nothing while the project keeps the policy; for what is about to build.

    Args:
        project: as `transform.parse_project` returned it; None parses where nothing is known of these files yet.

    Raises:
        DataError: it does not; the message names every column and the way.
    """
    from orchestration.lineage.build import load_graph

    require_policy(load_graph(settings, project))


def require_policy(graph: Graph) -> Personal:
    """What the graph says of personal data.

    Raises:
        DataError: the policy is broken.
    """
    found = follow_personal_data(graph)
    if found.violations:
        lines = describe_violations(found)
        raise DataError(
            f"personal data: {len(lines)} {'column breaks' if len(lines) == 1 else 'columns break'} the policy\n  "
            + "\n  ".join(lines),
            hint="`warehouse lineage pii` shows all of it.",
        )
    return found

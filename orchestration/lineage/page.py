"""The lineage page: one static file that works offline, beside dbt's docs site.

Graph -> page.html with the graph as JSON in it -> target/lineage.html
"""

import json
from pathlib import Path
from typing import Any

from orchestration.lineage.compiled import write_whole
from orchestration.lineage.graph import INDIRECT, ROWS, ColumnId, Graph
from orchestration.lineage.personal import follow_personal_data

PAGE = "lineage.html"
_PLACE = "/*GRAPH*/null"
# What a column is, as bits.
PERSONAL, ENDS, UNKNOWN, GENERATED, BROKEN = 1, 2, 4, 8, 16


def write_page(graph: Graph, path: Path) -> Path:
    """Write the page; returns where it stands."""
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    # Nothing a description says may end the script.
    data = json.dumps(page_data(graph), separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    write_whole(path, template.replace(_PLACE, data, 1))
    path.chmod(0o644)
    return path


def page_data(graph: Graph) -> dict[str, Any]:
    """What the page draws: datasets with their columns, edges and the ways of personal data by place in a list."""
    personal = follow_personal_data(graph)
    ended = {one.column: one for one in personal.endings}
    wrong = {one.column: one.reason for one in personal.violations}
    places: dict[ColumnId, int] = {}
    columns: list[list[Any]] = []
    datasets = []
    for number, dataset in enumerate(graph.datasets.values()):
        first = len(columns)
        for name, column in sorted(dataset.columns.items(), key=lambda one: one[0] != ROWS):
            where = ColumnId(dataset.id, name)
            places[where] = len(columns)
            flags = (
                (PERSONAL if where in personal.reached else 0)
                | (ENDS if where in ended else 0)
                | (UNKNOWN if column.unknown else 0)
                | (GENERATED if column.generated and name != ROWS else 0)
                | (BROKEN if where in wrong else 0)
            )
            said = column.unknown or wrong.get(where, "")
            steps = [[place, " ".join(text.split())[:600]] for place, text in column.expressions[:4]]
            columns.append([number, name, column.type, column.description, flags, column.barrier, said, steps])
        datasets.append(
            [dataset.name, dataset.kind, dataset.layer, dataset.relation, dataset.owner, dataset.description.strip(),
             dataset.file, first, len(columns) - first, len(dataset.tests)]
        )  # fmt: skip
    edges = [
        [
            places[edge.source],
            places[edge.target],
            int(edge.kinds[0] not in INDIRECT),
            ", ".join(edge.kinds) + (f" of {edge.path}" if edge.path else ""),
            int(edge.again),
        ]
        for edge in graph.edges
        if edge.source in places and edge.target in places
    ]
    via = {places[where]: places[edge.source] for where, edge in personal.reached.items() if edge is not None}
    via |= {places[where]: places[one.sources[0]] for where, one in ended.items()}
    numbers = {dataset: number for number, dataset in enumerate(graph.datasets)}
    reads = [
        [numbers[read], number]
        for number, dataset in enumerate(graph.datasets.values())
        for read in dataset.reads
        if read != dataset.id and read in numbers
    ]
    return {"name": graph.name, "datasets": datasets, "columns": columns, "edges": edges, "via": via, "reads": reads}

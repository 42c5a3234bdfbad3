"""The commands of lineage: what breaks, where a column comes from, personal data, what a change does, rows, incidents.

The graph is made from the files as they stand, without a server; `row` and `incident` ask the warehouse.
"""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ingestion.errors import ConfigurationError, DataError
from orchestration.cli_base import AsJson, Quiet, make_reporter, print_json, project_settings, with_connection

if TYPE_CHECKING:
    from orchestration.lineage.graph import ColumnId, Graph

lineage_app = typer.Typer(
    no_args_is_help=True, help="Columns from the field in the message to the mart; personal data on its way."
)

Node = Annotated[
    str, typer.Argument(metavar="NODE[.COLUMN]", help="A model, seed, source or topic, or a column of it.")
]
OneColumn = Annotated[str, typer.Argument(metavar="NODE.COLUMN", help="A column.")]
Folder = Annotated[
    Path | None,
    typer.Option("--project", help="Another dbt project: the folder of its manifest.json and catalog.json."),
]
TIME_FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]


def _graph(folder: Path | None = None) -> "Graph":
    from orchestration.lineage.build import load_graph, read_graph

    settings = project_settings()
    return read_graph(folder, settings.home) if folder is not None else load_graph(settings)


def _manifest() -> dict[str, Any]:
    from orchestration.lineage.compiled import load_compiled

    return load_compiled(project_settings())


@lineage_app.command()
def impact(node: Node, as_json: AsJson = False) -> None:
    """What breaks when a column, or a whole node, goes: models, tests, exposures, owners.

    Example: warehouse lineage impact stg_payments__transactions.status
    """
    from orchestration.lineage.impact import find_impact
    from orchestration.lineage.names import find_node

    graph = _graph()
    dataset, column = find_node(graph, node)
    found = find_impact(graph, _manifest(), dataset, column)
    names = [graph.datasets[one].name for one in found.exposures]
    if as_json:
        print_json(
            {
                "node": graph.datasets[dataset].name,
                "column": column or None,
                "broken": [{"model": graph.datasets[one.model].name, "reason": one.reason} for one in found.broken],
                "skipped": [graph.datasets[one].name for one in found.skipped],
                "changed": [graph.show(one) for one in found.changed],
                "tests": [_test_name(one) for one in found.tests],
                "exposures": names,
                "owners": found.owners,
            }
        )
        return
    print(f"without {graph.show(_column_id(dataset, column)) if column else graph.datasets[dataset].name}:")
    _section("fail to build", [f"{graph.datasets[one.model].name}: {one.reason}" for one in found.broken])
    _section("not built, because one before them failed", [graph.datasets[one].name for one in found.skipped])
    _section("columns with their value from it", [graph.show(one) for one in found.changed])
    _section("tests that read what is gone", [_test_name(one) for one in found.tests])
    _section("exposures", names)
    _section("owners", list(found.owners))


def _column_id(dataset: str, column: str) -> "ColumnId":
    from orchestration.lineage.graph import ColumnId

    return ColumnId(dataset, column)


def _test_name(unique_id: str) -> str:
    parts = unique_id.split(".")
    return ".".join(parts[2:3]) if parts[0] == "test" else ".".join(parts[2:])


def _section(title: str, lines: list[str]) -> None:
    print(f"  {title}: {len(lines) or 'none'}")
    for line in lines:
        print(f"    {line}")


@lineage_app.command()
def trace(column: OneColumn, project: Folder = None, as_json: AsJson = False) -> None:
    """Where a column comes from, back to the fields of messages, with the SQL of each step.

    Example: warehouse lineage trace rpt_finance__daily_revenue.revenue_minor
    """
    from orchestration.lineage.names import find_column

    graph = _graph(project)
    where = find_column(graph, column)
    reached = graph.walk(where, up=True)
    if as_json:
        print_json(
            {
                "column": graph.show(where),
                "origins": sorted(graph.show(one) for one in graph.origins(where)),
                "steps": [_step(graph, one) for one in reached],
            }
        )
        return
    _print_trace(graph, where, 0, set())
    indirect = sorted({*_decided_by(graph, where)})
    if indirect:
        print("which rows, or which value, is decided by:")
        for line in indirect:
            print(f"  {line}")


def _step(graph: "Graph", where: "ColumnId") -> dict[str, Any]:
    column = graph.column(where)
    return {
        "column": graph.show(where),
        "from": [
            {"column": graph.show(edge.source), "kinds": edge.kinds, "path": edge.path, "own_rows": edge.again}
            for edge in graph.into.get(where, ())
        ],
        "expressions": [
            {"in": name or "the statement", "sql": text} for name, text in (column.expressions if column else ())
        ],
        "unknown": column.unknown if column else "",
    }


def _print_trace(graph: "Graph", where: "ColumnId", depth: int, seen: set["ColumnId"]) -> None:
    column = graph.column(where)
    marks = []
    if column and column.pii:
        marks.append("personal")
    if column and column.barrier:
        marks.append(f"barrier {column.barrier}")
    if column and column.unknown:
        marks.append(f"unknown: {column.unknown}")
    if column and column.generated:
        marks.append("made of constants")
    again = " (above)" if where in seen else ""
    print(f"{'  ' * depth}{graph.show(where)}{' [' + ', '.join(marks) + ']' if marks else ''}{again}")
    if where in seen:
        return
    seen.add(where)
    for name, text in column.expressions if column else ():
        line = " ".join(text.split())
        print(
            f"{'  ' * depth}    = {line if len(line) <= 160 else line[:157] + '...'}" + (f"  in {name}" if name else "")
        )
    for edge in graph.into.get(where, ()):
        if edge.direct and edge.source != where and not edge.again:
            _print_trace(graph, edge.source, depth + 1, seen)


def _decided_by(graph: "Graph", where: "ColumnId") -> list[str]:
    from orchestration.lineage.graph import ROWS, ColumnId

    edges = [*graph.into.get(where, ()), *graph.into.get(ColumnId(where.dataset, ROWS), ())]
    return [
        f"{graph.show(edge.source)} ({', '.join(edge.kinds)})" for edge in edges if not edge.direct and not edge.again
    ]


@lineage_app.command()
def pii(as_json: AsJson = False) -> None:
    """Every column that holds personal data, how it got there, and the barrier that ends it.

    Exit code 7 where the policy is broken.

    Example: warehouse lineage pii
    """
    from orchestration.console import render_table
    from orchestration.lineage.personal import follow_personal_data, require_policy

    graph = _graph()
    found = follow_personal_data(graph)
    if as_json:
        print_json(
            {
                "holding": [
                    {"column": graph.show(one), "way": [graph.show(step) for step in found.way_to(one)]}
                    for one in found.holding
                ],
                "ends": [
                    {
                        "column": graph.show(one.column),
                        "barrier": one.barrier,
                        "from": [graph.show(source) for source in one.sources],
                    }
                    for one in found.endings
                ],
                "exposures": [graph.datasets[one].name for one in found.exposures],
                "violations": [
                    {
                        "column": graph.show(one.column),
                        "reason": one.reason,
                        "way": [graph.show(step) for step in one.way],
                    }
                    for one in found.violations
                ],
            }
        )
    else:
        rows = [(graph.show(one), found.show_way(found.way_to(one)[:-1]) or "declared there") for one in found.holding]
        print(render_table(("personal data in", "by way of"), rows, indent=""))
        print()
        ends = [(graph.show(one.column), one.barrier, ", ".join(map(graph.show, one.sources))) for one in found.endings]
        print(render_table(("ends at", "barrier", "of"), ends, indent=""))
        names = ", ".join(graph.datasets[one].name for one in found.exposures)
        print(f"exposures it reaches: {names or 'none'}")
    require_policy(graph)


@lineage_app.command()
def check() -> None:
    """Whether every column is traced and the personal-data policy is kept; for CI.

    Example: warehouse lineage check
    """
    from orchestration.lineage.personal import require_policy

    graph = _graph()
    unknown = graph.unknown()
    if unknown:
        raise DataError(
            f"lineage: {len(unknown)} columns cannot be traced\n"
            + "\n".join(f"  {graph.show(where)}: {why}" for where, why in unknown[:20]),
            hint="`warehouse lineage trace` shows how far each is understood.",
        )
    found = require_policy(graph)
    columns = sum(1 for _ in graph.columns("model", "snapshot"))
    print(f"{columns} columns traced, 0 unknown; personal data in {len(found.holding)}, ended at {len(found.endings)}")


@lineage_app.command()
def diff(
    against: Annotated[str, typer.Option("--against", help="A branch, tag or commit to compare with.")],
    as_json: AsJson = False,
) -> None:
    """What the files as they stand change: columns added, removed, of another meaning, personal data newly reaching
    somewhere. Exit code 7 when personal data reaches on, or the policy is broken.

    Example: warehouse lineage diff --against origin/main
    """
    from orchestration.lineage.diff import compare, graph_at

    settings = project_settings()
    before = graph_at(settings, against)
    after = _graph()
    found = compare(before, after)
    if as_json:
        print_json(
            {
                "added": [after.show(one) for one in found.added],
                "removed": [before.show(one) for one in found.removed],
                "changed": [
                    {"column": after.show(one), "before": was, "after": now} for one, was, now in found.changed
                ],
                "newly_personal": [
                    {"column": after.show(one), "way": [after.show(step) for step in way]}
                    for one, way in found.newly_personal
                ],
                "violations": [{"column": after.show(one.column), "reason": one.reason} for one in found.violations],
            }
        )
    else:
        for one in found.added:
            print(f"+ {after.show(one)}")
        for one in found.removed:
            print(f"- {before.show(one)}")
        for one, was, now in found.changed:
            print(f"~ {after.show(one)}\n    was {_short(was)}\n    is  {_short(now)}")
        for one, way in found.newly_personal:
            print(f"! {after.show(one)} now holds personal data: {' -> '.join(map(after.show, way))}")
        if not (found.added or found.removed or found.changed or found.newly_personal):
            print(f"no column differs from {against}")
    if found.harmful:
        lines = [
            f"{after.show(one)} now holds personal data: {' -> '.join(map(after.show, way))}"
            for one, way in found.newly_personal
        ]
        lines += [f"{after.show(one.column)} {one.reason}" for one in found.violations]
        raise DataError(
            f"compared with {against}:\n  " + "\n  ".join(lines),
            hint="Leave it out, or declare a barrier on the model column and make its SQL that barrier.",
        )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "..."


@lineage_app.command()
def row(
    table: Annotated[str, typer.Argument(help="A model.")],
    key: Annotated[str, typer.Argument(help="Its key; several columns with commas between.")],
    as_json: AsJson = False,
) -> None:
    """From a row of a model back to its records: topic, partition, offset, load; and dead letters with the same key.

    Example: warehouse lineage row fct_transactions 0b0c6b3e-5a55-4bb9-a9a4-2f1c4f1f7d8e
    """
    from ingestion.feeds import load_feeds
    from orchestration.console import render_table
    from orchestration.lineage.names import find_node
    from orchestration.lineage.row import trace_row

    graph = _graph()
    dataset, column = find_node(graph, table)
    if column or graph.datasets[dataset].kind not in ("model", "snapshot"):
        raise ConfigurationError(f"{table} is no model.", hint="`row` takes a model and the key of one of its rows.")
    manifest, feeds = _manifest(), load_feeds(project_settings())
    found = with_connection(
        lambda connection: trace_row(
            connection, graph, manifest, feeds, dataset, [part.strip() for part in key.split(",")]
        ),
        "lineage",
    )
    if as_json:
        print_json(
            {
                "key": found.columns,
                "records": [one.__dict__ for one in found.records],
                "more": found.more,
                "dead_letters": [one.__dict__ for one in found.letters],
            }
        )
        return
    rows = [
        (one.feed, one.origin, one.place, one.load_id, f"{one.loaded_at:%Y-%m-%d %H:%M:%S}") for one in found.records
    ]
    print(render_table(("feed", "from", "at", "load", "landed"), rows, indent=""))
    if found.more:
        print(f"... and {found.more:,} more")
    letters = [(one.dead_letter_id, one.feed, one.place, one.reason, one.status, one.load_id) for one in found.letters]
    if letters:
        print("\ndead letters with the same key:")
        print(render_table(("id", "feed", "at", "reason", "status", "load"), letters, indent=""))
    else:
        print("no dead letter with the same key")


@lineage_app.command()
def incident(
    column: OneColumn,
    at: Annotated[
        datetime | None, typer.Option("--at", formats=TIME_FORMATS, help="When it was seen, UTC; now for none.")
    ] = None,
    hours: Annotated[float, typer.Option("--hours", min=0.1, help="How far to look back.")] = 48,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Findings shown.")] = 20,
    as_json: AsJson = False,
) -> None:
    """What happened upstream of a column before a moment, the most suspicious first.

    Loads, failed runs, drift, contracts and code are looked at.

    Example: warehouse lineage incident rpt_finance__daily_revenue.revenue_minor --at 2026-03-07T09:00:00
    """
    from orchestration.console import render_table
    from orchestration.lineage.incident import find_incident, upstream_feeds
    from orchestration.lineage.names import find_column

    graph = _graph()
    where = find_column(graph, column)
    when = (at or datetime.now(UTC)).replace(tzinfo=UTC)
    found = with_connection(lambda connection: find_incident(connection, graph, where, when, hours), "lineage")
    if as_json:
        print_json({"feeds": upstream_feeds(graph, where), "findings": [one.__dict__ for one in found]})
        return
    print(f"upstream of {graph.show(where)}: {', '.join(upstream_feeds(graph, where))}")
    rows = [
        (f"{one.weight:.0f}", f"{one.at:%Y-%m-%d %H:%M:%S}", one.kind, one.subject, one.what) for one in found[:limit]
    ]
    print(render_table(("weight", "at", "kind", "where", "what"), rows, indent=""))
    if len(found) > limit:
        print(f"... and {len(found) - limit:,} more")


@lineage_app.command()
def coverage(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Folders with manifest.json; this project for none.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How much of a project's columns is understood; takes any dbt project's target folder.

    Example: warehouse lineage coverage ../other/target
    """
    from orchestration.console import render_table

    rows = []
    unknown: list[tuple[str, str, str]] = []
    chosen: list[Path | None] = [*folders] if folders else [None]
    for folder in chosen:
        graph = _graph(folder)
        missing = graph.unknown()
        # A model of which nothing is understood counts as a column at least.
        columns = {where for where, _ in graph.columns("model", "snapshot")} | {where for where, _ in missing}
        models = sum(dataset.kind in ("model", "snapshot") for dataset in graph.datasets.values())
        share = (len(columns) - len(missing)) / len(columns) if columns else 0.0
        rows.append((graph.name, models, len(columns), len(graph.edges), len(missing), f"{share:.1%}"))
        unknown += [(graph.name, graph.show(where), why) for where, why in missing]
    if as_json:
        header = ("project", "models", "columns", "edges", "unknown", "resolved")
        print_json(
            {
                "projects": [dict(zip(header, one, strict=True)) for one in rows],
                "unknown": [{"project": name, "column": where, "why": why} for name, where, why in unknown],
            }
        )
        return
    print(render_table(("project", "models", "columns", "edges", "unknown", "resolved"), rows, indent=""))
    for name, where, why in unknown[:20]:
        print(f"  {name}: {where}: {why}")
    if len(unknown) > 20:
        print(f"  ... and {len(unknown) - 20:,} more; --json has all")


@lineage_app.command()
def page(
    project: Folder = None,
    to: Annotated[Path | None, typer.Option("--to", help="The file; target/lineage.html for none.")] = None,
    quiet: Quiet = False,
) -> None:
    """Write the lineage page: one static, offline file, columns and personal data on it.

    Example: warehouse lineage page
    """
    from orchestration.lineage.page import write_page
    from orchestration.transform import quoted_file_url

    settings = project_settings()
    reporter = make_reporter(quiet)
    graph = _graph(project)
    path = write_page(graph, to or settings.project_dir / "target" / "lineage.html")
    reporter.line(f"{len(graph.datasets)} nodes, {len(graph.edges)} edges")
    print(quoted_file_url(path), file=sys.stdout)

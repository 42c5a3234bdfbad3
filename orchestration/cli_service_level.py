"""The commands about the service level: `ages`, `report`, `metrics`."""

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ingestion.errors import ConfigurationError, DataError
from orchestration.cli_base import AsJson, print_json, project_settings, services_running

if TYPE_CHECKING:
    from orchestration.ages import TableAge

# Prometheus keeps a list of who uses which port; this one is nobody's.
METRICS_PORT = 9846


def ages_command(
    record: Annotated[bool, typer.Option("--record", help="Keep what was measured, as a tick between runs.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 7 when a table is older than its error_after.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """How old the data of each feed and mart is, and which hop and partition holds it back.

    The age is now minus the oldest source time among what a table is made of: it grows while nothing runs, and while
    every job is green and one partition stands still.

    Example: warehouse ages --check
    """
    from ingestion.database import connect
    from ingestion.feeds import load_feeds
    from orchestration.ages import measure_ages
    from orchestration.run import prepare
    from orchestration.status import answering_services
    from orchestration.ticks import record_tick, take_tick

    with answering_services(project_settings()) as settings:
        if settings.dsn is None:
            raise ConfigurationError(
                "Nothing has landed yet.", hint="`warehouse demo` or `warehouse run` is the start."
            )
        feeds = prepare(settings) if record else load_feeds(settings)
        connection = connect(settings, purpose="ages")
        try:
            connection.autocommit = True
            if record:
                tick = take_tick(settings, feeds, connection)
                record_tick(connection, tick)
                at, ages = tick.at, tick.ages
            else:
                at = datetime.now(UTC)
                ages = measure_ages(settings, connection, at)
        finally:
            connection.close()
    if as_json:
        print_json({"at": at.isoformat(), "tables": [_age_dict(one) for one in ages]})
    else:
        print(render_ages(ages))
    late = [one for one in ages if one.state == "error"]
    if check and late:
        raise DataError(
            "\n  ".join(
                [f"{len(late)} of {len(ages)} tables are older than they may be:", *(_miss(one) for one in late)]
            ),
            hint="The hop named is where to look.",
        )


def _age_dict(one: "TableAge") -> dict[str, Any]:
    return {
        "table": one.table,
        "state": one.state,
        "age_seconds": one.age.total_seconds() if one.age is not None else None,
        "warn_after_seconds": one.warn_after.total_seconds() if one.warn_after is not None else None,
        "error_after_seconds": one.error_after.total_seconds() if one.error_after is not None else None,
        "hop": one.hop,
        "held_by": one.held_by,
    }


def _miss(one: "TableAge") -> str:
    return f"{one.table}: {_span(one.age)} old, {_span(one.error_after)} allowed; {one.held_by}"


def render_ages(ages: "list[TableAge]") -> str:
    """A line for each table, and below it what holds it back."""
    from orchestration.console import render_table

    rows = [(one.table, one.state, _span(one.age), _span(one.warn_after), _span(one.error_after)) for one in ages]
    header, *lines = render_table(("table", "state", "age", "warn after", "error after"), rows, indent="").splitlines()
    return "\n".join([header, *(f"{line}\n  {one.held_by}" for line, one in zip(lines, ages, strict=True))])


def _span(span: Any) -> str:
    from orchestration.console import render_age

    return render_age(span.total_seconds() if span is not None else None)


def report_command(
    serve: Annotated[bool, typer.Option("--serve", help="Serve the page on 127.0.0.1 until interrupted.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port for --serve; 0 takes a free one.")] = 8080,
) -> None:
    """Write the service level as one offline page: ages, run times, failures, misses, queues, error budgets.

    Example: warehouse report --serve
    """
    from orchestration.report import write_report
    from orchestration.transform import quoted_file_url

    with services_running() as settings:
        page = write_report(settings)
    print(quoted_file_url(page))
    if serve:
        from orchestration.docs_server import serve_page

        serve_page(page, port)


def metrics_command(
    serve: Annotated[bool, typer.Option("--serve", help="Serve them to be scraped until interrupted.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port for --serve; 0 takes a free one.")] = METRICS_PORT,
    host: Annotated[str, typer.Option(help="Address for --serve; another than this one shows names to a network.")] = (
        "127.0.0.1"
    ),
) -> None:
    """The figures of the report in Prometheus' text format, measured when asked.

    Example: warehouse metrics --serve
    """
    from orchestration.metrics import render_metrics, serve_metrics

    with services_running() as settings:
        if serve:
            serve_metrics(settings, host, port, lambda problem: print(problem, file=sys.stderr, flush=True))
        else:
            print(render_metrics(settings), end="")

"""The page of the service level: how old the tables are, how runs went, what waits, what is left of the error budgets.

    Figures and Curves (orchestration/figures.py) -> plots (orchestration/plots.py) -> target/report.html

One static file beside the lineage page, each linking to the other: no script, nothing from elsewhere, light or dark as
the reader has it, readable on a phone. Every plot has its figures as text beside it.
"""

import html
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, time, timedelta
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ingestion.database import connect
from ingestion.settings import Settings
from orchestration import transform
from orchestration.console import render_age
from orchestration.figures import HISTORY_DAYS, Curves, Figures, Pipeline, fetch_curves, fetch_figures
from orchestration.history import code_version
from orchestration.run import prepare
from orchestration.ticks import record_tick

if TYPE_CHECKING:
    from orchestration.ages import TableAge

PAGE = "report.html"
KINDS = {"run": "Commands", "feed": "Feeds", "step": "Steps", "model": "Models", "seed": "Seeds"}
ONE = {"run": "command", "feed": "feed", "step": "step"}
SLOWEST = 12
ABSENT = "–"
# Also without colour.
SIGNS = {"pass": "✓", "warn": "!", "error": "✕", "unknown": "?"}


def report_page(settings: Settings) -> Path:
    """Where the page stands: beside the lineage page."""
    return settings.project_dir / "target" / PAGE


def write_report(settings: Settings, now: datetime | None = None) -> Path:
    """Take a tick, keep it, and write the page.

    Raises:
        ConfigurationError: nothing was built yet.
        WarehouseError: the database does not answer.
    """
    feeds = prepare(settings)
    connection = connect(settings, purpose="report")
    connection.autocommit = True
    try:
        figures = fetch_figures(settings, feeds, connection, now)
        record_tick(connection, figures.tick)
        curves = fetch_curves(connection, figures.at)
    finally:
        connection.close()
    # matplotlib keeps its list of fonts here; the home of whoever runs is not to be written to.
    os.environ.setdefault("MPLCONFIGDIR", str(settings.home / "matplotlib"))
    text = render_report(figures, curves, code_version(settings.project_dir))
    page = report_page(settings)
    page.parent.mkdir(parents=True, exist_ok=True)
    # Whoever looks at the page meanwhile sees one or the other whole.
    fresh = page.with_suffix(".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(page)
    return page


def render_report(figures: Figures, curves: Curves, version: str) -> str:
    """The page as text."""
    style = files("orchestration").joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(
        part
        for section in (_heading(figures, version), _tables(figures, curves), _runs(figures), _queues(figures, curves))
        for part in section
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Payments warehouse: service level</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


# --- heading ----------------------------------------------------------------------------------------------------------


def _heading(figures: Figures, version: str) -> Iterator[str]:
    yield "<header>"
    yield "<h1>Payments warehouse: service level</h1>"
    yield (
        f"<p>{figures.at:%-d %B %Y, %H:%M} UTC, code {_text(version)}. "
        f'<a href="{transform.LINEAGE_PAGE}">Lineage, models and columns</a></p>'
    )
    yield "</header>"
    late = [one for one in figures.ages if one.state == "error"]
    warned = [one for one in figures.ages if one.state == "warn"]
    whole = [one for one in figures.pipelines if one.kind == "run"]
    runs, failed = sum(one.runs for one in whole), sum(one.failed for one in whole)
    queues = figures.queues
    waiting = [one.lag for one in queues if one.lag is not None]
    dead = sum(one.open_dead_letters or 0 for one in queues)
    misses = sum(figures.misses.values())
    yield '<section class="tiles">'
    state = "error" if late else "warn" if warned else "pass"
    yield _tile("Tables too old", f"{len(late)} of {len(figures.ages)}", f"{len(warned)} more to watch", state)
    yield _tile("Misses", f"{misses:,}", f"began within {figures.span_days} days", "warn" if misses else "pass")
    yield _tile(
        "Failed runs",
        f"{failed / runs:.1%}" if runs else "none yet",
        f"{failed:,} of {runs:,}",
        "warn" if failed else "pass",
    )
    yield _tile("Waiting at the broker", f"{sum(waiting):,}" if waiting else "not known", "records", "")
    yield _tile("Dead letters open", f"{dead:,}", _oldest(figures), "warn" if dead else "pass")
    yield "</section>"


def _oldest(figures: Figures) -> str:
    ages = [one.oldest_dead_letter_seconds for one in figures.queues if one.oldest_dead_letter_seconds is not None]
    return f"the oldest for {render_age(max(ages))}" if ages else "none"


def _tile(what: str, figure: str, beside: str, state: str) -> str:
    return (
        f'<div class="tile {state}"><h2>{_text(what)}</h2><p class="figure">{_text(figure)}</p>'
        f"<p>{_text(beside)}</p></div>"
    )


# --- age of the tables ------------------------------------------------------------------------------------------------


def _tables(figures: Figures, curves: Curves) -> Iterator[str]:
    from orchestration.plots import Bar, plot_bars, plot_curve

    yield '<section><h2>Age of the data</h2><p class="lead">Now minus the oldest source time among what a table is '
    yield "made of: it grows while nothing runs, and while everything runs and one partition stands still.</p>"
    yield '<div class="rows">'
    # What is worst comes first.
    order = {"error": 0, "warn": 1, "unknown": 2, "pass": 3}
    for one in sorted(figures.ages, key=lambda one: (order[one.state], one.table)):
        yield _table_row(one)
    yield "</div>"
    budgeted = [one for one in figures.ages if one.age is not None and one.error_after is not None]
    yield '<div class="grid">'
    if budgeted:
        yield _card(
            "Age as a share of the budget",
            plot_bars(
                [
                    Bar(
                        one.table,
                        min(_share(one), 1.5),
                        f"{render_age(_seconds(one.age))} of {render_age(_seconds(one.error_after))}",
                        one.state,
                    )
                    for one in budgeted
                ],
                "Age of each table as a share of its error_after",
                limit=1.0,
            ),
            "The mark is error_after; bars end at one and a half of it.",
        )
    if figures.budgets_left:
        yield _card(
            "Error budget left",
            plot_bars(
                [
                    Bar(
                        table,
                        max(left, -1.0),
                        f"{left:.0%}",
                        "pass" if left > 0.25 else "warn" if left > 0 else "error",
                    )
                    for table, left in figures.budgets_left.items()
                ],
                "Share of each table's error budget that is left",
            ),
            f"Of the ticks of {figures.span_days} days {figures.objective:.4g} are to be within error_after. Below "
            "zero that is broken; bars end where it is broken twice over.",
        )
    span = (figures.at - timedelta(days=HISTORY_DAYS), figures.at)
    for one in figures.ages:
        points = [(moment, value / 3600) for moment, value in curves.ages.get(one.table, [])]
        if points:
            yield _card(
                f"Age of {one.table}",
                plot_curve(
                    points,
                    f"Age of {one.table} over {HISTORY_DAYS} days",
                    span,
                    "hours",
                    warn=_hours(one.warn_after),
                    error=_hours(one.error_after),
                ),
                "",
            )
    yield "</div></section>"


def _table_row(one: "TableAge") -> str:
    age = render_age(_seconds(one.age)) if one.age is not None else "no age"
    limit = f" of {render_age(_seconds(one.error_after))}" if one.error_after is not None else ""
    return (
        f'<div class="row"><span class="badge {one.state}">{SIGNS[one.state]} {one.state}</span>'
        f"<b>{_text(one.table)}</b><span>{age}{limit}</span><small>{_text(one.held_by)}</small></div>"
    )


def _share(one: "TableAge") -> float:
    assert one.age is not None
    assert one.error_after is not None
    return one.age / one.error_after


def _seconds(span: timedelta | None) -> float | None:
    return span.total_seconds() if span is not None else None


def _hours(span: timedelta | None) -> float | None:
    return span.total_seconds() / 3600 if span is not None else None


# --- runs -------------------------------------------------------------------------------------------------------------


def _runs(figures: Figures) -> Iterator[str]:
    from orchestration.plots import plot_days, plot_run_times

    yield f'<section><h2>Runs</h2><p class="lead">Of the last {figures.span_days} days. Times are of runs that '
    yield "succeeded, percentiles interpolated. A miss is a table growing older than its budget; it belongs to the "
    yield "feed that holds it back, or to the build where a model was left behind. In the plots a dot is the median of "
    yield "a day, the line goes up to its 95th percentile.</p>"
    for kind in ("run", "feed", "step"):
        rows = [one for one in figures.pipelines if one.kind == kind]
        if rows:
            yield _pipelines(KINDS[kind], rows, figures)
    models = sorted(
        (one for one in figures.pipelines if one.kind in ("model", "seed")), key=lambda one: -(one.p95 or 0)
    )
    if models:
        yield _pipelines(f"The slowest of {len(models)} models and seeds", models[:SLOWEST], figures, folded=True)
    span = (
        datetime.combine(figures.at.date() - timedelta(days=figures.span_days), time(12), UTC),
        datetime.combine(figures.at.date(), time(23, 59), UTC),
    )
    noon = {day: datetime.combine(day, time(12), UTC) for day in sorted({one.day for one in figures.days})}
    yield '<div class="grid">'
    if noon:
        succeeded = [sum(o.runs - o.failed for o in figures.days if o.kind == "run" and o.day == day) for day in noon]
        failed = [sum(o.failed for o in figures.days if o.kind == "run" and o.day == day) for day in noon]
        yield _card(
            "Runs by day",
            plot_days(
                list(noon.values()),
                [("succeeded", succeeded, "pass"), ("failed", failed, "error")],
                "Runs by day, succeeded and failed",
                span,
            ),
            "",
        )
        missed = [sum(one.misses for one in figures.days if one.day == day) for day in noon]
        if any(missed):
            plot = plot_days(list(noon.values()), [("misses", missed, "error")], "Misses by day", span)
            yield _card("Misses by day", plot, "")
    for pipeline in (one for one in figures.pipelines if one.kind in ("run", "feed", "step")):
        days = [
            (noon[one.day], one.p50, one.p95)
            for one in figures.days
            if (one.kind, one.name) == (pipeline.kind, pipeline.name) and one.p50 is not None and one.p95 is not None
        ]
        if days:
            yield _card(
                f"Time of {ONE[pipeline.kind]} {pipeline.name}",
                plot_run_times(days, f"Run time of {pipeline.name} by day, median and 95th percentile", span),
                "",
            )
    yield "</div></section>"


def _pipelines(caption: str, rows: Sequence[Pipeline], figures: Figures, *, folded: bool = False) -> str:
    header = ("", "runs", "failed in 100", "misses", "p50", "p95", "p99")
    lines = [
        (
            one.name,
            _figure(one.runs, f"{one.runs:,}"),
            _figure(one.failures_per_hundred, f"{one.failures_per_hundred:.1f}"),
            _count(None if one.kind in ("model", "seed") else figures.misses.get((one.kind, one.name), 0)),
            *(_duration(value) for value in (one.p50, one.p95, one.p99)),
        )
        for one in rows
    ]
    table = _table(header, lines)
    if folded:
        return f"<details><summary>{_text(caption)}</summary>{table}</details>"
    return f"<h3>{_text(caption)}</h3>{table}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ABSENT
    return _figure(seconds, f"{seconds:.3g} s" if seconds < 100 else render_age(seconds))


def _count(number: int | None) -> str:
    return ABSENT if number is None else _figure(number, f"{number:,}")


def _figure(value: float, said: str) -> str:
    """A figure as it is read, with the exact one beneath it."""
    return f'<data value="{value!r}">{_text(said)}</data>'


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Of a line the first cell is text, the others are markup."""
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "".join(
        f'<tr><th scope="row">{_text(line[0])}</th>'
        + "".join(
            f'<td data-name="{_text(name)}">{value}</td>' for name, value in zip(header[1:], line[1:], strict=True)
        )
        + "</tr>"
        for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# --- queues -----------------------------------------------------------------------------------------------------------


def _queues(figures: Figures, curves: Curves) -> Iterator[str]:
    from orchestration.plots import plot_curve

    yield "<section><h2>What waits</h2>"
    lines = [
        (
            one.feed,
            _count(one.lag),
            _count(one.open_dead_letters),
            _duration(one.oldest_dead_letter_seconds),
        )
        for one in figures.queues
    ]
    yield _table(("", "at the broker", "dead letters open", "the oldest for"), lines)
    span = (figures.at - timedelta(days=HISTORY_DAYS), figures.at)
    yield '<div class="grid">'
    for feed, points in curves.lags.items():
        yield _card(
            f"{feed}: waiting at the broker",
            plot_curve(points, f"Records of {feed} waiting at the broker over {HISTORY_DAYS} days", span, "records"),
            "",
        )
    yield "</div></section>"


def _card(title: str, plot: str, beside: str) -> str:
    note = f"<figcaption>{_text(beside)}</figcaption>" if beside else ""
    return f"<figure><h3>{_text(title)}</h3>{plot}{note}</figure>"


def _text(value: str) -> str:
    return html.escape(value)

"""The plots of the report, as SVG to stand inside a page: `values -> matplotlib -> <svg>`.

Drawn in the width of a phone, so that text is as large there as the rest of the page; wide screens lay several side
by side. Colours are the page's CSS variables, so one picture serves light and dark. No script, no fonts but the page's.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import matplotlib
import matplotlib.dates
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# A colour nobody would choose stands for each variable until the picture is text.
COLOURS = {
    "ink": "#010101",
    "soft": "#020202",
    "line": "#030303",
    "series": "#040404",
    "second": "#050505",
    "pass": "#060606",
    "warn": "#070707",
    "error": "#080808",
    "unknown": "#090909",
}
WIDTH = 3.6
HEIGHT = 1.75
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["soft"],
    "ytick.color": COLOURS["soft"],
    "xtick.bottom": False,
    "ytick.left": False,
    "text.color": COLOURS["ink"],
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}

Point = tuple[datetime, float]
# Not matplotlib's own: its annotations know no times on an axis.
Axes = Any
dates: Any = matplotlib.dates


@dataclass(frozen=True)
class Bar:
    """A horizontal bar: what it says at its left and right end, how long it is, and the colour's name."""

    label: str
    value: float
    said: str
    colour: str = "series"


def plot_bars(bars: Sequence[Bar], described: str, *, limit: float | None = None) -> str:
    """Horizontal bars, each with its label above it; `limit` marks what they should not cross."""

    def draw(axes: Axes) -> None:
        greatest = max([abs(bar.value) for bar in bars] + [limit or 0.0]) or 1.0
        least = min([bar.value for bar in bars] + [0.0])
        axes.set_xlim(min(least, 0.0), greatest * 1.02)
        for place, bar in enumerate(bars):
            axes.barh(-place, bar.value, height=0.34, color=COLOURS[bar.colour])
            # Above the bar, so that a long name takes nothing from its length.
            whole_width = axes.get_yaxis_transform()
            axes.text(0, -place + 0.3, bar.label, transform=whole_width, va="bottom", ha="left")
            axes.text(1, -place + 0.3, bar.said, transform=whole_width, va="bottom", ha="right", color=COLOURS["soft"])
        axes.set_ylim(-len(bars) + 0.5, 0.85)
        # At the bars alone: the labels stand between them.
        marks = [(0.0, "line", 1.0)] + ([] if limit is None else [(limit, "error", 1.6)])
        for at, colour, width in marks:
            for place in range(len(bars)):
                axes.plot([at, at], [-place - 0.22, -place + 0.2], color=COLOURS[colour], linewidth=width)
        axes.set_axis_off()

    return _render(draw, described, height=0.15 + 0.44 * len(bars))


def plot_curve(
    points: Sequence[Point],
    described: str,
    span: tuple[datetime, datetime],
    unit: str,
    *,
    warn: float | None = None,
    error: float | None = None,
) -> str:
    """A value over time, with the limits it is held against."""

    def draw(axes: Axes) -> None:
        axes.plot(
            [moment for moment, _ in points],
            [value for _, value in points],
            color=COLOURS["series"],
            linewidth=1.4,
            marker="o",
            markersize=2.2 if len(points) > 1 else 4,
            clip_on=False,
        )
        for limit, colour in ((warn, "warn"), (error, "error")):
            if limit is not None:
                axes.axhline(limit, color=COLOURS[colour], linewidth=1, linestyle="--" if colour == "warn" else "-")
        greatest = max([value for _, value in points] + [error or warn or 0.0]) or 1.0
        axes.set_ylim(0, greatest * 1.12)
        axes.set_xlim(*span)
        _name_days(axes, span)
        axes.set_ylabel(unit)

    return _render(draw, described)


def plot_run_times(
    days: Sequence[tuple[datetime, float, float]], described: str, span: tuple[datetime, datetime]
) -> str:
    """Median of each day as a dot, and a line up to what 95 of 100 runs stayed within."""

    def draw(axes: Axes) -> None:
        for day, median, high in days:
            axes.plot([day, day], [median, high], color=COLOURS["second"], linewidth=2.4, solid_capstyle="butt")
        axes.plot(
            [day for day, _, _ in days],
            [median for _, median, _ in days],
            color=COLOURS["series"],
            marker="o",
            markersize=3,
            linewidth=0,
            clip_on=False,
        )
        axes.set_ylim(0, max(high for _, _, high in days) * 1.12 or 1.0)
        axes.set_xlim(*span)
        _name_days(axes, span)
        axes.set_ylabel("seconds")

    return _render(draw, described)


def plot_days(
    days: Sequence[datetime],
    parts: Sequence[tuple[str, Sequence[int], str]],
    described: str,
    span: tuple[datetime, datetime],
) -> str:
    """Counts by day, stacked: (what, count of each day, colour)."""

    def draw(axes: Axes) -> None:
        below = [0] * len(days)
        for what, counts, colour in parts:
            axes.bar(list(days), list(counts), bottom=below, width=0.72, color=COLOURS[colour], label=what)
            below = [one + other for one, other in zip(below, counts, strict=True)]
        axes.set_ylim(0, max([*below, 1]) * 1.25)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlim(*span)
        _name_days(axes, span)
        if len(parts) > 1:
            axes.legend(loc="upper left", ncols=len(parts), borderaxespad=0, handlelength=0.9, columnspacing=1.2)

    return _render(draw, described)


def _name_days(axes: Axes, span: tuple[datetime, datetime]) -> None:
    days = max((span[1] - span[0]).days, 1)
    axes.xaxis.set_major_locator(dates.DayLocator(interval=-(-days // 5), tz=UTC))
    axes.xaxis.set_major_formatter(dates.DateFormatter("%-d %b", tz=UTC))


def _render(draw: Callable[[Axes], None], described: str, height: float = HEIGHT) -> str:
    # Ids of clip paths and markers come from the salt: another one for each picture of a page.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": described}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _to_inline(buffer.getvalue(), described)


def _to_inline(picture: str, described: str) -> str:
    """matplotlib's document as an element of the page: the page's fonts, colours and width; no ids but those in use."""
    svg = picture[picture.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None, "matplotlib gives every picture a viewBox"
    opening = f'<svg {view[0]} role="img" aria-label="{html.escape(described)}">'
    return opening + svg[svg.index(">") + 1 :]

"""What a person sees: progress bars on a terminal, plain lines elsewhere; tables and errors the same in both.

Progress and errors go to stderr, results to stdout, so that a script can read one without the other.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ingestion.errors import WarehouseError

# Off a terminal, a step says how far it is at most this often.
LINE_EVERY_S = 5.0


class Reporter:
    """Progress of a run's steps."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and not quiet
        self._bars: Any = None

    def line(self, text: str) -> None:
        """One line of what happened."""
        if self.quiet:
            return
        if self._bars is not None:
            self._bars.console.print(text, highlight=False, markup=False)
        else:
            stamp = "" if self.terminal else time.strftime("%H:%M:%S ")
            print(stamp + text, file=sys.stderr, flush=True)

    @contextmanager
    def task(self, name: str) -> Iterator["Task"]:
        """A step with a bar (or lines) of its own."""
        if not self.terminal:
            yield Task(self, name, None)
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        outer = self._bars
        if outer is None:
            self._bars = Progress(
                TextColumn("{task.description:<36}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bars.start()
        try:
            yield Task(self, name, self._bars.add_task(name, total=None))
        finally:
            if outer is None:
                self._bars.stop()
                self._bars = None


class Task:
    """One step's progress; `update` may be called as often as one likes."""

    def __init__(self, reporter: Reporter, name: str, bar: Any) -> None:
        self._reporter = reporter
        self._name = name
        self._bar = bar
        self._said = time.monotonic()

    def update(self, done: int, due: int | None = None) -> None:
        if self._bar is not None:
            self._reporter._bars.update(self._bar, completed=done, total=due)
        elif time.monotonic() - self._said >= LINE_EVERY_S:
            self._said = time.monotonic()
            self._reporter.line(f"{self._name}: {done:,}" + (f" of {due:,}" if due is not None else ""))


def render_table(header: Sequence[str], rows: Sequence[Sequence[Any]], indent: str = "  ") -> str:
    """Columns aligned: numbers (with thousands) right, texts left."""
    cells = [[_text(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    right = [all(isinstance(row[i], int | float) or row[i] is None for row in rows) for i in range(len(header))]

    def line(values: Sequence[str]) -> str:
        return (
            indent
            + "  ".join(v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)).rstrip()
        )

    return "\n".join([line(header), *map(line, cells)])


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def render_age(seconds: float | None) -> str:
    """Seconds as the two largest units; None as a dash."""
    if seconds is None:
        return "-"
    left = max(int(seconds), 0)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)):
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size}{unit}")
            left %= size
    return " ".join(parts[:2])


def render_error(error: WarehouseError) -> str:
    """What happened, where, and what to do next."""
    return f"error: {error.message}" + (f"\n  {error.hint}" if error.hint else "")

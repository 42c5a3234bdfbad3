"""Backfill: a range of days of a feed read again, planned first, then landed a stretch of days at a time.

    feed, days -> plan: each day as a dry run finds it, the models' days that would change -> stretches of the days that
    miss something -> landed one after the other -> (by the caller) the models behind

A stretch is a replay of its window (orchestration/replay.py): what landed stays, positions stay, and applied twice it
lands nothing the second time. Between two stretches the feed is free, so that ingestion goes on during a long backfill;
one that was killed goes on where it was when it is asked for again. Days are those of the source's clock, in UTC.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from ingestion.errors import ConfigurationError
from ingestion.feeds import FeedSpec
from ingestion.replay import Coming
from ingestion.replay_window import TimeWindow, WindowReplay
from ingestion.settings import Settings
from orchestration.console import Reporter
from orchestration.forecast import ModelDays
from orchestration.history import Run
from orchestration.replay import forecast_models, replay_source

STRETCH_SETTING = "WAREHOUSE_BACKFILL_DAYS"
STRETCH_DAYS = 7
WAIT_S = 60.0
# What a day is read again for.
MISSING = ("landed", "restored", "dead")


@dataclass(frozen=True)
class DayRange:
    """Both days belong to it."""

    first: date
    last: date

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise ConfigurationError(
                f"The days end ({self.last}) before they begin ({self.first}).", hint="Both ends belong to the range."
            )

    @property
    def window(self) -> TimeWindow:
        return TimeWindow(_midnight(self.first), _midnight(self.last + timedelta(days=1)))

    def __str__(self) -> str:
        return f"{self.first}" if self.first == self.last else f"{self.first} .. {self.last}"


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


@dataclass(frozen=True)
class Plan:
    """What a backfill would do: `found` day by day, the models' days that would change, and the stretches to read."""

    feed: str
    days: DayRange
    found: WindowReplay
    models: tuple[ModelDays, ...]
    stretches: tuple[DayRange, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "feed": self.feed,
            "from": self.days.first.isoformat(),
            "to": self.days.last.isoformat(),
            "found": self.found.as_dict(),
            "stretches": [str(stretch) for stretch in self.stretches],
            "models": [one.as_dict() for one in self.models],
        }


def plan_backfill(settings: Settings, feed: FeedSpec, days: DayRange, reporter: Reporter) -> Plan:
    """Read the days without landing anything, and say what is missing.

    Raises:
        ConfigurationError: the topic was never read, or the models never built.
        WarehouseError: as `replay_source`.
    """
    coming: list[Coming] = []
    found = replay_source(settings, feed, days.window, None, reporter, wait_s=WAIT_S, coming=coming)
    models = forecast_models(settings, coming, reporter)
    most = max(int(settings.number(STRETCH_SETTING, STRETCH_DAYS)), 1)
    missing = [
        day
        for place, figures in found.days.items()
        if any(figures[figure] for figure in MISSING)
        for day in _days_of(place)
    ]
    return Plan(feed.name, days, found, tuple(models), tuple(to_stretches(missing, most)))


def _days_of(place: str) -> Iterator[date]:
    """The days of a line of the plan: a day, or those an API was asked for at once (`DAY to DAY`)."""
    first, _, last = place.partition(" to ")
    day = date.fromisoformat(first)
    while day <= date.fromisoformat(last or first):
        yield day
        day += timedelta(days=1)


def to_stretches(days: Sequence[date], most: int) -> Iterator[DayRange]:
    """Days in order -> ranges of days that follow each other, of at most so many."""
    first = last = None
    for day in sorted(days):
        if first is not None and last is not None and (day - last).days == 1 and (day - first).days < most:
            last = day
            continue
        if first is not None and last is not None:
            yield DayRange(first, last)
        first = last = day
    if first is not None and last is not None:
        yield DayRange(first, last)


def run_backfill(
    settings: Settings, feed: FeedSpec, plan: Plan, run: Run, reporter: Reporter, because: str | None = None
) -> list[WindowReplay]:
    """Land what the plan found missing, a stretch at a time.

    Raises:
        WarehouseError: of the stretch that failed; those before it stand.
    """
    done = []
    for number, stretch in enumerate(plan.stretches, 1):
        result = replay_source(
            settings, feed, stretch.window, run, reporter, because=because or f"backfill {plan.days}", wait_s=WAIT_S
        )
        reporter.line(
            f"{feed.name}: {stretch} ({number} of {len(plan.stretches)}): landed {result.landed:,}, "
            f"restored {result.restored:,}, set aside {result.dead:,}"
        )
        done.append(result)
    return done

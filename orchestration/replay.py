"""Replays as an operator runs them: feed after feed, recorded in the run history, the models rebuilt behind them.

A dry run records nothing and makes nothing: it may not change a byte.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from ingestion.database import connect
from ingestion.feeds import FeedSpec
from ingestion.replay import Coming, Replay, Selection, count_open, discard_dead_letters, replay_dead_letters
from ingestion.replay_window import OffsetWindow, TimeWindow, WindowReplay, replay_window
from ingestion.settings import Settings
from orchestration import transform
from orchestration.console import Reporter
from orchestration.forecast import ModelDays, fetch_contents, find_changed, forecast_days, select_downstream
from orchestration.history import Run, recorded_run
from orchestration.run import prepare

R = TypeVar("R", bound=Replay)


@contextmanager
def recording(settings: Settings, command: str, apply: bool) -> Iterator[Run | None]:
    """The run history around a command that changes something; nothing at all around a dry run."""
    if not apply:
        yield None
        return
    prepare(settings)
    connection = connect(settings, purpose=command)
    try:
        with recorded_run(connection, command, "manual", settings.project_dir) as run:
            yield run
    finally:
        connection.close()


def replay_letters(
    settings: Settings,
    feeds: Sequence[FeedSpec],
    selection: Selection,
    run: Run | None,
    reporter: Reporter,
    *,
    because: str | None = None,
    wait_s: float,
    coming: list[Coming] | None = None,
) -> list[Replay]:
    """Replay the feeds' open dead letters, or (no run) say what it would do. A feed without any is left alone.

    Args:
        coming: gets the rows that would land, by feed.

    Raises:
        WarehouseError: of the first feed that failed; feeds before it stand.
    """
    replays = []
    for feed in feeds:
        if count_open(settings, feed, selection) == 0:
            continue
        with reporter.task(f"replay {feed.name}") as task:
            action = partial(
                replay_dead_letters,
                settings,
                feed,
                selection,
                apply=run is not None,
                because=because,
                wait_s=wait_s,
                coming=None if coming is None else _begin(coming, feed),
                progress=task.update,
            )
            replays.append(_recorded(run, feed, action))
    return replays


def replay_source(
    settings: Settings,
    feed: FeedSpec,
    window: TimeWindow | OffsetWindow,
    run: Run | None,
    reporter: Reporter,
    *,
    because: str | None = None,
    wait_s: float,
    coming: list[Coming] | None = None,
) -> WindowReplay:
    """Read a window of a feed again, or (no run) say what it would do; `coming` gets the rows that would land."""
    with reporter.task(f"replay {feed.name}") as task:
        action = partial(
            replay_window,
            settings,
            feed,
            window,
            apply=run is not None,
            because=because,
            wait_s=wait_s,
            coming=None if coming is None else _begin(coming, feed),
            progress=task.update,
        )
        return _recorded(run, feed, action)


def _begin(coming: list[Coming], feed: FeedSpec) -> Coming:
    coming.append(Coming(feed))
    return coming[-1]


def _recorded(run: Run | None, feed: FeedSpec, action: Callable[[], R]) -> R:
    if run is None:
        return action()
    # A step of its own name: one of the feed's own would pass for a read of its source and make it fresh.
    with run.step(f"replay {feed.name}") as step:
        done = action()
        step.rows, step.dead = done.landed + done.restored, 0
        return done


def discard_letters(
    settings: Settings, feeds: Sequence[FeedSpec], selection: Selection, because: str, *, apply: bool, wait_s: float
) -> dict[str, int]:
    """Discard the feeds' open dead letters, or say how many it would; by feed."""
    counts = {feed.name: count_open(settings, feed, selection) for feed in feeds}
    if apply:
        for feed in feeds:
            if counts[feed.name]:
                counts[feed.name] = discard_dead_letters(settings, feed, selection, because, apply=True, wait_s=wait_s)
    return {name: count for name, count in counts.items() if count}


@dataclass(frozen=True)
class Rebuild:
    """What building the models of replayed feeds changed.

    `unforeseen`: models of which more or fewer rows were written than forecast, as when something else landed
    meanwhile; on other days than those looked at they may have changed, too.
    """

    models: list[ModelDays]
    unforeseen: list[str]


def downstream(replays: Sequence[Replay]) -> list[str]:
    """dbt's arguments that build the models of what landed; none for nothing."""
    feeds = [replay.feed for replay in replays if replay.load_ids]
    return select_downstream(feeds) if feeds else []


def forecast_models(settings: Settings, coming: Sequence[Coming], reporter: Reporter) -> list[ModelDays]:
    """The models of the feeds rows would land in, with the days that would change; none where nothing would land.

    Closes what is coming.

    Raises:
        WarehouseError: as `forecast_days`.
    """
    feeds = [one.feed.name for one in coming if one.rows]
    try:
        if not feeds:
            return []
        with reporter.task("forecast"):
            return forecast_days(settings, feeds, coming)
    finally:
        for one in coming:
            one.close()


def build_downstream(settings: Settings, replays: Sequence[Replay], run: Run, reporter: Reporter) -> Rebuild:
    """`dbt build` of the models of what landed, and the days of them it changed.

    Raises:
        DataError: a model or test failed.
        WarehouseError: as `forecast_days`; nothing was built.
    """
    feeds = [replay.feed for replay in replays if replay.load_ids]
    if not feeds:
        return Rebuild([], [])
    with run.step("build"), reporter.task("dbt build") as task:
        forecast = forecast_days(settings, feeds)
        before = fetch_contents(settings, forecast)
        report = transform.run_build(
            settings, on_node=lambda _n, _s, done, due: task.update(done, due), select=select_downstream(feeds)
        )
        run.record_nodes(report.nodes)
        transform.require_built(report)
        after = fetch_contents(settings, forecast)
    written = {node.node: node.rows for node in report.nodes}
    unforeseen = [
        one.model.name
        for one in forecast
        if one.rows is not None and written.get(one.model.unique_id) not in (None, one.rows)
    ]
    return Rebuild(find_changed(forecast, before, after), unforeseen)

"""Replays as an operator runs them: feed after feed, recorded in the run history, the models rebuilt behind them.

A dry run records nothing and makes nothing: it may not change a byte.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from ingestion.database import connect
from ingestion.feeds import FeedSpec
from ingestion.replay import Replay, Selection, count_open, discard_dead_letters, replay_dead_letters
from ingestion.replay_window import OffsetWindow, TimeWindow, WindowReplay, replay_window
from ingestion.settings import Settings
from orchestration import transform
from orchestration.console import Reporter
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
) -> list[Replay]:
    """Replay the feeds' open dead letters, or (no run) say what it would do. A feed without any is left alone.

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
) -> WindowReplay:
    """Read a window of a feed again, or (no run) say what it would do."""
    with reporter.task(f"replay {feed.name}") as task:
        action = partial(
            replay_window,
            settings,
            feed,
            window,
            apply=run is not None,
            because=because,
            wait_s=wait_s,
            progress=task.update,
        )
        return _recorded(run, feed, action)


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


def downstream(replays: Sequence[Replay]) -> list[str]:
    """dbt's arguments that rebuild the models of what landed; none for nothing.

    Staging counts the raw rows folded into each of its own. It may or may not have taken in a row that was gone and
    is back under another load; only a full refresh counts it once in either case.
    """
    feeds = [replay for replay in replays if replay.load_ids]
    refresh = ["--full-refresh"] if any(replay.restored for replay in feeds) else []
    return [*refresh, "--select", *(f"source:{replay.feed}+" for replay in feeds)] if feeds else []


def build_downstream(settings: Settings, replays: Sequence[Replay], run: Run, reporter: Reporter) -> list[str]:
    """`dbt build` of the models of what landed; their names.

    Raises:
        DataError: a model or test failed.
    """
    with run.step("build"), reporter.task("dbt build") as task:
        arguments = downstream(replays)
        report = transform.build(settings, arguments, on_node=lambda _n, _s, done, due: task.update(done, due))
    return [node.node.rpartition(".")[2] for node in report.nodes if node.node.startswith("model.")]

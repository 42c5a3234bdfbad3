"""Parts of a replay that need no server: the budget, the chunks, the window asked for."""

import datetime as dt
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ingestion.errors import ConfigurationError, DataError
from ingestion.feeds import DeadLetterBudget, FeedSpec, load_feeds
from ingestion.kafka import Topic
from ingestion.landing import Landing
from ingestion.replay import BYTES_PER_CHUNK, LETTERS_PER_CHUNK, _chunks
from ingestion.replay_window import OffsetWindow, TimeWindow, WindowReplay, _bounds_by_offset, _days
from ingestion.settings import Settings
from orchestration.cli_replay import _window, render_days
from orchestration.run import require_within_budget

SOURCES = "models/staging/payments/_payments__sources.yml"
DECLARED = "dead_letter_budget: {share: 0.1}"


@pytest.mark.parametrize(
    ("budget", "offered", "dead", "over"),
    [
        (DeadLetterBudget(), 10, 10, False),
        (DeadLetterBudget(share=0.05), 1_000, 50, False),
        (DeadLetterBudget(share=0.05), 1_000, 51, True),
        (DeadLetterBudget(share=0.05), 99, 99, False),
        (DeadLetterBudget(share=0.05, minimum_records=10), 99, 99, True),
        (DeadLetterBudget(count=3), 10, 3, False),
        (DeadLetterBudget(count=3), 10, 4, True),
        (DeadLetterBudget(share=0.5, count=3), 1_000, 4, True),
        (DeadLetterBudget(share=0.0), 0, 0, False),
    ],
)
def test_a_budget_of_dead_letters(budget: DeadLetterBudget, offered: int, dead: int, over: bool) -> None:
    assert (budget.find_excess(offered, dead) is not None) == over


def test_a_run_over_its_budget_fails_with_what_to_do(feed_named: Callable[[str], FeedSpec]) -> None:
    feed = feed_named("raw_payments.transaction_created")
    landing = Landing(feed.name, landed=850, dead=150)
    landing.reasons.update({"wrong_type": 60, "malformed_json": 40})
    with pytest.raises(
        DataError, match=r"150 of 1,000 records aside \(15\.0%\), its budget is 10\.0%: wrong_type 60"
    ) as e:
        require_within_budget(feed, landing)
    assert "dead-letters list" in e.value.hint
    require_within_budget(replace(feed, dead_letter_budget=DeadLetterBudget()), landing)


@pytest.fixture
def project(tmp_path: Path, clean_settings: Settings) -> Settings:
    for folder in ("models", "seeds"):
        shutil.copytree(clean_settings.project_dir / folder, tmp_path / folder)
    return replace(clean_settings, project_dir=tmp_path)


def declare(project: Settings, budget: str) -> int:
    path = project.project_dir / SOURCES
    text = path.read_text()
    path.write_text(text.replace(DECLARED, budget))
    return text[: text.index(DECLARED)].count("\n") + 1


def test_the_declared_budget(project: Settings) -> None:
    declare(project, "dead_letter_budget: {share: 0.1, count: 7, minimum_records: 20}")
    budgets = {feed.name: feed.dead_letter_budget for feed in load_feeds(project)}
    assert budgets["raw_payments.transaction_created"] == DeadLetterBudget(0.1, 7, 20)
    assert budgets["raw_fx.daily_rates"] == DeadLetterBudget()


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ("dead_letter_budget: 5", "must be a mapping"),
        ("dead_letter_budget: {minimum_records: 5}", "needs `share`, `count` or both"),
        ("dead_letter_budget: {share: 5}", "from 0 to 1"),
        ("dead_letter_budget: {share: true}", "from 0 to 1"),
        ("dead_letter_budget: {count: -1}", "0 or more"),
        ("dead_letter_budget: {count: many}", "must be a whole number"),
        ("dead_letter_budget: {percent: 5}", "has no setting `percent`"),
    ],
)
def test_a_budget_that_cannot_be_understood_names_its_line(project: Settings, budget: str, reason: str) -> None:
    line = declare(project, budget)
    with pytest.raises(ConfigurationError, match=rf"_payments__sources\.yml:{line}: .*{reason}"):
        load_feeds(project)


def test_letters_are_held_in_bounded_chunks() -> None:
    assert [len(chunk) for chunk in _chunks((str(i), 1) for i in range(2_500))] == [LETTERS_PER_CHUNK] * 2 + [500]
    large = [(str(i), BYTES_PER_CHUNK // 2) for i in range(5)]
    assert [len(chunk) for chunk in _chunks(large)] == [2, 2, 1]
    assert list(_chunks([("huge", 10 * BYTES_PER_CHUNK)])) == [["huge"]]
    assert list(_chunks([])) == []


DAY = dt.datetime(2026, 1, 5)


def test_a_window_of_times_or_of_offsets() -> None:
    assert _window(DAY, DAY + dt.timedelta(days=1), None, None, None) == TimeWindow(
        DAY.replace(tzinfo=dt.UTC), DAY.replace(tzinfo=dt.UTC) + dt.timedelta(days=1)
    )
    assert _window(None, None, 0, 5, 5) == OffsetWindow(0, 5, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        (None, None, None, None, None),
        (DAY, None, None, None, None),
        (DAY, DAY, None, None, None),
        (DAY, DAY + dt.timedelta(days=1), 0, None, None),
        (None, None, 0, 5, None),
        (None, None, None, 5, 6),
        (None, None, 0, 6, 5),
    ],
)
def test_half_a_window_is_refused(arguments: tuple) -> None:
    with pytest.raises(ConfigurationError):
        _window(*arguments)


@pytest.mark.parametrize(
    ("first", "last", "bounds", "gone", "waiting"),
    [
        (10, 19, {0: (10, 20)}, 0, 0),
        (0, 9, {0: (5, 10)}, 5, 0),
        (25, 99, {0: (25, 30)}, 0, 10),
        (30, 35, {}, 0, 6),
        (0, 3, {}, 4, 0),
        (50, 60, {}, 0, 0),
    ],
)
def test_offsets_beyond_the_log_or_the_position_are_said_and_not_read(
    feed_named: Callable[[str], FeedSpec],
    first: int,
    last: int,
    bounds: dict[int, tuple[int, int]],
    gone: int,
    waiting: int,
) -> None:
    feed = feed_named("raw_payments.transaction_created")
    result = WindowReplay(feed.name, False)
    topic = Topic("cluster", "id", {0: (5, 40), 1: (0, 9)})
    assert _bounds_by_offset(feed, topic, {0: 30}, OffsetWindow(0, first, last), result) == bounds
    assert (result.gone, result.waiting) == (gone, waiting)
    with pytest.raises(ConfigurationError, match="no partition 7"):
        _bounds_by_offset(feed, topic, {0: 30}, OffsetWindow(7, 0, 1), result)


def test_an_api_is_asked_for_whole_days_and_none_before_its_first() -> None:
    start = dt.datetime(2026, 1, 5, 13, tzinfo=dt.UTC)
    stop = dt.datetime(2026, 1, 7, 0, 1, tzinfo=dt.UTC)
    first = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
    assert _days(TimeWindow(start, stop), first) == (start.replace(hour=0), stop.replace(day=8, minute=0))
    assert _days(TimeWindow(start, stop), start)[0] == start


def days(*numbers: int | None) -> list[dt.date | None]:
    return [number and dt.date(2026, 1, number) for number in numbers]


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ([], "none"),
        (days(6), "2026-01-06 (1 day)"),
        (days(6, 7, 8), "2026-01-06 .. 2026-01-08 (3 days)"),
        (days(2, 6, 7), "2026-01-02, 2026-01-06 .. 2026-01-07 (3 days)"),
        (days(1, 3, 5, 7), "2026-01-01, 2026-01-03, 2026-01-05, 2026-01-07 (4 days)"),
        (days(1, 3, 5, 7, 9, 10), "2026-01-01, 2026-01-03, 2026-01-05, ..., 2026-01-09 .. 2026-01-10 (6 days)"),
        (days(1, None), "2026-01-01, no day (2 days)"),
        (days(None), "no day (1 day)"),
    ],
)
def test_days_are_shown_as_ranges(told: list[dt.date | None], text: str) -> None:
    assert render_days(told) == text

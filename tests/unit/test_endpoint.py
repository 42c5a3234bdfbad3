"""Which windows of an API are asked for once more because they were empty."""

import datetime as dt
from collections.abc import Callable
from dataclasses import replace

import pytest

from ingestion.endpoint import EMPTY_WINDOWS_PER_RUN, PageAccount, choose_empty, note_empty
from ingestion.feeds import FeedSpec, RestOrigin, WindowSpec
from ingestion.ledger import EmptyWindow

NOW = dt.datetime(2026, 6, 1, 12, tzinfo=dt.UTC)


def day(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(f"2026-{text}").replace(tzinfo=dt.UTC)


def window(start: str, stop: str, found_at: dt.datetime = NOW) -> EmptyWindow:
    return EmptyWindow(day(start), day(stop), found_at)


def page(start: str, stop: str, read: int) -> PageAccount:
    return PageAccount(day(start), day(stop), read=read, landed=read, dead=0, drifted=0, bytes=read)


@pytest.fixture
def origin(feed_named: Callable[[str], FeedSpec]) -> RestOrigin:
    declared = feed_named("raw_fx.daily_rates").origin
    assert isinstance(declared, RestOrigin)
    return replace(declared, window=WindowSpec(start=dt.date(2026, 1, 1), days=10, reread_days=30))


def test_an_empty_window_is_due_as_long_as_any_day_is_read_again(origin: RestOrigin) -> None:
    recent = window("01-01", "01-11", NOW - dt.timedelta(days=29))
    believed = window("01-11", "01-21", NOW - dt.timedelta(days=30))
    assert choose_empty([recent, believed], origin, NOW, day("05-01")) == [(day("01-01"), day("01-11"))]
    without = replace(origin, window=replace(origin.window, reread_days=0))
    assert choose_empty([recent], without, NOW, day("05-01")) == []


def test_what_is_due_anyway_is_not_asked_for_twice(origin: RestOrigin) -> None:
    empty = [window("04-21", "05-01"), window("05-01", "05-11"), window("05-11", "05-21")]
    assert choose_empty(empty, origin, NOW, day("05-05")) == [
        (day("04-21"), day("05-01")),
        (day("05-01"), day("05-05")),
    ]


def test_of_many_a_few_each_run_and_all_over_the_runs(origin: RestOrigin) -> None:
    empty = [window(f"02-{number:02}", f"02-{number + 1:02}") for number in range(1, 21)]
    asked = [choose_empty(empty, origin, NOW, day("05-01")) for _ in range(200)]
    assert {len(one) for one in asked} == {EMPTY_WINDOWS_PER_RUN}
    assert all(one == sorted(one) for one in asked)
    assert {start for one in asked for start, _ in one} == {one.start for one in empty}


def test_what_is_noted_of_empty_windows() -> None:
    before = NOW - dt.timedelta(days=3)
    known = [window("01-01", "01-11", before), window("01-11", "01-21", before), window("01-21", "02-01", before)]
    pages = [page("01-11", "01-21", 0), page("01-21", "02-01", 7), page("02-01", "02-11", 0), page("02-11", "02-21", 1)]
    assert note_empty(known, pages, NOW) == [
        window("01-01", "01-11", before),  # not asked for this time
        window("01-11", "01-21", before),  # still empty: since then
        window("02-01", "02-11", NOW),
    ]

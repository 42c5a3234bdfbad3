"""Dead letters and windows of an API, which sends the same record again: a later version is never overtaken."""

import datetime as dt
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal

import pytest

from ingestion import rest
from ingestion.errors import ConfigurationError
from ingestion.feeds import AcceptedValues, FeedSpec, RestOrigin, WindowSpec
from ingestion.landing import land_feed
from ingestion.replay import Selection, replay_dead_letters
from ingestion.replay_window import TimeWindow, replay_window
from ingestion.settings import Settings
from orchestration.sample.rates import is_publishing_day
from orchestration.sample.rates_api import Fault, RatesServer, serving

Query = Callable[..., list[tuple]]

TODAY = dt.datetime.now(dt.UTC).date()
FIRST_DAY = TODAY - dt.timedelta(days=60)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RatesServer]:
    monkeypatch.setattr(rest, "BACKOFF_FACTOR_S", 0.01)
    with serving(7, today=lambda: TODAY) as running:
        yield running


@pytest.fixture
def settings(warehouse: Settings, server: RatesServer) -> Settings:
    return warehouse.with_env(FX_API_BASE=server.url, WAREHOUSE_EMBEDDED="")


@pytest.fixture
def feed(feed_named: Callable[[str], FeedSpec]) -> FeedSpec:
    declared = feed_named("raw_fx.daily_rates")
    assert isinstance(declared.origin, RestOrigin)
    return replace(declared, origin=replace(declared.origin, window=WindowSpec(FIRST_DAY, 30, 10)))


def without_pounds(feed: FeedSpec) -> FeedSpec:
    """The contract before it was corrected."""
    columns = tuple(
        replace(c, rules=tuple(AcceptedValues(r.values - {"GBP"}) if isinstance(r, AcceptedValues) else r
                               for r in c.rules))
        if c.name == "quote_currency" else c
        for c in feed.columns
    )  # fmt: skip
    return replace(feed, columns=columns)


def pounds(query: Query) -> dict[str, Decimal]:
    """Day -> the pound's rate as the models read it: of the latest load."""
    return dict(
        query(
            "select distinct on (rate_date) rate_date::text, rate from raw_fx.daily_rates where quote_currency = 'GBP' "
            "and _dlt_load_id in (select load_id from raw_fx._dlt_loads) "
            "order by rate_date, _dlt_load_id desc, _api_window_from desc, _api_page desc, _api_item desc"
        )
    )


def published(server: RatesServer) -> dict[str, Decimal]:
    days = server.book.between(FIRST_DAY, TODAY, "USD")
    return {day: Decimal(rates["GBP"]) for day, rates in days.items() if day >= FIRST_DAY.isoformat()}


def assert_adds_up(query: Query) -> None:
    ((landed, dead),) = query("select sum(landed)::int, sum(dead)::int from ops.ledger")
    assert query("select count(*)::int from raw_fx.daily_rates") == [(landed,)]
    assert query("select count(*)::int from ops.dead_letters where status <> 'replayed'") == [(dead,)]


def a_recent_day() -> dt.date:
    day = TODAY - dt.timedelta(days=2)
    while not is_publishing_day(day):
        day -= dt.timedelta(days=1)
    return day


def test_dead_letters_land_once_and_are_unchanged_from_then_on(
    settings: Settings, feed: FeedSpec, server: RatesServer, query: Query
) -> None:
    dead = land_feed(settings, without_pounds(feed)).dead
    assert dead >= len(published(server))
    forecast = replay_dead_letters(settings, feed, Selection())
    outcome = replay_dead_letters(settings, feed, Selection(), apply=True)
    assert (forecast.landed, forecast.superseded) == (outcome.landed, outcome.superseded)
    assert outcome.landed + outcome.superseded == dead
    found = pounds(query)
    assert {day: rate for day, rate in found.items() if day >= FIRST_DAY.isoformat()} == published(server)
    assert_adds_up(query)
    assert replay_dead_letters(settings, feed, Selection(), apply=True).landed == 0
    assert land_feed(settings, feed).landed == 0
    assert_adds_up(query)


def test_what_landed_meanwhile_is_not_overtaken(
    settings: Settings, feed: FeedSpec, server: RatesServer, query: Query
) -> None:
    """The days read again land by themselves under the corrected contract, one of them with another rate."""
    land_feed(settings, without_pounds(feed))
    day = a_recent_day()
    server.book.correct(day, "GBP", "0.5")
    again = land_feed(settings, feed)
    assert again.landed > 1
    forecast = replay_dead_letters(settings, feed, Selection())
    outcome = replay_dead_letters(settings, feed, Selection(), apply=True)
    assert (forecast.landed, forecast.superseded) == (outcome.landed, outcome.superseded)
    assert outcome.superseded >= again.landed
    found = pounds(query)
    assert found[day.isoformat()] == published(server)[day.isoformat()]
    assert {d: rate for d, rate in found.items() if d >= FIRST_DAY.isoformat()} == published(server)
    assert query("select distinct discarded_because from ops.dead_letters where status = 'discarded'") == [
        ("superseded: a later version of the record landed",)
    ]
    assert_adds_up(query)


def test_of_two_rejected_versions_the_later_one_stands_in_whatever_order_they_come(
    settings: Settings, feed: FeedSpec, server: RatesServer, query: Query
) -> None:
    tight = without_pounds(feed)
    land_feed(settings, tight)
    day = a_recent_day()
    server.book.correct(day, "GBP", "0.5")
    assert land_feed(settings, tight).dead == 1
    ((later,),) = query("select dead_letter_id from ops.dead_letters order by load_id desc limit 1")
    olders = [
        row[0]
        for row in query(
            "select dead_letter_id from ops.dead_letters where dead_letter_id <> %s "
            "and convert_from(raw_value, 'utf8')::json ->> 'rate_date' = %s",
            later,
            day.isoformat(),
        )
    ]
    assert replay_dead_letters(settings, feed, Selection(ids=tuple(olders)), apply=True).landed == 1
    # Its load is later than the other's; the version is not.
    assert replay_dead_letters(settings, feed, Selection(ids=(later,)), apply=True).landed == 1
    assert pounds(query)[day.isoformat()] == published(server)[day.isoformat()]
    assert_adds_up(query)


def test_a_window_of_days_is_read_again(settings: Settings, feed: FeedSpec, server: RatesServer, query: Query) -> None:
    land_feed(settings, without_pounds(feed))
    ends = query("select max(window_to) from ops.ledger")
    early = FIRST_DAY + dt.timedelta(days=5)
    while not is_publishing_day(early):
        early += dt.timedelta(days=1)
    server.book.correct(early, "JPY", "150")
    start = dt.datetime.combine(FIRST_DAY, dt.time(), dt.UTC)
    window = TimeWindow(start, start + dt.timedelta(days=20))
    forecast = replay_window(settings, feed, window)
    outcome = replay_window(settings, feed, window, apply=True)
    figures = [(r.read, r.landed, r.unchanged, r.dead, r.failed, r.superseded) for r in (forecast, outcome)]
    assert figures[0] == figures[1]
    assert forecast.days == outcome.days
    pound_days = [day for day in published(server) if day < (FIRST_DAY + dt.timedelta(days=20)).isoformat()]
    assert outcome.landed > len(pound_days), "the pounds and one corrected rate"
    assert set(pound_days) <= set(pounds(query))
    assert_adds_up(query)
    again = replay_window(settings, feed, window, apply=True)
    assert (again.landed, again.dead, again.load_ids) == (0, 0, [])
    assert query("select max(window_to) from ops.ledger") == ends
    # Days no normal run has read are left to it.
    ahead = TimeWindow(start, dt.datetime.combine(TODAY, dt.time(), dt.UTC) + dt.timedelta(days=4))
    assert replay_window(settings, feed, ahead).waiting == 3


def test_days_the_api_has_nothing_of_are_an_empty_window(
    settings: Settings, feed: FeedSpec, server: RatesServer, query: Query
) -> None:
    """Its answer is 404, as for a path that is wrong: then it knows nothing of earlier days either."""
    land_feed(settings, feed)
    before = query("select * from ops.ledger")
    server.today = lambda: TODAY - dt.timedelta(days=10)
    midnight = dt.datetime.combine(TODAY, dt.time(), dt.UTC)
    unpublished = TimeWindow(midnight - dt.timedelta(days=5), midnight)
    for apply in (False, True):
        result = replay_window(settings, feed, unpublished, apply=apply)
        assert (result.read, result.landed, result.load_ids) == (0, 0, [])
        assert len(result.days) == 1
    assert query("select * from ops.ledger") == before

    first = dt.datetime.combine(FIRST_DAY, dt.time(), dt.UTC)
    for faults, window in ((2, unpublished), (1, TimeWindow(first, first + dt.timedelta(days=3)))):
        server.faults.extend([Fault(status=404)] * faults)
        with pytest.raises(ConfigurationError, match="answered with status 404"):
            replay_window(settings, feed, window)

"""Windows, pages and records of a REST feed: no day left out, no digit changed, no record dropped in silence."""

import datetime as dt
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from email.utils import format_datetime

import pytest

from ingestion import rest
from ingestion.contract import Contract, Rejection, Row
from ingestion.errors import ConfigurationError
from ingestion.feeds import FeedSpec, RestOrigin, WindowSpec
from ingestion.rest import EndpointReader, encode_record, parse_page, parse_retry_after, plan_windows, split_page
from ingestion.retry import RetryPolicy
from ingestion.settings import Settings

RATES = "raw_fx.daily_rates"


def moment(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


@pytest.fixture
def feed(feed_named: Callable[[str], FeedSpec]) -> FeedSpec:
    return feed_named(RATES)


@pytest.fixture
def origin(feed: FeedSpec) -> RestOrigin:
    assert isinstance(feed.origin, RestOrigin)
    return replace(feed.origin, window=WindowSpec(start=dt.date(2026, 1, 1), days=10, reread_days=3))


def windows(origin: RestOrigin, read_until: str | None, today: str) -> list[tuple[str, str]]:
    planned = plan_windows(origin, moment(read_until) if read_until else None, dt.date.fromisoformat(today))
    return [(f"{start:%m-%d}", f"{stop:%m-%d}") for start, stop in planned]


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read_until", "today", "expected"),
    [
        (None, "2026-01-01", [("01-01", "01-02")]),
        (None, "2026-01-10", [("01-01", "01-11")]),
        (None, "2026-01-11", [("01-01", "01-11"), ("01-11", "01-12")]),
        (None, "2026-01-25", [("01-01", "01-11"), ("01-11", "01-21"), ("01-21", "01-26")]),
        (None, "2025-12-31", []),
        (None, "2025-06-01", []),
        ("2026-01-26", "2026-01-25", [("01-23", "01-26")]),
        ("2026-01-26", "2026-01-26", [("01-23", "01-27")]),
        ("2026-01-26", "2026-02-05", [("01-23", "02-02"), ("02-02", "02-06")]),
        ("2026-01-03", "2026-01-03", [("01-01", "01-04")]),
        ("2026-02-26", "2026-01-25", []),
    ],
    ids=[
        "first day",
        "one full window",
        "a day more than a window",
        "several windows",
        "first day is tomorrow",
        "first day far ahead",
        "second run of a day",
        "next day",
        "after a pause",
        "reread not before the first day",
        "clock behind the last run by more than is read again",
    ],
)
def test_windows_cover_what_is_due(
    origin: RestOrigin, read_until: str | None, today: str, expected: list[tuple[str, str]]
) -> None:
    assert windows(origin, read_until, today) == expected


def test_without_reread_only_what_is_new_is_asked_for(origin: RestOrigin) -> None:
    origin = replace(origin, window=replace(origin.window, reread_days=0))
    assert windows(origin, "2026-01-26", "2026-01-25") == []
    assert windows(origin, "2026-01-26", "2026-01-26") == [("01-26", "01-27")]


@pytest.mark.parametrize("days", [1, 7, 180, 1000])
@pytest.mark.parametrize("reread_days", [0, 1, 30])
def test_windows_of_any_size_leave_no_day_out_and_ask_for_none_twice(
    origin: RestOrigin, days: int, reread_days: int
) -> None:
    origin = replace(origin, window=replace(origin.window, days=days, reread_days=reread_days))
    first, today = dt.date(2026, 1, 1), dt.date(2026, 12, 31)
    for read_until in (None, moment("2026-06-15")):
        planned = plan_windows(origin, read_until, today)
        asked = [start + dt.timedelta(days=n) for start, stop in planned for n in range((stop - start).days)]
        begin = first if read_until is None else read_until.date() - dt.timedelta(days=reread_days)
        assert [day.date() for day in asked] == [begin + dt.timedelta(days=n) for n in range((today - begin).days + 1)]
        assert all(stop - start <= dt.timedelta(days=days) for start, stop in planned)


# --- pages ------------------------------------------------------------------------------------------------------------


def records_of(feed: FeedSpec, page: str, **shape: object) -> list[bytes]:
    assert isinstance(feed.origin, RestOrigin)
    spec = replace(feed.origin.records, **shape)  # type: ignore[arg-type]
    return [encode_record(record) for record in split_page(parse_page(page.encode()), spec, feed)]


LISTED: dict[str, object] = {"path": "data.items", "keys": (), "value": None, "page_fields": {}}


def test_nested_objects_become_records(feed: FeedSpec) -> None:
    page = '{"base":"USD","rates":{"2026-01-02":{"EUR":0.9,"JPY":150},"2026-01-05":{"EUR":0.91}}}'
    assert records_of(feed, page) == [
        b'{"base_currency":"USD","rate_date":"2026-01-02","quote_currency":"EUR","rate":0.9}',
        b'{"base_currency":"USD","rate_date":"2026-01-02","quote_currency":"JPY","rate":150}',
        b'{"base_currency":"USD","rate_date":"2026-01-05","quote_currency":"EUR","rate":0.91}',
    ]


def test_a_list_of_objects_becomes_records(feed: FeedSpec) -> None:
    page = '{"run": 7, "data": {"items": [{"id": 1, "run": 8}, {"id": 2}]}}'
    assert records_of(feed, page, **LISTED) == [b'{"id":1,"run":8}', b'{"id":2}']
    # What the record says of itself stands above what the page says.
    assert records_of(feed, page, **{**LISTED, "page_fields": {"run": "run"}}) == [
        b'{"run":8,"id":1}',
        b'{"run":7,"id":2}',
    ]


def test_a_page_may_be_the_list_itself(feed: FeedSpec) -> None:
    bare = {**LISTED, "path": ""}
    assert records_of(feed, '[{"id":1},{"id":2}]', **bare) == [b'{"id":1}', b'{"id":2}']
    assert records_of(feed, "[]", **bare) == []
    assert records_of(feed, '["x"]', **{**bare, "page_fields": {"id": "x"}}) == [b'"x"']


@pytest.mark.parametrize("page", ['{"rates":{}}', '{"rates":{"2026-01-02":{}}}'])
def test_a_page_may_hold_nothing(feed: FeedSpec, page: str) -> None:
    assert records_of(feed, page) == []


@pytest.mark.parametrize(
    "page",
    ["{}", "[]", "null", "7", '"rates"', '{"rates":null}', '{"rates":[]}', '{"rates":1}', '{"message":"not found"}'],
)
def test_a_page_of_another_shape_is_one_clear_error(feed: FeedSpec, page: str) -> None:
    with pytest.raises(ConfigurationError, match=r"the API's answer has no object at `rates`") as caught:
        records_of(feed, page)
    assert f"{feed.file}:{feed.line}" in caught.value.hint


@pytest.mark.parametrize("page", ["{}", '{"data":{}}', '{"data":{"items":{"a":1}}}', '{"data":[]}', "[]", "null"])
def test_a_page_without_its_list_is_one_clear_error(feed: FeedSpec, page: str) -> None:
    with pytest.raises(ConfigurationError, match=r"has no list at `data\.items`"):
        records_of(feed, page, **LISTED)


@pytest.mark.parametrize(
    ("page", "path"),
    [
        ('{"base":"USD","rates":{"2026-01-02":{"EUR":null}}}', "$.rate"),
        ('{"base":"USD","rates":{"2026-01-02":{"EUR":"0.9"}}}', "$.rate"),
        ('{"base":"USD","rates":{"2026-01-02":{"EUR":{"mid":0.9}}}}', "$.rate"),
        ('{"base":"USD","rates":{"2026-01-02":{"EUR":NaN}}}', "$"),
        ('{"base":"USD","rates":{"2026-01-02":{"EUR":1e999999999999999999999}}}', "$.rate"),
        ('{"base":"USD","rates":{"2026-01-02":{"XXQ":0.9}}}', "$.quote_currency"),
        ('{"base":"USD","rates":{"2026-01-02":0.9}}', "$.quote_currency"),
        ('{"base":"USD","rates":{"02.01.2026":{"EUR":0.9}}}', "$.rate_date"),
        ('{"base":7,"rates":{"2026-01-02":{"EUR":0.9}}}', "$.base_currency"),
        ('{"rates":{"2026-01-02":{"EUR":0.9}}}', "$.base_currency"),
        ('{"base":"USD","rates":{"2026-01-02":{"\\ud800":0.9}}}', "$.quote_currency"),
        ('{"base":"USD","rates":{"2026-01-02":{"EU\\u0000R":0.9}}}', "$.quote_currency"),
    ],
)
def test_a_record_that_does_not_fit_reaches_the_contract(feed: FeedSpec, page: str, path: str) -> None:
    (record,) = records_of(feed, page)
    decoded = Contract(feed).decode(record)
    assert isinstance(decoded, Rejection), record
    assert decoded.path == path


def test_a_repeated_name_loses_no_record(feed: FeedSpec) -> None:
    # Of a record: both values reach the contract, which refuses the record.
    (record,) = records_of(feed, '{"data":{"items":[{"rate":0.90,"rate":0.9}]}}', **LISTED)
    assert record == b'{"rate":0.90,"rate":0.9}'
    # Of a level of nesting: the whole level goes to the contract.
    (level,) = records_of(feed, '{"base":"USD","rates":{"2026-01-02":{"EUR":0.9,"EUR":0.8}}}')
    assert b'"rate":{"EUR":0.9,"EUR":0.8}' in level
    assert isinstance(Contract(feed).decode(level), Rejection)
    # Of the page itself: nobody can say which is meant.
    with pytest.raises(ConfigurationError):
        records_of(feed, '{"rates":{"2026-01-02":{"EUR":0.9}},"rates":{}}')


# --- digits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "digits",
    [
        "0",
        "-0",
        "0.1",
        "0.10",
        "1.000000000000",
        "0.000000000001",
        "123456789012.123456789012",
        "999999999999.999999999999",
        "0.1234567890123456789012345678901234567890",
        "12345678901234567890123456789012345678901234567890",
        "1e-7",
        "1E+5",
        "1.5e400",
        "-1.0e-400",
    ],
)
def test_a_number_keeps_its_digits(feed: FeedSpec, digits: str) -> None:
    (record,) = records_of(feed, f'{{"base":"USD","rates":{{"2026-01-02":{{"EUR":{digits}}}}}}}')
    assert record.endswith(f'"rate":{digits}}}'.encode())


def test_twin_plain_json_changes_the_digits() -> None:
    digits = "0.1234567890123456789"
    assert encode_record(json.loads(digits)) != digits.encode()
    assert encode_record(parse_page(digits.encode())) == digits.encode()


def test_texts_come_through_whatever_they_hold() -> None:
    texts = ["", "é", "\u2028", "😀", '"', "\\", "\x00", "\x7f", "a\nb"]
    page = json.dumps({"a": texts, "b": [True, False, None, {"c": []}]}).encode()
    assert json.loads(encode_record(parse_page(page))) == json.loads(page)
    # Half of a surrogate pair has no UTF-8: it stays escaped, and so do its neighbours.
    odd = b'{"\\ud83d":["\\u00e9","\\ud800",1.50,true,null,{"d":-0}]}'
    assert encode_record(parse_page(odd)) == odd.replace(b",", b",")
    assert json.loads(encode_record(parse_page(odd))) == json.loads(odd)


def test_a_record_of_the_real_api_lands_to_the_digit(feed: FeedSpec) -> None:
    (record,) = records_of(feed, '{"amount":1.0,"base":"USD","rates":{"2026-01-02":{"EUR":0.123456789012}}}')
    assert Contract(feed).decode(record) == Row(["2026-01-02", "USD", "EUR", "0.123456789012"], None)


# --- trying again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "total_s"), [({}, 60.0), ({"WAREHOUSE_RETRY_SECONDS": "5"}, 5.0)])
def test_an_api_is_asked_again_within_the_retry_policy(
    feed: FeedSpec, clean_settings: Settings, setting: dict[str, str], total_s: float
) -> None:
    reader = EndpointReader(clean_settings.with_env(FX_API_BASE="http://127.0.0.1:1", **setting), feed)
    assert reader._policy == RetryPolicy(base_s=0.5, cap_s=30.0, total_s=total_s, tries=6)


# --- when to come back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("0", 0),
        (" 120 ", 120),
        ("Wed, 01 Jan 2020 00:00:00 GMT", 0),
        ("Wed, 99 Jan 2020 00:00:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str | None, seconds: float | None) -> None:
    assert parse_retry_after(text) == seconds


def test_a_date_to_come_back_at_is_a_delay() -> None:
    when = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=2)
    assert 115 < (parse_retry_after(format_datetime(when, usegmt=True)) or 0) <= 120


def test_who_was_told_to_wait_makes_all_wait() -> None:
    pace = rest.Pace(None)
    pace.hold(0.2)
    started = time.monotonic()
    pace.wait()
    assert time.monotonic() - started >= 0.19
    # The twin: once it is over, nobody waits.
    assert pace._next <= time.monotonic()


def test_who_waits_is_woken_when_reading_stops() -> None:
    pace = rest.Pace(1)
    threading.Timer(0.05, pace.stop).start()
    with pytest.raises(InterruptedError):
        pace.sleep(60)

"""The sample rates and their HTTP server, in the form of the Frankfurter API."""

import hashlib
import http.client
import json
import re
import socket
from collections.abc import Iterator
from datetime import date, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest

from ingestion.errors import ConfigurationError
from orchestration.sample.rates import CURRENCIES, FIRST_DAY, RateBook, easter_sunday, is_publishing_day, render_rate
from orchestration.sample.rates_api import Fault, RatesServer, respond, serve, serving

TODAY = date(2026, 1, 14)  # a Wednesday


def test_same_seed_gives_these_rates() -> None:
    text = json.dumps(RateBook(1).between(date(2025, 1, 1), date(2025, 12, 31), "USD"))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "3d835dba05a5a3707a00b2ad3ad0914e733fb457fa65a035b39a025d46f73c00"
    )
    assert text != json.dumps(RateBook(2).between(date(2025, 1, 1), date(2025, 12, 31), "USD"))


def test_rates_of_a_day_do_not_depend_on_the_question() -> None:
    whole = RateBook(1).between(date(2025, 1, 1), date(2026, 1, 10), "USD")
    book = RateBook(1)
    for day in ("2026-01-09", "2025-03-03", "2025-11-20"):
        assert book.latest(date.fromisoformat(day), "USD") == {day: whole[day]}
    some = RateBook(1).between(date(2025, 6, 1), date(2025, 6, 10), "USD", ["JPY", "EUR"])
    assert all(rates == {code: whole[day][code] for code in ("EUR", "JPY")} for day, rates in some.items())


def test_rates_are_there_on_publishing_days_only() -> None:
    days = list(RateBook(1).between(date(2025, 12, 22), date(2026, 1, 6)))
    assert days == [
        "2025-12-22", "2025-12-23", "2025-12-24", "2025-12-29", "2025-12-30", "2025-12-31",
        "2026-01-02", "2026-01-05", "2026-01-06",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("year", "month", "day"), [(2000, 4, 23), (2008, 3, 23), (2024, 3, 31), (2025, 4, 20), (2026, 4, 5), (2038, 4, 25)]
)
def test_easter_is_a_closing_time(year: int, month: int, day: int) -> None:
    easter = date(year, month, day)
    assert easter_sunday(year) == easter
    assert not is_publishing_day(easter - timedelta(days=2))
    assert not is_publishing_day(easter + timedelta(days=1))
    if easter > FIRST_DAY:
        assert is_publishing_day(easter - timedelta(days=3))
        assert is_publishing_day(easter + timedelta(days=2))


def test_rates_are_plausible_and_move() -> None:
    series = RateBook(1).between(date(2024, 1, 1), date(2026, 1, 1), "EUR")
    assert len(series) > 500
    for code, (_, level) in CURRENCIES.items():
        if code == "EUR":
            continue
        rates = [Decimal(day[code]) for day in series.values()]
        assert all(Decimal(level) * Decimal("0.6") < rate < Decimal(level) * Decimal("1.6") for rate in rates), code
        assert len(set(rates)) > 20, code
        steps = [abs(b / a - 1) for a, b in pairwise(rates)]
        assert max(steps) < Decimal("0.02"), code


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        ("17021.4", "17021"),
        ("161.0049", "161.0"),
        ("20.10049", "20.1"),
        ("1.08504", "1.085"),
        ("0.920006", "0.92001"),
        ("0.00009871", "0.000099"),
        ("5", "5.0"),
    ],
)
def test_rate_has_the_decimals_of_the_real_one(rate: str, text: str) -> None:
    assert render_rate(Decimal(rate)) == text


def test_correction_changes_one_day() -> None:
    book, plain = RateBook(1), RateBook(1)
    period = (date(2026, 1, 5), date(2026, 1, 9), "USD")
    before = book.between(*period)
    book.correct(date(2026, 1, 7), "JPY", "999")
    after = book.between(*period)
    changed = {(day, code) for day in after for code in after[day] if after[day][code] != before[day][code]}
    assert changed == {("2026-01-07", "JPY")}
    assert plain.between(*period) == before
    for day, code in ((date(2026, 1, 10), "JPY"), (date(2026, 1, 7), "EUR"), (date(2026, 1, 7), "XXX")):
        with pytest.raises(ConfigurationError, match="no rate"):
            book.correct(day, code, "1")


@pytest.fixture(scope="module")
def server() -> Iterator[RatesServer]:
    with serving(seed=1, today=lambda: TODAY) as running:
        yield running


def get(server: RatesServer, path: str) -> tuple[int, Any, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read(), parse_float=Decimal), response
    finally:
        connection.close()


def test_period_has_the_form_of_the_real_api(server: RatesServer) -> None:
    status, body, response = get(server, "/v1/2026-01-05..2026-01-07?base=USD&symbols=EUR,JPY")
    assert status == 200
    assert response.getheader("Content-Type") == "application/json; charset=utf-8"
    assert list(body) == ["amount", "base", "start_date", "end_date", "rates"]
    assert (body["amount"], body["base"]) == (1, "USD")
    assert (body["start_date"], body["end_date"]) == ("2026-01-05", "2026-01-07")
    assert list(body["rates"]) == ["2026-01-05", "2026-01-06", "2026-01-07"]
    expected = server.book.between(date(2026, 1, 5), date(2026, 1, 7), "USD", ["EUR", "JPY"])
    assert body["rates"] == {d: {c: Decimal(r) for c, r in rates.items()} for d, rates in expected.items()}


def test_numbers_are_written_exactly() -> None:
    book = RateBook(1)
    status, text = respond(book, TODAY, "/v1/2026-01-05?base=USD")
    assert status == 200
    rates = book.latest(date(2026, 1, 5), "USD")["2026-01-05"]
    assert re.findall(r'"([A-Z]{3})":([0-9.]+)', text.split('"rates"')[1]) == list(rates.items())


def test_period_is_bounded_by_the_days_with_rates(server: RatesServer) -> None:
    # From a Saturday to a Sunday: the real API goes back to the Friday before the period.
    _, body, _ = get(server, "/v1/2026-01-10..2026-01-11?base=USD&symbols=EUR")
    assert (body["start_date"], body["end_date"], list(body["rates"])) == ("2026-01-09", "2026-01-09", ["2026-01-09"])
    # New Year's Day.
    _, body, _ = get(server, "/v1/2026-01-01..2026-01-04")
    assert list(body["rates"]) == ["2025-12-31", "2026-01-02"]
    assert body["base"] == "EUR"


def test_no_day_after_today(server: RatesServer) -> None:
    for path in ("/v1/2026-01-12..2026-12-31", "/v1/2026-01-12.."):
        _, body, _ = get(server, path)
        assert list(body["rates"]) == ["2026-01-12", "2026-01-13", "2026-01-14"]
    assert get(server, "/v1/2026-01-15..2026-01-20")[0] == 404
    assert get(server, "/v1/2026-01-15")[0] == 404


def test_latest_and_one_day(server: RatesServer) -> None:
    _, latest, _ = get(server, "/v1/latest?base=usd&symbols=eur")
    assert list(latest) == ["amount", "base", "date", "rates"]
    assert latest["date"] == "2026-01-14"
    _, sunday, _ = get(server, "/v1/2026-01-11?from=USD&to=EUR&amount=100")
    assert (sunday["date"], sunday["amount"]) == ("2026-01-09", 100)
    assert Decimal(80) < sunday["rates"]["EUR"] < Decimal(120)


def test_currencies(server: RatesServer) -> None:
    status, body, _ = get(server, "/v1/currencies")
    assert status == 200
    assert body["USD"] == "United States Dollar"
    assert {"EUR", "GBP", "JPY", "CAD"} <= set(body)
    assert list(body) == sorted(body)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 404),
        ("/v2/rates", 404),
        ("/v1/2026-01-05...2026-01-07", 404),
        ("/v1/latest?base=XYZ", 404),
        ("/v1/latest?symbols=XYZ", 404),
        ("/v1/2026-01-09..2026-01-01", 404),
        ("/v1/2019-01-01", 404),
        ("/v1/2026-13-01", 422),
        ("/v1/2026-02-30..2026-03-01", 422),
        ("/v1/latest?base=USD&symbols=USD", 422),
        ("/v1/latest?amount=0", 422),
        ("/v1/latest?amount=-1", 422),
        ("/v1/latest?amount=nan", 422),
        ("/v1/latest?amount=1e999999999", 422),
        ("/v1/latest?amount=much", 422),
    ],
)
def test_bad_questions_get_json_errors(server: RatesServer, path: str, status: int) -> None:
    answered, body, _ = get(server, path)
    assert answered == status
    assert list(body) == ["message"]


def test_unknown_symbols_are_left_out(server: RatesServer) -> None:
    _, body, _ = get(server, "/v1/latest?base=USD&symbols=XYZ,EUR,USD")
    assert list(body["rates"]) == ["EUR"]


def test_faults_are_used_up_one_a_request() -> None:
    with serving(seed=1, today=lambda: TODAY) as server:
        server.faults.extend(
            [
                Fault(status=429, headers={"Retry-After": "1"}),
                Fault(status=500),
                Fault("body", body="<html></html>", content_type="text/html"),
                Fault("cut_connection"),
                Fault("cut_body"),
            ]
        )

        def fetch() -> tuple[int, bytes, str | None]:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
            try:
                connection.request("GET", "/v1/latest")
                response = connection.getresponse()
                return response.status, response.read(), response.getheader("Retry-After")
            finally:
                connection.close()

        assert fetch() == (429, b'{"message":"too many requests"}', "1")
        assert fetch()[:2] == (500, b'{"message":"internal server error"}')
        assert fetch()[:2] == (200, b"<html></html>")
        with pytest.raises(http.client.IncompleteRead):
            fetch()
        status, half, _ = fetch()
        with pytest.raises(json.JSONDecodeError):
            json.loads(half)
        whole = fetch()[1]
        assert status == 200
        assert whole.startswith(half)
        assert json.loads(whole)["date"] == "2026-01-14"
        assert list(server.requests) == ["/v1/latest"] * 6


def test_one_connection_serves_many_requests(server: RatesServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.connect()
    first = connection.sock
    for _ in range(3):
        connection.request("GET", "/v1/latest")
        assert connection.getresponse().read()
    assert connection.sock is first
    connection.close()


def test_address_in_use_is_one_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigurationError, match="cannot listen on"):
        serve("127.0.0.1", taken.getsockname()[1], 1)


def test_shown_days_end_today_in_utc() -> None:
    with serving(seed=1) as server:
        _, body, _ = get(server, "/v1/latest")
        assert date.fromisoformat(body["date"]) <= server.today()

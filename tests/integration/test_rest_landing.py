"""Landing a REST endpoint: every rate once, corrections as new rows, and nothing half-committed when the API fails."""

import datetime as dt
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from ingestion import endpoint, rest
from ingestion.errors import AuthenticationError, ConfigurationError, TransientError
from ingestion.feeds import FeedSpec, RequestSpec, RestOrigin, WindowSpec
from ingestion.landing import Landing, land_feed
from ingestion.settings import Settings
from orchestration.sample.rates import is_publishing_day
from orchestration.sample.rates_api import Fault, RatesServer, serving

Query = Callable[..., list[tuple]]

SEED = 7
REREAD_DAYS = 20
WINDOW_DAYS = 30
TODAY = dt.datetime.now(dt.UTC).date()
FIRST_DAY = TODAY - dt.timedelta(days=100)

# In a row of faults: the request is answered as it should be.
FINE = None


class TimedRequests(deque[str]):
    """The paths asked for, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def append(self, path: str) -> None:
        super().append(path)
        self.times.append(time.monotonic())

    def clear(self) -> None:
        super().clear()
        self.times.clear()


@pytest.fixture
def server() -> Iterator[RatesServer]:
    with serving(SEED, today=lambda: TODAY) as running:
        running.requests = TimedRequests()
        yield running


@pytest.fixture
def feed(feed_named: Callable[[str], FeedSpec]) -> FeedSpec:
    """The declared rates, from a hundred days ago in windows of thirty."""
    declared = feed_named("raw_fx.daily_rates")
    assert isinstance(declared.origin, RestOrigin)
    return replace(declared, origin=replace(declared.origin, window=WindowSpec(FIRST_DAY, WINDOW_DAYS, REREAD_DAYS)))


@pytest.fixture
def land(warehouse: Settings, feed: FeedSpec, server: RatesServer) -> Callable[[], Landing]:
    """Land the rates from the test's own server."""
    settings = reading_from(warehouse, server)
    return lambda: land_feed(settings, feed)


def reading_from(warehouse: Settings, server: RatesServer) -> Settings:
    """The test's own server as one of the user's: an address that means something, not the embedded API."""
    return warehouse.with_env(FX_API_BASE=server.url, WAREHOUSE_EMBEDDED="")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of attempts stays, the time between them shrinks."""
    monkeypatch.setattr(rest, "BACKOFF_FACTOR_S", 0.01)


def published(server: RatesServer, first: dt.date = FIRST_DAY, last: dt.date = TODAY) -> dict[tuple[str, str], str]:
    """(day, currency) -> rate, as the book has them."""
    days = server.book.between(first, last, "USD")
    return {(day, code): rate for day, rates in days.items() for code, rate in rates.items()}


def standing(query: Query) -> dict[tuple[str, str], Decimal]:
    """(day, currency) -> the rate of the latest load."""
    rows = query(
        "select distinct on (rate_date, quote_currency) rate_date::text, quote_currency, rate from raw_fx.daily_rates "
        "where _dlt_load_id in (select load_id from raw_fx._dlt_loads) "
        "order by rate_date, quote_currency, _dlt_load_id desc, _api_page desc, _api_item desc"
    )
    return {(day, currency): rate for day, currency, rate in rows}


def assert_account(query: Query) -> tuple[int, ...]:
    """(offered, landed, dead, unchanged) of the ledger, which equals what the tables hold."""
    ((offered, landed, dead, unchanged, tombstones),) = query(
        "select coalesce(sum(offered), 0)::int, coalesce(sum(landed), 0)::int, coalesce(sum(dead), 0)::int, "
        "coalesce(sum(unchanged), 0)::int, coalesce(sum(tombstones), 0)::int from ops.ledger"
    )
    assert offered == landed + dead + unchanged
    assert tombstones == 0
    assert query("select count(*)::int from raw_fx.daily_rates") == [(landed,)]
    assert query("select count(*)::int from ops.dead_letters") == [(dead,)]
    return offered, landed, dead, unchanged


def snapshot(query: Query) -> list[list[tuple]]:
    """Everything a reader can see of the feed."""
    return [
        query(statement)
        for statement in (
            "select * from ops.ledger order by load_id",
            "select * from ops.loads order by load_id",
            "select * from ops.dead_letters order by dead_letter_id",
            "select * from raw_fx.daily_rates where _dlt_load_id in (select load_id from raw_fx._dlt_loads) "
            "order by rate_date, quote_currency, _dlt_load_id",
        )
    ]


def last_publishing_day(before: dt.date = TODAY) -> dt.date:
    day = before - dt.timedelta(days=1)
    while not is_publishing_day(day):
        day -= dt.timedelta(days=1)
    return day


def a_correction(server: RatesServer, per_euro: str = "0.5") -> tuple[str, str]:
    """Publish another rate of a past day inside the window that is read again; its key."""
    day = last_publishing_day()
    server.book.correct(day, "GBP", per_euro)
    return day.isoformat(), "GBP"


# --- several requests at once -----------------------------------------------------------------------------------------


class Meeting(TimedRequests):
    """Each request waits for others; `is_met` when as many were there at once."""

    def __init__(self, parties: int, patience_s: float) -> None:
        super().__init__()
        self._barrier = threading.Barrier(parties, action=self._meet, timeout=patience_s)
        self.is_met = False

    def _meet(self) -> None:
        self.is_met = True

    def append(self, path: str) -> None:
        super().append(path)
        with suppress(threading.BrokenBarrierError):
            self._barrier.wait()


@pytest.mark.parametrize(
    ("concurrent", "patience_s", "are_together"), [(4, 10.0, True), (3, 0.3, False), (1, 0.3, False)]
)
def test_windows_are_asked_for_at_once_as_many_as_declared_and_land_in_order(
    warehouse: Settings,
    feed: FeedSpec,
    server: RatesServer,
    query: Query,
    concurrent: int,
    patience_s: float,
    are_together: bool,
) -> None:
    assert isinstance(feed.origin, RestOrigin)
    server.requests = meeting = Meeting(4, patience_s)
    several = replace(feed, origin=replace(feed.origin, requests=RequestSpec(concurrent)))
    landing = land_feed(reading_from(warehouse, server), several)
    assert meeting.is_met is are_together
    assert len(meeting) == 4
    assert standing(query) == {key: Decimal(rate) for key, rate in published(server).items()}
    assert assert_account(query)[:2] == (landing.offered, landing.landed)
    pages = query("select distinct _api_page, _api_window_from from raw_fx.daily_rates order by 1")
    assert [page for page, _ in pages] == [1, 2, 3, 4]
    assert [start for _, start in pages] == sorted(start for _, start in pages)


def test_no_more_a_minute_than_declared(warehouse: Settings, feed: FeedSpec, server: RatesServer) -> None:
    assert isinstance(feed.origin, RestOrigin)
    slow = replace(feed, origin=replace(feed.origin, requests=RequestSpec(concurrent=4, per_minute=300)))
    land_feed(reading_from(warehouse, server), slow)
    assert isinstance(server.requests, TimedRequests)
    times = sorted(server.requests.times)
    assert len(times) == 4
    # They set out 0.2 s apart; on its way one may be held up, and the next not.
    assert times[-1] - times[0] > 0.5


def test_a_window_that_fails_ends_the_others(warehouse: Settings, feed: FeedSpec, server: RatesServer) -> None:
    assert isinstance(feed.origin, RestOrigin)
    several = replace(feed, origin=replace(feed.origin, requests=RequestSpec(concurrent=4)))
    # One is refused, the others are told to come back much later: nobody waits for them.
    server.faults.append(Fault(status=401))
    server.faults.extend([Fault(status=503, headers={"Retry-After": "50"})] * 3)
    started = time.monotonic()
    with pytest.raises(AuthenticationError):
        land_feed(reading_from(warehouse, server).with_env(WAREHOUSE_RETRY_SECONDS="55"), several)
    assert time.monotonic() - started < 45


# --- what lands -------------------------------------------------------------------------------------------------------


def test_the_first_load_brings_every_day_since_the_declared_start(
    land: Callable[[], Landing], server: RatesServer, query: Query
) -> None:
    landing = land()
    expected = published(server)
    assert standing(query) == {key: Decimal(rate) for key, rate in expected.items()}
    assert landing.landed == len(expected)
    assert (landing.dead, len(landing.loads)) == (0, 1)
    offered, landed, _, unchanged = assert_account(query)
    assert landed == len(expected)
    # A window that begins on a day without rates brings the day before it once more.
    assert offered == landed + unchanged == landing.offered
    assert unchanged % 22 == 0
    windows = query("select window_from::date, window_to::date, pages from ops.ledger")
    assert windows == [(FIRST_DAY, TODAY + dt.timedelta(days=1), 4)]
    assert len(server.requests) == 4


def test_coordinates_lead_back_to_the_page_and_the_item(
    land: Callable[[], Landing], server: RatesServer, query: Query
) -> None:
    land()
    rows = query(
        "select rate_date, quote_currency, _api_window_from::date, _api_window_to::date, _api_page, _api_item "
        "from raw_fx.daily_rates where _api_page = 2 order by _api_item"
    )
    start = FIRST_DAY + dt.timedelta(days=WINDOW_DAYS)
    stop = start + dt.timedelta(days=WINDOW_DAYS)
    assert {row[2:5] for row in rows} == {(start, stop, 2)}
    page = list(published(server, start, stop - dt.timedelta(days=1)))
    assert all(page[item] == (day.isoformat(), currency) for day, currency, *_, item in rows)


def test_a_second_run_lands_nothing_and_writes_no_load(
    land: Callable[[], Landing], server: RatesServer, query: Query
) -> None:
    land()
    before = snapshot(query)
    server.requests.clear()
    again = land()
    assert (again.landed, again.dead, again.loads) == (0, 0, [])
    assert again.offered == again.unchanged > 0
    assert snapshot(query) == before
    first = TODAY + dt.timedelta(days=1 - REREAD_DAYS)
    assert list(server.requests) == [f"/v1/{first}..{TODAY}?base=USD"]


def test_a_new_day_lands_alone(
    warehouse: Settings, feed: FeedSpec, server: RatesServer, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = reading_from(warehouse, server)
    earlier = last_publishing_day(last_publishing_day())
    monkeypatch.setattr(server, "today", lambda: earlier)
    land_feed(settings, feed)
    assert standing(query).keys() == published(server, last=earlier).keys()
    monkeypatch.setattr(server, "today", lambda: TODAY)
    due = published(server).keys() - published(server, last=earlier).keys()
    assert land_feed(settings, feed).landed == len(due) > 0
    assert standing(query).keys() == published(server).keys()


def test_a_correction_inside_the_window_is_one_new_row(
    land: Callable[[], Landing], server: RatesServer, query: Query
) -> None:
    first = land().landed
    original = standing(query)
    key = a_correction(server)
    landing = land()
    assert (landing.landed, landing.dead, len(landing.loads)) == (1, 0, 1)
    corrected = standing(query)
    assert {k for k in corrected if corrected[k] != original[k]} == {key}
    assert corrected[key] == Decimal(published(server)[key])
    assert query(
        "select count(*)::int, count(distinct _dlt_load_id)::int from raw_fx.daily_rates "
        "where (rate_date::text, quote_currency) = (%s, %s)",
        *key,
    ) == [(2, 2)]
    offered, landed, _, unchanged = assert_account(query)
    assert (landed, offered) == (first + 1, first + 1 + unchanged)
    assert land().loads == []


def test_a_correction_taken_back_is_a_third_row(
    land: Callable[[], Landing], server: RatesServer, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of a day are its history: what was believed in between stays."""
    land()
    original = standing(query)
    key = a_correction(server)
    land()
    monkeypatch.setattr(server.book, "_corrections", {})
    assert land().landed == 1
    assert standing(query) == original
    history = query(
        "select rate from raw_fx.daily_rates where (rate_date::text, quote_currency) = (%s, %s) order by _dlt_load_id",
        *key,
    )
    assert [row[0] for row in history[::2]] == [original[key]] * 2
    assert history[1][0] != original[key]


def test_a_correction_before_the_window_is_not_seen(
    land: Callable[[], Landing], server: RatesServer, query: Query
) -> None:
    """The declared `reread_days` says how far back corrections are taken up."""
    land()
    before = snapshot(query)
    server.book.correct(last_publishing_day(TODAY - dt.timedelta(days=REREAD_DAYS + 7)), "GBP", "0.5")
    assert land().loads == []
    assert snapshot(query) == before


def test_the_same_rates_at_another_address_are_the_same_rates(
    land: Callable[[], Landing], warehouse: Settings, feed: FeedSpec, query: Query
) -> None:
    land()
    before = snapshot(query)
    with serving(SEED, today=lambda: TODAY) as other:
        landing = land_feed(reading_from(warehouse, other), feed)
    assert (landing.landed, landing.loads) == (0, [])
    assert snapshot(query) == before


def test_the_embedded_api_is_the_same_api_at_its_next_start(warehouse: Settings, feed: FeedSpec, query: Query) -> None:
    """Its port is another each time; only what is read again is asked for."""
    for _ in range(2):
        with serving(SEED, today=lambda: TODAY) as embedded:
            land_feed(warehouse.with_env(FX_API_BASE=embedded.url, WAREHOUSE_EMBEDDED="postgres,rates"), feed)
            asked = len(embedded.requests)
    assert asked == 1
    assert query("select count(*)::int from ops.ledger") == [(1,)]


def test_a_first_day_in_the_future_asks_for_nothing(
    warehouse: Settings, feed: FeedSpec, server: RatesServer, query: Query
) -> None:
    assert isinstance(feed.origin, RestOrigin)
    window = WindowSpec(TODAY + dt.timedelta(days=3), WINDOW_DAYS, REREAD_DAYS)
    ahead = replace(feed, origin=replace(feed.origin, window=window))
    landing = land_feed(reading_from(warehouse, server), ahead)
    assert (landing.offered, landing.loads) == (0, [])
    assert not server.requests
    assert query("select count(*)::int from ops.ledger") == [(0,)]


QUIET_READER = """
import sys
from datetime import date
from pathlib import Path
from ingestion import endpoint, rest
from ingestion.feeds import load_feeds, select_feeds
from ingestion.settings import load_settings

if sys.argv[3] == "twin":
    rest.DLT_DEFAULTS.clear()
settings = load_settings(Path(sys.argv[1])).with_env(FX_API_BASE=sys.argv[2])
(feed,) = select_feeds(load_feeds(settings), ["daily_rates"])
today = date.fromisoformat(sys.argv[4])
list(rest.EndpointReader(settings, feed).read(rest.plan_windows(feed.origin, None, today)[-1:]))
from dlt.common import logger
from dlt.common.runtime import anon_tracker
print(anon_tracker._ANON_TRACKER_ENDPOINT, logger.LOGGER.isEnabledFor(40))
"""


@pytest.mark.parametrize(("case", "is_quiet"), [("as it is", True), ("twin", False)])
def test_dlt_phones_nobody_and_logs_no_row(server: RatesServer, tmp_path: Path, case: str, is_quiet: bool) -> None:
    """dlt settles both when anything of it is first used, which for an API is before there is a pipeline."""
    project = Path(__file__).resolve().parents[2]
    found = subprocess.run(
        [sys.executable, "-c", QUIET_READER, str(project), server.url, case, TODAY.isoformat()],
        env={**{k: v for k, v in os.environ.items() if not k.startswith("RUNTIME__")}, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (found.stdout.split() == ["None", "False"]) is is_quiet, found.stdout


# --- an API that is not well, and gets well ---------------------------------------------------------------------------

HTML = Fault("body", body="<!doctype html><title>Sign in</title>", content_type="text/html")
EMPTY_PAGE = Fault("body", body='{"amount":1.0,"base":"USD","rates":{}}')


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(status=500)] * 3,
        [Fault(status=503), Fault(status=502)],
        [Fault(status=429)],
        [Fault("cut_connection")] * 2,
        [Fault("cut_body")] * 2,
        [Fault("body", body="")],
        [EMPTY_PAGE],
        [FINE, Fault(status=500), FINE, Fault("cut_body"), Fault("cut_connection"), Fault(status=429)],
    ],
    ids=["500 three times", "503, 502", "429", "cut connection", "cut body", "no body", "empty page", "now and then"],
)
def test_a_passing_fault_is_asked_again_and_changes_nothing(
    land: Callable[[], Landing], server: RatesServer, query: Query, faults: list[Fault]
) -> None:
    server.faults.extend(faults)
    landing = land()
    assert not server.faults
    assert len(server.requests) == 4 + sum(fault is not FINE for fault in faults)
    assert standing(query) == {key: Decimal(rate) for key, rate in published(server).items()}
    assert len(landing.loads) == 1
    assert assert_account(query)[:2] == (landing.offered, landing.landed)


def test_retry_after_is_honoured(land: Callable[[], Landing], server: RatesServer) -> None:
    server.faults.append(Fault(status=429, headers={"Retry-After": "1"}))
    server.faults.append(Fault(status=503, headers={"Retry-After": "2"}))
    server.faults.append(Fault(status=503))
    land()
    assert isinstance(server.requests, TimedRequests)
    first, second, third, fourth, *_ = server.requests.times
    assert 1 <= second - first < 1.9
    assert 2 <= third - second < 2.9
    # Twin: unasked, nobody waits that long.
    assert fourth - third < 0.9


def test_whoever_asks_for_more_patience_than_a_run_has_is_left_alone(
    land: Callable[[], Landing], server: RatesServer
) -> None:
    """The delay goes to whoever started the run, which is not asked to sleep for an hour."""
    server.faults.append(Fault(status=429, headers={"Retry-After": "3600"}))
    with pytest.raises(TransientError, match="status 429 and asks to come back in 3600 s") as caught:
        land()
    assert (caught.value.retry_after_s, len(server.requests)) == (3600, 1)


# --- an API that stays unwell -----------------------------------------------------------------------------------------


class NotText(str):
    """A body whose bytes are not UTF-8."""

    def encode(self, *_: object) -> bytes:
        return b'{"rates":{"\xff":{}}}'


LASTING = {
    "429": ([Fault(status=429)] * rest.MAX_ATTEMPTS, TransientError, "answered with status 429 6 times"),
    "500": ([Fault(status=500)] * rest.MAX_ATTEMPTS, TransientError, "answered with status 500 6 times"),
    "cut connection": ([Fault("cut_connection")] * rest.MAX_ATTEMPTS, TransientError, "does not answer"),
    "cut body": ([Fault("cut_body")] * rest.MAX_ATTEMPTS, TransientError, "something that is not JSON"),
    "HTML": ([HTML] * rest.MAX_ATTEMPTS, TransientError, "something that is not JSON"),
    "503 with a page for people": (
        [Fault(status=503, body="<h1>Service unavailable</h1>", content_type="text/html")] * rest.MAX_ATTEMPTS,
        TransientError,
        "answered with status 503 6 times",
    ),
    "a redirect in a circle": (
        [Fault(status=302, headers={"Location": "/v1/latest"})] * (rest.MAX_REDIRECTS + 1),
        ConfigurationError,
        "redirects again and again",
    ),
    "a redirect to a sign-in page": (
        [Fault(status=302, headers={"Location": "/sign-in"}), HTML] * rest.MAX_ATTEMPTS,
        TransientError,
        "something that is not JSON",
    ),
    "nested beyond reason": ([Fault("body", body="{" * 100_000)] * rest.MAX_ATTEMPTS, TransientError, "is not JSON"),
    "HTML that says it is JSON": (
        [replace(HTML, content_type="application/json")] * rest.MAX_ATTEMPTS,
        TransientError,
        "something that is not JSON",
    ),
    "bytes that are not text": (
        [Fault("body", body=NotText())] * rest.MAX_ATTEMPTS,
        TransientError,
        "something that is not JSON",
    ),
    # Also of more days: a window alone may hold nothing.
    "404": ([Fault(status=404)] * 2, ConfigurationError, "answered with status 404"),
    "401": ([Fault(status=401)], AuthenticationError, "it refused us"),
    "403": ([Fault(status=403)], AuthenticationError, "it refused us"),
    "another shape": (
        [Fault("body", body='{"message":"quota exceeded"}')],
        ConfigurationError,
        "has no object at `rates`",
    ),
    "a list": ([Fault("body", body="[1,2]")], ConfigurationError, "has no object at `rates`"),
    "null": ([Fault("body", body="null")], ConfigurationError, "has no object at `rates`"),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_is_one_clear_error_and_leaves_everything_as_it_was(
    warehouse: Settings, feed: FeedSpec, server: RatesServer, query: Query, name: str
) -> None:
    faults, error_class, message = LASTING[name]
    assert isinstance(feed.origin, RestOrigin)
    # What is read again takes two requests; due is a correction in the first, and the fault comes in the second.
    window = WindowSpec(TODAY - dt.timedelta(days=25), REREAD_DAYS // 2, REREAD_DAYS)
    halved = replace(feed, origin=replace(feed.origin, window=window))
    settings = reading_from(warehouse, server)
    land_feed(settings, halved)
    corrected = last_publishing_day(TODAY - dt.timedelta(days=REREAD_DAYS // 2))
    server.book.correct(corrected, "GBP", "0.5")
    before = snapshot(query)
    server.requests.clear()
    server.faults.extend([FINE, *faults])
    with pytest.raises(error_class, match=message) as caught:
        land_feed(settings, halved)
    assert type(caught.value) is error_class
    assert caught.value.hint
    assert not server.faults
    assert len(server.requests) == 1 + len(faults)
    assert snapshot(query) == before

    assert land_feed(settings, halved).landed == 1
    expected = published(server, window.start)
    assert standing(query) == {key: Decimal(rate) for key, rate in expected.items()}
    assert_account(query)


def test_a_first_run_that_fails_half_way_leaves_nothing(
    land: Callable[[], Landing], server: RatesServer, query: Query
) -> None:
    server.faults.extend([FINE, FINE, *[HTML] * rest.MAX_ATTEMPTS])
    with pytest.raises(TransientError):
        land()
    assert snapshot(query) == [[], [], [], []]
    assert query("select count(*)::int from raw_fx.daily_rates") == [(0,)]
    assert land().landed == len(published(server))
    assert_account(query)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 that nobody signed, with its key."""
    path = tmp_path / "server.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", str(tmp_path / "only.pem")]
    subprocess.run(command, check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + (tmp_path / "only.pem").read_bytes())
    return path


def test_a_certificate_nobody_vouches_for_is_a_wrong_setting(
    warehouse: Settings,
    feed: FeedSpec,
    server: RatesServer,
    certificate: Path,
    query: Query,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    settings = warehouse.with_env(FX_API_BASE=server.url.replace("http:", "https:"), WAREHOUSE_EMBEDDED="")
    with pytest.raises(ConfigurationError, match="has no certificate this machine trusts") as caught:
        land_feed(settings, feed)
    assert "REQUESTS_CA_BUNDLE" in caught.value.hint
    assert snapshot(query) == [[], [], [], []]
    # Twin: vouched for, the same server is read.
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    assert land_feed(settings, feed).landed == len(published(server))


def test_a_server_that_speaks_no_tls_is_a_wrong_setting(
    warehouse: Settings, feed: FeedSpec, server: RatesServer, query: Query
) -> None:
    settings = warehouse.with_env(FX_API_BASE=server.url.replace("http:", "https:"), WAREHOUSE_EMBEDDED="")
    with pytest.raises(ConfigurationError, match="or speaks no TLS"):
        land_feed(settings, feed)
    assert snapshot(query) == [[], [], [], []]


def test_a_server_that_hangs_up_in_the_handshake_is_an_outage(warehouse: Settings, feed: FeedSpec) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        asked = []

        def hang_up() -> None:
            for _ in range(rest.MAX_ATTEMPTS):
                asked.append(listening.accept()[0])
                asked[-1].recv(1)
                asked[-1].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(TransientError, match="does not answer"):
            land_feed(warehouse.with_env(FX_API_BASE=f"https://127.0.0.1:{listening.getsockname()[1]}"), feed)
        thread.join()
    assert len(asked) == rest.MAX_ATTEMPTS


def test_one_page_for_every_window_lands_once(land: Callable[[], Landing], server: RatesServer, query: Query) -> None:
    """An API that does not look at the days it is asked for: no window leads to another, so reading ends."""
    server.faults.extend([page_of(TODAY, '"EUR":0.9,"GBP":0.8')] * 4)
    landing = land()
    assert (landing.landed, landing.unchanged, len(server.requests)) == (2, 6, 4)
    assert assert_account(query) == (8, 2, 0, 6)


def test_the_retry_policy_bounds_an_outage_of_the_api(
    warehouse: Settings, feed: FeedSpec, server: RatesServer, query: Query
) -> None:
    """WAREHOUSE_RETRY_SECONDS=0: one try."""
    settings = reading_from(warehouse, server).with_env(WAREHOUSE_RETRY_SECONDS="0")
    server.faults.append(Fault(status=503))
    with pytest.raises(TransientError, match=r"answered with status 503\."):
        land_feed(settings, feed)
    assert len(server.requests) == 1
    # Twin: with time to try again the same fault passes.
    server.faults.append(Fault(status=503))
    assert land_feed(reading_from(warehouse, server), feed).landed == len(published(server))


def test_a_server_that_is_down_is_an_outage(warehouse: Settings, feed: FeedSpec, query: Query) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(TransientError, match=f"http://127.0.0.1:{port} does not answer") as caught:
        land_feed(warehouse.with_env(FX_API_BASE=f"http://127.0.0.1:{port}"), feed)
    assert "FX_API_BASE" in caught.value.hint
    assert snapshot(query) == [[], [], [], []]


@pytest.mark.parametrize("address", ["nonsense", "localhost:8080", "ftp://127.0.0.1", "http://", "http://[::1", "//x"])
def test_an_address_that_is_none_is_a_wrong_setting(
    warehouse: Settings, feed: FeedSpec, query: Query, address: str
) -> None:
    with pytest.raises(ConfigurationError, match="FX_API_BASE is not the address of an HTTP API"):
        land_feed(warehouse.with_env(FX_API_BASE=address), feed)
    assert snapshot(query) == [[], [], [], []]


def test_pages_that_stay_empty_land_nothing_and_claim_nothing(
    land: Callable[[], Landing], server: RatesServer, query: Query
) -> None:
    server.faults.extend([EMPTY_PAGE] * (4 * rest.EMPTY_PAGE_ATTEMPTS))
    landing = land()
    assert (landing.offered, landing.loads) == (0, [])
    assert snapshot(query) == [[], [], [], []]
    assert land().landed == len(published(server))


def test_a_window_that_was_empty_is_asked_for_again(
    land: Callable[[], Landing], server: RatesServer, query: Query
) -> None:
    """It lies before what is read again for corrections: believed, its days would never be asked for again."""
    empty = (FIRST_DAY, FIRST_DAY + dt.timedelta(days=WINDOW_DAYS))
    server.faults.extend([EMPTY_PAGE] * rest.EMPTY_PAGE_ATTEMPTS)
    first = land()
    # A window that begins on a day without rates brings the day before it once more.
    assert min(day for day, _ in standing(query)) >= (empty[1] - dt.timedelta(days=7)).isoformat()
    assert first.landed < len(published(server))
    assert query("select window_from::date, window_to::date, pages from ops.ledger") == [
        (FIRST_DAY, TODAY + dt.timedelta(days=1), 4)
    ]
    # Still empty: nothing is landed, and nothing forgotten.
    server.faults.extend([EMPTY_PAGE] * rest.EMPTY_PAGE_ATTEMPTS)
    server.requests.clear()
    assert land().loads == []
    asked = f"/v1/{empty[0]}..{empty[1] - dt.timedelta(days=1)}?base=USD"
    assert list(server.requests)[:-1] == [asked] * rest.EMPTY_PAGE_ATTEMPTS
    third = land()
    assert first.landed + third.landed == len(published(server))
    assert standing(query) == {key: Decimal(rate) for key, rate in published(server).items()}
    assert_account(query)
    # Filled, it is like any other.
    server.requests.clear()
    assert land().loads == []
    assert asked not in server.requests


def test_twin_a_window_that_was_empty_and_is_believed_is_never_read(
    land: Callable[[], Landing], server: RatesServer, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "EMPTY_WINDOWS_PER_RUN", 0)
    server.faults.extend([EMPTY_PAGE] * rest.EMPTY_PAGE_ATTEMPTS)
    land()
    land()
    assert standing(query).keys() < published(server).keys()


# --- records that do not fit ------------------------------------------------------------------------------------------


def page_of(day: dt.date, rates: str) -> Fault:
    return Fault("body", body=f'{{"amount":1.0,"base":"USD","rates":{{"{day}":{{{rates}}}}}}}')


@pytest.fixture
def one_window(warehouse: Settings, feed: FeedSpec, server: RatesServer) -> Callable[[], Landing]:
    """The feed asks for five days in one request, so that one fault is its whole page."""
    assert isinstance(feed.origin, RestOrigin)
    window = WindowSpec(TODAY - dt.timedelta(days=4), WINDOW_DAYS, REREAD_DAYS)
    short = replace(feed, origin=replace(feed.origin, window=window))
    settings = reading_from(warehouse, server)
    return lambda: land_feed(settings, short)


DIGITS = ["0.123456789012", "1", "1.0", "999999999.123456789012", "0", "1e-7", "1.25E+3", "0.000000000001", "7.50"]


def test_rates_land_to_the_digit(one_window: Callable[[], Landing], server: RatesServer, query: Query) -> None:
    codes = ["EUR", "GBP", "JPY", "CAD", "AUD", "CHF", "SEK", "NOK", "DKK"]
    server.faults.append(page_of(TODAY, ",".join(f'"{c}":{d}' for c, d in zip(codes, DIGITS, strict=True))))
    landing = one_window()
    assert (landing.landed, landing.dead) == (len(DIGITS), 0)
    # As text: a comparison of numbers would forgive a digit lost to a float.
    landed = query("select quote_currency, rate::text from raw_fx.daily_rates")
    assert dict(landed) == {c: format(Decimal(d), ".12f") for c, d in zip(codes, DIGITS, strict=True)}


BAD_RECORDS = {
    '"EUR":null': ("null_field", "$.rate"),
    '"GBP":"0.79"': ("wrong_type", "$.rate"),
    '"XXQ":1.5': ("not_accepted", "$.quote_currency"),
    '"JPY":-1': ("out_of_range", "$.rate"),
    '"CAD":0.1234567890123': ("out_of_range", "$.rate"),  # a digit more than the column holds: never rounded
    '"AUD":1e400': ("out_of_range", "$.rate"),
    '"CHF":{"mid":0.9}': ("wrong_type", "$.rate"),
    '"SEK":NaN': ("malformed_json", "$"),
    '"":1': ("not_accepted", "$.quote_currency"),
    '"NO\\u0000K":1': ("invalid_text", "$.quote_currency"),
}


def test_records_that_do_not_fit_are_set_aside_with_their_json_and_the_reason(
    one_window: Callable[[], Landing], server: RatesServer, query: Query
) -> None:
    server.faults.append(page_of(TODAY, ",".join(['"BRL":5.5', *BAD_RECORDS, '"PLN":4.25'])))
    landing = one_window()
    assert (landing.landed, landing.dead, landing.offered) == (2, len(BAD_RECORDS), 2 + len(BAD_RECORDS))
    assert_account(query)
    assert query("select quote_currency, rate::float from raw_fx.daily_rates order by 1") == [
        ("BRL", 5.5),
        ("PLN", 4.25),
    ]
    dead = query(
        "select reason, path, raw_value, api_page, api_item, api_window_to::date, status from ops.dead_letters "
        "order by api_item"
    )
    for item, ((sent, (reason, path)), row) in enumerate(zip(BAD_RECORDS.items(), dead, strict=True), start=1):
        code, _, value = sent.partition(":")
        record = f'{{"base_currency":"USD","rate_date":"{TODAY}","quote_currency":{code},"rate":{value}}}'
        assert (*row[:2], bytes(row[2]).decode()) == (reason, path, record)
        assert row[3:] == (1, item, TODAY + dt.timedelta(days=1), "open")
    assert dict(landing.reasons) == {
        reason: sum(r == reason for r, _ in BAD_RECORDS.values()) for reason, _ in BAD_RECORDS.values()
    }
    # What is said of a record quotes none of it.
    messages = " ".join(row[0] for row in query("select message from ops.dead_letters"))
    assert not any(value in messages for value in ("0.79", "XXQ", "0.1234567890123", "mid"))


def test_reading_again_does_not_set_the_same_record_aside_again(
    one_window: Callable[[], Landing], server: RatesServer, query: Query
) -> None:
    bad = page_of(TODAY, '"EUR":null,"GBP":0.8')
    server.faults.append(bad)
    assert (one_window().landed, assert_account(query)[2]) == (1, 1)
    before = snapshot(query)
    server.faults.append(bad)
    again = one_window()
    assert (again.landed, again.dead, again.unchanged, again.loads) == (0, 0, 2, [])
    assert snapshot(query) == before
    # Beside something new it is still no news.
    server.faults.append(page_of(TODAY, '"EUR":null,"GBP":0.81'))
    third = one_window()
    assert (third.landed, third.dead, third.unchanged) == (1, 0, 1)
    # Twin: broken in another way, it is another offer.
    server.faults.append(page_of(TODAY, '"EUR":"n/a","GBP":0.81'))
    assert one_window().dead == 1
    assert assert_account(query)[2] == 2
    # Mended, it lands.
    server.faults.append(page_of(TODAY, '"EUR":0.9,"GBP":0.81'))
    assert one_window().landed == 1
    assert_account(query)


def test_the_same_record_in_two_pages_is_set_aside_once(
    warehouse: Settings, feed: FeedSpec, server: RatesServer, query: Query
) -> None:
    """A window that begins on a day without rates brings the day before it once more."""
    assert isinstance(feed.origin, RestOrigin)
    halved = replace(feed, origin=replace(feed.origin, window=WindowSpec(TODAY - dt.timedelta(days=3), 2, 0)))
    server.faults.extend([page_of(TODAY, '"EUR":null'), page_of(TODAY, '"EUR":null,"GBP":0.8')])
    landing = land_feed(reading_from(warehouse, server), halved)
    assert (landing.landed, landing.dead, landing.unchanged) == (1, 1, 1)
    assert assert_account(query) == (3, 1, 1, 1)

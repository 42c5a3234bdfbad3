"""A record of an API that the database refuses, or that loads die of, is set aside and the rest of its window lands."""

import datetime as dt
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ingestion import rest
from ingestion.database import connect
from ingestion.ddl import ensure_schema
from ingestion.errors import Reason, RefusedDataError, TransientError
from ingestion.feeds import FeedSpec, RestOrigin, WindowSpec
from ingestion.landing import Landing, land_feed
from ingestion.poison_records import Trial
from ingestion.replay import Selection, replay_dead_letters
from ingestion.replay_window import TimeWindow, replay_window
from ingestion.settings import Settings
from orchestration.sample.rates_api import Fault, RatesServer, serving

RATES = "raw_fx.daily_rates"
PROJECT = Path(__file__).resolve().parents[2]
TODAY = dt.datetime.now(dt.UTC).date()
FIRST_DAY = TODAY - dt.timedelta(days=5)

Query = Callable[..., list[tuple]]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "BACKOFF_FACTOR_S", 0.01)


@pytest.fixture
def server() -> Iterator[RatesServer]:
    with serving(7, today=lambda: TODAY) as running:
        yield running


@pytest.fixture
def feed(feed_named: Callable[[str], FeedSpec]) -> FeedSpec:
    """The declared rates, six days in windows of two: three pages."""
    declared = feed_named(RATES)
    assert isinstance(declared.origin, RestOrigin)
    return replace(declared, origin=replace(declared.origin, window=WindowSpec(FIRST_DAY, 2, 30)))


@pytest.fixture
def settings(warehouse: Settings, server: RatesServer) -> Settings:
    return warehouse.with_env(FX_API_BASE=server.url, WAREHOUSE_EMBEDDED="")


@pytest.fixture
def land(settings: Settings, feed: FeedSpec) -> Callable[[], Landing]:
    connection = connect(settings)
    ensure_schema(connection, [feed])
    connection.close()
    return lambda: land_feed(settings, feed)


def page(day: int, **rates: str) -> Fault:
    """The answer to a request: rates of the feed's day of this number."""
    shown = ",".join(f'"{code}":{rate}' for code, rate in rates.items())
    return Fault(
        "body", body=f'{{"amount":1.0,"base":"USD","rates":{{"{FIRST_DAY + dt.timedelta(days=day)}":{{{shown}}}}}}}'
    )


def record(day: int, code: str, rate: str) -> bytes:
    return (
        f'{{"base_currency":"USD","rate_date":"{FIRST_DAY + dt.timedelta(days=day)}",'
        f'"quote_currency":"{code}","rate":{rate}}}'
    ).encode()


def account(query: Query) -> tuple[int, ...]:
    """(offered, landed, dead, unchanged) of the ledger; it has to add up and to be what the tables hold."""
    ((offered, landed, dead, unchanged),) = query(
        "select sum(offered)::int, sum(landed)::int, sum(dead)::int, sum(unchanged)::int from ops.ledger"
    )
    assert offered == landed + dead + unchanged
    assert query(f"select count(*)::int from {RATES}") == [(landed,)], "rows of no committed load are left"
    assert query("select (count(*) filter (where status <> 'replayed'))::int from ops.dead_letters") == [(dead,)]
    return offered, landed, dead, unchanged


def poison(query: Query) -> list[tuple]:
    rows = query(
        "select api_page, api_item, raw_value, message from ops.dead_letters where reason = 'poison' order by 1, 2"
    )
    return [(api_page, item, bytes(value), message) for api_page, item, value, message in rows]


REFUSED_TEXT = "the database refused this record; see the raw table's constraints"


def test_records_the_database_refuses_are_found_and_the_rest_lands(
    land: Callable[[], Landing], server: RatesServer, query: Query, settings: Settings, feed: FeedSpec
) -> None:
    query(f"alter table {RATES} add constraint no_crowns check (quote_currency not in ('SEK', 'NOK'))")
    pages = [
        page(0, EUR="0.90", SEK="9.10", GBP="0.8"),
        page(2, EUR="0.91", JPY="null"),
        page(4, NOK="1.10e1", EUR="0.92", SEK="9.30"),
    ]
    server.faults.extend([*pages, *pages])
    landing = land()
    assert (landing.landed, landing.dead, dict(landing.reasons)) == (4, 4, {"poison": 3, "null_field": 1})
    assert account(query) == (8, 4, 4, 0)
    assert query("select window_from::date, window_to::date, pages from ops.ledger") == [
        (FIRST_DAY, TODAY + dt.timedelta(days=1), 3)
    ]
    reason = f"{REFUSED_TEXT} (no_crowns)"
    assert poison(query) == [
        (1, 1, record(0, "SEK", "9.10"), reason),
        (3, 0, record(4, "NOK", "1.10e1"), reason),
        (3, 2, record(4, "SEK", "9.30"), reason),
    ]
    assert query("select application_name from pg_stat_activity where application_name like '%%try raw%%'") == []

    # The window brings them again with every run: they are set aside once, and looked at no more.
    server.faults.extend(pages)
    server.requests.clear()
    again = land()
    assert (again.landed, again.dead, again.unchanged, again.loads) == (0, 0, 8, [])
    assert len(server.requests) == len(pages)
    # A corrected rate is another record.
    server.faults.extend([page(0, EUR="0.90", SEK="9.20"), *pages[1:]] * 2)
    assert (third := land()).dead == 1
    assert third.unchanged == 6
    assert account(query)[1:3] == (4, 5)

    # Once the constraint is gone they land by name, to the byte.
    query(f"alter table {RATES} drop constraint no_crowns")
    replay = replay_dead_letters(settings, feed, Selection(reason=Reason.POISON), apply=True)
    assert (replay.landed, replay.failed) == (3, 0)
    assert account(query)[1:3] == (7, 2)


def test_what_is_refused_because_of_another_row_is_found(
    land: Callable[[], Landing], server: RatesServer, query: Query
) -> None:
    """Also where the constraint waits for the commit, and the other row came with another page."""
    query(f"alter table {RATES} add constraint one_rate unique (rate) deferrable initially deferred")
    server.faults.extend([page(0, EUR="0.9", GBP="0.8"), page(2, EUR="0.91", GBP="0.8"), page(4, CHF="0.90")] * 2)
    landing = land()
    assert (landing.landed, landing.dead) == (3, 2)
    assert [one[:3] for one in poison(query)] == [(2, 1, record(2, "GBP", "0.8")), (3, 0, record(4, "CHF", "0.90"))]
    assert account(query) == (5, 3, 2, 0)


def test_the_same_refused_record_in_two_pages_is_set_aside_once(
    land: Callable[[], Landing], server: RatesServer, query: Query
) -> None:
    query(f"alter table {RATES} add constraint no_crowns check (quote_currency <> 'SEK')")
    server.faults.extend([page(0, SEK="9.1"), page(0, SEK="9.1", EUR="0.9"), page(4, EUR="0.9")] * 2)
    landing = land()
    assert (landing.landed, landing.dead, landing.unchanged) == (2, 1, 1)
    assert account(query) == (4, 2, 1, 1)


def test_a_window_replayed_sets_aside_what_is_refused(
    land: Callable[[], Landing], server: RatesServer, query: Query, settings: Settings, feed: FeedSpec
) -> None:
    pages = [page(0, EUR="0.9"), page(2, EUR="0.91"), page(4, EUR="0.92")]
    server.faults.extend(pages)
    assert land().landed == 3
    query(f"alter table {RATES} add constraint no_crowns check (quote_currency <> 'SEK') not valid")
    start = dt.datetime.combine(FIRST_DAY, dt.time(), dt.UTC)
    server.faults.extend([page(0, EUR="0.9", SEK="9.1", GBP="0.8")] * 2)
    result = replay_window(settings, feed, TimeWindow(start, start + dt.timedelta(days=2)), apply=True)
    assert (result.read, result.landed, result.dead, result.unchanged) == (3, 1, 1, 1)
    assert account(query) == (6, 4, 1, 1)


def test_twin_without_the_trial_nothing_lands(
    land: Callable[[], Landing], server: RatesServer, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    query(f"alter table {RATES} add constraint no_crowns check (quote_currency <> 'SEK')")
    monkeypatch.setattr(Trial, "find_refused", lambda self, rows: {})
    with pytest.raises(RefusedDataError, match="refused a record that fits the contract") as caught:
        land()
    assert caught.value.hint
    assert query("select count(*)::int from ops.ledger") == [(0,)]


def test_what_no_row_is_to_blame_for_is_one_clear_error(
    land: Callable[[], Landing], server: RatesServer, query: Query
) -> None:
    query("alter table raw_fx._ledger add constraint house_rule check (landed < 0)")
    with pytest.raises(RefusedDataError):
        land()
    assert query("select count(*)::int from ops.ledger") == [(0,)]
    query("alter table raw_fx._ledger drop constraint house_rule")
    assert land().dead == 0
    account(query)


# --- a record loads die of --------------------------------------------------------------------------------------------

# A loader whose decoder dies of one rate, the way a fault in a native library would.
MORTAL_LOADER = """
import os, signal, sys
import datetime as dt
from dataclasses import replace
from pathlib import Path
from ingestion import poison_records, rest
from ingestion.contract import Contract
from ingestion.feeds import WindowSpec, load_feeds, select_feeds
from ingestion.landing import land_feed
from ingestion.settings import load_settings

rest.BACKOFF_FACTOR_S = 0.01
if sys.argv[3:] == ["twin"]:
    poison_records.DEATHS_BEFORE_NOTING = 99
decode = Contract.decode

def mortal(self, value):
    if b"6.66666" in value:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(self, value)

Contract.decode = mortal
settings = load_settings(Path(sys.argv[1]))
(feed,) = select_feeds(load_feeds(settings), ["daily_rates"])
window = WindowSpec(dt.date.fromisoformat(sys.argv[2]), 2, 30)
landing = land_feed(settings, replace(feed, origin=replace(feed.origin, window=window)))
print(landing.landed, landing.dead, landing.unchanged)
"""


@pytest.fixture
def run_mortal(settings: Settings) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    names = ("WAREHOUSE_DSN", "FX_API_BASE")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("WAREHOUSE_", "FX_"))},
        **{name: settings.env[name] for name in names},
        "WAREHOUSE_HOME": str(settings.home),
    }
    return lambda *case: subprocess.run(
        [sys.executable, "-c", MORTAL_LOADER, str(PROJECT), FIRST_DAY.isoformat(), *case],
        env=environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("landed_before", [False, True], ids=["in the first load", "behind pages that bring nothing"])
def test_a_record_the_loader_dies_of_is_found_and_the_rest_lands(
    run_mortal: Callable[[], "subprocess.CompletedProcess[str]"],
    land: Callable[[], Landing],
    server: RatesServer,
    query: Query,
    landed_before: bool,
) -> None:
    pages = [page(0, EUR="0.9", GBP="0.8"), page(2, EUR="0.91", SEK="6.66666"), page(4, EUR="0.92")]
    if landed_before:
        server.faults.extend([pages[0], page(2, EUR="0.91"), pages[2]])
        assert land().landed == 4
    deaths = 0
    while True:
        server.faults.clear()
        server.faults.extend(pages)
        result = run_mortal()
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL, result.stderr
        deaths += 1
        assert deaths < 10, "the record is never found"
    assert deaths == 5, "three deaths before each record is noted, two on the noted one"
    assert result.stdout.split() == (["0", "1", "4"] if landed_before else ["4", "1", "0"])
    assert [one[2:] for one in poison(query)] == [
        (record(2, "SEK", "6.66666"), "the loader died 2 times on this record")
    ]
    assert account(query) == ((9, 4, 1, 4) if landed_before else (5, 4, 1, 0))
    # Known by its bytes, it is not decoded again: the loader lives.
    server.faults.extend(pages)
    assert run_mortal().stdout.split() == ["0", "0", "5"]
    assert query("select count(*)::int from raw_fx._loads_begun where phase = 'reading'") == [(0,)]


def test_both_kinds_of_poison_in_one_load(land: Callable[[], Landing], server: RatesServer, query: Query) -> None:
    """The verdict on the record loads died of outlives the load the database refused."""
    pages = [page(0, EUR="0.9", CHF="0.7"), page(2, SEK="9.1"), page(4, EUR="0.92")]
    query(f"alter table {RATES} add constraint no_crowns check (quote_currency <> 'SEK')")
    start = dt.datetime.combine(FIRST_DAY, dt.time(), dt.UTC).isoformat()
    query(
        "insert into raw_fx._streams (feed, kind, origin, name, incarnation) values (%s, 'rest', %s, %s, '')",
        RATES,
        server.url,
        "/v1/{from}..{to}",
    )
    for number, noted in enumerate([None, None, None, "CHF", "CHF"]):
        query(
            "insert into raw_fx._loads_begun (load_id, feed, writer_token, batch, noted) select %s, %s, 0, "
            "json_build_array(stream_id, %s)::text, %s from raw_fx._streams",
            f"reading-{number}",
            RATES,
            start,
            hashlib.sha256(record(0, noted, "0.7")).hexdigest() if noted else None,
        )
    server.faults.extend(pages * 2)
    landing = land()
    assert (landing.landed, landing.dead) == (2, 2)
    assert [one[2] for one in poison(query)] == [record(0, "CHF", "0.7"), record(2, "SEK", "9.1")]
    assert account(query) == (4, 2, 2, 0)


def test_twin_without_noting_the_record_is_never_found(
    run_mortal: Callable[..., "subprocess.CompletedProcess[str]"], server: RatesServer, query: Query
) -> None:
    for _ in range(6):
        server.faults.clear()
        server.faults.extend([page(0, EUR="0.9", SEK="6.66666"), page(2, EUR="0.91"), page(4, EUR="0.92")])
        assert run_mortal("twin").returncode == -signal.SIGKILL
    assert query("select count(*)::int from ops.ledger") == [(0,)]


def test_an_outage_makes_no_record_poison(land: Callable[[], Landing], server: RatesServer, query: Query) -> None:
    lasting = [Fault("body", body="<html>", content_type="text/html")] * rest.MAX_ATTEMPTS
    for _ in range(6):
        server.faults.extend([page(0, EUR="0.9"), *lasting])
        with pytest.raises(TransientError):
            land()
    assert query("select distinct phase from raw_fx._loads_begun where batch is not null") == [("excused",)]
    server.faults.extend([page(0, EUR="0.9"), page(2, EUR="0.91"), page(4, EUR="0.92")])
    assert land().landed == 3
    assert account(query) == (3, 3, 0, 0)


def test_what_read_and_never_loaded_is_no_swept_load(
    run_mortal: Callable[[], "subprocess.CompletedProcess[str]"], land: Callable[[], Landing], server: RatesServer
) -> None:
    """A run that died before it had anything to load left nothing."""
    pages = [page(0, EUR="0.9"), page(2, EUR="0.91"), page(4, EUR="0.92")]
    server.faults.extend(pages)
    land()
    server.faults.extend([pages[0], page(2, SEK="6.66666"), pages[2]])
    assert run_mortal().returncode == -signal.SIGKILL
    server.faults.clear()
    server.faults.extend(pages)
    assert land().swept == []

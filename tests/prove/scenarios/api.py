"""The API feed: killed at random instants while days are added and corrected; each version of a rate lands once."""

import itertools
import json
import urllib.request
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any

from orchestration.sample.rates_api import RatesServer, serving
from tests.prove.outcome import Outcome, Plan
from tests.prove.stage import Site

FX = "raw_fx.daily_rates"
COMMITTED = "_dlt_load_id in (select load_id from raw_fx._dlt_loads)"
Published = dict[tuple[date, str, str], Decimal]


def kill_api_loader(plan: Plan, outcome: Outcome) -> None:
    """kill -9 of the rates feed at random instants; the disk wiped half of the time."""
    rng = Random(f"{plan.stage.seed}/api")
    span = 1.0
    today = datetime.now(UTC).date()
    # Within the days that are asked for again: earlier ones the feed does not look at a second time.
    shown = [today - timedelta(days=20)]
    with serving(plan.stage.seed, today=lambda: shown[0]) as server, plan.stage.site("api") as site:
        orders: dict[str, Any] = {"feed": FX, "api": server.url}
        while outcome.kills < plan.repeats and plan.has_time and outcome.verdict.is_clean:
            # A new day and a correction of one that was read: something to land each time.
            shown[0] = min(shown[0] + timedelta(days=1), today)
            correction = f"0.{rng.randrange(8000, 9000)}"
            with server.lock:
                server.book.correct(_working_day(shown[0] - timedelta(days=rng.randrange(1, 6))), "GBP", correction)
            loader = site.start(**orders)
            loader.pause(rng.uniform(0.0, span * 1.2))
            struck = loader.kill()
            outcome.kills += struck
            outcome.count(loader)
            if not struck:
                span = min(span, loader.seconds)
            elif rng.random() < 0.5:
                site.wipe()
            outcome.runs += site.settle(outcome.verdict, **orders)
            _compare(outcome, site, server)
        outcome.repeats = outcome.kills


def _working_day(day: date) -> date:
    while day.weekday() >= 5:
        day -= timedelta(days=1)
    return day


def _published(server: RatesServer, last: date) -> Published:
    """What the API shows now, read without the product's code."""
    rates: Published = {}
    start = date(2025, 1, 1)
    url = f"{server.url}/v1/{start}..{last}?base=USD"
    with urllib.request.urlopen(url, timeout=30) as answer:
        body: Any = json.loads(answer.read(), parse_float=Decimal, parse_int=Decimal)
    for day, quotes in body["rates"].items():
        for quote, rate in quotes.items():
            rates[date.fromisoformat(day), "USD", quote] = rate
    return rates


def _compare(outcome: Outcome, site: Site, server: RatesServer) -> None:
    verdict = outcome.verdict
    rows = site.query(
        "select rate_date, base_currency, quote_currency, rate, _dlt_load_id, _api_page, _api_item "
        f"from {FX} where {COMMITTED} order by _dlt_load_id, _api_page, _api_item"
    )
    published = _published(server, server.today())
    verdict.records = len(published)
    places = Counter(row[4:] for row in rows)
    versions: dict[tuple[date, str, str], list[Decimal]] = {}
    for day, base, quote, rate, *_ in rows:
        versions.setdefault((day, base, quote), []).append(rate)
    for key, rate in published.items():
        history = versions.pop(key, [])
        if not history:
            verdict.lost += 1
            verdict.note(f"{key} is nowhere")
        elif history[-1] != rate:
            verdict.altered += 1
            verdict.note(f"{key} is {history[-1]}, the API says {rate}")
        # The same version twice in a row is the same record landed twice.
        verdict.duplicate += sum(a == b for a, b in itertools.pairwise(history))
    # The API begins a period with the publishing day before it, which a check from that very day does not see.
    strange = [key for key in versions if key[0] >= date(2025, 1, 1)]
    outcome.require(not strange, f"{len(strange)} rates the API never published")
    outcome.require(max(places.values()) == 1, "a place in the API's answers stands twice")
    sums = site.query(
        "select coalesce(sum(landed), 0), bool_and(offered = landed + dead + tombstones + unchanged) from ops.ledger"
    )
    outcome.require(sums == [(len(rows), True)], f"{len(rows)} rows, the ledger says {sums}")
    holes = site.query(
        "select 1 from (select window_from, max(window_to) over (order by load_id rows between unbounded preceding "
        "and 1 preceding) as until from ops.ledger) as l where window_from > until"
    )
    outcome.require(not holes, "windows with a hole between them")
    for table in ("daily_rates", "_dead_letters", "_ledger"):
        left = site.query(f"select count(*) from raw_fx.{table} where not ({COMMITTED})")
        outcome.require(left == [(0,)], f"{left[0][0]} uncommitted rows in {table} after the last sweep")

"""A record that makes loads die is found and set aside, and the rest goes on; an outage proves nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ingestion.database import connect
from ingestion.ddl import ensure_schema
from ingestion.errors import TransientError
from ingestion.feeds import FeedSpec
from ingestion.kafka import TopicReader
from ingestion.landing import land_feed
from ingestion.settings import Settings
from tests.harness.records import payment

PAYMENTS = "raw_payments.transaction_created"
PROJECT = Path(__file__).resolve().parents[2]

Query = Callable[..., list[tuple]]

# A loader whose decoder dies of one merchant, the way a fault in a native library would.
MORTAL_LOADER = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from ingestion import landing, topic
from ingestion.feeds import load_feeds, select_feeds
from ingestion.settings import load_settings

decode = topic.decode_messages

def mortal(batch, *rest):
    if any(b"mer_66666" in (message.value() or b"") for message in batch):
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(batch, *rest)

topic.decode_messages = mortal
settings = load_settings(Path(sys.argv[1]))
(feed,) = select_feeds(load_feeds(settings), ["raw_payments.transaction_created"])
landing.land_feed(settings, replace(feed, origin=replace(feed.origin, topic=sys.argv[2])))
"""


def counts(query: Query) -> tuple[int, ...]:
    (row,) = query("select sum(offered)::int, sum(landed)::int, sum(dead)::int from ops.ledger")
    return row


def test_records_the_database_refuses_are_found_and_the_rest_lands(
    warehouse: Settings, own_topic: Callable[[str], FeedSpec], send: Callable[..., None], query: Query
) -> None:
    feed = own_topic(PAYMENTS)
    bad = {40: payment(merchant_id="mer_66666"), 41: payment(merchant_id="mer_66666")}
    send(feed, [(b"k", bad.get(i, payment())) for i in range(200)], 0)
    connection = connect(warehouse)
    ensure_schema(connection, [feed])
    connection.close()
    query("alter table raw_payments.transaction_created add check (merchant_id <> 'mer_66666')")
    landing = land_feed(warehouse, feed)
    assert (landing.landed, landing.dead, dict(landing.reasons)) == (198, 2, {"poison": 2})
    assert counts(query) == (200, 198, 2)
    letters = query("select kafka_offset, reason, raw_value from ops.dead_letters order by 1")
    assert [(offset, reason, bytes(value)) for offset, reason, value in letters] == [
        (offset, "poison", value) for offset, value in bad.items()
    ]


def test_a_record_the_loader_dies_of_is_found_and_the_rest_lands(
    warehouse: Settings, own_topic: Callable[[str], FeedSpec], send: Callable[..., None], query: Query
) -> None:
    feed = own_topic(PAYMENTS)
    send(feed, [(b"k", payment(merchant_id="mer_66666" if i == 150 else "mer_12345")) for i in range(300)], 0)
    environment = {
        **os.environ,
        **{name: value for name, value in warehouse.env.items() if name.startswith(("WAREHOUSE_", "KAFKA_"))},
        "WAREHOUSE_HOME": str(warehouse.home),
    }
    command = [sys.executable, "-c", MORTAL_LOADER, str(PROJECT), feed.origin.topic]
    deaths = 0
    while subprocess.run(command, env=environment, cwd=PROJECT).returncode == -signal.SIGKILL:
        deaths += 1
        assert deaths < 10, "the record is never found"
    assert deaths >= 4, "one death is not enough to call a record poison"
    assert counts(query) == (300, 299, 1)
    assert query("select kafka_offset, reason from ops.dead_letters") == [(150, "poison")]
    land_feed(warehouse, feed)
    assert counts(query) == (300, 299, 1)


def test_an_outage_makes_no_record_poison(
    warehouse: Settings,
    own_topic: Callable[[str], FeedSpec],
    send: Callable[..., None],
    query: Query,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feed = own_topic(PAYMENTS)
    send(feed, [(b"k", payment()) for _ in range(50)], 0)

    def broken(self: TopicReader, *_: object) -> object:
        raise TransientError("the broker is away")
        yield []

    with monkeypatch.context() as patch:
        patch.setattr(TopicReader, "read", broken)
        for _ in range(6):
            with pytest.raises(TransientError):
                land_feed(warehouse, feed)
    assert query("select distinct phase from raw_payments._loads_begun") == [("excused",)]
    assert land_feed(warehouse, feed).landed == 50
    assert counts(query) == (50, 50, 0)

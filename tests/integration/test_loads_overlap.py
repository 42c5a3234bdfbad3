"""A load is read while the one before it is committed; what goes wrong with one leaves the other whole."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ingestion import topic as topic_module
from ingestion.database import connect
from ingestion.ddl import ensure_schema
from ingestion.errors import TransientError
from ingestion.feeds import FeedSpec
from ingestion.landing import land_feed
from ingestion.settings import Settings
from tests.harness.records import payment

PAYMENTS = "raw_payments.transaction_created"
PROJECT = Path(__file__).resolve().parents[2]

Query = Callable[..., list[tuple]]
Send = Callable[..., None]
OwnTopic = Callable[[str], FeedSpec]

# A loader whose decoder dies of one merchant; small loads, so that one is under way when it does.
MORTAL_LOADER = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from ingestion import landing, topic
from ingestion.feeds import load_feeds, select_feeds
from ingestion.poison import Suspicion
from ingestion.settings import load_settings

decode = topic.decode_messages

def mortal(batch, *rest):
    if any(b"mer_66666" in (message.value() or b"") for message in batch):
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(batch, *rest)

topic.decode_messages = mortal
if sys.argv[3] == "hurried":
    Suspicion.is_careful = property(lambda self: self.noting or self.limit < self.usual_limit)
settings = load_settings(Path(sys.argv[1]))
(feed,) = select_feeds(load_feeds(settings), ["raw_payments.transaction_created"])
landing.land_feed(settings, replace(feed, origin=replace(feed.origin, topic=sys.argv[2])), records_per_load=100)
"""


def account(query: Query) -> tuple[int, ...]:
    """(offered, landed, dead) of the ledger, rows of the table."""
    (counts,) = query("select sum(offered)::int, sum(landed)::int, sum(dead)::int from ops.ledger")
    ((rows,),) = query("select count(*)::int from raw_payments.transaction_created")
    return (*counts, rows)


def test_what_was_read_behind_a_refused_load_is_read_again(
    warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query
) -> None:
    feed = own_topic(PAYMENTS)
    send(feed, [(b"k", payment(merchant_id="mer_66666" if i in (7, 58) else "mer_12345")) for i in range(100)], 0)
    connection = connect(warehouse)
    ensure_schema(connection, [feed])
    connection.close()
    query("alter table raw_payments.transaction_created add check (merchant_id <> 'mer_66666')")

    landing = land_feed(warehouse, feed, records_per_load=20)

    assert (landing.landed, landing.dead, dict(landing.reasons)) == (98, 2, {"poison": 2})
    assert account(query) == (100, 98, 2, 98)
    assert query("select kafka_offset from ops.dead_letters order by 1") == [(7,), (58,)]
    assert not any(path.is_file() for path in (warehouse.home / "spool").rglob("*")), "no file is left behind"
    begun = query("select count(*) from raw_payments._loads_begun where phase = 'reading'")
    assert begun == [(0,)], "no load that was dropped is taken for one that died"


def test_an_outage_while_a_load_is_under_way_loses_neither(
    warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = own_topic(PAYMENTS)
    send(feed, [(b"k", payment()) for _ in range(100)], 0)
    reads = []
    write_package = topic_module.write_package

    def write_once(*arguments: object) -> object:
        reads.append(arguments)
        if len(reads) == 2:
            raise TransientError("the broker went away")
        return write_package(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(topic_module, "write_package", write_once)
        with pytest.raises(TransientError, match="went away"):
            land_feed(warehouse, feed, records_per_load=40)
    assert account(query) == (40, 40, 0, 40), "the load under way was committed"
    assert land_feed(warehouse, feed, records_per_load=40).landed == 60
    assert account(query) == (100, 100, 0, 100)


def run_mortal(settings: Settings, feed: FeedSpec, manner: str) -> int:
    """Start the loader again until it survives; how often it died, 10 at most."""
    environment = {
        **os.environ,
        **{name: value for name, value in settings.env.items() if name.startswith(("WAREHOUSE_", "KAFKA_"))},
        "WAREHOUSE_HOME": str(settings.home),
    }
    command = [sys.executable, "-c", MORTAL_LOADER, str(PROJECT), feed.origin.topic, manner]
    deaths = 0
    while deaths < 10 and subprocess.run(command, env=environment, cwd=PROJECT).returncode == -signal.SIGKILL:
        deaths += 1
    return deaths


@pytest.mark.parametrize("manner", ["careful", "hurried"])
def test_a_record_the_loader_dies_of_behind_a_load_under_way_is_found(
    warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query, manner: str
) -> None:
    """Twin `hurried`: were the next load read before the first is committed, its deaths would never be counted."""
    feed = own_topic(PAYMENTS)
    send(feed, [(b"k", payment(merchant_id="mer_66666" if i == 150 else "mer_12345")) for i in range(300)], 0)
    deaths = run_mortal(warehouse, feed, manner)
    if manner == "hurried":
        assert deaths == 10
        return
    assert deaths < 10, "the record is never found"
    assert account(query) == (300, 299, 1, 299)
    assert query("select kafka_offset, reason from ops.dead_letters") == [(150, "poison")]

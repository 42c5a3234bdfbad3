"""A writer whose heir swept its load away before the commit is told so: nothing of the load is left to compare."""

from collections.abc import Callable

import pytest

from ingestion import ledger
from ingestion.database import connect
from ingestion.destination import CopyClient
from ingestion.errors import ErrorClass, FeedBusyError, TransientError, WarehouseError
from ingestion.feeds import FeedSpec
from ingestion.landing import land_feed
from ingestion.settings import Settings
from tests.harness.records import payment

PAYMENTS = "raw_payments.transaction_created"
# What the guard asks when the ledger no longer says whose load it was.
BRANCH = """exists (
        select from "raw_payments"._loads_begun where load_id = new.load_id and writer_token <> writer.token
    )"""

Query = Callable[..., list[tuple]]


@pytest.fixture
def feed(
    warehouse: Settings,
    own_topic: Callable[[str], FeedSpec],
    send: Callable[..., None],
    query: Query,
    monkeypatch: pytest.MonkeyPatch,
) -> FeedSpec:
    """A feed with one committed load; the next one is swept by an heir when all of it is copied."""
    feed = own_topic(PAYMENTS)
    send(feed, [(b"k", payment()) for _ in range(10)], 0)
    land_feed(warehouse, feed)
    send(feed, [(b"k", payment()) for _ in range(5)], 0)
    complete = CopyClient.complete_load
    # The heir would end the session that commits; a writer that wakes up later has another.
    monkeypatch.setattr(ledger, "_end_load_sessions", lambda cursor, feed: None)

    def complete_late(self: CopyClient, load_id: str) -> None:
        monkeypatch.setattr(CopyClient, "complete_load", complete)
        assert query("select count(*)::int from raw_payments._ledger where _dlt_load_id = %s", load_id) == [(1,)]
        heir = connect(warehouse, purpose="heir")
        with ledger.writing(heir, feed, take_over=True):
            assert ledger.sweep(heir, feed) == [load_id]
        heir.close()
        complete(self, load_id)

    monkeypatch.setattr(CopyClient, "complete_load", complete_late)
    return feed


def loads(query: Query) -> list[tuple]:
    return query("select count(*)::int, (select count(*)::int from raw_payments._ledger) from raw_payments._dlt_loads")


def test_a_load_its_heir_swept_away_is_refused_as_taken_over(warehouse: Settings, feed: FeedSpec, query: Query) -> None:
    with pytest.raises(FeedBusyError, match="was taken over by another writer"):
        land_feed(warehouse, feed)
    assert loads(query) == [(1, 1)]
    assert query(f"select count(*)::int from {PAYMENTS}") == [(10,)]
    assert land_feed(warehouse, feed).landed == 5


def test_twin_without_the_note_of_its_beginning_nobody_knows_why(
    warehouse: Settings, feed: FeedSpec, query: Query
) -> None:
    """Refused all the same, because nothing accounts for it, but as a fault of ours instead of a take-over."""
    ((definition,),) = query("select pg_get_functiondef('raw_payments._guard_commit'::regproc)")
    assert BRANCH in definition
    query(definition.replace(BRANCH, "false"))
    with pytest.raises(WarehouseError, match="unaccounted") as caught:
        land_feed(warehouse, feed)
    assert caught.value.error_class is ErrorClass.INTERNAL
    assert loads(query) == [(1, 1)]


def test_twin_without_the_guard_a_load_without_a_record_commits(
    warehouse: Settings, feed: FeedSpec, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    query("drop trigger _guard_commit on raw_payments._dlt_loads")
    monkeypatch.setattr("ingestion.landing.ensure_schema", lambda connection, feeds: None)
    with pytest.raises(TransientError):  # its session was ended all the same
        land_feed(warehouse, feed)
    assert loads(query) == [(2, 1)], "the commit of a load that was swept away"

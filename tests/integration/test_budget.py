"""The dead-letter budget is a run's: what a try that failed had committed counts with the rest."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from ingestion import landing as landing_module
from ingestion.database import connect
from ingestion.ddl import ensure_schema
from ingestion.errors import DataError, TransientError
from ingestion.feeds import DeadLetterBudget, FeedSpec
from ingestion.kafka import TopicReader
from ingestion.landing import Landing, land_feed
from ingestion.settings import Settings
from orchestration.console import Reporter
from orchestration.history import recorded_run
from orchestration.run import RunReport, ingest
from tests.harness.records import payment

PAYMENTS = "raw_payments.transaction_created"

Query = Callable[..., list[tuple]]
RunOnce = Callable[[FeedSpec], Landing]


@pytest.fixture
def feed(own_topic: Callable[[str], FeedSpec], send: Callable[..., None]) -> FeedSpec:
    """120 records, the first 40 with 12 that are no JSON; a budget of a tenth, or of 10."""
    feed = own_topic(PAYMENTS)
    bad = [(b"k", b"{") for _ in range(12)]
    send(feed, [*bad, *[(b"k", payment()) for _ in range(108)]], 0)
    return feed


@pytest.fixture
def run_once(warehouse: Settings, monkeypatch: pytest.MonkeyPatch) -> RunOnce:
    """Ingest with loads of 40 records and an outage after the first load; the second try reads the rest."""
    settings = warehouse.with_env(WAREHOUSE_RETRY_SECONDS="30")
    read = TopicReader.read
    tries: list[int] = []

    def read_with_an_outage(self: TopicReader, *arguments: Any) -> Iterator[Any]:
        tries.append(1)
        for number, batch in enumerate(read(self, *arguments)):
            if len(tries) == 1 and number == 1:
                raise TransientError("the broker is away")
            yield batch

    monkeypatch.setattr(TopicReader, "read", read_with_an_outage)

    def run(feed: FeedSpec) -> Landing:
        connection = connect(settings)
        ensure_schema(connection, [feed])
        report = RunReport()
        try:
            with recorded_run(connection, "ingest", "manual", settings.project_dir) as run:
                ingest(settings, [feed], run, Reporter(quiet=True), report)
        finally:
            connection.close()
        (landing,) = report.landings
        assert len(tries) == 2, "there was an outage"
        return landing

    return run


@pytest.fixture(autouse=True)
def small_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingestion.kafka.MESSAGES_PER_CALL", 40)
    monkeypatch.setattr(landing_module, "land_feed", partial(land_feed, records_per_load=40))


def test_a_run_is_what_all_its_tries_did(feed: FeedSpec, run_once: RunOnce, query: Query) -> None:
    landing = run_once(replace(feed, dead_letter_budget=DeadLetterBudget()))
    assert (landing.offered, landing.landed, landing.dead) == (120, 108, 12)
    assert dict(landing.reasons) == {"malformed_json": 12}
    assert len(landing.loads) == 3
    assert query("select rows::int, dead::int, outcome from ops.run_steps") == [(108, 12, "success")]


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (DeadLetterBudget(count=10), "set 12 records aside, its budget is 10 a run: malformed_json 12"),
        # Twice over in the first try, and at the limit in the run.
        (DeadLetterBudget(share=0.1, minimum_records=50), None),
        (
            DeadLetterBudget(share=0.09, minimum_records=50),
            r"set 12 of 120 records aside \(10.0%\), its budget is 9.0%",
        ),
    ],
    ids=["count", "share within", "share over"],
)
def test_the_budget_looks_at_all_tries(
    feed: FeedSpec, run_once: RunOnce, query: Query, budget: DeadLetterBudget, said: str | None
) -> None:
    spec = replace(feed, dead_letter_budget=budget)
    if said is None:
        assert run_once(spec).dead == 12
        return
    with pytest.raises(DataError, match=said):
        run_once(spec)
    assert query("select sum(landed)::int, sum(dead)::int from ops.ledger") == [(108, 12)]
    assert query("select rows::int, dead::int, outcome, error_class from ops.run_steps") == [
        (108, 12, "failed", "data")
    ]


def test_twin_a_budget_that_sees_the_last_try_only_is_not_kept(
    feed: FeedSpec, run_once: RunOnce, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last_try_only(*arguments: Any, landing: Landing, **options: Any) -> Landing:
        mine = land_feed(*arguments, **options, records_per_load=40)
        landing.landed, landing.dead = mine.landed, mine.dead
        return mine

    monkeypatch.setattr(landing_module, "land_feed", last_try_only)
    assert run_once(replace(feed, dead_letter_budget=DeadLetterBudget(count=10))).dead == 0


def test_a_run_that_fails_for_good_tells_what_it_committed(
    feed: FeedSpec, warehouse: Settings, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = TopicReader.read

    def breaking(self: TopicReader, *arguments: Any) -> Iterator[Any]:
        yield next(read(self, *arguments))
        raise TransientError("the broker is away")

    monkeypatch.setattr(TopicReader, "read", breaking)
    settings = warehouse.with_env(WAREHOUSE_RETRY_SECONDS="0")
    connection = connect(settings)
    ensure_schema(connection, [feed])
    with (
        pytest.raises(TransientError),
        recorded_run(connection, "ingest", "manual", settings.project_dir) as run,
    ):
        ingest(settings, [feed], run, Reporter(quiet=True))
    connection.close()
    assert query("select rows::int, dead::int, outcome from ops.run_steps") == [(28, 12, "failed")]

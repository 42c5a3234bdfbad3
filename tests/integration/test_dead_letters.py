"""A dead letter's story: how often it was tried, who resolved it and when; and no payload where none is asked for."""

import base64
import json
import re
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg2.extensions
import pytest

from ingestion.database import connect
from ingestion.errors import Reason, WarehouseError
from ingestion.feeds import AcceptedValues, FeedSpec, load_feeds
from ingestion.landing import land_feed
from ingestion.replay import Selection, discard_dead_letters, replay_dead_letters
from ingestion.settings import Settings, load_settings
from orchestration import transform
from orchestration.dead_letters import (
    DeadLetter,
    Filter,
    count_dead_letters,
    export_dead_letters,
    fetch_dead_letter,
    fetch_events,
    list_dead_letters,
)
from orchestration.run import prepare
from orchestration.sample.rates_api import Fault, RatesServer, serving
from tests.harness.project_copy import copy_project, run_warehouse
from tests.harness.records import payment

PAYMENTS, RATES = "raw_payments.transaction_created", "raw_fx.daily_rates"
CANARY = "canary8a2d"
TODAY = datetime.now(UTC).date()

Query = Callable[..., list[tuple]]
Send = Callable[..., None]
OwnTopic = Callable[[str], FeedSpec]


def taking(feed: FeedSpec, *currencies: str) -> FeedSpec:
    """The feed with more currencies in its contract."""
    columns = tuple(
        replace(
            column,
            rules=tuple(
                AcceptedValues(rule.values | set(currencies)) if isinstance(rule, AcceptedValues) else rule
                for rule in column.rules
            ),
        )
        if column.name == "currency"
        else column
        for column in feed.columns
    )
    return replace(feed, columns=columns)


@pytest.fixture
def rejected(warehouse: Settings, own_topic: OwnTopic, send: Send) -> FeedSpec:
    """One record in francs and one in crowns, neither of which the contract takes."""
    feed = own_topic(PAYMENTS)
    send(feed, [(b"k", payment(currency="CHF")), (b"k", payment(currency="SEK"))], 0)
    assert land_feed(warehouse, feed).dead == 2
    return feed


def letters(settings: Settings) -> list[DeadLetter]:
    """By offset."""
    connection = connect(settings)
    try:
        found = list_dead_letters(connection, Filter())
    finally:
        connection.close()
    return sorted(found, key=lambda letter: letter.kafka_offset or 0)


# --- attempts, who and when -------------------------------------------------------------------------------------------


def test_attempts_and_who_resolved_it_are_what_happened(warehouse: Settings, rejected: FeedSpec, query: Query) -> None:
    francs, crowns = letters(warehouse)
    assert (francs.attempts, francs.status, francs.resolved_at, francs.resolved_by) == (1, "open", None, None)

    assert replay_dead_letters(warehouse, rejected, Selection(), apply=False).failed == 2
    assert [letter.attempts for letter in letters(warehouse)] == [1, 1], "a dry run is no try"
    assert replay_dead_letters(warehouse, rejected, Selection(), apply=True).failed == 2
    assert [letter.attempts for letter in letters(warehouse)] == [2, 2]

    # A replay that dies before its commit was none.
    query("create function public.refuse() returns trigger language plpgsql as $$ begin raise 'no'; end $$")
    query("create trigger z_refuse before insert on raw_payments._dlt_loads execute function public.refuse()")
    with pytest.raises(WarehouseError):
        replay_dead_letters(warehouse, taking(rejected, "CHF"), Selection(ids=(francs.dead_letter_id,)), apply=True)
    query("drop trigger z_refuse on raw_payments._dlt_loads")
    assert query("select count(*)::int from raw_payments._dead_letter_events where action = 'replayed'") == [(1,)]
    assert [(letter.attempts, letter.status) for letter in letters(warehouse)] == [(2, "open")] * 2

    before = datetime.now(UTC)
    replay_dead_letters(warehouse, taking(rejected, "CHF"), Selection(), apply=True, because="francs are fine")
    discard_dead_letters(warehouse, rejected, Selection(ids=(crowns.dead_letter_id,)), "crowns are not", apply=True)
    francs, crowns = letters(warehouse)
    assert (francs.attempts, francs.status, francs.resolved_because) == (3, "replayed", "francs are fine")
    assert (crowns.attempts, crowns.status, crowns.resolved_because) == (3, "discarded", "crowns are not")
    for letter in (francs, crowns):
        assert re.fullmatch(r".+@.+ pid \d+", letter.resolved_by or "")
        assert letter.resolved_at is not None
        assert before <= letter.resolved_at <= datetime.now(UTC)
    connection = connect(warehouse)
    actions = [[event.action for event in fetch_events(connection, one.dead_letter_id)] for one in (francs, crowns)]
    connection.close()
    assert actions == [["failed_again", "replayed"], ["failed_again", "failed_again", "discarded"]]


def test_twin_attempts_follow_the_events_and_nothing_else(
    warehouse: Settings, rejected: FeedSpec, query: Query
) -> None:
    replay_dead_letters(warehouse, rejected, Selection(), apply=True)
    query("alter table raw_payments._dead_letter_events disable trigger _append_only")
    query("delete from raw_payments._dead_letter_events")
    assert [letter.attempts for letter in letters(warehouse)] == [1, 1]


# --- which letters ----------------------------------------------------------------------------------------------------


def test_filters_mean_the_same_in_list_stats_and_export(
    warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query, tmp_path: Path
) -> None:
    payments, users = own_topic(PAYMENTS), own_topic("raw_users.user_events")
    send(payments, [(b"k", payment(currency="CHF")), (b"k", b"{"), (b"k", b"")], 0)
    land_feed(warehouse, payments)
    send(users, [(b"k", b"{"), (b"k", b"[]")], 0)
    land_feed(warehouse, users)
    send(payments, [(b"k", b"{{")], 0)
    land_feed(warehouse, payments)
    discard_dead_letters(warehouse, payments, Selection(reason=Reason.EMPTY_VALUE), "empty", apply=True)
    # Three loads a day apart.
    query("update raw_payments._dead_letters set failed_at = '2026-01-05' where raw_value <> '{{'")
    query("update raw_users._dead_letters set failed_at = '2026-01-06'")
    query("update raw_payments._dead_letters set failed_at = '2026-01-07' where raw_value = '{{'")
    day = {n: datetime(2026, 1, n, tzinfo=UTC) for n in (5, 6, 7, 8)}
    expected = {
        Filter(): 6,
        Filter(feed=PAYMENTS): 4,
        Filter(feed="raw_users.user_events"): 2,
        Filter(reason="malformed_json"): 3,
        Filter(reason="malformed_json", feed=PAYMENTS): 2,
        Filter(status="open"): 5,
        Filter(status="discarded"): 1,
        Filter(status="replayed"): 0,
        Filter(since=day[6]): 3,
        Filter(until=day[6]): 3,
        Filter(since=day[6], until=day[7]): 2,
        Filter(since=day[8]): 0,
        Filter(feed=PAYMENTS, reason="malformed_json", since=day[6], status="open"): 1,
    }
    connection = connect(warehouse)
    for number, (wanted, count) in enumerate(expected.items()):
        listed = list_dead_letters(connection, wanted)
        assert len(listed) == count, wanted
        assert sum(group.letters for group in count_dead_letters(connection, wanted)) == count, wanted
        target = tmp_path / f"{number}.jsonl"
        assert export_dead_letters(connection, wanted, target) == count, wanted
        lines = [json.loads(line) for line in target.read_text().splitlines()]
        assert {line["dead_letter_id"] for line in lines} == {letter.dead_letter_id for letter in listed}
    assert len(list_dead_letters(connection, Filter(), limit=2)) == 2
    newest = list_dead_letters(connection, Filter(), limit=1)[0]
    letter, key, value, headers = fetch_dead_letter(connection, newest.dead_letter_id)
    assert (letter, key, value, headers) == (newest, b"k", b"{{", None)
    connection.close()


# --- no payload unasked -----------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[RatesServer]:
    with serving(7, today=lambda: TODAY) as running:
        yield running


@pytest.fixture
def project(tmp_path: Path) -> Path:
    copied = copy_project(tmp_path / "project")
    for declaration in copied.glob("models/staging/*/_*__sources.yml"):
        text = re.sub(r"(topic: \w+)", rf"\1_{uuid.uuid4().hex[:8]}", declaration.read_text())
        text = re.sub(r"start: 2025-01-01", f"start: {TODAY - timedelta(days=2)}", text)
        declaration.write_text(text)
    return copied


@pytest.fixture
def run(project: Path, warehouse: Settings, server: RatesServer) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    names = ("WAREHOUSE_DSN", "KAFKA_BOOTSTRAP_SERVERS", "KAFKA_CLUSTER_INCARNATION")
    settings = {name: warehouse.env[name] for name in names} | {
        "WAREHOUSE_HOME": str(warehouse.home),
        "FX_API_BASE": server.url,
        "WAREHOUSE_EMBEDDED": "kafka",
        "WAREHOUSE_RETRY_SECONDS": "0",
    }
    return lambda *arguments, **more: run_warehouse(project, *arguments, **settings | more)


def bad_payments() -> list[tuple[bytes, bytes]]:
    """The canary as a value of every kind of fault, as a key, as a field's name, declared and not."""
    canary = CANARY.encode()
    records = [
        payment(currency="CHF", note=CANARY),
        *(payment(**{name: CANARY}) for name in ("user_id", "amount", "currency", "created_at", "transaction_id")),
        payment(merchant_id={CANARY: CANARY}),
        payment(note={CANARY: "\x00"}),
        payment(**{CANARY: "\ud800"}),
        payment()[:-1] + b', "x": {"' + canary + b'": 1, "' + canary + b'": 2}}',
        payment()[:-1] + b', "' + canary + b'": 1e999999}',
        b'{"' + canary,
        b'"' + canary + b'"',
        b"\xff" + canary,
        canary,
    ]
    return [(canary, record) for record in records]


def test_no_output_holds_a_payload_unasked(
    run: Callable[..., "subprocess.CompletedProcess[str]"],
    project: Path,
    server: RatesServer,
    send: Send,
    query: Query,
    warehouse: Settings,
    tmp_path: Path,
) -> None:
    """Every command, in text and JSON, what it writes into its home, the history and the project's logs."""
    feeds = {feed.name: feed for feed in load_feeds(load_settings(project))}
    bad = bad_payments()
    send(feeds[PAYMENTS], [*bad, *[(None, payment()) for _ in range(10 * len(bad))]], 0)
    rates = f'{{"amount":1.0,"base":"USD","rates":{{"{TODAY}":{{"{CANARY}":1.5,"EUR":"{CANARY}","GBP":0.8}}}}}}'
    said: list[str] = []

    def ask(*arguments: str, codes: tuple[int, ...] = (0,), **settings: str) -> str:
        result = run(*arguments, **settings)
        assert result.returncode in codes, (arguments, result.stderr)
        said.append(f"{arguments}\n{result.stdout}\n{result.stderr}")
        return result.stdout

    server.faults.extend([Fault("body", body=rates)] * 2)
    ask("ingest", PAYMENTS, RATES, codes=(0, 7))
    assert query("select feed, count(*)::int from ops.dead_letters group by 1 order by 1") == [
        (RATES, 2),
        (PAYMENTS, len(bad)),
    ]
    ids = [row[0] for row in query("select dead_letter_id from ops.dead_letters order by kafka_offset")]
    server.faults.extend([Fault("body", body=rates)] * 2)
    for more in ((), ("--json",)):
        ask("ingest", PAYMENTS, RATES, *more)
        ask("dead-letters", "list", "--limit", "1000", *more)
        ask("dead-letters", "show", ids[0], *more)
    ask("dead-letters", "stats", "--json")
    ask("dead-letters", "replay")
    ask("dead-letters", "replay", "--apply", "--because", "again", "--json")
    ask("replay", PAYMENTS, "--partition", "0", "--from-offset", "0", "--to-offset", "500")
    ask("dead-letters", "discard", "--because", "x", "--reason", "malformed_json", "--apply")
    (discarded, *_) = query("select dead_letter_id from ops.dead_letters where status = 'discarded'")
    story = json.loads(ask("dead-letters", "show", discarded[0], "--json"))
    assert (story["attempts"], story["status"], story["resolved_because"]) == (2, "discarded", "x")
    assert [event["action"] for event in story["events"]] == ["failed_again", "discarded"]
    assert story["events"][-1]["acted_by"] == story["resolved_by"]
    ask("dead-letters", "export", str(tmp_path / "all.jsonl"))
    # An API that is not well, with the payload in its answer.
    for fault in (
        Fault("body", body=f"<html>{CANARY}", content_type="text/html"),
        Fault("body", body=f'{{"{CANARY}": "{CANARY}"}}'),
        Fault(status=404, body=CANARY),
    ):
        server.faults.clear()
        server.faults.extend([fault] * 20)
        ask("ingest", RATES, codes=(2, 3, 4))
    server.faults.clear()
    # A database that refuses or fails while it has a row in hand, and quotes it.
    query(f"alter table {PAYMENTS} add constraint house_rule check (_extra is null)")
    query("create function public.fail() returns trigger language plpgsql as $$ begin if new._extra is not null "
          "then raise exception 'no % here', new._extra; end if; return new; end $$")  # fmt: skip
    good = payment(note=CANARY)
    send(feeds[PAYMENTS], [(CANARY.encode(), good)], 0)
    ask("ingest", PAYMENTS, codes=(0, 7))
    query(f"create trigger fail before insert on {PAYMENTS} for each row execute function public.fail()")
    send(feeds[PAYMENTS], [(CANARY.encode(), good)], 0)
    ask("ingest", PAYMENTS, codes=(1,))
    query("create or replace function public.fail() returns trigger language plpgsql as $$ begin "
          "perform pg_sleep(60); return new; end $$")  # fmt: skip
    slow = psycopg2.extensions.make_dsn(warehouse.env["WAREHOUSE_DSN"], options="-c statement_timeout=300")
    ask("ingest", PAYMENTS, codes=(4,), WAREHOUSE_DSN=slow)
    assert "statement timeout" in said[-1]

    leaks = [text.splitlines()[0] for text in said if CANARY in text]
    assert leaks == []
    history = query("select r::text from ops.runs r union all select s::text from ops.run_steps s")
    assert not any(CANARY in row[0] for row in history)
    events = query("select e::text from ops.dead_letter_events e")
    assert events
    assert not any(CANARY in row[0] for row in events)
    kept = [path for folder in (warehouse.home, project) for path in folder.rglob("*") if path.is_file()]
    assert [path for path in kept if CANARY.encode() in path.read_bytes()] == []
    # It is there to be seen, and seen by whoever asks.
    assert CANARY in run("dead-letters", "show", ids[0], "--payload").stdout
    shown = json.loads(run("dead-letters", "show", ids[0], "--payload", "--json").stdout)
    assert CANARY.encode() in bytes.fromhex(shown["value_hex"])
    exported = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert all(CANARY.encode() in base64.b64decode(line["value_base64"]) for line in exported)


# --- the audit as a model ---------------------------------------------------------------------------------------------


def test_the_audit_model_says_who_did_what_with_which_outcome(
    warehouse: Settings, rejected: FeedSpec, query: Query, project: Path
) -> None:
    settings = replace(warehouse, project_dir=project)
    prepare(settings)
    francs, crowns = letters(warehouse)
    replay_dead_letters(warehouse, taking(rejected, "CHF"), Selection(), apply=True, because="INC-1")
    discard_dead_letters(warehouse, rejected, Selection(ids=(crowns.dead_letter_id,)), "test", apply=True)
    chosen = ["--select", "audit_dead_letters", "audit_dead_letter_events"]
    report = transform.run_build(settings, select=chosen)
    assert not report.failures
    rows = query(
        "select dead_letter_id, action, because, load_id is not null, first_reason, reason, status, acted_by ~ ' pid ' "
        "from audit.audit_dead_letter_events order by dead_letter_id = %s, acted_at",
        crowns.dead_letter_id,
    )
    assert rows == [
        (francs.dead_letter_id, "replayed", "INC-1", True, "not_accepted", None, "replayed", True),
        (crowns.dead_letter_id, "failed_again", "INC-1", False, "not_accepted", "not_accepted", "discarded", True),
        (crowns.dead_letter_id, "discarded", "test", False, "not_accepted", None, "discarded", True),
    ]
    # Twin: an event taken away is seen.
    query("alter table raw_payments._dead_letter_events disable trigger _append_only")
    query("delete from raw_payments._dead_letter_events where action = 'replayed'")
    broken = transform.run_build(settings, select=chosen)
    (failure,) = broken.failures
    assert "audit_dead_letter_events__end_as_the_letter_does" in str(failure)

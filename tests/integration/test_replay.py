"""Dead letters tried again: each lands once, whoever calls and however often; and the twins that break it."""

import base64
import json
import multiprocessing
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from ingestion import ledger
from ingestion.database import connect
from ingestion.ddl import ensure_schema
from ingestion.errors import AuthenticationError, ErrorClass, FeedBusyError, Reason, TransientError, WarehouseError
from ingestion.feeds import AcceptedValues, FeedSpec, Range
from ingestion.landing import land_feed
from ingestion.replay import Replay, Selection, count_open, discard_dead_letters, replay_dead_letters
from ingestion.replay_window import OffsetWindow, TimeWindow, replay_window
from ingestion.settings import Settings
from orchestration.dead_letters import Filter, count_dead_letters, export_dead_letters, fetch_events, list_dead_letters
from tests.harness.records import payment

PAYMENTS = "raw_payments.transaction_created"

Query = Callable[..., list[tuple]]
Send = Callable[..., None]
OwnTopic = Callable[[str], FeedSpec]


def relaxed(feed: FeedSpec) -> FeedSpec:
    """The feed with a corrected contract: Swiss francs and negative amounts are payments too."""
    columns = []
    for column in feed.columns:
        rules = tuple(
            AcceptedValues(rule.values | {"CHF"})
            if isinstance(rule, AcceptedValues) and column.name == "currency"
            else rule
            for rule in column.rules
            if not (isinstance(rule, Range) and column.name == "amount")
        )
        columns.append(replace(column, rules=rules))
    return replace(feed, columns=tuple(columns))


def francs(count: int) -> list[tuple[bytes, bytes]]:
    return [(str(i).encode(), payment(currency="CHF", amount=i + 1)) for i in range(count)]


def account(query: Query) -> tuple[int, ...]:
    """(offered, landed, dead) of the ledger, raw rows, letters not replayed, replayed ones; and it has to add up."""
    ((offered, landed, dead),) = query(
        "select sum(offered)::int, sum(landed)::int, sum(dead)::int from ops.ledger where feed = %s", PAYMENTS
    )
    ((rows, places),) = query(
        "select count(*)::int, count(distinct (_stream_id, _kafka_partition, _kafka_offset))::int "
        f"from {PAYMENTS} where _dlt_load_id in (select load_id from raw_payments._dlt_loads)"
    )
    ((kept, replayed),) = query(
        "select (count(*) filter (where status <> 'replayed'))::int, "
        "(count(*) filter (where status = 'replayed'))::int from ops.dead_letters"
    )
    assert rows == places, "a record landed twice"
    assert (landed, dead) == (rows, kept)
    return offered, landed, dead, replayed


def fingerprint(query: Query) -> dict[str, Any]:
    """Every row of every table with where it stands and who wrote it, and every object there is."""
    tables = query(
        "select format('%%I.%%I', schemaname, tablename) from pg_tables "
        "where schemaname like %s or schemaname = 'ops' order by 1",
        "raw%",
    )
    found: dict[str, Any] = {
        table: query(f"select count(*), md5(string_agg(ctid::text || xmin::text || t::text, ',' order by ctid)) "
                     f"from {table} t")
        for (table,) in tables
    }  # fmt: skip
    for catalog in ("pg_proc", "pg_trigger", "pg_attribute", "pg_constraint"):
        found[catalog] = query(f"select count(*), max(xmin::text::bigint) from {catalog}")
    found["sequences"] = query("select schemaname, sequencename, last_value from pg_sequences order by 1, 2")
    return found


@pytest.fixture
def rejected(warehouse: Settings, own_topic: OwnTopic, send: Send) -> FeedSpec:
    """A feed that landed 5 and set 24 aside: 20 in francs, 3 that are no JSON, 1 without an amount."""
    feed = own_topic(PAYMENTS)
    bad = [(b"k", b"{broken"), (None, b"x"), (None, b""), (b"k", payment(amount=None))]
    send(feed, [*francs(20), *bad, *[(b"good", payment()) for _ in range(5)]], 0)
    landing = land_feed(warehouse, feed)
    assert (landing.landed, landing.dead) == (5, 24)
    return feed


def run_replay(warehouse: Settings, feed: FeedSpec, **options: Any) -> Replay:
    selection = Selection(**{k: options.pop(k) for k in ("reason", "since", "until", "ids") if k in options})
    return replay_dead_letters(warehouse, relaxed(feed), selection, **options)


def test_a_dry_run_changes_no_byte_and_its_forecast_is_what_comes(
    warehouse: Settings, rejected: FeedSpec, query: Query
) -> None:
    before = fingerprint(query)
    forecast = run_replay(warehouse, rejected)
    assert fingerprint(query) == before
    outcome = run_replay(warehouse, rejected, apply=True, because="francs are payments too")
    assert fingerprint(query) != before
    assert (forecast.landed, forecast.failed, forecast.reasons) == (outcome.landed, outcome.failed, outcome.reasons)
    assert (outcome.landed, outcome.failed) == (20, 4)
    assert outcome.reasons == {"malformed_json": 2, "empty_value": 1, "null_field": 1}
    assert account(query) == (29, 25, 4, 20)


def test_a_replayed_row_is_the_record_with_its_own_coordinates(
    warehouse: Settings, rejected: FeedSpec, query: Query
) -> None:
    letters = query(
        "select kafka_partition, kafka_offset, source_time, raw_key, stream_id from ops.dead_letters "
        "where reason = 'not_accepted' order by kafka_offset"
    )
    replay = run_replay(warehouse, rejected, apply=True)
    rows = query(
        "select _kafka_partition, _kafka_offset, _kafka_timestamp, _kafka_key, _stream_id, amount, _dlt_load_id "
        f"from {PAYMENTS} where currency = 'CHF' order by _kafka_offset"
    )
    assert [row[:3] for row in rows] == [row[:3] for row in letters]
    assert [(bytes(row[3]), row[4]) for row in rows] == [(bytes(row[3]), row[4]) for row in letters]
    assert [int(row[5]) for row in rows] == list(range(1, 21))
    assert {row[6] for row in rows} == set(replay.load_ids)
    # The position is where it was: the next run goes on behind it.
    assert land_feed(warehouse, relaxed(rejected)).offered == 0
    (interval,) = query("select kind, offered, landed, dead, first_position from ops.ledger where kind = 'replay'")
    assert interval == ("replay", 0, 20, -20, None)


def test_three_times_lands_once(warehouse: Settings, rejected: FeedSpec, query: Query) -> None:
    assert [run_replay(warehouse, rejected, apply=True).landed for _ in range(3)] == [20, 0, 0]
    assert account(query) == (29, 25, 4, 20)
    # Failing again is noted each time, without a load.
    assert query("select action, count(*)::int from ops.dead_letter_events group by 1 order by 1") == [
        ("failed_again", 12),
        ("replayed", 20),
    ]
    assert query("select distinct attempts from ops.dead_letters order by 1") == [(2,), (4,)]


def _replay_in_a_process(settings: Settings, feed: FeedSpec, start: Any, answers: Any) -> None:
    start.wait()
    try:
        answers.put(replay_dead_letters(settings, feed, Selection(), apply=True, wait_s=120).landed)
    except WarehouseError as error:
        answers.put(error.message)


def test_four_processes_at_once_land_each_once(
    warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query
) -> None:
    feed = own_topic(PAYMENTS)
    send(feed, francs(1_000))
    assert land_feed(warehouse, feed).dead == 1_000
    context = multiprocessing.get_context("spawn")
    answers, start = context.Queue(), context.Event()
    rivals = [
        context.Process(target=_replay_in_a_process, args=(warehouse, relaxed(feed), start, answers)) for _ in range(4)
    ]
    for rival in rivals:
        rival.start()
    start.set()
    landed = [answers.get(timeout=200) for _ in rivals]
    for rival in rivals:
        rival.join(30)
    assert sorted(landed, key=str) == [0, 0, 0, 1_000], landed
    assert account(query) == (1_000, 1_000, 0, 1_000)


def test_who_does_not_wait_is_told_who_holds_the_feed(warehouse: Settings, rejected: FeedSpec) -> None:
    connection = connect(warehouse)
    with ledger.writing(connection, rejected), pytest.raises(FeedBusyError, match=r"written by .+ pid \d+ since"):
        run_replay(warehouse, rejected, apply=True, wait_s=0.5)
    connection.close()


def test_a_crash_before_the_commit_leaves_them_open_and_the_next_replay_lands_each_once(
    warehouse: Settings, rejected: FeedSpec, query: Query
) -> None:
    query("create function public.refuse() returns trigger language plpgsql as $$ begin raise 'no'; end $$")
    query("create trigger a_refuse before insert on raw_payments._dlt_loads execute function public.refuse()")
    with pytest.raises(WarehouseError):
        run_replay(warehouse, rejected, apply=True)
    # Its rows and marks are there, and nothing of it is true.
    assert query(f"select count(*)::int from {PAYMENTS}") == [(25,)]
    assert query("select count(*)::int from raw_payments._dead_letters where replay_load_id is not null") == [(20,)]
    assert account(query) == (29, 5, 24, 0)
    assert query("select count(*)::int from ops.dead_letter_events where action = 'replayed'") == [(0,)]

    query("drop trigger a_refuse on raw_payments._dlt_loads")
    assert run_replay(warehouse, rejected).landed == 20
    # Any writer of the feed sweeps it.
    assert len(land_feed(warehouse, rejected).swept) == 1
    assert query("select count(*)::int from raw_payments._dead_letters where replay_load_id is not null") == [(0,)]
    assert run_replay(warehouse, rejected, apply=True).landed == 20
    assert account(query) == (29, 25, 4, 20)
    assert query(f"select count(*)::int from {PAYMENTS}") == [(25,)]


def test_a_replay_that_was_taken_over_cannot_mark_or_commit(
    warehouse: Settings, rejected: FeedSpec, query: Query
) -> None:
    def take_over(done: int, due: int | None) -> None:
        query("update raw_payments._writers set token = token + 1, holder = 'another', acquired_at = now()")

    with pytest.raises(FeedBusyError, match="taken over"):
        run_replay(warehouse, rejected, apply=True, progress=take_over)
    assert query("select count(*)::int from raw_payments._dead_letters where replay_load_id is not null") == [(0,)]
    assert account(query) == (29, 5, 24, 0)


def test_selected_by_reason_time_and_id(warehouse: Settings, rejected: FeedSpec, query: Query) -> None:
    now = datetime.now(UTC)
    assert run_replay(warehouse, rejected, reason=Reason.MALFORMED_JSON).failed == 2
    assert run_replay(warehouse, rejected, since=now + timedelta(hours=1)).landed == 0
    assert run_replay(warehouse, rejected, until=now + timedelta(hours=1)).landed == 20
    ((one,),) = query("select dead_letter_id from ops.dead_letters where kafka_offset = 7")
    assert run_replay(warehouse, rejected, ids=(one,), apply=True).landed == 1
    assert query("select kafka_offset from ops.dead_letters where status = 'replayed'") == [(7,)]
    assert run_replay(warehouse, rejected, ids=(one,), apply=True).landed == 0


def test_a_record_that_made_loads_die_is_tried_only_by_name(
    warehouse: Settings, rejected: FeedSpec, query: Query
) -> None:
    query("update raw_payments._dead_letters set reason = 'poison' where _kafka_offset = 3")
    assert run_replay(warehouse, rejected).landed == 19
    assert run_replay(warehouse, rejected, reason=Reason.POISON).landed == 1


def test_a_rule_taken_back_reaches_the_table(warehouse: Settings, rejected: FeedSpec, query: Query) -> None:
    """A column that was required is NOT NULL in the raw table; the relaxed contract takes that back."""
    columns = tuple(replace(c, required=c.name != "amount" and c.required) for c in rejected.columns)
    optional = replace(rejected, columns=columns)
    replay = replay_dead_letters(warehouse, optional, Selection(reason=Reason.NULL_FIELD), apply=True)
    assert (replay.landed, replay.failed) == (1, 0)
    assert query(f"select count(*)::int from {PAYMENTS} where amount is null") == [(1,)]


# --- discard, audit, export -------------------------------------------------------------------------------------------


def test_discarded_letters_stay_with_their_reason_and_are_not_replayed(
    warehouse: Settings, rejected: FeedSpec, query: Query
) -> None:
    selection = Selection(reason=Reason.NOT_ACCEPTED)
    before = fingerprint(query)
    assert discard_dead_letters(warehouse, rejected, selection, "test traffic") == 20
    assert fingerprint(query) == before
    assert discard_dead_letters(warehouse, rejected, selection, "test traffic", apply=True) == 20
    assert discard_dead_letters(warehouse, rejected, selection, "test traffic", apply=True) == 0
    assert run_replay(warehouse, rejected, apply=True).landed == 0
    assert account(query) == (29, 5, 24, 0)
    assert query(
        "select distinct status, discarded_because, discarded_by ~ ' pid ' from ops.dead_letters "
        "where reason = 'not_accepted'"
    ) == [("discarded", "test traffic", True)]
    assert query("select action, because, count(*)::int from ops.dead_letter_events where because <> '' group by 1, 2"
                 ) == [("discarded", "test traffic", 20)]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        "update raw_payments._dead_letter_events set acted_by = 'nobody'",
        "delete from raw_payments._dead_letter_events",
        "truncate raw_payments._dead_letter_events",
    ],
)
def test_the_audit_is_append_only(warehouse: Settings, rejected: FeedSpec, query: Query, change: str) -> None:
    run_replay(warehouse, rejected, apply=True)
    with pytest.raises(psycopg2.Error, match="append-only"):
        query(change)
    # Twin: it is the trigger that keeps it.
    query("drop trigger _append_only on raw_payments._dead_letter_events")
    query(change)


def test_a_resolved_letter_cannot_be_resolved_again(warehouse: Settings, rejected: FeedSpec, query: Query) -> None:
    run_replay(warehouse, rejected, apply=True)
    discard_dead_letters(warehouse, rejected, Selection(reason=Reason.EMPTY_VALUE), "x", apply=True)
    for change in (
        "set replay_load_id = null where replay_load_id is not null",
        "set discarded_at = now() where replay_load_id is not null",
        "set discarded_at = null where discarded_at is not null",
    ):
        with pytest.raises(psycopg2.Error, match="resolved"):
            query(f"update raw_payments._dead_letters {change}")


def test_list_stats_events_and_export(warehouse: Settings, rejected: FeedSpec, tmp_path: Path) -> None:
    run_replay(warehouse, rejected, apply=True, because="INC-1")
    connection = connect(warehouse)
    groups = {(g.reason, g.status): g.letters for g in count_dead_letters(connection, Filter(feed=PAYMENTS))}
    assert groups == {
        ("not_accepted", "replayed"): 20,
        ("malformed_json", "open"): 2,
        ("empty_value", "open"): 1,
        ("null_field", "open"): 1,
    }
    (letter,) = list_dead_letters(connection, Filter(reason="null_field", status="open"))
    (event,) = fetch_events(connection, letter.dead_letter_id)
    assert (event.action, event.because, event.reason, event.path) == (
        "failed_again",
        "INC-1",
        "null_field",
        "$.amount",
    )
    assert "INC-1" in str(event)

    target = tmp_path / "rejected.jsonl"
    assert export_dead_letters(connection, Filter(), target) == 24
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert {base64.b64decode(line["value_base64"]) for line in lines if line["reason"] == "malformed_json"} == {
        b"{broken",
        b"x",
    }
    with pytest.raises(WarehouseError, match="there already"):
        export_dead_letters(connection, Filter(), target)
    connection.close()


REFUSALS = {
    "connection ended": (
        "create function public.end_it() returns trigger language plpgsql as $$ begin "
        "perform pg_terminate_backend(pg_backend_pid()); return null; end $$; "
        "create trigger end_it after insert on raw_payments._dead_letter_events execute function public.end_it()",
        TransientError,
        "went away",
    ),
    "no right": (
        "create function public.no_right() returns trigger language plpgsql as $$ begin "
        "raise insufficient_privilege using message = 'permission denied for table x'; end $$; "
        "create trigger no_right before insert on raw_payments._dead_letter_events execute function public.no_right()",
        AuthenticationError,
        "permission denied",
    ),
    "another table": (
        "alter table raw_payments._dead_letter_events rename column acted_by to actor",
        WarehouseError,
        'the replay failed: column "acted_by" .* does not exist',
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_postgres_refuses_is_named(warehouse: Settings, rejected: FeedSpec, query: Query, name: str) -> None:
    """Also where nothing lands: letters that fail again are only noted."""
    how, error_class, message = REFUSALS[name]
    query(how)
    with pytest.raises(WarehouseError, match=message) as failed:
        run_replay(warehouse, rejected, reason=Reason.MALFORMED_JSON, apply=True)
    assert type(failed.value) is error_class
    assert failed.value.hint
    # Neither the statement nor what it was to write.
    assert "INSERT" not in failed.value.message.upper()


def test_a_dry_run_that_postgres_refuses_is_named(warehouse: Settings, rejected: FeedSpec, query: Query) -> None:
    query("alter table raw_payments._dead_letters rename column raw_value to value")
    for ask in (run_replay, lambda warehouse, feed: count_open(warehouse, feed, Selection())):
        with pytest.raises(WarehouseError, match=r"column .*raw_value.* does not exist") as failed:
            ask(warehouse, rejected)
        assert failed.value.error_class is ErrorClass.INTERNAL


# --- the guard --------------------------------------------------------------------------------------------------------


def write_replay_interval(query: Query, **changes: object) -> None:
    """A ledger row of a replay by the feed's writer, of one landed row."""
    values: dict[str, object] = {
        "kind": "replay", "first_position": None, "last_position": None, "offered": 0, "landed": 1, "dead": -1,
        "tombstones": 0, "control": 0, "restored": 0, "_dlt_load_id": "9999999999.1",
    }  # fmt: skip
    query(
        "insert into raw_payments._ledger select (jsonb_populate_record(l, %s)).* from raw_payments._ledger l limit 1",
        json.dumps(values | changes),
    )


def copy_row(query: Query, offset: int) -> None:
    query(
        f"insert into {PAYMENTS} select (jsonb_populate_record(t, %s)).* from {PAYMENTS} t limit 1",
        json.dumps({"_dlt_load_id": "9999999999.1", "_kafka_offset": offset}),
    )


def mark(query: Query, *offsets: int) -> None:
    query(
        "update raw_payments._dead_letters set replay_load_id = '9999999999.1' where _kafka_offset = any(%s)",
        list(offsets),
    )


def commit(query: Query) -> None:
    query("insert into raw_payments._dlt_loads values ('9999999999.1', 'transaction_created', 0, now(), 'x')")


def test_the_database_takes_a_replay_that_adds_up(rejected: FeedSpec, query: Query) -> None:
    write_replay_interval(query)
    copy_row(query, 4)
    mark(query, 4)
    commit(query)
    assert account(query) == (29, 6, 23, 1)


@pytest.mark.parametrize(
    ("marked", "rows", "changes", "message"),
    [
        ([], [4], {}, "replays 1 dead letters .* 0 are marked"),
        ([4, 5], [4], {}, "replays 1 dead letters .* 2 are marked"),
        ([4], [5], {}, "holds no row for 1 of the dead letters"),
        ([4], [], {}, "copied 0 rows, its ledger says 1"),
        ([4], [4, 5], {}, "copied 2 rows, its ledger says 1"),
        ([4, 5], [4, 5], {"landed": 1, "dead": -1, "restored": 1}, "replays 1 dead letters .* 2 are marked"),
    ],
    ids=["not marked", "one too many marked", "another record", "no row", "one row too many", "restored"],
)
def test_the_database_refuses_a_replay_that_does_not_add_up(
    rejected: FeedSpec, query: Query, marked: list[int], rows: list[int], changes: dict[str, object], message: str
) -> None:
    write_replay_interval(query, **changes)
    for offset in rows:
        copy_row(query, offset)
    mark(query, *marked)
    with pytest.raises(psycopg2.Error, match=message):
        commit(query)


@pytest.mark.parametrize("changes", [{"dead": 0}, {"offered": 1, "dead": 0}, {"kind": "api", "window_from": None}])
def test_the_database_refuses_a_replay_that_offers_or_takes_nothing_from_the_dead(
    rejected: FeedSpec, query: Query, changes: dict[str, object]
) -> None:
    with pytest.raises(psycopg2.Error, match="violates check constraint"):
        write_replay_interval(query, **changes)


def test_after_a_replay_the_log_still_has_no_hole(
    warehouse: Settings, rejected: FeedSpec, send: Send, query: Query
) -> None:
    """A replay's interval has no offsets; it must not hide the last one that has."""
    run_replay(warehouse, rejected, apply=True)
    query(
        "insert into raw_payments._ledger select (jsonb_populate_record(l, %s)).* from raw_payments._ledger l "
        "where kind = 'kafka' limit 1",
        json.dumps({"first_position": 31, "last_position": 31, "landed": 1, "dead": 0, "offered": 1,
                    "writer_token": 2, "_dlt_load_id": "9999999999.1"}),
    )  # fmt: skip
    copy_row(query, 31)
    with pytest.raises(psycopg2.Error, match="hole"):
        commit(query)


# --- a window of the topic --------------------------------------------------------------------------------------------


def test_an_offset_window_lands_what_is_missing_and_leaves_the_rest(
    warehouse: Settings, rejected: FeedSpec, send: Send, query: Query
) -> None:
    query(f"delete from {PAYMENTS} where _kafka_offset in (25, 26)")
    send(rejected, [(b"new", payment())] * 3, 0)
    feed, window = relaxed(rejected), OffsetWindow(0, 15, 31)
    before = fingerprint(query)
    forecast = replay_window(warehouse, feed, window)
    assert fingerprint(query) == before
    figures = {name: getattr(forecast, name) for name in ("read", "unchanged", "landed", "failed", "restored", "empty")}
    assert figures == {"read": 14, "unchanged": 3, "landed": 5, "failed": 4, "restored": 2, "empty": 0}
    assert (forecast.waiting, forecast.gone) == (3, 0)
    (day,) = forecast.days
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day)

    outcome = replay_window(warehouse, feed, window, apply=True)
    assert outcome.days == forecast.days
    assert query("select landed::int, dead::int, restored::int from ops.ledger where kind = 'replay'") == [(5, -5, 2)]
    assert account(query) == (29, 10, 19, 5)
    again = replay_window(warehouse, feed, window, apply=True)
    assert (again.landed, again.restored, again.unchanged) == (0, 0, 10)
    assert land_feed(warehouse, feed).landed == 3, "positions are where they were"


def test_a_window_replay_interrupted_before_its_commit_is_swept(
    warehouse: Settings, rejected: FeedSpec, query: Query
) -> None:
    query(f"delete from {PAYMENTS} where _kafka_offset = 25")
    query("create function public.refuse() returns trigger language plpgsql as $$ begin raise 'no'; end $$")
    query("create trigger a_refuse before insert on raw_payments._dlt_loads execute function public.refuse()")
    with pytest.raises(WarehouseError):
        replay_window(warehouse, relaxed(rejected), OffsetWindow(0, 0, 28), apply=True)
    query("drop trigger a_refuse on raw_payments._dlt_loads")
    outcome = replay_window(warehouse, relaxed(rejected), OffsetWindow(0, 0, 28), apply=True)
    assert (outcome.landed, outcome.restored) == (20, 1)
    assert account(query) == (29, 25, 4, 20)


def test_a_broker_that_cannot_look_up_times_says_so(warehouse: Settings, rejected: FeedSpec) -> None:
    now = datetime.now(UTC)
    with pytest.raises(WarehouseError, match="cannot look up offsets by time") as failed:
        replay_window(warehouse, rejected, TimeWindow(now - timedelta(days=1), now))
    assert "--from-offset" in failed.value.hint


def test_a_topic_that_was_never_read_is_refused(warehouse: Settings, rejected: FeedSpec) -> None:
    other = warehouse.with_env(KAFKA_CLUSTER_INCARNATION="another")
    with pytest.raises(WarehouseError, match="nothing of the topic"):
        replay_window(other, rejected, OffsetWindow(0, 0, 5))


def test_a_database_of_the_version_before_is_brought_up_to_date(
    warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query
) -> None:
    feed = own_topic(PAYMENTS)
    connection = connect(warehouse)
    ensure_schema(connection, [feed])
    for statement in (
        "drop view ops.dead_letters, ops.ledger, ops.dead_letter_events",
        "drop table raw_payments._dead_letter_events",
        "alter table raw_payments._dead_letters add column status text not null, "
        "drop column replay_load_id cascade, drop column discarded_at cascade, "
        "drop column discarded_by, drop column discarded_because",
        "alter table raw_payments._ledger drop column restored cascade",
    ):
        query(statement)
    with pytest.raises(WarehouseError, match="no dead-letter queue of this version"):
        replay_dead_letters(warehouse, feed, Selection())
    send(feed, francs(2))
    assert land_feed(warehouse, feed).dead == 2
    assert run_replay(warehouse, feed, apply=True).landed == 2
    connection.close()

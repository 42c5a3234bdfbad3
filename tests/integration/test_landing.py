"""Landing a topic: every record accounted for, nothing altered, nothing twice; and the twins that break it."""

import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from psycopg2 import errors as pg_errors

from ingestion import ledger
from ingestion.database import connect
from ingestion.ddl import ensure_schema
from ingestion.errors import FeedBusyError, SourceLossError, WarehouseError
from ingestion.feeds import FeedSpec
from ingestion.kafka import Topic, TopicReader
from ingestion.landing import land_feed
from ingestion.settings import Settings
from orchestration.sample.defects import catalogue
from tests.harness.records import payment

PAYMENTS = "raw_payments.transaction_created"
USERS = "raw_users.user_events"

Query = Callable[..., list[tuple]]
Send = Callable[..., None]
OwnTopic = Callable[[str], FeedSpec]


def payments(count: int) -> list[tuple[bytes | None, bytes | None]]:
    return [(str(i).encode(), payment()) for i in range(count)]


def account(query: Query, source: str = "raw_payments") -> tuple[int, ...]:
    """(offered, landed, dead, tombstones) of the ledger, (rows, dead letters) of the tables; committed loads only."""
    (counts,) = query(
        "select sum(offered)::int, sum(landed)::int, sum(dead)::int, sum(tombstones)::int from ops.ledger "
        "where source_name = %s",
        source,
    )
    table = {"raw_payments": "transaction_created", "raw_users": "user_events"}[source]
    ((rows,),) = query(
        f"select count(*)::int from {source}.{table} where _dlt_load_id in (select load_id from {source}._dlt_loads)"
    )
    ((dead,),) = query("select count(*)::int from ops.dead_letters where source_name = %s", source)
    return (*counts, rows, dead)


@pytest.mark.parametrize("name", [PAYMENTS, USERS])
def test_every_known_bad_record_ends_landed_or_set_aside_with_its_bytes(
    warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query, name: str
) -> None:
    feed = own_topic(name)
    rng = Random(3)
    good = next(iter(_good_records(name)))
    cases = [(defect, *defect.build(rng, good)) for defect in catalogue(name, bulky=True)]
    send(feed, [(key, value) for _, key, value in cases], partition=0)

    landing = land_feed(warehouse, feed)

    expected = {kind: sum(defect.expected == kind for defect, *_ in cases) for kind in ("landed", "dead", "tombstone")}
    assert (landing.landed, landing.dead, landing.tombstones) == tuple(expected.values())
    assert landing.offered == len(cases)
    rows = {row[0] for row in query(f"select _kafka_offset from {name}")}
    dead = {row[0]: row[1:] for row in query("select kafka_offset, reason, raw_value, raw_key from ops.dead_letters")}
    for offset, (defect, key, value) in enumerate(cases):
        assert (offset in rows) == (defect.expected == "landed"), defect.name
        assert (offset in dead) == (defect.expected == "dead"), defect.name
        if defect.expected == "dead":
            reason, raw_value, raw_key = dead[offset]
            assert reason == defect.reason, defect.name
            assert bytes(raw_value) == value, defect.name
            assert (bytes(raw_key) if raw_key is not None else None) == key, defect.name
    offered, landed, set_aside, tombstones, in_table, in_queue = account(query, feed.source)
    assert offered == landed + set_aside + tombstones == len(cases)
    assert (in_table, in_queue) == (landed, set_aside)


def _good_records(name: str) -> list[dict[str, str]]:
    """Fields of a good record as JSON tokens, the form the catalogue spoils."""
    if name == PAYMENTS:
        return [{key: json.dumps(value) for key, value in json.loads(payment()).items()}]
    event = {
        "event_id": str(uuid.uuid4()),
        "event_type": "signed_up",
        "user_id": "usr_123456",
        "email": "a@example.org",
        "full_name": "A B",
        "phone": "+1 555",
        "ip_address": "192.0.2.1",
        "country": "US",
        "occurred_at": "2026-01-02T03:04:05Z",
    }
    return [{key: json.dumps(value) for key, value in event.items()}]


def test_texts_land_to_the_character(warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query) -> None:
    texts = [
        "",
        " ",
        "NULL",
        "\\N",
        '"',
        '""',
        "a,b",
        "line\nfeed",
        "carriage\r\nreturn",
        "\\x00",
        "tab\t",
        "é\u2028😀",
    ]
    texts += ["\\.", "\n\\.\n", "'", "\x01\x7f", "x" * 100_000]
    feed = own_topic(USERS)
    events = [
        {
            "event_id": str(uuid.uuid4()),
            "event_type": "signed_in",
            "user_id": "usr_000001",
            "full_name": text,
            "email": None,
            "occurred_at": "2026-01-02T03:04:05Z",
        }
        for text in texts
    ]
    send(feed, [(text.encode(), json.dumps(event).encode()) for text, event in zip(texts, events, strict=True)], 0)
    land_feed(warehouse, feed)
    rows = query("select full_name, email, phone, _kafka_key from raw_users.user_events order by _kafka_offset")
    assert [row[0] for row in rows] == texts
    assert all(row[1] is None and row[2] is None for row in rows)
    assert [bytes(row[3]).decode() for row in rows] == texts


def test_a_second_run_lands_nothing(warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query) -> None:
    feed = own_topic(PAYMENTS)
    send(feed, payments(500))
    assert land_feed(warehouse, feed).landed == 500
    again = land_feed(warehouse, feed)
    assert (again.offered, again.loads) == (0, [])
    send(feed, payments(3))
    assert land_feed(warehouse, feed).landed == 3
    assert account(query) == (503, 503, 0, 0, 503, 0)


def test_a_backlog_is_read_in_several_loads_without_hole_or_overlap(
    warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query
) -> None:
    feed = own_topic(PAYMENTS)
    send(feed, payments(60_000))
    landing = land_feed(warehouse, feed, records_per_load=10_000)
    assert len(landing.loads) > 1
    assert account(query) == (60_000, 60_000, 0, 0, 60_000, 0)
    holes = query(
        "select 1 from (select first_position, lag(last_position) over (partition by partition order by "
        "first_position) as before from ops.ledger) as l where first_position <> coalesce(before + 1, 0)"
    )
    assert holes == []


def test_what_an_interrupted_load_left_is_invisible_and_swept(
    warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query
) -> None:
    feed = own_topic(PAYMENTS)
    send(feed, [*payments(200), (b"k", b"broken")])
    connection = connect(warehouse)
    ensure_schema(connection, [feed])
    connection.close()
    # The database refuses the commit, as it would when it goes away right there.
    query("create function public.refuse() returns trigger language plpgsql as $$ begin raise 'no'; end $$")
    query("create trigger a_refuse before insert on raw_payments._dlt_loads execute function public.refuse()")
    with pytest.raises(WarehouseError):
        land_feed(warehouse, feed)
    assert query("select count(*) from raw_payments.transaction_created") == [(200,)]
    assert query("select count(*) from ops.ledger") == [(0,)]
    assert query("select count(*) from ops.dead_letters") == [(0,)]

    query("drop trigger a_refuse on raw_payments._dlt_loads")
    landing = land_feed(warehouse, feed)
    assert len(landing.swept) == 1
    assert account(query) == (201, 200, 1, 0, 200, 1)
    assert query("select count(*) from raw_payments.transaction_created") == [(200,)]


def test_twin_without_the_sweep_the_left_rows_are_still_no_part_of_the_warehouse(
    warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sweep off: the commit point holds by itself, and the check of the table sees the rubbish."""
    feed = own_topic(PAYMENTS)
    send(feed, payments(50))
    land_feed(warehouse, feed)
    query("insert into raw_payments._loads_begun (load_id, feed, writer_token) values ('1.0', %s, 1)", feed.name)
    query(
        "insert into raw_payments.transaction_created select (t).* from (select t from "
        "raw_payments.transaction_created t) as x"
    )
    query("update raw_payments.transaction_created set _dlt_load_id = '1.0' where ctid in (select ctid from "
          "raw_payments.transaction_created offset 50)")  # fmt: skip
    monkeypatch.setattr(ledger, "sweep", lambda connection, feed: [])
    send(feed, payments(5))
    land_feed(warehouse, feed)
    assert account(query) == (55, 55, 0, 0, 55, 0)
    assert query("select count(*) from raw_payments.transaction_created") == [(105,)]
    monkeypatch.undo()
    land_feed(warehouse, feed)
    assert query("select count(*) from raw_payments.transaction_created") == [(55,)]


def test_a_second_writer_is_told_who_holds_the_feed(warehouse: Settings, own_topic: OwnTopic, send: Send) -> None:
    feed = own_topic(PAYMENTS)
    send(feed, payments(1))
    connection = connect(warehouse)
    ensure_schema(connection, [feed])
    with ledger.writing(connection, feed), pytest.raises(FeedBusyError, match=r"written by .+ pid \d+ since \d{4}"):
        land_feed(warehouse, feed)
    connection.close()
    assert land_feed(warehouse, feed).landed == 1


def take_over(query: Query) -> None:
    query("update raw_payments._writers set token = token + 1, holder = 'another', acquired_at = now()")


def test_a_stuck_writer_is_taken_over_by_an_explicit_option(
    warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query
) -> None:
    feed = own_topic(PAYMENTS)
    send(feed, payments(1))
    stuck = connect(warehouse)
    ensure_schema(stuck, [feed])
    holding = ledger.writing(stuck, feed)
    holding.__enter__()
    assert land_feed(warehouse, feed, take_over=True).landed == 1
    assert query("select token from raw_payments._writers") == [(2,)]
    with pytest.raises(Exception, match=r"terminat|closed"), stuck.cursor() as cursor:
        cursor.execute("select 1")


def test_a_writer_that_was_taken_over_cannot_commit(
    warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query
) -> None:
    feed = own_topic(PAYMENTS)
    send(feed, payments(100))
    with pytest.raises(FeedBusyError, match="taken over"):
        land_feed(warehouse, feed, progress=lambda done, due: take_over(query))
    assert query("select count(*) from ops.ledger") == [(0,)]
    assert land_feed(warehouse, feed).landed == 100


def test_twin_without_the_guard_a_writer_that_was_taken_over_commits(
    warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query
) -> None:
    feed = own_topic(PAYMENTS)
    send(feed, payments(100))

    def take_over_unguarded(done: int, due: int | None) -> None:
        take_over(query)
        # Called for each batch there is.
        query("drop trigger if exists _guard_commit on raw_payments._dlt_loads")

    land_feed(warehouse, feed, progress=take_over_unguarded)
    assert query("select count(*) from ops.ledger") != [(0,)], "the fence alone kept it out, not the guard"


@pytest.fixture
def landed(warehouse: Settings, own_topic: OwnTopic, send: Send) -> FeedSpec:
    """A feed with one committed load of 10 records in partition 0."""
    feed = own_topic(PAYMENTS)
    send(feed, payments(10), 0)
    land_feed(warehouse, feed)
    return feed


def next_interval(query: Query, **changes: object) -> None:
    """Write the ledger row of a load that would follow the committed one, with something wrong in it."""
    values = {"first_position": 10, "last_position": 10, "landed": 1, "offered": 1, "_dlt_load_id": "9999999999.1"}
    values |= changes
    query(
        "insert into raw_payments._ledger select (jsonb_populate_record(l, %s)).* from raw_payments._ledger l limit 1",
        json.dumps(values),
    )


def commit(query: Query, load_id: str = "9999999999.1") -> None:
    query("insert into raw_payments._dlt_loads values (%s, 'transaction_created', 0, now(), 'x')", load_id)


def copy_row(query: Query, load_id: str = "9999999999.1") -> None:
    query(
        "insert into raw_payments.transaction_created select (jsonb_populate_record(t, %s)).* from "
        "raw_payments.transaction_created t limit 1",
        json.dumps({"_dlt_load_id": load_id, "_kafka_offset": 10}),
    )


def test_the_database_takes_a_load_that_adds_up(landed: FeedSpec, query: Query) -> None:
    next_interval(query)
    copy_row(query)
    commit(query)
    commit(query)  # dlt repeats it after a kill
    assert query("select count(*) from raw_payments._dlt_loads where load_id = '9999999999.1'") == [(1,)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_position": 12, "last_position": 12}, "hole"),
        ({"writer_token": 0}, "fenced"),
        ({"landed": 2, "last_position": 11, "offered": 2}, "copied 1 rows, its ledger says 2"),
        ({"landed": 0, "dead": 1}, "copied 1 rows, its ledger says 0"),
    ],
    ids=["hole", "fenced", "row missing", "dead letter missing"],
)
def test_the_database_refuses_a_load_that_does_not_add_up(
    landed: FeedSpec, query: Query, changes: dict[str, object], message: str
) -> None:
    next_interval(query, **changes)
    copy_row(query)
    with pytest.raises(Exception, match=message):
        commit(query)


def test_the_database_refuses_an_overlap(landed: FeedSpec, query: Query) -> None:
    with pytest.raises(pg_errors.ExclusionViolation):
        next_interval(query, first_position=9, landed=2, offered=2)


def test_the_database_refuses_figures_that_do_not_cover_their_interval(landed: FeedSpec, query: Query) -> None:
    with pytest.raises(pg_errors.CheckViolation):
        next_interval(query, last_position=11)
    with pytest.raises(pg_errors.CheckViolation):
        next_interval(query, offered=2)


def test_the_database_refuses_a_load_id_that_runs_backwards(landed: FeedSpec, query: Query) -> None:
    next_interval(query, _dlt_load_id="1.0")
    copy_row(query, "1.0")
    with pytest.raises(Exception, match="clock"):
        commit(query, "1.0")


def test_the_database_refuses_a_load_without_account(landed: FeedSpec, query: Query) -> None:
    copy_row(query)
    with pytest.raises(Exception, match="unaccounted"):
        commit(query)


@pytest.mark.parametrize(
    ("bounds", "kind", "detail"),
    [
        ({0: (15, 20)}, "retention", "lost offsets 10 to 14"),
        ({0: (0, 5)}, "truncated", "ends at 5, and was read up to 10"),
        ({1: (0, 5)}, "truncated", "partition 0 is gone"),
    ],
    ids=["retention", "cut", "partition gone"],
)
def test_a_position_the_log_cannot_serve_is_a_loss(
    warehouse: Settings, own_topic: OwnTopic, bounds: dict[int, tuple[int, int]], kind: str, detail: str
) -> None:
    reader = TopicReader(warehouse, own_topic(PAYMENTS))
    (loss,) = reader.find_losses(Topic("cluster", "id", bounds), {0: 10})
    assert loss.kind == kind
    assert detail in loss.detail
    assert reader.find_losses(Topic("cluster", "id", {0: (10, 10), 1: (5, 9)}), {0: 10}) == []


def test_another_cluster_is_refused_before_a_row_is_read(
    warehouse: Settings, landed: FeedSpec, send: Send, query: Query
) -> None:
    send(landed, payments(5), 0)
    with pytest.raises(SourceLossError, match=r"of cluster another is not test_\w+ of cluster cluster-of-the-tests"):
        land_feed(warehouse.with_env(KAFKA_CLUSTER_INCARNATION="another"), landed)
    assert account(query)[0] == 10
    assert land_feed(warehouse, landed).landed == 5


def test_another_cluster_accepted_by_name_is_read_from_its_start(
    warehouse: Settings, landed: FeedSpec, query: Query
) -> None:
    other = warehouse.with_env(KAFKA_CLUSTER_INCARNATION="another")
    with pytest.raises(SourceLossError):
        land_feed(other, landed)
    connection = connect(warehouse)
    assert len(ledger.accept_losses(connection, landed, "moved to the new cluster")) == 1
    connection.close()
    landing = land_feed(other, landed)
    assert (landing.landed, landing.open_losses) == (10, [])
    assert query("select accepted_because from raw_payments._losses") == [("moved to the new cluster",)]
    with pytest.raises(SourceLossError):
        land_feed(warehouse.with_env(KAFKA_CLUSTER_INCARNATION="third"), landed)


def test_the_embedded_broker_may_forget_and_be_followed_by_any(
    warehouse: Settings, own_topic: OwnTopic, send: Send, query: Query
) -> None:
    feed = own_topic(PAYMENTS)
    send(feed, payments(5), 0)
    for name in ("embedded-1", "embedded-2", "one-of-the-users"):
        assert land_feed(warehouse.with_env(KAFKA_CLUSTER_INCARNATION=name), feed).landed == 5
    assert query("select count(distinct stream_id)::int from ops.ledger") == [(3,)]


def test_a_new_column_is_added_and_a_changed_type_is_refused(
    warehouse: Settings, landed: FeedSpec, send: Send, query: Query
) -> None:
    note = replace(landed.columns[5], name="note", required=False, rules=())
    wider = replace(landed, columns=(*landed.columns, note))
    send(landed, [(b"k", payment(note="hello"))], 0)
    land_feed(warehouse, wider)
    assert query("select note, count(*)::int from raw_payments.transaction_created group by 1 order by 1") == [
        ("hello", 1),
        (None, 10),
    ]
    other_type = replace(landed, columns=(replace(landed.columns[1], type=note.type), *landed.columns[2:]))
    with pytest.raises(WarehouseError, match="amount is declared text, the database has"):
        land_feed(warehouse, other_type)

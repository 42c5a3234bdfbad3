"""Landing a folder: every file accounted for to the byte, nothing twice, the topic left alone; and the twins."""

import datetime as dt
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psycopg2
import pytest
from psycopg2 import errors as pg_errors

from ingestion import files as files_module
from ingestion import ledger
from ingestion.contract import Contract, Row
from ingestion.database import connect
from ingestion.ddl import ensure_schema
from ingestion.errors import DataError, SourceLossError, TransientError, WarehouseError
from ingestion.feeds import AcceptedValues, FeedSpec
from ingestion.files import Folder, FolderReader
from ingestion.landing import Landing, land_feed
from ingestion.poison import Suspicion
from ingestion.replay import Selection, replay_dead_letters
from ingestion.settings import Settings
from orchestration import dead_letters
from orchestration.run import prepare
from orchestration.transform import require_built, run_build
from tests.fixtures.json_corpus import numbers, payment, write_corpus
from tests.harness.folder_account import find_discrepancies
from tests.harness.project_copy import copy_project, environment_of, run_warehouse

PAYMENTS = "raw_payments.transaction_created"
PROJECT = Path(__file__).resolve().parents[2]

Query = Callable[..., list[tuple]]
OwnTopic = Callable[[str], FeedSpec]


@pytest.fixture
def drop(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "drop"
    folder.mkdir()
    return folder


@pytest.fixture
def feed(own_topic: OwnTopic) -> FeedSpec:
    return own_topic(PAYMENTS)


def fill(folder: Path, count: int, *, bad_every: int = 5, start: int = 0) -> None:
    """Good payments in a few folders, every so many of them cut short."""
    for number in range(start, start + count):
        content = payment(f"{folder.name} {number}")
        path = folder / f"{number % 3}" / f"{number:04}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content[: -1 if number % bad_every == 0 else None])


def counts(query: Query) -> tuple[int, int, int]:
    ((offered, landed, dead),) = query(
        "select sum(offered)::int, sum(landed)::int, sum(dead)::int from ops.ledger where kind = 'files'"
    )
    return offered, landed, dead


@pytest.fixture
def landed(warehouse: Settings, feed: FeedSpec, drop: Path) -> Path:
    """A folder of 30 files that was read: 24 landed, 6 set aside."""
    fill(drop, 30)
    landing = land_feed(warehouse, feed, folder=drop)
    assert (landing.offered, landing.landed, landing.dead, landing.unchanged) == (30, 24, 6, 0)
    return drop


# --- every file -------------------------------------------------------------------------------------------------------


def test_every_file_of_the_corpus_is_landed_or_set_aside_to_the_byte(
    warehouse: Settings, feed: FeedSpec, drop: Path, query: Query
) -> None:
    cases = write_corpus(drop)
    expected = {"landed": 0, "dead": 0}
    for case in cases.values():
        expected[case.verdict] += 1

    landing = land_feed(warehouse, feed, folder=drop)

    assert (landing.landed, landing.dead, landing.offered) == (expected["landed"], expected["dead"], len(cases))
    assert "poison" not in landing.reasons, "the database refused what the contract took"
    assert find_discrepancies(query, drop) == []
    rows = {bytes(row[0]) for row in query(f"select _kafka_key from {PAYMENTS}")}
    assert rows == {path for path, case in cases.items() if case.verdict == "landed"}
    # Positions are given in the order of the paths' bytes; a record's time is its file's.
    places = query(
        f"select _kafka_offset, _kafka_key, _kafka_timestamp from {PAYMENTS} union all "
        "select _kafka_offset, raw_key, source_time from raw_payments._dead_letters order by 1"
    )
    assert [bytes(key) for _, key, _ in places] == sorted(cases)
    day = dt.datetime.fromtimestamp(1_750_000_000, dt.UTC)
    assert all(at == day - dt.timedelta(days=len(key)) for _, key, at in places)

    again = land_feed(warehouse, feed, folder=drop)
    assert (again.offered, again.unchanged, again.loads) == (len(cases), len(cases), [])
    assert counts(query) == (len(cases), expected["landed"], expected["dead"])


TAMPERED = {
    "a byte of a dead letter": (
        "update raw_payments._dead_letters set raw_value = set_byte(raw_value, 0, get_byte(raw_value, 0) # 1) "
        "where raw_key = '0/0000.json'",
        ["b'0/0000.json' was set aside with other bytes"],
    ),
    "a dead letter gone": (
        "delete from raw_payments._dead_letters where raw_key = '0/0000.json'",
        [
            "b'0/0000.json' is in no table",
            "positions are missing or given twice",
            "the ledger says 24 + 6 of 30, there are 24 + 5",
        ],
    ),
    "a row twice": (
        f"insert into {PAYMENTS} select * from {PAYMENTS} where _kafka_key = '1/0001.json'",
        [
            "b'1/0001.json' stands twice with the same content",
            "positions are missing or given twice",
            "the ledger says 24 + 6 of 30, there are 25 + 6",
        ],
    ),
    "a digit of an amount": (
        f"update {PAYMENTS} set amount = amount + 0.0001 where _kafka_key = '1/0001.json'",
        ["b'1/0001.json' landed with another amount"],
    ),
    "a field nobody sent": (
        f"update {PAYMENTS} set _extra = '{{\"x\": 1}}' where _kafka_key = '1/0001.json'",
        ["b'1/0001.json' landed with other unknown fields"],
    ),
}


@pytest.mark.parametrize("tampering", TAMPERED)
def test_twin_the_check_sees(landed: Path, query: Query, tampering: str) -> None:
    assert find_discrepancies(query, landed) == []
    statement, expected = TAMPERED[tampering]
    query(statement)
    assert find_discrepancies(query, landed) == expected


def test_twin_the_check_sees_a_file_that_was_skipped(
    warehouse: Settings, feed: FeedSpec, drop: Path, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(drop, 6)
    list_paths = Folder.list_paths
    monkeypatch.setattr(Folder, "list_paths", lambda *given: (p for p in list_paths(*given) if p != b"1/0001.json"))
    land_feed(warehouse, feed, folder=drop)
    assert find_discrepancies(query, drop) == ["b'1/0001.json' is in no table"]


def test_the_contract_takes_the_numbers_postgres_takes(warehouse: Settings, feed: FeedSpec, query: Query) -> None:
    contract = Contract(feed)
    for token in numbers():
        if not token.valid:
            continue
        record = payment("number")[:-1] + b', "x": ' + token.text + b"}"
        try:
            query("select %s::jsonb is null", token.text.decode())
            fits = True
        except psycopg2.DataError:
            fits = False
        assert isinstance(contract.decode(record), Row) == fits == token.storable, token.name


LANDING = """
import resource, sys
from pathlib import Path
from ingestion.feeds import load_feeds, select_feeds
from ingestion.landing import Landing, land_feed
from ingestion.settings import load_settings
settings = load_settings(Path(sys.argv[1]))
(feed,) = select_feeds(load_feeds(settings), ["raw_payments.transaction_created"])
landing = land_feed(settings, feed, folder=Path(sys.argv[2]), records_per_load=int(sys.argv[3]))
print(landing.landed, landing.dead, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def start_landing(warehouse: Settings, folder: Path, records_per_load: int) -> "subprocess.Popen[str]":
    """The loader in a process of its own."""
    named = {name: warehouse.env[name] for name in ("WAREHOUSE_DSN", "KAFKA_BOOTSTRAP_SERVERS")}
    return subprocess.Popen(
        [sys.executable, "-c", LANDING, str(PROJECT), str(folder), str(records_per_load)],
        cwd=PROJECT,
        env=environment_of(PROJECT, **{**named, "WAREHOUSE_HOME": str(warehouse.home)}),
        stdout=subprocess.PIPE,
        text=True,
    )


def test_large_files_pass_in_bounded_memory(warehouse: Settings, drop: Path, query: Query) -> None:
    """Parsed, the array takes 6 GB."""
    good = payment("large")[:-1]
    array = good + b', "x": [' + b"1," * 25_000_000 + b"1]}"
    (drop / "array").write_bytes(array)
    (drop / "text").write_bytes(good + b', "x": "' + b"a" * 50_000_000 + b'"}')
    process = start_landing(warehouse, drop, 500_000)
    out, _ = process.communicate()
    assert process.returncode == 0
    landed, dead, megabytes = map(int, out.split())
    assert (landed, dead) == (1, 1)
    assert megabytes < 900
    ((value,),) = query("select raw_value from ops.dead_letters")
    assert bytes(value) == array
    assert query(f"select length(_extra ->> 'x') from {PAYMENTS}") == [(50_000_000,)]


# --- once -------------------------------------------------------------------------------------------------------------


def test_what_changed_is_another_record_and_what_did_not_is_none(
    warehouse: Settings, feed: FeedSpec, landed: Path, query: Query
) -> None:
    first, second, third, fourth = (landed / "0" / f"{number:04}.json" for number in (0, 3, 6, 9))
    before = second.read_bytes()
    second.write_bytes(payment("another"))
    os.utime(third, (1, 1))
    fourth.rename(landed / "renamed")
    first.unlink()
    fill(landed, 2, start=30)
    again = land_feed(warehouse, feed, folder=landed)
    assert (again.landed, again.dead, again.unchanged) == (3, 1, 27)
    assert find_discrepancies(query, landed) == []
    places = query(f"select _kafka_offset from {PAYMENTS} where _kafka_key = '0/0003.json' order by 1")
    assert places == [(1,), (30,)]
    # What it was before the last time is new all the same.
    second.write_bytes(before)
    assert land_feed(warehouse, feed, folder=landed).landed == 1
    assert find_discrepancies(query, landed) == []
    assert land_feed(warehouse, feed, folder=landed).loads == []


def test_a_folder_is_the_same_wherever_a_link_leads(
    warehouse: Settings, feed: FeedSpec, landed: Path, tmp_path: Path, query: Query
) -> None:
    (tmp_path / "link").symlink_to(landed)
    assert land_feed(warehouse, feed, folder=tmp_path / "link").unchanged == 30
    other = tmp_path / "other"
    landed.rename(other)
    assert land_feed(warehouse, feed, folder=other).offered == 30
    assert query("select name from raw_payments._streams order by 1") == [(f"files:{landed}",), (f"files:{other}",)]


def test_twin_without_the_notes_a_folder_lands_twice(
    warehouse: Settings, feed: FeedSpec, landed: Path, query: Query
) -> None:
    query("delete from raw_payments._files")
    assert land_feed(warehouse, feed, folder=landed).offered == 30
    assert any("stands twice" in said for said in find_discrepancies(query, landed))


def test_a_load_without_its_notes_is_refused(
    warehouse: Settings, feed: FeedSpec, drop: Path, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(drop, 10)
    with monkeypatch.context() as patch:
        patch.setattr(FolderReader, "note_read", lambda *given: None)
        with pytest.raises(WarehouseError, match="noted 0 files, its ledger says 10"):
            land_feed(warehouse, feed, folder=drop)
    assert counts(query) == (None, None, None)
    land_feed(warehouse, feed, folder=drop)
    assert find_discrepancies(query, drop) == []


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"first_position": 29, "landed": 2}, pg_errors.ExclusionViolation),
        ({"last_position": 31}, pg_errors.CheckViolation),
        ({"first_position": 31, "last_position": 31}, psycopg2.Error),
    ],
    ids=["overlap", "figures", "hole"],
)
def test_the_database_guards_the_positions_of_files(
    landed: Path, query: Query, changes: dict[str, int], error: type[Exception]
) -> None:
    load = {"_dlt_load_id": "9999999999.1", "landed": 1, "dead": 0, "first_position": 30, "last_position": 30} | changes
    with pytest.raises(error, match=r"_ledger__|hole"):
        query(
            "insert into raw_payments._ledger "
            "select (jsonb_populate_record(l, %s)).* from raw_payments._ledger as l where kind = 'files';"
            "insert into raw_payments._dlt_loads values ('9999999999.1', 'transaction_created', 0, now(), 'x')",
            json.dumps(load | {"offered": load["landed"]}),
        )


def test_the_guards_of_an_older_warehouse_are_renewed(
    warehouse: Settings, feed: FeedSpec, drop: Path, query: Query
) -> None:
    connection = connect(warehouse)
    ensure_schema(connection, [feed])
    query(
        "alter table raw_payments._ledger "
        "drop constraint _ledger__no_overlap, drop constraint _ledger__covers_interval, "
        "add constraint _ledger__no_overlap exclude using gist (stream_id with =, partition with =, "
        "int8range(first_position, last_position, '[]') with &&) where (kind = 'kafka'), "
        "add constraint _ledger__covers_interval check (kind <> 'kafka' or control = 0);"
        "drop table raw_payments._files; comment on table raw_payments._writers is 'older'"
    )
    ensure_schema(connection, [feed])
    connection.close()
    guards = dict(
        query(
            "select conname, pg_get_constraintdef(oid) from pg_constraint "
            "where conname in ('_ledger__no_overlap', '_ledger__covers_interval') "
            "and connamespace = 'raw_payments'::regnamespace"
        )
    )
    assert all("files" in definition for definition in guards.values()), guards
    fill(drop, 3)
    assert land_feed(warehouse, feed, folder=drop).offered == 3


# --- beside the topic -------------------------------------------------------------------------------------------------


def positions(query: Query, kind: str) -> list[tuple[int, int, int]]:
    return query(
        "select partition, min(first_position)::int, max(last_position)::int + 1 from ops.ledger where kind = %s "
        "group by stream_id, partition order by partition",
        kind,
    )


def test_topic_and_folder_leave_one_another_alone(
    warehouse: Settings, feed: FeedSpec, landed: Path, send: Callable[..., None], query: Query
) -> None:
    assert positions(query, "kafka") == []
    send(feed, [(b"k", payment(f"sent {number}")) for number in range(7)], 0)
    assert land_feed(warehouse, feed).landed == 7
    fill(landed, 5, start=30)
    assert land_feed(warehouse, feed, folder=landed).offered == 35
    send(feed, [(b"k", payment(f"sent {number}")) for number in range(7, 10)], 0)
    assert land_feed(warehouse, feed).landed == 3
    assert positions(query, "kafka") == [(0, 0, 10)]
    assert positions(query, "files") == [(0, 0, 35)]
    assert find_discrepancies(query, landed) == []


def test_twin_a_folder_taken_for_a_topic_keeps_the_topic_from_being_read(
    warehouse: Settings, feed: FeedSpec, landed: Path, send: Callable[..., None], query: Query
) -> None:
    query("update raw_payments._streams set kind = 'kafka'")
    send(feed, [(b"k", payment("sent"))], 0)
    with pytest.raises(SourceLossError):
        land_feed(warehouse, feed)


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


def vanish(path: Path) -> None:
    path.unlink()


def change(path: Path) -> None:
    path.write_bytes(payment("changed"))


def give_way(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("happens", "said"),
    [
        (vanish, "2/0029.json cannot be read: No such file or directory"),
        (change, "2/0029.json changed while it was read"),
        (give_way, "2/0029.json cannot be read: Is a directory"),
    ],
    ids=["vanished", "changed", "folder"],
)
def test_a_file_that_cannot_be_read_as_it_was_ends_the_run_and_is_no_dead_letter(
    warehouse: Settings, feed: FeedSpec, drop: Path, query: Query, happens: Callable[[Path], None], said: str
) -> None:
    fill(drop, 30)
    last = drop / "2" / "0029.json"
    seen: list[int] = []

    def progress(done: int, due: int | None) -> None:
        assert due == 30
        if not seen:
            happens(last)
        seen.append(done)

    landing = Landing(feed.name)
    with pytest.raises(TransientError, match=said):
        land_feed(warehouse, feed, folder=drop, records_per_load=10, progress=progress, landing=landing)
    assert counts(query) == (20, 16, 4), "loads before it are whole, its own is not there"
    if happens is give_way:
        last.rmdir()
    # The next try adds to the same account: what landed before is no file that did not change.
    land_feed(warehouse, feed, folder=drop, landing=landing)
    assert (landing.offered, landing.unchanged) == (29 if happens is not change else 30, 0)
    assert find_discrepancies(query, drop) == []
    assert query("select count(*)::int from ops.dead_letters") == [(6,)]


def test_twin_without_looking_twice_a_changed_file_is_noted_with_bytes_it_did_not_land(
    warehouse: Settings, feed: FeedSpec, drop: Path, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(drop, 30)
    read = Folder.read
    last = drop / "2" / "0029.json"

    def read_unchecked(folder: Folder, file: files_module.File) -> bytes:
        return change(last) or last.read_bytes() if file.path == b"2/0029.json" else read(folder, file)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", read_unchecked)
        land_feed(warehouse, feed, folder=drop)
    land_feed(warehouse, feed, folder=drop)
    assert "b'2/0029.json' stands twice with the same content" in find_discrepancies(query, drop)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file the system cannot read")
def test_a_device_that_fails_sets_nothing_aside(warehouse: Settings, feed: FeedSpec, drop: Path, query: Query) -> None:
    fill(drop, 3)
    (drop / "memory").symlink_to("/proc/self/mem")
    with pytest.raises(TransientError, match="memory cannot be read: Input/output error"):
        land_feed(warehouse, feed, folder=drop)
    assert counts(query) == (None, None, None)
    (drop / "memory").unlink()
    assert land_feed(warehouse, feed, folder=drop).offered == 3


BOUNDARIES = [
    *(("_files", "INSERT", moment) for moment in ("BEFORE", "AFTER")),
    *((table, "INSERT", "AFTER") for table in ("_loads_begun", "transaction_created", "_dead_letters", "_ledger")),
    *(("_dlt_loads", "INSERT", moment) for moment in ("BEFORE", "AFTER")),
    ("_files", "DELETE", "AFTER"),
]


def test_a_kill_at_any_boundary_leaves_nothing_half(
    warehouse: Settings, feed: FeedSpec, drop: Path, query: Query
) -> None:
    """A trigger holds the loader's statement; the loader is killed, then the server goes on."""
    fill(drop, 40)
    connection = connect(warehouse)
    ensure_schema(connection, [feed])
    connection.close()
    query(
        "create table public.trap (at text);"
        "create function public.hold() returns trigger language plpgsql as $$ begin "
        "if exists (select from public.trap where at = tg_table_name || tg_op || tg_when) then "
        "perform pg_advisory_lock(7777); perform pg_advisory_unlock(7777); end if; return null; end $$"
    )
    for table, op, moment in BOUNDARIES:
        query(
            f"create trigger a_hold_{op}_{moment} {moment} {op} on raw_payments.{table} "
            "for each statement execute function public.hold()"
        )
    for boundary in BOUNDARIES:
        query("select pg_advisory_lock(7777)")
        query("insert into public.trap values (%s)", "".join(boundary))
        process = start_landing(warehouse, drop, 10)
        held = "select 1 from pg_locks where locktype = 'advisory' and objid = 7777 and not granted"
        while not query(held):
            assert process.poll() is None, f"{boundary} was not reached"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        query("delete from public.trap")
        query("select pg_advisory_unlock(7777)")
    process = start_landing(warehouse, drop, 10)
    process.communicate()
    assert process.returncode == 0
    assert find_discrepancies(query, drop) == []
    assert counts(query) == (40, 32, 8)
    assert query(
        "select count(*)::int, count(distinct position)::int, count(distinct path)::int from raw_payments._files"
    ) == [(40, 40, 40)]
    # Killed with rows or the ledger written: at least these had something to sweep.
    assert query("select count(*)::int from raw_payments._loads_begun where swept_at is not null")[0][0] >= 4


def test_twin_without_the_sweep_what_a_dead_load_noted_stands_in_the_way(
    warehouse: Settings, feed: FeedSpec, drop: Path, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(drop, 10)
    connection = connect(warehouse)
    ensure_schema(connection, [feed])
    connection.close()
    query("create function public.refuse() returns trigger language plpgsql as $$ begin raise 'no'; end $$")
    query("create trigger a_refuse before insert on raw_payments._dlt_loads execute function public.refuse()")
    with pytest.raises(WarehouseError):
        land_feed(warehouse, feed, folder=drop)
    query("drop trigger a_refuse on raw_payments._dlt_loads")
    assert query("select count(*)::int from raw_payments._files") == [(10,)]
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "sweep", lambda connection, feed: [])
        with pytest.raises(WarehouseError):
            land_feed(warehouse, feed, folder=drop)
    assert counts(query) == (None, None, None)
    assert land_feed(warehouse, feed, folder=drop).offered == 10
    assert find_discrepancies(query, drop) == []


def test_a_file_the_database_refuses_is_found_and_the_rest_lands(
    warehouse: Settings, feed: FeedSpec, drop: Path, query: Query
) -> None:
    fill(drop, 40, bad_every=100)
    (drop / "1" / "0022.json").write_bytes(payment("refused", merchant_id="mer_66666"))
    connection = connect(warehouse)
    ensure_schema(connection, [feed])
    connection.close()
    query(f"alter table {PAYMENTS} add check (merchant_id <> 'mer_66666')")
    landing = land_feed(warehouse, feed, folder=drop)
    assert (landing.landed, landing.dead, dict(landing.reasons)) == (38, 2, {"malformed_json": 1, "poison": 1})
    letters = query("select raw_key, source_time is null from ops.dead_letters where reason = 'poison'")
    assert [bytes(key) for key, _ in letters] == [b"1/0022.json"]
    assert find_discrepancies(query, drop) == []


def test_a_death_counts_against_a_position_only_while_the_same_files_stand_behind_it(
    warehouse: Settings, feed: FeedSpec, drop: Path, query: Query
) -> None:
    """Otherwise a file that came since would be set aside in place of the one loads died of."""
    fill(drop, 9)
    connection = connect(warehouse)
    ensure_schema(connection, [feed])
    connection.autocommit = True

    def suspect() -> dict[tuple[int, int], object]:
        reader = FolderReader(warehouse, connection, feed, drop)
        reader.fetch_topic()
        suspicion = Suspicion.after(connection, feed, reader.stream, {0: 0}, 100)
        suspicion.note_batch("1.0", reader.stream, {0: 0})
        reader.close()
        return dict(suspicion.poison)

    for load in ("1.0", "2.0", "3.0"):
        query("insert into raw_payments._loads_begun (load_id, feed, writer_token) values (%s, %s, 1)", load, feed.name)
    assert suspect() == {}
    query(
        "update raw_payments._loads_begun set noted = '[0, 7]', "
        "batch = (select batch from raw_payments._loads_begun where load_id = '1.0')"
    )
    assert list(suspect()) == [(0, 7)]
    fill(drop, 1, start=9)
    assert suspect() == {}
    connection.close()


# --- the queue and the command ----------------------------------------------------------------------------------------


def test_a_files_dead_letter_is_replayed_from_its_bytes(
    warehouse: Settings, feed: FeedSpec, drop: Path, query: Query
) -> None:
    (drop / "b\udcff\n").write_bytes(payment("francs", currency="CHF"))
    (drop / "a").write_bytes(payment("dollars"))
    land_feed(warehouse, feed, folder=drop)
    connection = connect(warehouse)
    (letter,) = dead_letters.list_dead_letters(connection, dead_letters.Filter(feed=feed.name))
    connection.close()
    assert letter.coordinates == f"files:{drop}/b%FF%0A"
    assert json.dumps(letter.as_dict())
    for name in ("a", "b\udcff\n"):
        (drop / name).unlink()
    columns = [
        replace(column, rules=tuple(rule for rule in column.rules if not isinstance(rule, AcceptedValues)))
        for column in feed.columns
    ]
    replay = replay_dead_letters(warehouse, replace(feed, columns=tuple(columns)), Selection(), apply=True)
    assert (replay.landed, replay.failed) == (1, 0)
    rows = query(f"select _kafka_key, _kafka_offset, currency, _kafka_timestamp is not null from {PAYMENTS} order by 2")
    assert [(bytes(key), *rest) for key, *rest in rows] == [(b"a", 0, "USD", True), (b"b\xff\n", 1, "CHF", True)]
    assert query("select kind, sum(landed)::int, sum(dead)::int from ops.ledger group by 1 order by 1") == [
        ("files", 1, 1),
        ("replay", 1, -1),
    ]
    assert land_feed(warehouse, feed, folder=drop).offered == 0


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return copy_project(tmp_path / "project")


@pytest.fixture
def run(project: Path, warehouse: Settings) -> Run:
    names = ("WAREHOUSE_DSN", "KAFKA_BOOTSTRAP_SERVERS", "KAFKA_CLUSTER_INCARNATION", "FX_API_BASE")
    own = {"WAREHOUSE_HOME": str(warehouse.home), "WAREHOUSE_EMBEDDED": "kafka", "WAREHOUSE_RETRY_SECONDS": "0"}
    return lambda *given: run_warehouse(project, *given, **own, **{name: warehouse.env[name] for name in names})


def test_the_command_from_a_folder_to_the_marts(run: Run, project: Path, drop: Path, query: Query) -> None:
    fill(drop, 120)
    (drop / "latest").symlink_to("2")
    os.mkfifo(drop / "pipe")
    ingest = ("ingest", "--from-files", str(drop), "--feed", PAYMENTS)
    over = run(*ingest)
    assert over.returncode == 7, over.stderr
    assert (
        f"error: {PAYMENTS} set 24 of 120 records aside (20.0%), its budget is 10.0%: malformed_json 24." in over.stderr
    )
    # What landed is told all the same.
    header, row = over.stdout.splitlines()
    assert header.split() == ["feed", "offered", "landed", "dead", "tombstones", "unchanged", "lost"]
    assert row.split() == [f"files:{drop}", "120", "96", "24", "0", "0", "0"]

    again = run(*ingest)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[1].split() == [f"files:{drop}", "120", "0", "0", "0", "120", "0"]
    assert f"files:{drop}: not read, being no files: latest (link to a folder), pipe (no regular file)" in again.stderr
    # It is no read of the topic and does not make the feed fresh.
    assert query("select distinct feed from ops.run_steps where step = 'ingest'") == [(f"files:{drop}",)]

    (status,) = [one for one in json.loads(run("status", "--json").stdout)["feeds"] if one["feed"] == PAYMENTS]
    assert [status[name] for name in ("offered", "landed", "dead", "open_dead_letters", "last_success")] == [
        120,
        96,
        24,
        24,
        None,
    ]
    listed = run("dead-letters", "list", "--feed", PAYMENTS, "--limit", "1").stdout.splitlines()[1].split()
    assert listed[1] == f"files:{drop}/0/0000.json"
    assert f"coordinates: files:{drop}/0/0000.json" in run("dead-letters", "show", listed[0]).stdout
    exported = project / "letters.jsonl"
    run("dead-letters", "export", str(exported))
    line = json.loads(exported.read_text().splitlines()[0])
    assert (line["key_base64"], line["coordinates"]) == ("MC8wMDAwLmpzb24=", f"files:{drop}/0/0000.json")
    built = run("replay", PAYMENTS, "--partition", "0", "--from-offset", "0", "--to-offset", "9")
    assert "nothing of the topic" in built.stderr


def test_the_audit_models_account_for_files(
    warehouse: Settings, project: Path, feed: FeedSpec, landed: Path, query: Query
) -> None:
    settings = replace(warehouse, project_dir=project)
    prepare(settings)
    chosen = ["--select", "+audit_reconciliation", "+audit_ledger", "+audit_dead_letters", "reference"]
    require_built(run_build(settings, [*chosen, "--indirect-selection", "cautious"]))
    assert query(
        "select offered::int, landed::int, dead::int, dead_letter_rows::int, raw_rows::int, staged_rows::int, adds_up "
        "from audit.audit_reconciliation where feed = %s",
        PAYMENTS,
    ) == [(30, 24, 6, 6, 24, 24, True)]
    assert query("select feed_kind, stream_name, first_offset::int, last_offset::int from audit.audit_ledger") == [
        ("files", f"files:{landed}", 0, 29)
    ]
    query("delete from raw_payments._dead_letters where raw_key = '0/0000.json'")
    with pytest.raises(DataError, match="audit_reconciliation"):
        require_built(run_build(settings, [*chosen, "--indirect-selection", "cautious", "--full-refresh"]))


def test_what_the_command_refuses(run: Run, drop: Path, query: Query, tmp_path: Path) -> None:
    refused = {
        ("--from-files", str(drop)): "--from-files lands the files of one feed, not of 3.",
        ("--from-files", str(drop), "--feed", "raw_fx.daily_rates"): "raw_fx.daily_rates is read from an API",
        ("--from-files", str(drop / "none"), "--feed", PAYMENTS): f"{drop}/none is not a folder.",
        ("--from-files", str(tmp_path), "--feed", PAYMENTS): "holds the warehouse's own working folder",
    }
    for arguments, said in refused.items():
        result = run("ingest", *arguments)
        assert (result.returncode, result.stdout) == (2, ""), result.stderr
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 2, "one sentence, and what to do"
    assert query(
        "select count(*) from pg_namespace where nspname like 'raw%%'",
    ) == [(0,)], "nothing was started"

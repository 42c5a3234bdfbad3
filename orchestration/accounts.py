"""What the warehouse's own books say of each feed: ledger, losses, dead letters, writers, and the last reconciliation.

One connection and a few statements, none of them over a raw table: the answer does not take longer the more has landed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2 import sql

from ingestion.database import classify_error, connect
from ingestion.errors import WarehouseError
from ingestion.feeds import FeedSpec
from ingestion.ledger import LOCK_SPACE, Stream
from ingestion.settings import Settings

Cursor = psycopg2.extensions.cursor


@dataclass
class Account:
    """One feed's account over all time. offered = landed + dead + tombstones + unchanged.

    `positions`: stream -> partition -> next offset to read. `last_success`: when a run last read all there was.
    """

    offered: int = 0
    landed: int = 0
    dead: int = 0
    tombstones: int = 0
    unchanged: int = 0
    lost: int = 0
    open_losses: list[str] = field(default_factory=list)
    open_dead_letters: int = 0
    oldest_dead_letter: datetime | None = None
    newest_record: datetime | None = None
    last_success: datetime | None = None
    holder: str | None = None
    held_since: datetime | None = None
    streams: list[Stream] = field(default_factory=list)
    positions: dict[int, dict[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What the last reconciliation found of a feed. `behind`: rows that landed and are not in the models yet.

    `last_day` is None for a feed of which nothing had landed then.
    """

    adds_up: bool
    last_day: date | None
    broken_days: int = 0
    first_broken_day: date | None = None
    behind: int = 0


@dataclass(frozen=True)
class Books:
    """All accounts, by feed; `verdicts` is None where the reconciliation was not built yet."""

    accounts: Mapping[str, Account]
    verdicts: Mapping[str, Verdict] | None


def fetch_books(
    settings: Settings, feeds: Sequence[FeedSpec], timeout_s: float, on_connect: Callable[[], None] = lambda: None
) -> Books:
    """The account of every feed; one that never landed anything has an empty one.

    Args:
        timeout_s: what a single statement may take.
        on_connect: called once the database has answered.

    Raises:
        WarehouseError: the database refuses us, does not answer or takes too long.
    """
    accounts = {feed.name: Account() for feed in feeds}
    connection = connect(settings, purpose="status")
    on_connect()
    try:
        connection.set_session(readonly=True, autocommit=True)
        with connection.cursor() as cursor:
            cursor.execute("select set_config('statement_timeout', %s, false)", (f"{timeout_s * 1000:.0f}ms",))
            return _read_books(cursor, settings, accounts)
    except psycopg2.Error as error:
        named = classify_error(error)
        raise named or WarehouseError(f"The ledger cannot be read: {error.diag.message_primary}.") from error
    finally:
        connection.close()


def _read_books(cursor: Cursor, settings: Settings, accounts: dict[str, Account]) -> Books:
    declared = {name.partition(".")[0] for name in accounts}
    made = {row[0] for row in _rows(cursor, "select schemaname from pg_tables where tablename = '_ledger'")}
    sources = sorted(declared & made)
    if sources:
        _add_ledger(cursor, sources, accounts)
        _add_streams(cursor, sources, accounts)
        _add_losses(cursor, sources, accounts)
        _add_dead_letters(cursor, sources, accounts)
        _add_runs(cursor, accounts)
        _add_holders(cursor, sources, accounts)
    return Books(accounts, _fetch_verdicts(cursor, settings, accounts))


def _add_ledger(cursor: Cursor, sources: Sequence[str], accounts: Mapping[str, Account]) -> None:
    """Of committed loads. From the tables: the view `ops.ledger` costs a join that is not needed here."""
    for feed, stream_id, partition, *sums, last_position, newest in _from_each(
        cursor,
        sources,
        "select feed, stream_id, partition, sum(offered)::bigint, sum(landed)::bigint, sum(dead)::bigint, "
        "sum(tombstones)::bigint, sum(unchanged)::bigint, sum(lost)::bigint, max(last_position), max(source_time_max) "
        "from {source}._ledger where _dlt_load_id in (select load_id from {source}._dlt_loads) "
        "group by feed, stream_id, partition",
    ):
        account = accounts.get(feed)
        if account is None:
            continue
        for name, value in zip(("offered", "landed", "dead", "tombstones", "unchanged", "lost"), sums, strict=True):
            setattr(account, name, getattr(account, name) + value)
        positions = account.positions.setdefault(stream_id, {})
        if last_position is not None:
            positions[partition] = last_position + 1
        if newest is not None:
            account.newest_record = max(newest, account.newest_record or newest)


def _add_streams(cursor: Cursor, sources: Sequence[str], accounts: Mapping[str, Account]) -> None:
    """The streams a topic's lag is told by: read from, or following one that was cut; see `ledger.find_streams`."""
    columns = "feed, stream_id, origin, name, incarnation, begins_at"
    for feed, stream_id, origin, name, incarnation, begins_at in _from_each(
        cursor, sources, f"select {columns} from {{source}}._streams where kind <> 'files'", "order by stream_id"
    ):
        if feed in accounts and (begins_at or stream_id in accounts[feed].positions):
            begins = {int(partition): offset for partition, offset in begins_at.items()}
            accounts[feed].streams.append(Stream(stream_id, origin, name, incarnation, begins))


def _add_losses(cursor: Cursor, sources: Sequence[str], accounts: Mapping[str, Account]) -> None:
    for feed, detail, _ in _from_each(
        cursor,
        sources,
        "select feed, detail, detected_at from {source}._losses where accepted_at is null",
        "order by detected_at",
    ):
        if feed in accounts:
            accounts[feed].open_losses.append(detail)


def _add_dead_letters(cursor: Cursor, sources: Sequence[str], accounts: Mapping[str, Account]) -> None:
    """Open are those of the ledger, which takes replayed ones off, less those discarded: no letter is counted here."""
    discarded = dict(
        _from_each(
            cursor,
            sources,
            "select feed, count(*) from {source}._dead_letter_events where action = 'discarded' group by feed",
        )
    )
    for feed, account in accounts.items():
        account.open_dead_letters = account.dead - discarded.get(feed, 0)
        if account.open_dead_letters > 0:
            # By the index on (feed, failed_at): no further than to the first that is open.
            (row,) = _from_each(
                cursor,
                [feed.partition(".")[0]],
                "select (select d.failed_at from {source}._dead_letters as d where d.feed = %s "
                "and d.discarded_at is null "
                "and exists (select from {source}._dlt_loads as l where l.load_id = d._dlt_load_id) "
                "and not exists (select from {source}._dlt_loads as l where l.load_id = d.replay_load_id) "
                "order by d.failed_at limit 1)",
                values=(feed,),
            )
            account.oldest_dead_letter = row[0]


def _add_runs(cursor: Cursor, accounts: Mapping[str, Account]) -> None:
    for feed, finished_at in _rows(
        cursor,
        "select f.feed, (select s.finished_at from ops.run_steps s where s.feed = f.feed and s.outcome = 'success' "
        "and s.finished_at is not null order by s.finished_at desc limit 1) from unnest(%s) as f (feed)",
        list(accounts),
    ):
        accounts[feed].last_success = finished_at


def _add_holders(cursor: Cursor, sources: Sequence[str], accounts: Mapping[str, Account]) -> None:
    """Who has a feed's lock now; a writer that is done has left its name and no lock."""
    held = {
        key
        for (key,) in _rows(
            cursor,
            "select objid::bigint from pg_locks where locktype = 'advisory' and granted and classid = %s "
            "and objsubid = 2 and database = (select oid from pg_database where datname = current_database())",
            LOCK_SPACE,
        )
    }
    if not held:
        return
    key = "hashtext(feed)::bigint & 4294967295"
    for feed, holder, acquired_at, feed_key in _from_each(
        cursor, sources, f"select feed, holder, acquired_at, {key} from {{source}}._writers"
    ):
        if feed in accounts and feed_key in held:
            accounts[feed].holder, accounts[feed].held_since = holder, acquired_at


def _fetch_verdicts(cursor: Cursor, settings: Settings, accounts: Mapping[str, Account]) -> dict[str, Verdict] | None:
    # As macros/generate_schema_name.sql names it.
    schema = settings.get("WAREHOUSE_SCHEMA") or "analytics"
    table = sql.Identifier("audit" if schema == "analytics" else f"{schema}_audit", "audit_reconciliation")
    try:
        found = _rows(
            cursor,
            sql.SQL(
                "select feed, bool_and(adds_up), max(loaded_date), count(*) filter (where not adds_up), "
                "min(loaded_date) filter (where not adds_up), sum(landed - coalesce(waiting_rows, 0))::bigint "
                "from {} group by feed"
            ).format(table),
        )
    except (psycopg2.errors.UndefinedTable, psycopg2.errors.InvalidSchemaName, psycopg2.errors.UndefinedColumn):
        return None  # a column: built by an earlier version
    verdicts = {feed: Verdict(True, None, behind=account.landed) for feed, account in accounts.items()}
    for feed, adds_up, last_day, broken, first, in_models in found:
        if feed in accounts:
            verdicts[feed] = Verdict(adds_up, last_day, broken, first, max(accounts[feed].landed - in_models, 0))
    return verdicts


def _rows(cursor: Cursor, statement: str | sql.Composable, *values: object) -> list[tuple[Any, ...]]:
    cursor.execute(statement, values or None)
    return cursor.fetchall()


def _from_each(
    cursor: Cursor, sources: Sequence[str], statement: str, order: str = "", values: tuple[object, ...] = ()
) -> list[tuple[Any, ...]]:
    """The rows of a statement over the tables of every source."""
    parts = [sql.SQL(statement).format(source=sql.Identifier(source)) for source in sources]
    return _rows(cursor, sql.SQL(" union all ").join(parts) + sql.SQL(f" {order}"), *values)

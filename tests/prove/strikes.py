"""Stopping a loader exactly at a boundary, without a hook in the product: triggers in the test's database.

A statement trigger waits for an advisory lock the test holds, so the server stands still right before or right after
the statement; the test sees the waiter, kills the loader, and lets the server go on, at once or when the next loader
is already at work. The statement of the dead loader then ends as the server sees fit: a COPY without its client is
rolled back, an INSERT that was sent commits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import psycopg2

from tests.prove.stage import OTHERS, Database, Loader, wait_until

LOCK_SPACE = 7777

_SET_UP = """
create schema prove;
create table prove.strike (id integer primary key, tbl text, op text, moment text, skip integer);
create sequence prove.hits;
create function prove.strike() returns trigger language plpgsql as $$
declare s record;
begin
    select * into s from prove.strike where tbl = tg_table_name and op = tg_op and moment = tg_when;
    if found and nextval('prove.hits') > s.skip then
        perform pg_advisory_lock(7777, s.id);
        perform pg_advisory_unlock(7777, s.id);
    end if;
    return null;
end $$;
"""


@dataclass(frozen=True)
class Boundary:
    """Before or after a statement, or (`moment` = COMMITTED) as soon as others can see what it did."""

    table: str
    op: str
    moment: str

    def __str__(self) -> str:
        return f"{self.moment.lower()} {self.op.lower()} {self.table}"


COMMIT_BOUNDARIES = tuple(
    Boundary(table, "INSERT", moment)
    for table in ("_loads_begun", "transaction_created", "_dead_letters", "_ledger", "_dlt_loads")
    for moment in ("BEFORE", "AFTER", "COMMITTED")
)
SWEEP_BOUNDARIES = tuple(
    Boundary(table, op, moment)
    for table, op in (
        ("transaction_created", "DELETE"),
        ("_dead_letters", "DELETE"),
        ("_ledger", "DELETE"),
        ("_loads_begun", "UPDATE"),
    )
    for moment in ("BEFORE", "AFTER")
)
BEFORE_COMMIT = Boundary("_dlt_loads", "INSERT", "BEFORE")
AFTER_NOTE = Boundary("_loads_begun", "INSERT", "AFTER")
BEFORE_ROWS = Boundary("transaction_created", "INSERT", "BEFORE")
BEFORE_LEDGER = Boundary("_ledger", "INSERT", "BEFORE")


class Strikes:
    """The triggers of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = psycopg2.connect(database.dsn, application_name="prove")
        self._lock.autocommit = True
        self._id = 0
        database.query(_SET_UP)
        for boundary in (*COMMIT_BOUNDARIES, *SWEEP_BOUNDARIES):
            if boundary.moment != "COMMITTED":
                # The name sorts before the product's triggers; statement triggers stand around them anyway.
                database.query(
                    f"create trigger a_prove_{boundary.op}_{boundary.moment} {boundary.moment} {boundary.op} "
                    f"on raw_payments.{boundary.table} for each statement execute function prove.strike()"
                )

    def _tell(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        with self._lock.cursor() as cursor:
            cursor.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def arm(self, boundary: Boundary, skip: int = 0) -> Callable[[], bool]:
        """Set the trap for the next loader; what is returned says whether a loader is in it. `skip`: so many pass."""
        if boundary.moment == "COMMITTED":
            # Not their number: a run also clears away the notes of loads that committed.
            name = "load_id" if boundary.table in ("_loads_begun", "_dlt_loads") else "_dlt_load_id"
            newest = f"select coalesce(max({name}), '') from raw_payments.{boundary.table}"
            begun = self._database.query(newest)
            return lambda: self._database.query(newest) > begun
        self._id += 1
        number = self._id
        self._tell("select pg_advisory_lock(%s, %s), setval('prove.hits', 1, false)", LOCK_SPACE, number)
        self._tell(
            "insert into prove.strike values (%s, %s, %s, %s, %s)",
            *(number, boundary.table, boundary.op, boundary.moment, skip),
        )
        waiting = (
            "select 1 from pg_locks where locktype = 'advisory' and classid = %s and objid = %s and not granted "
            "and database = (select oid from pg_database where datname = current_database())"
        )
        own = self._id
        return lambda: bool(self._tell(waiting, LOCK_SPACE, own))

    def disarm(self) -> None:
        """The next loader passes; who waits goes on waiting."""
        self._tell("delete from prove.strike")

    def release(self) -> None:
        """Who waits goes on."""
        self._tell("select pg_advisory_unlock_all()")

    def abort(self) -> None:
        """The server ends what the dead loader left there, as its own crash would; nothing of it commits."""
        self._tell(f"select pg_terminate_backend(pid, 5000) from pg_stat_activity where {OTHERS}")
        self.release()

    def catch(self, loader: Loader, trapped: Callable[[], bool], timeout_s: float = 30.0) -> bool:
        """Wait until the loader is in the trap; False when it ended without."""
        return bool(wait_until(lambda: trapped() or not loader.is_alive, "the boundary", timeout_s, 0.002)) and (
            loader.is_alive
        )

    def close(self) -> None:
        self._lock.close()

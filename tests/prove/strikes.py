"""Stopping a loader exactly at a boundary, without a hook in the product: triggers in the test's database.

A statement trigger waits for an advisory lock the test holds, so the server stands still right before or right after
the statement; the test sees the waiter, kills the loader, and lets the server go on, at once or when the next loader
is already at work. The statement of the dead loader then ends as the server sees fit: a COPY without its client is
rolled back, an INSERT that was sent commits.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import psycopg2

from tests.prove.stage import Database, Loader, StuckError

LOCK_SPACE = 7777
TABLES = ("transaction_created", "_dead_letters", "_ledger", "_dlt_loads", "_loads_begun", "_writers", "_streams")

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
BEFORE_ROWS = Boundary("transaction_created", "INSERT", "BEFORE")


class Strikes:
    """The triggers of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = psycopg2.connect(database.dsn, application_name="prove")
        self._lock.autocommit = True
        self._id = 0
        database.query(_SET_UP)
        for table in TABLES:
            for op in ("INSERT", "UPDATE", "DELETE"):
                for moment in ("BEFORE", "AFTER"):
                    # The name sorts before the product's triggers; statement triggers stand around them anyway.
                    database.query(
                        f"create trigger a_prove_{op}_{moment} {moment} {op} on raw_payments.{table} "
                        "for each statement execute function prove.strike()"
                    )

    def _tell(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        with self._lock.cursor() as cursor:
            cursor.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def arm(self, boundary: Boundary, skip: int = 0) -> Callable[[], bool]:
        """Set the trap for the next loader; what is returned says whether a loader is in it. `skip`: so many pass."""
        self._id += 1
        if boundary.moment == "COMMITTED":
            if boundary.op != "INSERT":
                raise ValueError(boundary)
            count = f"select count(*) from raw_payments.{boundary.table}"
            begun = self._database.query(count)[0][0]
            return lambda: self._database.query(count)[0][0] > begun
        self._tell("select pg_advisory_lock(%s, %s)", LOCK_SPACE, self._id)
        self._tell("select setval('prove.hits', 1, false)")
        self._tell(
            "insert into prove.strike values (%s, %s, %s, %s, %s)",
            self._id,
            boundary.table,
            boundary.op,
            boundary.moment,
            skip,
        )
        waiting = (
            "select 1 from pg_locks where locktype = 'advisory' and classid = %s and objid = %s and not granted "
            "and database = (select oid from pg_database where datname = current_database())"
        )
        return lambda: bool(self._tell(waiting, LOCK_SPACE, self._id))

    def disarm(self) -> None:
        """The next loader passes; who waits goes on waiting."""
        self._tell("delete from prove.strike")

    def release(self) -> None:
        """Who waits goes on."""
        self._tell("select pg_advisory_unlock_all()")

    def catch(self, loader: Loader, trapped: Callable[[], bool], timeout_s: float = 30.0) -> bool:
        """Wait until the loader is in the trap; False when it ended without."""
        deadline = time.monotonic() + timeout_s
        while not trapped():
            if not loader.is_alive:
                return False
            if time.monotonic() > deadline:
                raise StuckError(f"loader {loader.pid} neither ended nor came to the boundary")
            time.sleep(0.001)
        return True

    def close(self) -> None:
        self._lock.close()

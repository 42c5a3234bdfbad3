"""How WAREHOUSE_DSN reaches the sessions of a load: every parameter as it is meant, and without SQLAlchemy."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import psycopg2.extensions
import pytest

from ingestion import credentials
from ingestion.credentials import LibpqCredentials
from ingestion.database import connect
from ingestion.ddl import ensure_schema
from ingestion.feeds import FeedSpec
from ingestion.landing import land_feed
from ingestion.settings import Settings
from tests.harness.records import payment

PAYMENTS = "raw_payments.transaction_created"
PROJECT = Path(__file__).resolve().parents[2]
OPTIONS = "-c statement_timeout=54321 -c lock_timeout=43210"

Query = Callable[..., list[tuple]]
Send = Callable[..., None]


@pytest.fixture(params=["as a URL", "as pairs"])
def with_options(request: pytest.FixtureRequest, warehouse: Settings, database_dsn: str) -> Settings:
    """The warehouse, with parameters in its DSN that hold spaces."""
    parts = psycopg2.extensions.parse_dsn(database_dsn)
    if request.param == "as pairs":
        return warehouse.with_env(WAREHOUSE_DSN=psycopg2.extensions.make_dsn(**parts, options=OPTIONS))
    place = f"{parts['user']}:{quote(parts.get('password', ''))}@{parts['host']}:{parts['port']}/{parts['dbname']}"
    return warehouse.with_env(WAREHOUSE_DSN=f"postgresql://{place}?options={quote(OPTIONS)}")


@pytest.fixture
def sessions(query: Query) -> Callable[[], set[tuple]]:
    """(name, statement timeout, lock timeout) of the sessions that committed a load."""
    query("create table public.seen (name text, statement_timeout text, lock_timeout text)")
    query(
        "create function public.note() returns trigger language plpgsql as $$ begin insert into public.seen values "
        "(current_setting('application_name'), current_setting('statement_timeout'), current_setting('lock_timeout')); "
        "return new; end $$"
    )
    return lambda: set(query("select * from public.seen"))


def land_watched(settings: Settings, feed: FeedSpec, send: Send, query: Query) -> None:
    connection = connect(settings)
    ensure_schema(connection, [feed])
    connection.close()
    query("create trigger z_note before insert on raw_payments._dlt_loads for each row execute function public.note()")
    send(feed, [(b"k", payment())], 0)
    land_feed(settings, feed)


def test_options_reach_every_session(
    with_options: Settings,
    own_topic: Callable[[str], FeedSpec],
    send: Send,
    query: Query,
    sessions: Callable[[], set[tuple]],
) -> None:
    land_watched(with_options, own_topic(PAYMENTS), send, query)
    assert sessions() == {(f"payments-warehouse:{PAYMENTS}", "54321ms", "43210ms")}
    connection = connect(with_options)
    with connection.cursor() as cursor:
        cursor.execute("select current_setting('statement_timeout'), current_setting('timezone')")
        assert cursor.fetchone() == ("54321ms", "UTC")
    connection.close()


@pytest.mark.parametrize(("case", "name"), [("as it is", "a name, spaced"), ("twin", "a+name,+spaced")])
def test_a_parameter_with_a_space_reaches_dlts_sessions(
    warehouse: Settings,
    own_topic: Callable[[str], FeedSpec],
    send: Send,
    query: Query,
    sessions: Callable[[], set[tuple]],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    name: str,
) -> None:
    """Twin: written as dlt writes it, libpq reads another value."""
    monkeypatch.setattr(credentials.ledger, "load_session_name", lambda feed: "a name, spaced")
    if case == "twin":
        monkeypatch.delattr(LibpqCredentials, "to_native_representation")
    land_watched(warehouse, own_topic(PAYMENTS), send, query)
    assert {row[0] for row in sessions()} == {name}


@pytest.mark.parametrize("text", ["it's", "back\\slash", "a b", "", "ü=1&x?#/@:%20", '"q"'])
def test_a_password_of_any_letters_is_written_as_libpq_reads_it(text: str) -> None:
    place = {"host": "::1", "port": 5433, "username": "u", "password": text, "database": "d"}
    written = LibpqCredentials({**place, "query": {"sslrootcert": "/my certificates/ca.pem"}})
    assert psycopg2.extensions.parse_dsn(written.to_native_representation()) == {
        "host": "::1",
        "port": "5433",
        "user": "u",
        "password": text,
        "dbname": "d",
        "connect_timeout": "15",
        "sslrootcert": "/my certificates/ca.pem",
    }
    assert str(written) == "postgresql://u@::1:5433/d"


LOADER = """
import sys
from dataclasses import replace
from pathlib import Path
from ingestion import credentials
from ingestion.feeds import load_feeds, select_feeds
from ingestion.landing import land_feed
from ingestion.settings import load_settings

if sys.argv[3] == "twin":
    del credentials.LibpqCredentials.to_native_representation
settings = load_settings(Path(sys.argv[1]))
(feed,) = select_feeds(load_feeds(settings), ["raw_payments.transaction_created"])
assert land_feed(settings, replace(feed, origin=replace(feed.origin, topic=sys.argv[2]))).landed == 1
print("sqlalchemy" in sys.modules)
"""


@pytest.mark.parametrize(("case", "imported"), [("as it is", "False"), ("twin", "True")])
def test_a_load_does_not_import_sqlalchemy(
    warehouse: Settings, own_topic: Callable[[str], FeedSpec], send: Send, case: str, imported: str
) -> None:
    feed = own_topic(PAYMENTS)
    send(feed, [(b"k", payment())], 0)
    names = ("WAREHOUSE_DSN", "KAFKA_BOOTSTRAP_SERVERS", "KAFKA_CLUSTER_INCARNATION", "WAREHOUSE_EMBEDDED")
    environment = {**os.environ, **{name: warehouse.env[name] for name in names}, "WAREHOUSE_HOME": str(warehouse.home)}
    found = subprocess.run(
        [sys.executable, "-c", LOADER, str(PROJECT), feed.origin.topic, case],  # type: ignore[union-attr]
        env=environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout.strip()) == (0, imported), found.stderr

"""Fixtures shared by all tests: a real Postgres for the session, a database for each test, a broker and an API.

The services are the product's own embedded ones, in a home of the session's; `WAREHOUSE_TEST_DSN` names another
Postgres to use instead. Unit tests take none of these fixtures.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psycopg2
import psycopg2.extensions
import pytest

from ingestion.feeds import FeedSpec, load_feeds
from ingestion.settings import Settings, load_settings

PROJECT = Path(__file__).resolve().parents[1]
OWN_SETTINGS = ("WAREHOUSE_", "KAFKA_", "FX_API_")
# A command that crashes says where.
os.environ["PYTHONFAULTHANDLER"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session", autouse=True)
def dlt_outside_of_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Loads link their working folders into dlt's own; the tests' do not belong into the user's."""
    os.environ["DLT_DATA_DIR"] = str(tmp_path_factory.mktemp("dlt"))


@pytest.fixture(scope="session")
def clean_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The project's settings without anything of the machine's: no server named, a home of the session's."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)}
    return replace(load_settings(PROJECT), home=tmp_path_factory.mktemp("home"), env=env)


@pytest.fixture(scope="session")
def services(clean_settings: Settings) -> Iterator[Settings]:
    """The embedded services, up for the session."""
    from orchestration.services import erase, running

    with running(clean_settings) as settings:
        _forgo_syncs(settings.require("WAREHOUSE_DSN", "the embedded Postgres has one"))
        yield settings
    # Run by root, the data may lie outside the home, where Postgres' user can reach it.
    erase(clean_settings, force=True)


def _forgo_syncs(dsn: str) -> None:
    """Processes die in the tests, machines do not: what the kernel was given is not lost."""
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    with connection.cursor() as cursor:
        for setting in ("fsync", "full_page_writes"):
            cursor.execute(f"alter system set {setting} = off")
        cursor.execute("select pg_reload_conf()")
    connection.close()


@pytest.fixture(scope="session")
def server_dsn(request: pytest.FixtureRequest) -> str:
    """A Postgres in which databases can be made."""
    named = os.environ.get("WAREHOUSE_TEST_DSN")
    if named:
        return named
    settings: Settings = request.getfixturevalue("services")
    return settings.require("WAREHOUSE_DSN", "the embedded Postgres has one")


@pytest.fixture
def database_dsn(server_dsn: str) -> Iterator[str]:
    """A fresh database, gone after the test."""
    # One name for all tests of a process: what dbt parsed for one of them is good for the next.
    name = f"test_{os.getpid()}"
    admin = psycopg2.connect(server_dsn)
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute(f"create database {name}")
    try:
        yield psycopg2.extensions.make_dsn(server_dsn, dbname=name)
    finally:
        with admin.cursor() as cursor:
            cursor.execute(f"drop database if exists {name} with (force)")
        admin.close()


@pytest.fixture
def warehouse(services: Settings, database_dsn: str, tmp_path: Path) -> Settings:
    """Settings of a warehouse of the test's own: fresh database, fresh home, the session's broker and API.

    The broker has a name of its own, so that it counts as one of the user's and is not allowed to forget.
    """
    settings = services.with_env(WAREHOUSE_DSN=database_dsn, KAFKA_CLUSTER_INCARNATION="cluster-of-the-tests")
    return replace(settings, home=tmp_path / "home")


@pytest.fixture
def connection(database_dsn: str) -> Iterator[psycopg2.extensions.connection]:
    """A connection to the test's database, in autocommit."""
    opened = psycopg2.connect(database_dsn, options="-c timezone=UTC")
    opened.autocommit = True
    yield opened
    opened.close()


@pytest.fixture
def feed_named(clean_settings: Settings) -> Callable[[str], FeedSpec]:
    """A declared feed by its full name."""
    feeds = {feed.name: feed for feed in load_feeds(clean_settings)}
    return feeds.__getitem__

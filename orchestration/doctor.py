"""Checks every setting, declaration and connection, and says what to do about each that is wrong."""

import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import psycopg2

from ingestion.database import classify_error, connect, where
from ingestion.errors import WarehouseError
from ingestion.feeds import FeedSpec, KafkaOrigin, RestOrigin, load_feeds
from ingestion.settings import Settings

MIN_FREE_BYTES = 1 << 30
MIN_POSTGRES = 150000


@dataclass(frozen=True)
class Check:
    """One thing looked at: `ok`, what was found, and what to do when it is not."""

    name: str
    ok: bool
    found: str
    hint: str = ""


def examine(settings: Settings) -> list[Check]:
    """All checks; one that fails does not keep the others from running."""
    checks = [
        _attempt("python", lambda: f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"),
        _attempt("project", lambda: str(settings.project_dir)),
        _check_disk(settings),
    ]
    feeds: list[FeedSpec] = []

    def declarations() -> str:
        feeds.extend(load_feeds(settings))
        return f"{len(feeds)} feeds declared"

    checks.append(_attempt("declarations", declarations))
    checks.append(_attempt("postgres", lambda: _examine_postgres(settings)))
    # At once: a server that is down takes its whole time to say nothing.
    with ThreadPoolExecutor(max_workers=max(len(feeds), 1)) as pool:
        checks.extend(pool.map(lambda feed: _check_source(settings, feed), feeds))
    checks.append(_attempt("dbt profile", lambda: _examine_profile(settings)))
    checks.extend(_check_alerts(settings))
    return checks


def _check_source(settings: Settings, feed: FeedSpec) -> Check:
    if isinstance(feed.origin, KafkaOrigin):
        return _attempt(f"topic {feed.origin.topic}", partial(_examine_topic, settings, feed))
    return _attempt(f"api {feed.name}", partial(_examine_api, settings, feed))


def _attempt(name: str, examine_: Callable[[], str]) -> Check:
    try:
        return Check(name, True, examine_())
    except WarehouseError as error:
        return Check(name, False, error.message, error.hint)
    except psycopg2.Error as error:
        named = classify_error(error)
        if named is None:
            raise
        return Check(name, False, named.message, named.hint)


def _check_alerts(settings: Settings) -> list[Check]:
    """The receivers of alerts: their settings, and what they answered last. Nothing is sent."""
    from orchestration.receivers import find_heartbeat, find_receivers, hint_of

    receivers, wrong = find_receivers(settings)
    checks = [Check("alerts", False, error.message, error.hint) for error in wrong]
    checks.append(
        _attempt("alerts heartbeat", lambda: heartbeat.host if (heartbeat := find_heartbeat(settings)) else "not set")
    )
    refusals = _fetch_refusals(settings)
    for receiver in receivers:
        name = f"alerts to {receiver.name}"
        # Other settings than those that were refused are not judged before they were tried.
        problem = refusals.get((receiver.name, receiver.digest))
        checks.append(Check(name, problem is None, problem or receiver.host, hint_of(receiver.name) if problem else ""))
    if not receivers and not wrong:
        checks.append(Check("alerts", True, "nobody is told: no WAREHOUSE_ALERT_ setting names a receiver"))
    return checks


def _fetch_refusals(settings: Settings) -> dict[tuple[str, str], str]:
    """(receiver, digest of its settings) -> what it refused last; nothing where the database does not say."""
    try:
        connection = connect(settings, purpose="doctor")
    except WarehouseError:
        return {}
    try:
        with connection.cursor() as cursor:
            cursor.execute("select receiver, configuration, problem from ops.alert_receivers where is_refusing")
            return {(receiver, digest): problem for receiver, digest, problem in cursor.fetchall()}
    except psycopg2.Error:
        return {}  # no command has made the tables yet
    finally:
        connection.close()


def _check_disk(settings: Settings) -> Check:
    folder = next(f for f in (settings.home, *settings.home.parents) if f.exists())
    free = shutil.disk_usage(folder).free
    return Check(
        "disk",
        free >= MIN_FREE_BYTES,
        f"{free / 2**30:.1f} GiB free at {settings.home}",
        "Loads spool their files here.",
    )


def _examine_postgres(settings: Settings) -> str:
    connection = connect(settings, purpose="doctor")
    try:
        version = connection.server_version
        with connection.cursor() as cursor:
            cursor.execute("select has_database_privilege(current_database(), 'create')")
            (may_create,) = cursor.fetchone() or (False,)
            cursor.execute("select count(*) from pg_available_extensions where name = 'btree_gist'")
            (has_gist,) = cursor.fetchone() or (0,)
    finally:
        connection.close()
    place = where(settings.dsn or "")
    if version < MIN_POSTGRES:
        raise WarehouseError(f"Postgres at {place} is version {version // 10000}.", hint="Use Postgres 15 or later.")
    if not may_create:
        raise WarehouseError(f"The user may not create schemas in {place}.", hint="grant create on database ... to ...")
    if not has_gist:
        raise WarehouseError(
            f"Postgres at {place} has no btree_gist extension.", hint="Install the contrib package of the server."
        )
    embedded = " (embedded)" if "postgres" in settings.embedded else ""
    return f"version {version // 10000}.{version % 10000} at {place}{embedded}"


def _examine_topic(settings: Settings, feed: FeedSpec) -> str:
    from ingestion.kafka import TopicReader

    reader = TopicReader(settings, feed)
    try:
        topic = reader.fetch_topic()
    finally:
        reader.close()
    waiting = sum(end - start for start, end in topic.bounds.values())
    embedded = " (embedded)" if "kafka" in settings.embedded else ""
    return f"{len(topic.bounds)} partitions, {waiting:,} records kept, at {settings.kafka_bootstrap}{embedded}"


def _examine_api(settings: Settings, feed: FeedSpec) -> str:
    import datetime as dt

    from ingestion.rest import EndpointReader, plan_windows

    assert isinstance(feed.origin, RestOrigin)
    reader = EndpointReader(settings, feed)
    today = dt.datetime.now(dt.UTC)
    # A week holds a business day; a day may hold none.
    windows = plan_windows(feed.origin, today, today.date())[-1:]
    if not windows:
        return f"nothing is asked for before {feed.origin.window.start}, at {reader.base_url}"
    records = sum(len(page.records) for page in reader.read(windows))
    return f"{records} records from {windows[0][0]:%Y-%m-%d} on, at {reader.base_url}"


def _examine_profile(settings: Settings) -> str:
    from orchestration.transform import ensure_profiles

    return str(ensure_profiles(settings))

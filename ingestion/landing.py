"""Landing one feed: source -> decoded against the contract -> raw table, dead letters and ledger, load by load.

    lock the feed -> sweep what never committed -> compare positions with the source -> read, decode, commit, repeat

What was offered is, after every commit, landed, dead-lettered, or counted as tombstone, unchanged or lost. A run that
dies leaves nothing true: the next one sweeps and reads on from the last commit. Run alone:
`warehouse ingest raw_payments.transaction_created`.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psycopg2
from psycopg2 import sql

from ingestion import ledger
from ingestion.database import classify_error, connect
from ingestion.ddl import ensure_schema
from ingestion.endpoint import Progress, land_endpoint
from ingestion.feeds import FeedSpec, KafkaOrigin
from ingestion.files import FolderReader
from ingestion.ledger import Connection
from ingestion.load import clear_spool
from ingestion.package import Package
from ingestion.profile import Profile
from ingestion.settings import Settings
from ingestion.topic import RECORDS_PER_LOAD, land_topic

# Statistics are renewed when a run adds more than this share of a raw table.
GROWTH_TO_ANALYZE = 0.1


@dataclass
class Landing:
    """What one run did to one feed. offered = landed + dead + tombstones + unchanged."""

    feed: str
    landed: int = 0
    dead: int = 0
    tombstones: int = 0
    unchanged: int = 0
    control: int = 0
    lost: int = 0
    drifted: int = 0
    loads: list[str] = field(default_factory=list)
    swept: list[str] = field(default_factory=list)
    # Of a folder read instead of the feed's source: its stream, and what in it is no file.
    stream: str = ""
    passed_over: list[str] = field(default_factory=list)
    open_losses: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    profile: Profile = field(default_factory=Profile)

    @property
    def offered(self) -> int:
        return self.landed + self.dead + self.tombstones + self.unchanged

    def add(self, package: Package) -> None:
        """Count a committed package."""
        self.loads.append(package.load_id)
        for interval in package.intervals:
            for name in ("landed", "dead", "tombstones", "unchanged", "control", "lost", "drifted"):
                setattr(self, name, getattr(self, name) + getattr(interval, name))


def land_feed(
    settings: Settings,
    feed: FeedSpec,
    *,
    progress: Progress = lambda done, due: None,
    records_per_load: int = RECORDS_PER_LOAD,
    take_over: bool = False,
    landing: Landing | None = None,
    folder: Path | None = None,
) -> Landing:
    """Read everything the source offers now and land it.

    A landing with `open_losses` is complete and the run it belongs to has failed all the same.

    Args:
        landing: what earlier tries of the same run did; this one adds what it commits, also when it fails.
        folder: its files are landed, instead of what the feed's source offers.

    Raises:
        FeedBusyError, SourceLossError, TransientError, ConfigurationError, AuthenticationError: the loads committed
            before stay; nothing else is true.
    """
    started = time.monotonic()
    connection = connect(settings, purpose=f"ingest {feed.name}")
    landing = Landing(feed.name) if landing is None else landing
    try:
        ensure_schema(connection, [feed])
        with ledger.writing(connection, feed, take_over=take_over) as writer:
            landing.swept += ledger.sweep(connection, feed)
            clear_spool(settings, feed)
            if folder is not None:
                reader = FolderReader(settings, connection, feed, folder, landing.loads)
                land_topic(settings, connection, writer, landing, progress, records_per_load, reader)
            elif isinstance(feed.origin, KafkaOrigin):
                land_topic(settings, connection, writer, landing, progress, records_per_load)
            else:
                land_endpoint(settings, connection, writer, landing, progress)
            if landing.loads:
                _analyze(connection, feed, landing.landed)
            if folder is None:
                landing.open_losses = ledger.find_open_losses(connection, feed)
    except psycopg2.Error as error:
        # A statement of our own (schema, lock, sweep, positions): named, or the retry would not know an outage.
        named = classify_error(error)
        if named is None:
            raise
        raise named from error
    finally:
        connection.close()
        landing.profile.finish()
        landing.seconds += time.monotonic() - started
    return landing


def _analyze(connection: Connection, feed: FeedSpec, added: int) -> None:
    """Statistics after a first or large load: without them the planner takes a million rows for a thousand.

    Autovacuum sees to the rest.
    """
    with connection.cursor() as cursor:
        cursor.execute("select reltuples from pg_class where oid = %s::regclass", (f"{feed.source}.{feed.table}",))
        known = (cursor.fetchone() or (0,))[0]
        if added > GROWTH_TO_ANALYZE * max(known, 0):
            for table in (feed.table, "_dlt_loads", "_ledger", "_dead_letters"):
                cursor.execute(sql.SQL("analyze {}").format(sql.Identifier(feed.source, table)))

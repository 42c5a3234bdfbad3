"""Tables the loaders write: raw tables from the declarations, bookkeeping beside them, run history in `ops`.

Made here rather than by dlt, because the guarantees stand in the database: intervals of the ledger that cannot
overlap, and a commit point (`_dlt_loads`) whose trigger refuses a writer that lost its feed, a load that would leave
a hole, and a load id that runs backwards. dlt finds the tables there and copies into them.

Idempotent: runs before every load, changes nothing where nothing is missing.
"""

import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files

import psycopg2.extensions
from psycopg2 import sql

from ingestion.errors import ConfigurationError
from ingestion.feeds import FeedSpec, KafkaOrigin, RestOrigin

Connection = psycopg2.extensions.connection

# (name, type, nullable): what the loader itself knows about a row. Order is the order of the raw table.
KAFKA_COORDINATES = (
    ("_stream_id", "integer", False),
    ("_kafka_partition", "integer", False),
    ("_kafka_offset", "bigint", False),
    ("_kafka_timestamp", "timestamptz", True),
    ("_kafka_key", "bytea", True),
    ("_kafka_headers", "jsonb", True),
)
API_COORDINATES = (
    ("_stream_id", "integer", False),
    ("_api_window_from", "timestamptz", False),
    ("_api_window_to", "timestamptz", False),
    ("_api_page", "integer", False),
    ("_api_item", "integer", False),
    ("_content_hash", "text", False),
)
LOAD_COLUMNS = (("_loaded_at", "timestamptz", False), ("_dlt_load_id", "text", False))

DEAD_LETTER_COLUMNS = (
    ("dead_letter_id", "text", False),
    ("feed", "text", False),
    ("_stream_id", "integer", False),
    ("_kafka_partition", "integer", True),
    ("_kafka_offset", "bigint", True),
    ("_api_window_from", "timestamptz", True),
    ("_api_window_to", "timestamptz", True),
    ("_api_page", "integer", True),
    ("_api_item", "integer", True),
    ("source_time", "timestamptz", True),
    ("failed_at", "timestamptz", False),
    ("reason", "text", False),
    ("path", "text", False),
    ("message", "text", False),
    ("raw_key", "bytea", True),
    ("raw_value", "bytea", False),
    ("headers", "jsonb", True),
    ("contract_version", "text", False),
    ("loader_version", "text", False),
    ("attempts", "integer", False),
    # The load that landed it; it counts when that load is committed.
    ("replay_load_id", "text", True),
    ("discarded_at", "timestamptz", True),
    ("discarded_by", "text", True),
    ("discarded_because", "text", True),
    ("_dlt_load_id", "text", False),
)
LEDGER_COLUMNS = (
    ("feed", "text", False),
    ("stream_id", "integer", False),
    ("kind", "text", False),
    ("partition", "integer", False),
    ("first_position", "bigint", True),
    ("last_position", "bigint", True),
    ("window_from", "timestamptz", True),
    ("window_to", "timestamptz", True),
    ("pages", "integer", False),
    ("offered", "bigint", False),
    ("landed", "bigint", False),
    ("dead", "bigint", False),
    ("tombstones", "bigint", False),
    ("unchanged", "bigint", False),
    ("control", "bigint", False),
    ("lost", "bigint", False),
    # Rows that had landed, were gone from the raw table and were read again: no part of `landed`.
    ("restored", "bigint", False),
    ("drifted", "bigint", False),
    ("bytes", "bigint", False),
    ("source_time_min", "timestamptz", True),
    ("source_time_max", "timestamptz", True),
    # Windows of an API that held nothing: [from, to, first seen].
    ("empty_windows", "jsonb", True),
    ("contract_version", "text", False),
    ("writer_token", "bigint", False),
    ("loaded_at", "timestamptz", False),
    ("_dlt_load_id", "text", False),
)


def raw_columns(feed: FeedSpec) -> list[tuple[str, str, bool]]:
    """(name, SQL type, nullable) of a feed's raw table, in order."""
    coordinates = KAFKA_COORDINATES if isinstance(feed.origin, KafkaOrigin) else API_COORDINATES
    return [
        *((column.name, column.type.sql, not column.required) for column in feed.columns),
        ("_extra", "jsonb", True),
        *coordinates,
        *LOAD_COLUMNS,
    ]


def ensure_schema(connection: Connection, feeds: Sequence[FeedSpec]) -> None:
    """Make what is missing: extension, schemas, raw tables, bookkeeping, run history, views. Commits.

    Raises:
        ConfigurationError: a raw table has a column of another type than declared.
    """
    with connection, connection.cursor() as cursor:
        # Two first runs at once would race on CREATE ... IF NOT EXISTS, which is not atomic in Postgres.
        cursor.execute("select pg_advisory_xact_lock(hashtext('payments-warehouse ddl'))")
        cursor.execute(_script("ops.sql"))
        cursor.execute(_script("alerts.sql"))
        # Also of sources nobody declares any more: the views are over all there are.
        sources = sorted({feed.source for feed in feeds} | set(_find_sources(cursor)))
        for source in sources:
            _ensure_bookkeeping(cursor, source)
        for feed in feeds:
            _ensure_raw_table(cursor, feed)
        _ensure_views(cursor, sources)


def _find_sources(cursor: psycopg2.extensions.cursor) -> list[str]:
    cursor.execute("select schemaname from pg_tables where tablename = '_ledger' order by 1")
    return [row[0] for row in cursor.fetchall()]


def _script(name: str) -> str:
    return files("ingestion").joinpath("sql", name).read_text(encoding="utf-8")


def _columns_sql(columns: Sequence[tuple[str, str, bool]]) -> sql.Composable:
    return sql.SQL(", ").join(
        sql.SQL("{} {}{}").format(sql.Identifier(name), sql.SQL(type_), sql.SQL("" if nullable else " not null"))
        for name, type_, nullable in columns
    )


def _ensure_bookkeeping(cursor: psycopg2.extensions.cursor, source: str) -> None:
    schema = sql.Identifier(source)
    cursor.execute(sql.SQL("create schema if not exists {}").format(schema))
    for table, columns in (("_ledger", LEDGER_COLUMNS), ("_dead_letters", DEAD_LETTER_COLUMNS)):
        cursor.execute(
            sql.SQL("create table if not exists {}.{} ({})").format(
                schema, sql.Identifier(table), _columns_sql(columns)
            )
        )
        _add_missing_columns(cursor, source, table, columns)
    script = _script("bookkeeping.sql")
    stamp = f"bookkeeping {hashlib.sha256(script.encode()).hexdigest()[:16]}"
    if not _has_bookkeeping(cursor, source, script, stamp):
        cursor.execute(script.replace("raw_schema", schema.as_string(cursor)))
        cursor.execute(
            sql.SQL("comment on table {} is {}").format(sql.Identifier(source, "_writers"), sql.Literal(stamp))
        )


def _has_bookkeeping(cursor: psycopg2.extensions.cursor, source: str, script: str, stamp: str) -> bool:
    """Whether the script ran as it is now and each guard it makes is still there.

    CREATE INDEX and CREATE TRIGGER wait for whoever writes to the table, even where they then do nothing: a writer
    that froze in the middle of a COPY could not be taken over.
    """
    triggers = re.findall(r"create or replace trigger (\w+)", script)
    constraints = re.findall(r"add constraint (\w+)", script)
    cursor.execute(
        "select obj_description(to_regclass(%s)) = %s and "
        "(select count(*) from pg_trigger t join pg_class c on c.oid = t.tgrelid "
        "where c.relnamespace = n.oid and t.tgname::text = any(%s) and t.tgenabled <> 'D') = %s and "
        "(select count(*) from pg_constraint where connamespace = n.oid and conname::text = any(%s)) = %s "
        "from pg_namespace n where n.nspname = %s",
        (f'"{source}"._writers', stamp, triggers, len(triggers), constraints, len(constraints), source),
    )
    row = cursor.fetchone()
    return bool(row and row[0])


def _add_missing_columns(
    cursor: psycopg2.extensions.cursor, source: str, table: str, columns: Sequence[tuple[str, str, bool]]
) -> None:
    """Bring a bookkeeping table of an earlier version up to date. Looks first: ALTER TABLE locks readers out."""
    existing = _fetch_columns(cursor, source, table)
    for name, type_, nullable in columns:
        if name not in existing:
            default = "" if nullable else " not null default 0"
            cursor.execute(
                sql.SQL("alter table {} add column {} {}").format(
                    sql.Identifier(source, table), sql.Identifier(name), sql.SQL(type_ + default)
                )
            )
    declared = {name for name, _, _ in columns}
    for name, (_, required) in existing.items():
        if name not in declared and required:
            # A column earlier versions filled.
            cursor.execute(
                sql.SQL("alter table {} alter column {} drop not null").format(
                    sql.Identifier(source, table), sql.Identifier(name)
                )
            )


def _fetch_columns(cursor: psycopg2.extensions.cursor, schema: str, table: str) -> dict[str, tuple[str, bool]]:
    """Column -> (type, whether it is NOT NULL); empty for a table that is not there."""
    cursor.execute(
        "select a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull from pg_attribute a "
        "join pg_class c on c.oid = a.attrelid join pg_namespace n on n.oid = c.relnamespace "
        "where n.nspname = %s and c.relname = %s and a.attnum > 0 and not a.attisdropped",
        (schema, table),
    )
    return {name: (type_, required) for name, type_, required in cursor.fetchall()}


def _ensure_raw_table(cursor: psycopg2.extensions.cursor, feed: FeedSpec) -> None:
    table = sql.Identifier(feed.source, feed.table)
    columns = raw_columns(feed)
    existing = _fetch_columns(cursor, feed.source, feed.table)
    if not existing:
        cursor.execute(sql.SQL("create table {} ({})").format(table, _columns_sql(columns)))
        # Loads arrive in order, so the smallest of indexes finds one load among millions of rows.
        cursor.execute(
            sql.SQL("create index {} on {} using brin (_dlt_load_id) with (autosummarize = on)").format(
                sql.Identifier(f"{feed.table}__load"), table
            )
        )
        if isinstance(feed.origin, RestOrigin):
            # A window is asked for again: each of its records is looked up.
            key = sql.SQL(", ").join(map(sql.Identifier, feed.origin.key))
            cursor.execute(
                sql.SQL("create index {} on {} ({})").format(sql.Identifier(f"{feed.table}__key"), table, key)
            )
        return
    for name, type_, nullable in columns:
        if name not in existing:
            # Rows landed before the column was declared do not have it, so it cannot be NOT NULL.
            cursor.execute(
                sql.SQL("alter table {} add column {} {}").format(table, sql.Identifier(name), sql.SQL(type_))
            )
            continue
        found, required = existing[name]
        if found.replace("timestamp with time zone", "timestamptz") != type_:
            raise ConfigurationError(
                f"{feed.file}:{feed.line}: {feed.name}.{name} is declared {type_}, the database has {found}.",
                hint="Land the new type under a new column name, or migrate the table by hand.",
            )
        if required and nullable:
            # The contract was relaxed: what it takes now, the table must take.
            cursor.execute(sql.SQL("alter table {} alter column {} drop not null").format(table, sql.Identifier(name)))


def _ensure_views(cursor: psycopg2.extensions.cursor, sources: Sequence[str]) -> None:
    """`ops.ledger`, `ops.dead_letters`, `ops.dead_letter_events` and `ops.loads`; committed loads only."""
    for view in ("loads", "ledger", "dead_letters", "dead_letter_events"):
        template = _script(f"view_{view}.sql")
        parts = [
            template.replace("raw_schema", sql.Identifier(source).as_string(cursor)).replace(
                "'source_name'", sql.Literal(source).as_string(cursor)
            )
            for source in sources
        ]
        definition = "\nunion all\n".join(parts)
        cursor.execute("select obj_description(to_regclass(%s))", (f"ops.{view}",))
        (comment,) = cursor.fetchone() or (None,)
        stamp = f"over {', '.join(sources)}; {hashlib.sha256(template.encode()).hexdigest()[:12]}"
        if comment != stamp:
            cursor.execute(f"create or replace view ops.{view} as\n{definition}")
            cursor.execute(sql.SQL("comment on view {} is {}").format(sql.Identifier("ops", view), sql.Literal(stamp)))

"""Tables the loaders write: raw tables from the declarations, bookkeeping beside them, run history in `ops`.

Made here rather than by dlt, because the guarantees stand in the database: intervals of the ledger that cannot
overlap, and a commit point (`_dlt_loads`) whose trigger refuses a writer that lost its feed, a load that would leave
a hole, and a load id that runs backwards. dlt finds the tables there and copies into them.

Idempotent: runs before every load, changes nothing where nothing is missing.
"""

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
    ("status", "text", False),
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
    ("drifted", "bigint", False),
    ("bytes", "bigint", False),
    ("source_time_min", "timestamptz", True),
    ("source_time_max", "timestamptz", True),
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
        for source in sorted({feed.source for feed in feeds}):
            _ensure_bookkeeping(cursor, source)
        for feed in feeds:
            _ensure_raw_table(cursor, feed)
        _ensure_views(cursor, sorted({feed.source for feed in feeds}))


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
    cursor.execute(_script("bookkeeping.sql").replace("raw_schema", schema.as_string(cursor)))


def _ensure_raw_table(cursor: psycopg2.extensions.cursor, feed: FeedSpec) -> None:
    table = sql.Identifier(feed.source, feed.table)
    columns = raw_columns(feed)
    cursor.execute(
        "select a.attname, format_type(a.atttypid, a.atttypmod) from pg_attribute a "
        "join pg_class c on c.oid = a.attrelid join pg_namespace n on n.oid = c.relnamespace "
        "where n.nspname = %s and c.relname = %s and a.attnum > 0 and not a.attisdropped",
        (feed.source, feed.table),
    )
    existing: dict[str, str] = dict(cursor.fetchall())
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
    for name, type_, _ in columns:
        if name not in existing:
            # Rows landed before the column was declared do not have it, so it cannot be NOT NULL.
            cursor.execute(
                sql.SQL("alter table {} add column {} {}").format(table, sql.Identifier(name), sql.SQL(type_))
            )
        elif existing[name].replace("timestamp with time zone", "timestamptz") != type_:
            raise ConfigurationError(
                f"{feed.file}:{feed.line}: {feed.name}.{name} is declared {type_}, the database has {existing[name]}.",
                hint="Land the new type under a new column name, or migrate the table by hand.",
            )


def _ensure_views(cursor: psycopg2.extensions.cursor, declared: Sequence[str]) -> None:
    """`ops.ledger`, `ops.dead_letters` and `ops.loads` over every schema with a ledger, committed loads only."""
    cursor.execute("select schemaname from pg_tables where tablename = '_ledger' order by 1")
    sources = [row[0] for row in cursor.fetchall()]
    for view in ("loads", "ledger", "dead_letters"):
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
        stamp = f"over {', '.join(sources)}"
        if comment != stamp:
            cursor.execute(f"create or replace view ops.{view} as\n{definition}")
            cursor.execute(sql.SQL("comment on view {} is {}").format(sql.Identifier("ops", view), sql.Literal(stamp)))

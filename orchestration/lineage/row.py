"""From a row of a model back to the records it is made of: topic, partition, offset, load; and their dead letters.

    key of the row -> the graph, up to the raw tables -> the same key in terms of their columns -> coordinates

A key that is an expression on its way (a token, a day of a moment) is looked for by that expression. Values are
compared in the database and never shown.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ingestion.errors import ConfigurationError
from ingestion.feeds import FeedSpec, KafkaOrigin
from orchestration.lineage.graph import ROWS, ColumnId, Graph

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

# Records shown of a row; a sum may be made of millions.
SHOWN = 50
# A column in a template.
_HOLE = "\0"


@dataclass(frozen=True)
class Record:
    """A landed record, by its coordinates."""

    feed: str
    origin: str
    place: str
    load_id: str
    loaded_at: datetime


@dataclass(frozen=True)
class Letter:
    """A dead letter with one of the row's keys in it."""

    dead_letter_id: str
    feed: str
    place: str
    reason: str
    status: str
    load_id: str


@dataclass(frozen=True)
class RowTrace:
    """What a row is made of; `more`: records that are not listed."""

    columns: tuple[str, ...]
    records: tuple[Record, ...]
    more: int
    letters: tuple[Letter, ...]


def key_columns(manifest: dict[str, Any], dataset: str) -> list[str]:
    """What a row of a model is known by."""
    node = manifest["nodes"].get(dataset, {})
    for constraint in node.get("constraints") or ():
        if constraint["type"] == "primary_key":
            return list(constraint["columns"])
    for name, column in (node.get("columns") or {}).items():
        if any(constraint["type"] == "primary_key" for constraint in column.get("constraints") or ()):
            return [name]
    key = (node.get("config") or {}).get("unique_key") or []
    return [key] if isinstance(key, str) else list(key)


def trace_row(
    connection: "Connection",
    graph: Graph,
    manifest: dict[str, Any],
    feeds: Sequence[FeedSpec],
    dataset: str,
    values: Sequence[str],
) -> RowTrace:
    """The records behind the row of a model with this key.

    Raises:
        ConfigurationError: the model has no key or no such row, or its key does not come from a feed.
    """
    names = key_columns(manifest, dataset)
    shown = graph.datasets[dataset].name
    if not names:
        raise ConfigurationError(f"{shown} declares no key.", hint="A primary key or `unique_key` says what a row is.")
    if len(names) != len(values):
        raise ConfigurationError(
            f"The key of {shown} is {', '.join(names)}: {len(names)} values, not {len(values)}.",
            hint="Several are written with commas between them.",
        )
    _require_row(connection, graph, dataset, names, values)
    by_table: dict[str, list[tuple[str, str, str]]] = {}
    for name, value in zip(names, values, strict=True):
        type_ = graph.datasets[dataset].columns[name].type or "text"
        for source, template in _in_terms_of_sources(graph, ColumnId(dataset, name)):
            by_table.setdefault(source.dataset, []).append((source.column, template, f"cast(%s as {type_})\0{value}"))
    by_name = {feed.name: feed for feed in feeds}
    records: list[Record] = []
    letters: list[Letter] = []
    more = 0
    for table, conditions in by_table.items():
        feed = by_name.get(graph.datasets[table].name)
        # Of a feed that holds a part of the key only, all rows of that part would be meant.
        if feed is None or len({column for column, _, _ in conditions}) < len(names):
            continue
        found, left, keys = _find_records(connection, feed, conditions)
        records += found
        more += left
        letters += _find_letters(connection, feed, keys or ([values[0]] if len(values) == 1 else []))
    if not by_table:
        raise ConfigurationError(f"The key of {shown} comes from no feed.", hint="`warehouse lineage trace` shows why.")
    return RowTrace(tuple(names), tuple(records), more, tuple(letters))


def _require_row(
    connection: "Connection", graph: Graph, dataset: str, names: Sequence[str], values: Sequence[str]
) -> None:
    from psycopg2 import DataError as WrongValue
    from psycopg2 import sql

    schema, _, table = graph.datasets[dataset].relation.partition(".")
    where = sql.SQL(" and ").join(sql.SQL("{}::text = %s").format(sql.Identifier(name)) for name in names)
    try:
        with connection.cursor() as cursor:
            cursor.execute("select to_regclass(%s) is not null", (f"{schema}.{table}",))
            if not (cursor.fetchone() or (False,))[0]:
                raise ConfigurationError(f"{schema}.{table} was not built yet.", hint="`warehouse run` builds it.")
            cursor.execute(
                sql.SQL("select 1 from {}.{} where {} limit 1").format(
                    sql.Identifier(schema), sql.Identifier(table), where
                ),
                list(values),
            )
            if cursor.fetchone() is None:
                raise ConfigurationError(f"{schema}.{table} has no row with {', '.join(names)} = {', '.join(values)}.")
    except WrongValue:
        raise ConfigurationError(f"{', '.join(values)} cannot be a key of {schema}.{table}.") from None


def _in_terms_of_sources(
    graph: Graph, where: ColumnId, seen: frozenset[ColumnId] = frozenset()
) -> Iterator[tuple[ColumnId, str]]:
    """Columns of raw tables a column is made of, each with the SQL that makes it, `\\0` for the raw column."""
    if graph.datasets[where.dataset].kind == "source":
        yield where, _HOLE
        return
    template = _template(graph, where)
    if template is None:
        return
    for edge in graph.into.get(where, ()):
        source = edge.source
        if edge.carrying and not edge.again and source.column != ROWS and source not in seen:
            if graph.datasets[source.dataset].kind == "external":
                continue
            for raw, inner in _in_terms_of_sources(graph, source, seen | {where}):
                yield raw, template.replace(_HOLE, inner)


def _template(graph: Graph, where: ColumnId) -> str | None:
    """The SQL of a column of one other; None when it is made of several, or is no function of one row."""
    from sqlglot import exp, parse_one

    column = graph.column(where)
    template = _HOLE
    for _, text in column.expressions if column else ():
        tree = parse_one(text, dialect="postgres")
        if isinstance(tree, exp.Coalesce):
            # One of the same key from either side of a join.
            continue
        if tree.find(exp.AggFunc, exp.Window):
            return None
        own = [one for one in tree.find_all(exp.Column) if one.find_ancestor(exp.Subquery) is None]
        if len({one.sql() for one in own}) != 1:
            return None
        for one in own:
            one.replace(exp.Placeholder(this="hole"))
        template = template.replace(_HOLE, f"({tree.sql('postgres')})")
        template = template.replace("%(hole)s", _HOLE).replace(":hole", _HOLE)
    return template


def _find_records(
    connection: "Connection", feed: FeedSpec, conditions: Sequence[tuple[str, str, str]]
) -> tuple[list[Record], int, list[str]]:
    """Records of a feed that fit, the newest first; how many more; and their keys as text."""
    from psycopg2 import sql

    parts: list[sql.Composable] = []
    values: list[str] = []
    for column, template, compared in conditions:
        compare, _, value = compared.partition("\0")
        own = sql.Identifier(column).as_string(connection)
        parts.append(sql.SQL(template.replace("%", "%%").replace(_HOLE, f"raw.{own}") + f" = {compare}"))
        values.append(value)
    kafka = isinstance(feed.origin, KafkaOrigin)
    place = (
        "raw._kafka_partition || '@' || raw._kafka_offset"
        if kafka
        else "to_char(raw._api_window_from at time zone 'UTC', 'YYYY-MM-DD') || ' page ' || raw._api_page"
        " || ' item ' || raw._api_item"
    )
    key = sql.SQL(", ").join(sql.SQL("raw.{}::text").format(sql.Identifier(column)) for column, _, _ in conditions)
    statement = sql.SQL(
        "select s.name, " + place + ", raw._dlt_load_id, raw._loaded_at, count(*) over (), array[{key}]"
        " from {schema}.{table} as raw inner join {schema}._streams as s on raw._stream_id = s.stream_id"
        " where raw._dlt_load_id in (select load_id from {schema}._dlt_loads) and {fits}"
        " order by raw._dlt_load_id desc, 2 desc limit " + str(SHOWN)
    ).format(
        key=key, schema=sql.Identifier(feed.source), table=sql.Identifier(feed.table), fits=sql.SQL(" and ").join(parts)
    )
    with connection.cursor() as cursor:
        cursor.execute(statement, values)
        rows = cursor.fetchall()
    records = [Record(feed.name, row[0], row[1], row[2], row[3]) for row in rows]
    keys = list(dict.fromkeys(row[5][0] for row in rows)) if len(conditions) == 1 else []
    return records, (rows[0][4] - len(rows) if rows else 0), keys


def _find_letters(connection: "Connection", feed: FeedSpec, keys: Sequence[str]) -> list[Letter]:
    """Dead letters of a feed whose key or bytes hold one of these."""
    if not keys:
        return []
    with connection.cursor() as cursor:
        cursor.execute(
            "select dead_letter_id, feed, stream_name, kafka_partition, kafka_offset, api_window_from, api_page, "
            "api_item, reason, status, load_id from ops.dead_letters where feed = %s "
            "and exists (select from unnest(%s::text[]) as k "
            "where raw_key = convert_to(k, 'UTF8') or position(convert_to(k, 'UTF8') in raw_value) > 0) "
            "order by failed_at desc limit %s",
            (feed.name, list(keys), SHOWN),
        )
        return [
            Letter(
                row[0],
                row[1],
                _place_of(*row[2:8]),
                row[8],
                row[9],
                row[10],
            )
            for row in cursor.fetchall()
        ]


def _place_of(
    stream: str, partition: int | None, offset: int | None, window: datetime | None, page: int | None, item: int | None
) -> str:
    if partition is not None:
        return f"{partition}@{offset}"
    return f"{window:%Y-%m-%d} page {page} item {item}" if window is not None else stream

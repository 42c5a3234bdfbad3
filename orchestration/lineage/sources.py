"""Where lineage begins: topics and endpoints by JSON path, raw tables, and the tables the loaders keep beside them.

    FeedSpec -> dataset of the topic or endpoint, dataset of the raw table, edges between them

What a message holds and nobody declared (`_extra`, its key, its headers) may be personal and counts as such.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files

from ingestion.ddl import DEAD_LETTER_COLUMNS, LEDGER_COLUMNS, raw_columns
from ingestion.feeds import FeedSpec, KafkaOrigin
from orchestration.lineage.graph import ROWS, Column, ColumnId, Dataset, Edge

LOADER = "loader"
# Column of a raw table -> what it is of the message or answer.
_COORDINATES = {
    "_kafka_partition": "@partition",
    "_kafka_offset": "@offset",
    "_kafka_timestamp": "@timestamp",
    "_kafka_key": "@key",
    "_kafka_headers": "@headers",
    "_api_window_from": "@window_from",
    "_api_window_to": "@window_to",
    "_api_page": "@page",
    "_api_item": "@item",
    "_extra": "$.*",
}
_LOADER_MADE = {"_stream_id": "stream_id", "_loaded_at": "loaded_at", "_dlt_load_id": "load_id"}
_SENT = frozenset({"raw_key", "raw_value", "headers", "message"})
_UNDECLARED = frozenset({"_extra", "_kafka_key", "_kafka_headers"})


def origin_name(feed: FeedSpec) -> str:
    """The topic or the path of the endpoint."""
    return feed.origin.topic if isinstance(feed.origin, KafkaOrigin) else feed.origin.path


def origin_id(feed: FeedSpec) -> str:
    return f"{'topic' if isinstance(feed.origin, KafkaOrigin) else 'endpoint'}.{origin_name(feed)}"


def field_path(feed: FeedSpec, column: str) -> str:
    """Where a declared column stands in the message or answer, as a JSON path."""
    if isinstance(feed.origin, KafkaOrigin):
        return f"$.{column}"
    records = feed.origin.records
    if column in records.page_fields:
        return f"$.{records.page_fields[column]}"
    levels = "".join(f".{{{key}}}" for key in records.keys)
    if column in records.keys:
        # A key of an object: the path ends at it.
        return f"$.{records.path}" + "".join(f".{{{key}}}" for key in records.keys[: records.keys.index(column) + 1])
    if column == records.value:
        return f"$.{records.path}{levels}.*"
    return f"$.{records.path}{levels}[*].{column}"


def feed_datasets(feed: FeedSpec, table_id: str, described: Dataset) -> Iterator[Dataset]:
    """The origin of a feed and its raw table; `described` is the table as dbt declares it."""
    declared = {column.name: column for column in feed.columns}
    fields: dict[str, Column] = {ROWS: Column(ROWS)}
    columns: dict[str, Column] = {ROWS: Column(ROWS)}
    for name, type_, _nullable in raw_columns(feed):
        spec, text = declared.get(name), described.columns.get(name, Column(name)).description
        pii = spec.pii if spec else name in _UNDECLARED
        subject_key = bool(spec and spec.subject_key)
        columns[name] = Column(name, type_, text, pii, subject_key)
        if spec is not None:
            path = field_path(feed, name)
            fields[path] = Column(path, type_, text, pii, subject_key)
        elif name in _COORDINATES:
            path = _COORDINATES[name]
            fields[path] = Column(path, type_, text, pii)
    yield Dataset(
        id=origin_id(feed),
        name=origin_name(feed),
        kind="topic" if isinstance(feed.origin, KafkaOrigin) else "endpoint",
        layer="origin",
        owner=feed.owner,
        file=f"{feed.file}:{feed.line}",
        columns=fields,
    )
    yield Dataset(
        id=table_id,
        name=feed.name,
        kind="source",
        layer="raw",
        relation=feed.name,
        owner=feed.owner,
        description=described.description,
        file=f"{feed.file}:{feed.line}",
        columns=columns,
        tests=described.tests,
        reads=(origin_id(feed), LOADER),
    )


def feed_edges(feed: FeedSpec, table_id: str) -> Iterator[Edge]:
    """From the fields of a message to the columns of its raw table."""
    origin, declared = origin_id(feed), {column.name for column in feed.columns}
    yield Edge(ColumnId(origin, ROWS), ColumnId(table_id, ROWS), ("rows",))
    for name, _type, _nullable in raw_columns(feed):
        target = ColumnId(table_id, name)
        if name in declared:
            yield Edge(ColumnId(origin, field_path(feed, name)), target, ("identity",))
        elif name in _COORDINATES:
            yield Edge(ColumnId(origin, _COORDINATES[name]), target, ("identity",))
        elif name in _LOADER_MADE:
            yield Edge(ColumnId(LOADER, _LOADER_MADE[name]), target, ("identity",))
        else:
            # The content hash of an API's record.
            yield Edge(ColumnId(origin, ROWS), target, ("transformation",), barriers=(("hash",),))


def dead_letter_tables(
    feeds: Sequence[FeedSpec], found_at: Mapping[tuple[str, str], str]
) -> Iterator[tuple[Dataset, list[Edge]]]:
    """Where dead letters lie, and what the views over all of them take from there. What was sent is personal there.

    Args:
        found_at: (schema, table) -> dataset, for the views.
    """
    for source in sorted({feed.source for feed in feeds}):
        for table, names in (
            ("_dead_letters", tuple(name for name, _, _ in DEAD_LETTER_COLUMNS)),
            ("_dead_letter_events", ("dead_letter_id", "message")),
        ):
            unique_id = f"external.{source}.{table}"
            columns = {name: Column(name, pii=name in _SENT) for name in (ROWS, *names)}
            view = found_at.get(("ops", table.removeprefix("_")))
            edges = [
                Edge(ColumnId(unique_id, name), ColumnId(view, name), ("identity",))
                for name in names
                if view is not None and name in _SENT
            ]
            relation = f"{source}.{table}"
            yield Dataset(unique_id, relation, "external", "raw", relation, columns=columns), edges


def loader_dataset() -> Dataset:
    """What the loader itself says of a row."""
    names = [ROWS, *_LOADER_MADE.values()]
    return Dataset(LOADER, LOADER, "loader", layer="origin", columns={name: Column(name) for name in names})


def kept_tables(feeds: Sequence[FeedSpec]) -> dict[str, dict[str, dict[str, str]]]:
    """schema -> table -> column -> type of what the loaders keep: ledger, dead letters, run history."""
    tables: dict[str, dict[str, dict[str, str]]] = {"ops": _made_by("ops.sql").get("ops", {})}
    for view in ("loads", "ledger", "dead_letters", "dead_letter_events"):
        tables["ops"][view] = _columns_of_view(f"view_{view}.sql")
    beside = _made_by("bookkeeping.sql").get("raw_schema", {})
    for source in {feed.source for feed in feeds}:
        tables[source] = {
            **beside,
            "_ledger": {name: type_ for name, type_, _ in LEDGER_COLUMNS},
            "_dead_letters": {name: type_ for name, type_, _ in DEAD_LETTER_COLUMNS},
        }
    return tables


def _script(name: str) -> str:
    return files("ingestion").joinpath("sql", name).read_text(encoding="utf-8")


def _made_by(script: str) -> dict[str, dict[str, dict[str, str]]]:
    """The tables a script makes."""
    from sqlglot import exp, parse

    found: dict[str, dict[str, dict[str, str]]] = {}
    text = _script(script)
    # Functions and triggers are no tables, and their bodies no SQL sqlglot knows.
    statements = [part for part in text.split("\n\n") if "create table" in part]
    for statement in statements:
        for tree in parse(statement[statement.index("create table") :], dialect="postgres"):
            if isinstance(tree, exp.Create) and tree.kind == "TABLE" and isinstance(tree.this, exp.Schema):
                table = tree.this.this
                found.setdefault(table.db, {})[table.name] = {
                    column.name: column.args["kind"].sql("postgres").lower()
                    for column in tree.this.expressions
                    if isinstance(column, exp.ColumnDef)
                }
    return found


def _columns_of_view(script: str) -> dict[str, str]:
    from sqlglot import exp, parse_one

    query = parse_one(_script(script), dialect="postgres")
    assert isinstance(query, exp.Select)
    return {one.alias_or_name: "" for one in query.expressions}

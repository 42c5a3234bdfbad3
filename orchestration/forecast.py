"""Which days of which models a build would change: the models' own SQL, over rows that are not there yet.

    rows to land -> the raw table as it would be -> the models downstream, compiled by dbt as they would be built
    -> the rows each would write, compared with those it holds -> days

The rows each would write stand in a temporary table, and the SQL of its children reads these with what the model holds.
So a forecast is what the build does, whatever the models are, and takes in whatever else waits for them. All of it is
one transaction that is rolled back. A model says which of its columns is the day (`config.meta.day_column`; a moment
counts as its day in UTC); one without has no days to tell.
"""

import datetime as dt
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2 import sql

from ingestion import ddl
from ingestion.database import Connection, classify_error, connect
from ingestion.errors import ConfigurationError, DataError, WarehouseError
from ingestion.replay import COMING_LOADS, Coming
from ingestion.settings import Settings
from orchestration import transform

# A row whose day column is empty has no day.
Day = dt.date | None
# Day -> (rows, sum of their hashes)
Contents = Mapping[Day, tuple[int, int]]

# How a model takes its rows in: they replace those of the same key, come on top, or are all there are.
BY_KEY = frozenset({"merge", "delete+insert"})
ON_TOP = frozenset({"append"})
WHOLE = frozenset({"difference", "table", "view"})


@dataclass(frozen=True)
class Model:
    """A model as it would be built now.

    `strategy`: that of an incremental model, the materialization of any other. `relation` is None for an ephemeral
    model: its SQL stands in that of its children.
    """

    unique_id: str
    name: str
    relation: str | None
    query: str
    parents: frozenset[str]
    day_column: str | None
    strategy: str
    key: tuple[str, ...]


@dataclass(frozen=True)
class ModelDays:
    """A model and days of it, in order; None for a model that has no days.

    `rows`: how many a build writes; None where dbt would not count the same.
    """

    model: Model
    days: tuple[Day, ...] | None
    rows: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "day_column": self.model.day_column,
            "days": None if self.days is None else [None if day is None else day.isoformat() for day in self.days],
        }


def select_downstream(feeds: Iterable[str]) -> list[str]:
    """dbt's arguments that select the models of feeds."""
    return ["--select", *(f"source:{feed}+" for feed in feeds)]


def forecast_days(settings: Settings, feeds: Sequence[str], coming: Sequence[Coming] = ()) -> list[ModelDays]:
    """Each model a build of these feeds' models would run, with the days it would change; nothing is changed here.

    Args:
        coming: rows the feeds would land before that build.

    Raises:
        ConfigurationError: some of the models were never built.
        DataError: a model does not compile.
        TransientError: Postgres went away.
    """
    coming = [one for one in coming if one.rows]
    project = _run_dbt(settings, ["parse"]).result
    models = find_models(settings, feeds, project)
    days: dict[str, set[Day]] = {}
    rows: dict[str, int] = {}
    if dated := _with_parents(models, {model.unique_id for model in models if model.day_column and model.relation}):
        connection = connect(settings, purpose="forecast")
        try:
            _require_built(connection, dated)
            dated = compile_models(settings, dated, project, restored=any(one.restored for one in coming))
            connection.set_session(isolation_level="REPEATABLE READ")
            with connection.cursor() as cursor:
                scratch = _Scratch(cursor)
                for one in coming:
                    scratch.add_coming(one)
                for model in dated:
                    if model.relation:
                        days[model.name], rows[model.name] = scratch.add_model(model, model.relation)
            connection.rollback()
        except psycopg2.Error as error:
            raise _named(error) from error
        finally:
            connection.close()
    return [
        ModelDays(
            model,
            _ordered(days[model.name]) if model.day_column else None,
            None if model.strategy in ("table", "view") else rows.get(model.name),
        )
        for model in models
        if model.relation
    ]


def _ordered(days: Iterable[Day]) -> tuple[Day, ...]:
    return tuple(sorted(days, key=lambda day: (day is None, day or dt.date.min)))


def _require_built(connection: Connection, models: Sequence[Model]) -> None:
    tables = [(model.name, model.relation) for model in models if model.relation]
    with connection, connection.cursor() as cursor:
        cursor.execute(
            "select name from unnest(%s, %s) as m (name, relation) where to_regclass(relation) is null",
            [list(texts) for texts in zip(*tables, strict=True)],
        )
        missing = [row[0] for row in cursor.fetchall()]
    if missing:
        raise ConfigurationError(
            f"Not all of the models were ever built: {', '.join(missing)}.", hint="`dbt build` builds them."
        )


def _named(error: psycopg2.Error) -> WarehouseError:
    return classify_error(error) or WarehouseError(
        f"The models' days cannot be told: {error.diag.message_primary or type(error).__name__}.",
        hint="Does `dbt build` of the same models pass?",
    )


# --- what dbt would run -----------------------------------------------------------------------------------------------


def find_models(settings: Settings, feeds: Sequence[str], project: Any) -> list[Model]:
    """The models downstream of feeds, parents before children, without their SQL.

    Args:
        project: as `transform.parse_project` returns it.
    """
    keys = "unique_id name relation_name depends_on config"
    result = _run_dbt(
        settings,
        ["ls", *select_downstream(feeds), "--resource-type", "model", "--output", "json", "--output-keys", keys],
        project,
    )
    return list(_sorted([_model_of(json.loads(line)) for line in result.result]))


def compile_models(settings: Settings, models: Sequence[Model], project: Any, *, restored: bool) -> list[Model]:
    """The models with the SQL a build would run now.

    Args:
        project: as `transform.parse_project` returns it.
        restored: whether rows are coming that had landed before; see `macros/restored_loads.sql`.

    Raises:
        DataError: one does not compile.
    """
    arguments = ["compile", "--select", *(model.name for model in models), "--indirect-selection", "empty"]
    if restored:
        arguments += ["--vars", f"{{restored_loads: ['{COMING_LOADS[0]}']}}"]
    result = _run_dbt(settings, arguments, project)
    for failure in transform.summarise(result).failures:
        name = failure.node.rpartition(".")[2]
        raise DataError(f"{name} does not compile: {failure.message[:300]}", hint="`dbt compile` says more.")
    compiled = {one.node.unique_id: one.node.compiled_code for one in result.result.results}
    return [replace(model, query=compiled[model.unique_id]) for model in models]


def _run_dbt(settings: Settings, arguments: Sequence[str], project: Any = None) -> Any:
    # In a folder of its own: target/ is what `dbt retry` goes by.
    folder = ["--target-path", str(settings.home / "dbt" / "forecast")]
    return transform.run_dbt(settings, [*arguments, *folder], project=project)


def _model_of(node: Mapping[str, Any]) -> Model:
    config = node["config"]
    key = config["unique_key"] or []
    materialized = config["materialized"]
    return Model(
        unique_id=node["unique_id"],
        name=node["name"],
        relation=node["relation_name"],
        query="",
        parents=frozenset(node["depends_on"]["nodes"]),
        day_column=config["meta"].get("day_column"),
        strategy=(config["incremental_strategy"] or ("merge" if key else "append"))
        if materialized == "incremental"
        else materialized,
        key=(key,) if isinstance(key, str) else tuple(key),
    )


def _sorted(models: Sequence[Model]) -> Iterator[Model]:
    """Parents before children, by name where neither is the other's."""
    left = {model.unique_id: model for model in sorted(models, key=lambda model: model.name)}
    while left:
        ready = [model for model in left.values() if not model.parents & left.keys()]
        for model in ready:
            yield left.pop(model.unique_id)


def _with_parents(models: Sequence[Model], wanted: set[str]) -> list[Model]:
    """Of models in order, the wanted and all they are made of."""
    for model in reversed(models):
        if model.unique_id in wanted:
            wanted |= model.parents
    return [model for model in models if model.unique_id in wanted]


# --- what the models would hold ---------------------------------------------------------------------------------------


class _Scratch:
    """What relations would hold, in temporary tables of one transaction: seen by nobody else, gone when it ends."""

    def __init__(self, cursor: psycopg2.extensions.cursor) -> None:
        self._cursor = cursor
        self._tables = 0
        # Relation -> what a query reads in its stead: the name of a CTE, and the CTE.
        self._instead: dict[str, tuple[str, str]] = {}
        # Feed -> relation
        self._raw: dict[str, str] = {}

    def add_coming(self, coming: Coming) -> None:
        """The raw table with the rows to come, and their loads among the committed."""
        feed = coming.feed
        relation = self._quote(self._cursor.connection.info.dbname, feed.source, feed.table)
        new = self._create(f"(like {relation})")
        given = ", ".join(self._quote(name) for name, _, _ in ddl.raw_columns(feed))
        coming.file.seek(0)
        self._cursor.copy_expert(f"copy {new} ({given}) from stdin", coming.file)
        self._cursor.execute(f"analyze {new}")
        self._put(relation, f"select * from {relation} union all select * from {new}")
        self._raw[feed.name] = relation
        loads = f"{feed.source}._dlt_loads"  # as the macro `committed_loads` says it
        self._put(loads, f"select load_id from {loads} union all values ('{COMING_LOADS[0]}'), ('{COMING_LOADS[1]}')")

    def add_model(self, model: Model, relation: str) -> tuple[set[Day], int]:
        """What the model would hold; the days that change, and how many rows a build writes.

        Raises:
            ConfigurationError: it is built in a way this does not know.
            WarehouseError: its SQL names its source in a way this does not know.
        """
        if model.strategy not in BY_KEY | ON_TOP | WHOLE:
            raise ConfigurationError(
                f"The days a model built by `{model.strategy}` changes cannot be told: {model.name}.",
                hint=f"Those of {', '.join(sorted(BY_KEY | ON_TOP | WHOLE))} can.",
            )
        for feed, raw in self._raw.items():
            is_read = any(one.startswith("source.") and one.endswith(f".{feed}") for one in model.parents)
            if is_read and raw not in model.query:
                raise WarehouseError(f"{model.name} reads {feed} by another name than {raw}.")
        columns = self._fetch_columns(relation)
        # In the columns' own types, so that what is the same looks the same.
        cells = ", ".join(f"cast({name} as {type_}) as {name}" for name, type_ in columns)
        new = self._create(f"as {self._with(model.query, f'select {cells} from (%s) as m')}")
        rows = self._cursor.rowcount
        self._cursor.execute(f"analyze {new}")
        if model.strategy in BY_KEY:
            key = " and ".join(f"n.{name} = o.{name}" for name in model.key)
            is_replaced = f"exists (select from {new} as n where {key})"
        else:
            is_replaced = str(model.strategy in WHOLE).lower()
        self._put(relation, f"select * from {relation} as o where not {is_replaced} union all select * from {new}")
        if model.day_column is None:
            return set(), rows
        self._cursor.execute(render_changes(_day(model.day_column), new, f"{relation} as o where {is_replaced}"))
        days = dict(self._cursor.fetchall())
        return set(days), sum(int(count or 0) for count in days.values()) if model.strategy in WHOLE else rows

    def _create(self, definition: str) -> str:
        """A temporary table; its name."""
        self._tables += 1
        name = f"pg_temp.forecast_{self._tables}"
        self._cursor.execute(f"create temp table {name.partition('.')[2]} {definition}")
        return name

    def _put(self, relation: str, query: str) -> None:
        self._instead[relation] = (f"after_{len(self._instead)}", query)

    def _with(self, query: str, around: str) -> str:
        """`around` a query, with what the relations it reads would hold."""
        ctes = []
        for relation, (name, after) in self._instead.items():
            if relation in query:
                query = query.replace(relation, name)
                ctes.append(f"{name} as not materialized ({after})")
        return f"with {', '.join(ctes)} " * bool(ctes) + around.replace("%s", f"\n{query}\n")

    def _fetch_columns(self, relation: str) -> list[tuple[str, str]]:
        """(column, type) of a relation, in order."""
        self._cursor.execute(
            "select quote_ident(attname), format_type(atttypid, atttypmod) from pg_attribute "
            "where attrelid = to_regclass(%s) and attnum > 0 and not attisdropped order by attnum",
            (relation,),
        )
        return self._cursor.fetchall()

    def _quote(self, *names: str) -> str:
        return sql.Identifier(*names).as_string(self._cursor)


def render_changes(day: str, new: str, old: str) -> str:
    """SQL of the days on which two relations differ: (day, rows of the new that the old has not)."""
    return (
        "select day, sum(rows) filter (where rows > 0) from (select day, sum(side) as rows from ("
        f"select {day} as day, n::text as content, 1 as side from {new} as n union all "
        f"select {day}, o::text, -1 from {old}"
        ") as sides group by day, content having sum(side) <> 0) as changes group by day"
    )


def _day(column: str) -> str:
    """The day of a date or a moment; connections are in UTC."""
    return f"cast(cast({column} as timestamptz) as date)"


# --- what changed -----------------------------------------------------------------------------------------------------


def fetch_contents(settings: Settings, models: Sequence[ModelDays]) -> dict[str, Contents]:
    """What the models hold on these days: equal before and after exactly where nothing changed."""
    connection = connect(settings, purpose="forecast")
    contents: dict[str, Contents] = {}
    try:
        connection.set_session(readonly=True)
        with connection.cursor() as cursor:
            for one in models:
                if one.days:
                    contents[one.model.name] = _fetch_content(cursor, one)
    except psycopg2.Error as error:
        raise _named(error) from error
    finally:
        connection.close()
    return contents


def _fetch_content(cursor: psycopg2.extensions.cursor, one: ModelDays) -> Contents:
    cursor.execute("select to_regclass(%s) is not null", (one.model.relation,))
    if not (cursor.fetchone() or (False,))[0]:
        return {}
    column = f"t.{one.model.day_column}"
    # Bounds rather than the column's day, for an index on the column.
    cursor.execute(
        f"select d.day, count(*), sum(hashtextextended(t::text, 0)::numeric) from unnest(%s::date[]) as d (day) "
        f"join {one.model.relation} as t on {column} >= d.day::timestamptz and {column} < (d.day + 1)::timestamptz "
        f"group by 1 union all select null, count(*), sum(hashtextextended(t::text, 0)::numeric) "
        f"from {one.model.relation} as t where %s and {column} is null",
        ([day for day in one.days or () if day], None in (one.days or ())),
    )
    return {day: (rows, hashes) for day, rows, hashes in cursor.fetchall()}


def find_changed(
    forecast: Sequence[ModelDays], before: Mapping[str, Contents], after: Mapping[str, Contents]
) -> list[ModelDays]:
    """The models with the days of the forecast on which they hold something else than before."""
    return [
        replace(one, days=one.days and tuple(
            day for day in one.days
            if before[one.model.name].get(day) != after[one.model.name].get(day)
        ))
        for one in forecast
    ]  # fmt: skip

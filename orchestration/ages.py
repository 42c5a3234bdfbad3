"""How old the data of each feed and mart is, held against its budget; a miss names the hop and partition behind it.

    ledger (newest source time by partition) + ops.model_loads (loads folded into each model) + lineage -> TableAge

A feed is as old as the newest record of its partition that is furthest behind: one that stops is seen while the others
flow. A model is as old as the oldest of its inputs as of the loads it has folded in, so one that was not rebuilt holds
back what stands on it. Seeds have no age. Measuring reads and changes nothing, and needs no run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import psycopg2.extensions
from psycopg2 import sql
from psycopg2.extras import execute_values

from ingestion.errors import ConfigurationError
from ingestion.settings import Settings
from orchestration.console import render_age

Connection = psycopg2.extensions.connection
Manifest = Mapping[str, Any]

SERVED = "marts"
PERIODS = {"minute": timedelta(minutes=1), "hour": timedelta(hours=1), "day": timedelta(days=1)}


@dataclass(frozen=True)
class TableAge:
    """How old a table's data is. `table` is schema.name.

    `age`: now minus the oldest mark among its inputs along the lineage; None while nothing landed or nothing was built.
    `state`: pass, warn, error; unknown without an age, and where an input that never landed is all that is wrong.
    `held_by`: one sentence, the hop and partition that hold the table back. `hop`: that feed or model, by name.
    """

    table: str
    age: timedelta | None
    warn_after: timedelta | None
    error_after: timedelta | None
    state: str
    held_by: str
    hop: str = ""


@dataclass(frozen=True)
class Budget:
    """How old a table may be."""

    warn_after: timedelta | None = None
    error_after: timedelta | None = None

    def state_of(self, age: timedelta) -> str:
        for state, limit in (("error", self.error_after), ("warn", self.warn_after)):
            if limit is not None and age > limit:
                return state
        return "pass"


def measure_ages(settings: Settings, connection: Connection, now: datetime) -> list[TableAge]:
    """The age of every feed and of every mart made of one, feeds first. Changes nothing.

    Raises:
        ConfigurationError: the project does not parse, or a budget cannot be understood.
    """
    from orchestration.manifest import load_manifest

    return measure(Lineage(load_manifest(settings)), connection, now)


def measure(lineage: "Lineage", connection: Connection, now: datetime) -> list[TableAge]:
    """`measure_ages` for who has the lineage at hand."""
    return _Measurement(lineage, connection, now).ages()


def record_ages(connection: Connection, ages: Sequence[TableAge], at: datetime) -> None:
    """Keep what was measured at a tick: a row per table in `ops.table_ages`. Bounded by the history's retention."""
    if not ages:
        return
    with connection.cursor() as cursor:
        execute_values(
            cursor,
            "insert into ops.table_ages (measured_at, table_name, age, warn_after, error_after, state, hop, held_by) "
            "values %s on conflict (measured_at, table_name) do nothing",
            [(at, a.table, a.age, a.warn_after, a.error_after, a.state, a.hop, a.held_by) for a in ages],
        )


@dataclass(frozen=True)
class Feed:
    """A feed as its ages need it."""

    name: str
    kind: str
    budget: Budget
    idle_partitions: bool


class Lineage:
    """Feeds, models and what each model is made of, read off dbt's manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    @cached_property
    def feeds(self) -> dict[str, Feed]:
        """By dbt's unique id."""
        found = {}
        for unique_id, source in sorted(self._manifest["sources"].items()):
            declared = source["meta"].get("feed")
            if declared is not None:
                name = f"{source['source_name']}.{source['name']}"
                found[unique_id] = Feed(
                    name,
                    declared["kind"],
                    parse_budget(source.get("freshness") or {}, name),
                    declared.get("idle_partitions") == "normal",
                )
        return found

    @cached_property
    def parents(self) -> dict[str, list[str]]:
        """Models made of feeds, directly or not -> those of their parents that are feeds or made of them."""
        memo: dict[str, bool] = dict.fromkeys(self.feeds, True)

        def is_fed(unique_id: str) -> bool:
            if unique_id not in memo:
                memo[unique_id] = False
                node = self._manifest["nodes"].get(unique_id)
                if node is not None and node["resource_type"] == "model":
                    memo[unique_id] = any([is_fed(parent) for parent in node["depends_on"]["nodes"]])
            return memo[unique_id]

        models = [key for key, node in self._manifest["nodes"].items() if node["resource_type"] == "model"]
        return {
            key: [parent for parent in self._manifest["nodes"][key]["depends_on"]["nodes"] if is_fed(parent)]
            for key in sorted(models)
            if is_fed(key)
        }

    @cached_property
    def served(self) -> list[str]:
        """Marts made of feeds."""
        return [key for key in self.parents if self._manifest["nodes"][key]["fqn"][1] == SERVED]

    def table(self, unique_id: str) -> str:
        """schema.name of a feed or model."""
        if unique_id in self.feeds:
            return self.feeds[unique_id].name
        node = self._manifest["nodes"][unique_id]
        return f"{node['schema']}.{node['alias']}"

    def name(self, unique_id: str) -> str:
        """What people call it."""
        return self.feeds[unique_id].name if unique_id in self.feeds else str(unique_id.rpartition(".")[2])

    def budget(self, unique_id: str) -> Budget:
        if unique_id in self.feeds:
            return self.feeds[unique_id].budget
        return parse_budget(self._manifest["nodes"][unique_id]["config"]["meta"], self.name(unique_id))

    def feeds_of(self, unique_id: str) -> list[str]:
        """Unique ids of the feeds it is made of."""
        if unique_id in self.feeds:
            return [unique_id]
        return sorted({feed for parent in self.parents[unique_id] for feed in self.feeds_of(parent)})


def parse_budget(declared: Mapping[str, Any], name: str) -> Budget:
    """`warn_after` and `error_after` as dbt writes them: {count: 2, period: hour}."""

    def limit(key: str) -> timedelta | None:
        value = declared.get(key)
        count, period = (value.get("count"), value.get("period")) if isinstance(value, Mapping) else (value, None)
        if count is None:
            return None
        if not isinstance(count, int) or count <= 0 or period not in PERIODS:
            raise ConfigurationError(
                f"{name}: {key} is not understood.",
                hint="Its form is {count: 2, period: hour}; periods are minute, hour and day.",
            )
        return int(count) * PERIODS[period]

    return Budget(limit("warn_after"), limit("error_after"))


@dataclass(frozen=True)
class Mark:
    """Up to when a feed's data is there as of a load, and the partition that says so; None where nothing landed."""

    at: datetime | None
    partition: int | None = None


class _Measurement:
    """One reading of the books, and the ages that follow from it."""

    def __init__(self, lineage: Lineage, connection: Connection, now: datetime) -> None:
        self.lineage = lineage
        self.now = now
        with connection.cursor() as cursor:
            self.books = _fetch_books(cursor, lineage)

    def ages(self) -> list[TableAge]:
        feeds = [self._feed_age(unique_id) for unique_id in self.lineage.feeds]
        return feeds + [self._model_age(unique_id) for unique_id in self.lineage.served]

    def _feed_age(self, feed: str) -> TableAge:
        name, budget = self.lineage.name(feed), self.lineage.budget(feed)
        mark = self.books.mark(feed, self.books.latest.get(name, ""))
        if mark.at is None:
            return self._unknown(name, budget, f"{name}: nothing landed yet", name)
        age = max(self.now - mark.at, timedelta())
        return self._age(name, age, budget, self._held_by_feed(feed, mark), name)

    def _model_age(self, model: str) -> TableAge:
        table, budget = self.lineage.table(model), self.lineage.budget(model)
        folded = self.books.folded.get(table)
        if folded is None:
            return self._unknown(table, budget, f"{self.lineage.name(model)}: not built yet", self.lineage.name(model))
        marks = {feed: self._mark_of(model, feed) for feed in self.lineage.feeds_of(model)}
        missing = [feed for feed, mark in marks.items() if mark.at is None]
        reached = {feed: mark.at for feed, mark in marks.items() if mark.at is not None}
        if not reached:
            hop, held_by = self._held_by_nothing(model, missing[0])
            return self._unknown(table, budget, held_by, hop)
        oldest = min(reached, key=lambda feed: reached[feed])
        age = max(self.now - reached[oldest], timedelta())
        if missing and budget.state_of(age) == "pass":
            hop, held_by = self._held_by_nothing(model, missing[0])
            return TableAge(table, age, budget.warn_after, budget.error_after, "unknown", held_by, hop)
        late = self._late_model(model, oldest)
        if late is None:
            return self._age(table, age, budget, self._held_by_feed(oldest, marks[oldest]), self.lineage.name(oldest))
        return self._age(table, age, budget, self._held_by_model(late, oldest, marks[oldest]), self.lineage.name(late))

    def _mark_of(self, model: str, feed: str) -> Mark:
        """The mark of a feed as far as the model holds it."""
        load_id = self.books.folded.get(self.lineage.table(model), {}).get(self.lineage.name(feed), "")
        return self.books.mark(feed, load_id)

    def _late_model(self, model: str, feed: str) -> str | None:
        """The hop at which the feed's newest data stopped on its way to the model; None where it did not."""
        name = self.lineage.name(feed)
        latest = self.books.mark(feed, self.books.latest.get(name, ""))
        if latest.at == self._mark_of(model, feed).at:
            return None
        for parent in self.lineage.parents[model]:
            is_on_the_way = parent not in self.lineage.feeds and feed in self.lineage.feeds_of(parent)
            if is_on_the_way and (found := self._late_model(parent, feed)) is not None:
                return found
        return model

    def _held_by_feed(self, feed: str, mark: Mark) -> str:
        name = self.lineage.name(feed)
        assert mark.at is not None
        read = self.books.last_read.get(name)
        suffix = f", read {self._ago(read)} ago" if read else ""
        if mark.partition is None:
            return f"{name}: complete up to {self._ago(mark.at)} ago"
        return f"{name} partition {mark.partition}: newest record {self._ago(mark.at)} old{suffix}"

    def _held_by_model(self, model: str, feed: str, mark: Mark) -> str:
        name = self.lineage.name(feed)
        built = self.books.built_at.get(self.lineage.table(model))
        since = f"built {self._ago(built)} ago" if built else "not built"
        partition = "" if mark.partition is None else f" partition {mark.partition}"
        newest = "nothing" if mark.at is None else f"{self._ago(mark.at)} old"
        return f"{self.lineage.name(model)}: {since}, without later loads; its newest of {name}{partition} is {newest}"

    def _held_by_nothing(self, model: str, feed: str) -> tuple[str, str]:
        """(hop, sentence) of an input of which the model holds nothing."""
        name = self.lineage.name(feed)
        late = self._late_model(model, feed)
        if late is None:
            return name, f"{name}: nothing landed yet"
        return self.lineage.name(late), f"{self.lineage.name(late)}: built before anything of {name} landed"

    def _ago(self, moment: datetime) -> str:
        return render_age((self.now - moment).total_seconds())

    @staticmethod
    def _age(table: str, age: timedelta, budget: Budget, held_by: str, hop: str) -> TableAge:
        return TableAge(table, age, budget.warn_after, budget.error_after, budget.state_of(age), held_by, hop)

    @staticmethod
    def _unknown(table: str, budget: Budget, held_by: str, hop: str) -> TableAge:
        return TableAge(table, None, budget.warn_after, budget.error_after, "unknown", held_by, hop)


@dataclass(frozen=True)
class _Books:
    """What the database says.

    By feed the last committed load, and when the run began that last read it to its end; by model the loads folded in;
    by feed and load the mark.
    """

    latest: Mapping[str, str]
    last_read: Mapping[str, datetime]
    folded: Mapping[str, Mapping[str, str]]
    built_at: Mapping[str, datetime]
    marks: Mapping[tuple[str, str], Mark]
    names: Mapping[str, str]

    def mark(self, feed: str, load_id: str) -> Mark:
        return self.marks.get((self.names[feed], load_id), Mark(None))


def _fetch_books(cursor: psycopg2.extensions.cursor, lineage: Lineage) -> _Books:
    names = {key: feed.name for key, feed in lineage.feeds.items()}
    by_name = {feed.name: feed for feed in lineage.feeds.values()}
    latest: dict[str, str] = {}
    last_read: dict[str, datetime] = {}
    folded: dict[str, dict[str, str]] = {}
    built_at: dict[str, datetime] = {}
    marks: dict[tuple[str, str], Mark] = {}
    books = _Books(latest, last_read, folded, built_at, marks, names)
    cursor.execute("select to_regclass('ops.model_loads') is not null")
    if not (cursor.fetchone() or (False,))[0]:
        return books  # no command has made the tables yet
    cursor.execute("select schemaname from pg_tables where tablename = '_ledger'")
    sources = sorted({row[0] for row in cursor.fetchall()} & {name.partition(".")[0] for name in by_name})
    for source in sources:
        cursor.execute(
            sql.SQL("select schema_name, max(load_id) from {}._dlt_loads group by schema_name").format(
                sql.Identifier(source)
            )
        )
        latest.update(
            {f"{source}.{table}": load for table, load in cursor.fetchall() if f"{source}.{table}" in by_name}
        )
    # Of an API a read that finds nothing new leaves no load: the step of the run says that it was asked.
    cursor.execute(
        "select f.feed, s.started_at from unnest(%s) as f (feed) cross join lateral (select started_at "
        "from ops.run_steps where feed = f.feed and outcome = 'success' order by finished_at desc limit 1) as s",
        (list(by_name),),
    )
    last_read.update(dict(cursor.fetchall()))
    cursor.execute("select model, feed, load_id, built_at from ops.model_loads")
    for model, feed, load_id, at in cursor.fetchall():
        folded.setdefault(model, {})[feed] = load_id
        built_at[model] = max(at, built_at.get(model, at))
    for source in sources:
        wanted = {(feed, load_id) for loads in folded.values() for feed, load_id in loads.items()}
        wanted |= set(latest.items())
        wanted = {(feed, load_id) for feed, load_id in wanted if feed.startswith(f"{source}.")}
        for (feed, load_id), partitions in _fetch_partitions(cursor, source, wanted).items():
            declared = by_name.get(feed)
            if declared is not None:
                marks[feed, load_id] = choose_mark(declared, partitions)
    for name, feed in by_name.items():
        load_id = latest.get(name, "")
        mark = marks.get((name, load_id))
        if feed.kind == "rest" and mark is not None and mark.at is not None and name in last_read:
            marks[name, load_id] = Mark(max(mark.at, last_read[name]))
    return books


def choose_mark(feed: Feed, partitions: Mapping[int, datetime]) -> Mark:
    """The mark of a feed from those of its partitions: the oldest, or the newest where idle partitions are normal.

    A partition that never held a record has no mark, and does not count.
    """
    if not partitions:
        return Mark(None)
    choose = max if feed.idle_partitions else min
    partition = choose(partitions, key=lambda one: (partitions[one], one))
    return Mark(partitions[partition], None if feed.kind == "rest" else partition)


def _fetch_partitions(
    cursor: psycopg2.extensions.cursor, source: str, wanted: set[tuple[str, str]]
) -> dict[tuple[str, str], dict[int, datetime]]:
    """(feed, load) -> partition -> newest source time, over all committed loads up to that one.

    Of the stream read last: the partitions of a topic that was replaced say nothing any more. A record from the future
    is as new as its load, or one wrong clock would hide a partition that stops. For an API it is the window's end.
    """
    if not wanted:
        return {}
    feeds, loads = zip(*sorted(wanted), strict=True)
    cursor.execute(
        sql.SQL("""
            with wanted as (
                select w.feed, w.load_id, s.stream_id
                from unnest(%s, %s) as w (feed, load_id)
                cross join lateral (
                    select l.stream_id from {ledger} as l
                    where
                        l.feed = w.feed and l._dlt_load_id <= w.load_id and l.kind in ('kafka', 'api')
                        and l._dlt_load_id in (select load_id from {loads})
                    order by l._dlt_load_id desc limit 1
                ) as s
            )
            select
                w.feed, w.load_id, l.partition,
                max(least(coalesce(l.source_time_max, l.window_to), l.loaded_at))
            from wanted as w
            inner join {ledger} as l on w.feed = l.feed and w.stream_id = l.stream_id and l._dlt_load_id <= w.load_id
            where
                l.kind in ('kafka', 'api') and coalesce(l.source_time_max, l.window_to) is not null
                and l._dlt_load_id in (select load_id from {loads})
            group by w.feed, w.load_id, l.partition
        """).format(ledger=sql.Identifier(source, "_ledger"), loads=sql.Identifier(source, "_dlt_loads")),
        (list(feeds), list(loads)),
    )
    found: dict[tuple[str, str], dict[int, datetime]] = {}
    for feed, load_id, partition, newest in cursor.fetchall():
        found.setdefault((feed, load_id), {})[partition] = newest.astimezone(UTC)
    return found

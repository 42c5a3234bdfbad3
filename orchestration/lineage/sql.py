"""One statement -> its columns, each with what it is made of.

    read_statement("select ...", schema) -> Statement(columns: name -> Output, rows: Output)

sqlglot parses and qualifies; the walk over its scopes is our own, because a value is not all there is to follow: the
rows (filters, joins, grouping), the path inside a JSON value, and the barriers a personal value crosses on its way. A
CTE, a union, a window, a lateral function and a correlated subquery are followed; what is not understood makes the
column `unknown`, with the reason.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlglot import exp, parse_one
from sqlglot.errors import OptimizeError, SqlglotError
from sqlglot.optimizer.qualify import qualify
from sqlglot.optimizer.scope import Scope, build_scope
from sqlglot.schema import MappingSchema

from orchestration.lineage import barriers
from orchestration.lineage.graph import DIRECT, INDIRECT, ROWS

DIALECT = "postgres"
# What is unknown of a statement is said once, by us.
logging.getLogger("sqlglot").setLevel(logging.ERROR)

# Steps of an expression shown; the rest of a very deep one says little.
MAX_STEPS = 12

# schema -> table -> column -> type
Tables = Mapping[str, Mapping[str, Mapping[str, str]]]


class Leaf(NamedTuple):
    """A column of a table the statement reads; `path` inside its JSON value."""

    schema: str
    table: str
    column: str
    path: str = ""


class Way(NamedTuple):
    """How a leaf's value arrives."""

    kind: str
    barriers: frozenset[str] = frozenset()


Flow = Mapping[Leaf, frozenset[Way]]
NOTHING: Flow = {}


@dataclass(frozen=True)
class Output:
    """What a column, or the rows, of a statement are made of."""

    flow: Flow
    expressions: tuple[tuple[str, str], ...] = ()
    unknown: str = ""


@dataclass(frozen=True)
class Statement:
    """A statement's columns in order. `tables`: what it reads; `unknown`: why nothing is known of it."""

    columns: Mapping[str, Output]
    rows: Output
    tables: frozenset[tuple[str, str]] = frozenset()
    unknown: str = ""


def read_statement(
    text: str, tables: Tables, names: Sequence[str] = (), functions: Mapping[str, Flow] | None = None
) -> Statement:
    """What a query gives.

    Args:
        tables: columns of the tables it reads, as far as they are known.
        names: its columns, where they are known otherwise: for a `*` over a table of which nothing is known.
        functions: what functions of the project read beside what they are given.
    """
    try:
        tree = parse_one(text, dialect=DIALECT)
        if not isinstance(tree, exp.Query):
            return Statement({}, Output(NOTHING), unknown=f"not a query but {type(tree).__name__}")
        scope = _scope_of(text, tree, _schema_of(tables))
    except (SqlglotError, RecursionError, ValueError, KeyError, AttributeError, TypeError) as error:
        # Also what sqlglot itself did not expect: one model's SQL must not cost the graph of all others.
        return Statement({}, Output(NOTHING), unknown=f"not understood: {_plain_text(error)}")
    if scope is None:
        return Statement({}, Output(NOTHING), unknown="not understood: no scope")
    return _Reader(tables, functions or {}).read(scope, names)


def _plain_text(error: Exception) -> str:
    """An error in one line; sqlglot underlines for a terminal."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())[:200]


def find_broken(text: str, tables: Tables) -> list[str]:
    """References of a statement to columns that are not there; [] when it would run, as far as columns go.

    Unlike `read_statement` this looks at every query in it, also at those nothing is taken from.
    """
    try:
        tree = parse_one(text, dialect=DIALECT)
        scope = _scope_of(text, tree, _schema_of(tables))
    except (SqlglotError, RecursionError, ValueError, KeyError, AttributeError, TypeError):
        return []
    if scope is None:
        return []
    reader = _Reader(tables)
    reader.register(scope)
    found = []
    for one in scope.traverse():
        for column in one.columns:
            if not column.is_star:
                try:
                    reader.flow(column, one)
                except _Unresolved as error:
                    found.append(str(error))
    return list(dict.fromkeys(found))


def _schema_of(tables: Tables) -> MappingSchema:
    # Normalised already, and by us: the names of a manifest are those of the database.
    return MappingSchema({key: dict(value) for key, value in tables.items()}, dialect=DIALECT, normalize=False)


def _scope_of(text: str, tree: exp.Expr, schema: MappingSchema) -> Scope | None:
    options: dict[str, Any] = {
        "dialect": DIALECT,
        "schema": schema,
        "validate_qualify_columns": False,
        "allow_partial_qualification": True,
        # Postgres knows an alias in GROUP BY and ORDER BY only.
        "expand_alias_refs": False,
        "quote_identifiers": False,
        "identify": False,
    }
    try:
        return build_scope(qualify(tree, **options))
    except OptimizeError:
        # Columns of a table nobody described stay as they are; the reader looks for them itself.
        return build_scope(qualify(parse_one(text, dialect=DIALECT), **options, qualify_columns=False))


def merged(flows: Iterable[Flow]) -> Flow:
    """All of them together."""
    found: dict[Leaf, frozenset[Way]] = {}
    for flow in flows:
        for leaf, ways in flow.items():
            found[leaf] = found.get(leaf, frozenset()) | ways
    return found


def through(flow: Flow, kind: str, crossed: Iterable[str] = ()) -> Flow:
    """A flow that goes on through an operation of this kind, and through the barriers it is."""
    if not flow or (kind == "identity" and not crossed):
        return flow
    extra = frozenset(crossed)
    return {
        leaf: frozenset(Way(_later(way.kind, kind), way.barriers | extra) for way in ways)
        for leaf, ways in flow.items()
    }


def _later(before: str, kind: str) -> str:
    """What became of a value that arrived as `before` and is now used as `kind`."""
    if before in INDIRECT:
        return before
    if kind in INDIRECT:
        return kind
    return before if DIRECT.index(before) >= DIRECT.index(kind) else kind


class _Unresolved(Exception):
    """A column nobody offers."""


@dataclass
class _Reader:
    tables: Tables
    functions: Mapping[str, Flow] = field(default_factory=dict)
    read_tables: set[tuple[str, str]] = field(default_factory=set)
    columns_of: dict[int, dict[str, Flow]] = field(default_factory=dict)
    rows_of: dict[int, Flow] = field(default_factory=dict)
    # Scopes being read: a recursive CTE meets itself.
    open: set[tuple[int, str]] = field(default_factory=set)
    scopes: dict[int, Scope] = field(default_factory=dict)
    names_of: dict[int, list[str]] = field(default_factory=dict)

    def read(self, scope: Scope, names: Sequence[str]) -> Statement:
        self.register(scope)
        for table in scope.expression.find_all(exp.Table):
            if isinstance(table.this, exp.Identifier) and table.db:
                self.read_tables.add((table.db, table.name))
        columns: dict[str, Output] = {}
        wanted = [name for name in self.names(scope) if name != ROWS]
        hidden = ROWS in self.names(scope)
        for name in dict.fromkeys([*wanted, *(names if hidden else ())]):
            try:
                columns[name] = Output(self.column(scope, name), tuple(self.steps(scope, name)))
            except _Unresolved as error:
                columns[name] = Output(NOTHING, unknown=str(error))
        if hidden and not names:
            columns[ROWS] = Output(NOTHING, unknown="`*` of a table whose columns are not known")
        try:
            rows = Output(self.rows(scope))
        except _Unresolved as error:
            rows = Output(NOTHING, unknown=str(error))
        return Statement(columns, rows, frozenset(self.read_tables))

    def register(self, scope: Scope) -> None:
        for one in scope.traverse():
            self.scopes[id(one.expression)] = one

    # Columns

    def column(self, scope: Scope, name: str) -> Flow:
        """What column `name` of a scope is made of."""
        # Inside a recursive CTE sqlglot gives its first part as a scope without sources.
        scope = self.scopes.get(id(scope.expression), scope)
        key = (id(scope), name)
        known = self.columns_of.setdefault(id(scope), {})
        if name in known:
            return known[name]
        if key in self.open:
            return NOTHING
        self.open.add(key)
        try:
            known[name] = self._column(scope, name)
        finally:
            self.open.discard(key)
        return known[name]

    def _column(self, scope: Scope, name: str) -> Flow:
        query = scope.expression
        if isinstance(query, exp.SetOperation):
            return self._column_of_set(scope, name)
        if isinstance(query, exp.Select):
            found = _projection(query, name)
            if found is not None:
                return self.flow(found, scope)
            starred = [self._star(star, scope, name) for star in query.expressions if star.is_star]
            if starred:
                return merged(starred)
            raise _Unresolved(f"no column {name} in {_name_of(scope)}")
        if isinstance(query, exp.Values):
            return NOTHING
        if isinstance(query, exp.Subquery | exp.Table):
            inner = self.scopes.get(id(query.this))
            if inner is not None:
                return self.column(inner, name)
        # A function in FROM: whatever it is given goes into all it gives.
        return self._of_function(query, scope.parent or scope)

    def _column_of_set(self, scope: Scope, name: str) -> Flow:
        sides = scope.set_operation_scopes
        names = self.names(sides[0])
        if name in names and ROWS not in names:
            place = names.index(name)
            others = [self.names(side) for side in sides]
            if all(ROWS not in other and place < len(other) for other in others):
                flows = [self._at(side, place) for side in sides]
                if isinstance(scope.expression, exp.Except):
                    # What is taken away gives no value.
                    flows[1:] = [through(flow, "filter") for flow in flows[1:]]
                return merged(flows)
        return merged(self.column(side, name) for side in sides)

    def _at(self, scope: Scope, place: int) -> Flow:
        """What the column at a place is made of; a set operation goes by places, and names may come twice."""
        query = scope.expression
        if isinstance(query, exp.Select) and not any(one.is_star for one in query.expressions):
            return self.flow(query.expressions[place], scope)
        return self.column(scope, self.names(scope)[place])

    def _star(self, star: exp.Expr, scope: Scope, name: str) -> Flow:
        """Column `name` behind a `*` that could not be spelt out."""
        wanted = [star.table] if isinstance(star, exp.Column) and star.table else list(scope.selected_sources)
        open_ended = []
        for alias in wanted:
            source = scope.sources.get(alias)
            if isinstance(source, Scope):
                names = self.names(source)
                if name in names or ROWS in names:
                    open_ended.append(self.column(source, name))
            elif isinstance(source, exp.Table):
                known = self._known(source)
                if known is None or name in known:
                    open_ended.append(self._of_table(source, name))
        if len(open_ended) != 1:
            raise _Unresolved(f"{name} may come from any of {', '.join(wanted)}")
        return open_ended[0]

    def _known(self, table: exp.Table) -> Mapping[str, str] | None:
        return self.tables.get(table.db, {}).get(table.name)

    def _of_table(self, table: exp.Table, name: str) -> Flow:
        known = self._known(table)
        if known is not None and known and name not in known:
            raise _Unresolved(f"no column {name} in {table.db}.{table.name}")
        return {Leaf(table.db, table.name, name): frozenset({Way("identity")})}

    def _of_function(self, node: exp.Expr, scope: Scope) -> Flow:
        return through(merged(self._children(node, scope)), "transformation")

    def _reference(self, column: exp.Column, scope: Scope) -> Flow:
        alias, name = column.table, column.name
        at: Scope | None = scope
        while at is not None:
            if alias:
                chosen = at.selected_sources.get(alias)
                source = chosen[1] if chosen else at.lateral_sources.get(alias)
                if source is not None:
                    return self._from_source(source, name, at)
            else:
                offering = [one for one in at.selected_sources if self._offers(at.sources.get(one), name)]
                if len(offering) == 1:
                    return self._from_source(at.sources[offering[0]], name, at)
                # Only there Postgres knows the name of an output column.
                if column.find_ancestor(exp.Group, exp.Order) and isinstance(at.expression, exp.Select):
                    named = _projection(at.expression, name)
                    if named is not None and all(one is not column for one in named.find_all(exp.Column)):
                        return self.flow(named, at)
            # A CTE or a table in FROM sees nothing of the query around it; a subquery and a lateral one do.
            at = at.parent if at.is_subquery or at.is_udtf or at.lateral_sources or at.can_be_correlated else None
        raise _Unresolved(f"nothing offers {column.sql(DIALECT)} in {_name_of(scope)}")

    def _offers(self, source: Any, name: str) -> bool:
        if isinstance(source, Scope):
            names = self.names(source)
            return name in names or ROWS in names
        if isinstance(source, exp.Table):
            known = self._known(source)
            return known is None or name in known
        return False

    def _from_source(self, source: Any, name: str, scope: Scope) -> Flow:
        if isinstance(source, Scope):
            return self.column(source, name)
        if not isinstance(source.this, exp.Identifier):
            return self._of_function(source, scope)
        return self._of_table(source, name)

    # Rows

    def rows(self, scope: Scope) -> Flow:
        """Which rows a scope gives: the rows it reads, and what filters, joins and groups them."""
        scope = self.scopes.get(id(scope.expression), scope)
        if id(scope) in self.rows_of:
            return self.rows_of[id(scope)]
        if (id(scope), ROWS) in self.open:
            return NOTHING
        self.open.add((id(scope), ROWS))
        try:
            found = self.rows_of[id(scope)] = self._rows(scope)
        finally:
            self.open.discard((id(scope), ROWS))
        return found

    def _rows(self, scope: Scope) -> Flow:
        query = scope.expression
        if isinstance(query, exp.SetOperation):
            flows = [self.rows(side) for side in scope.set_operation_scopes]
            if isinstance(query, exp.Except | exp.Intersect):
                flows[1:] = [through(flow, "filter") for flow in flows[1:]]
            if query.args.get("distinct"):
                names = [name for name in self.names(scope) if name != ROWS]
                flows += [through(self.column(scope, name), "group") for name in names]
            return merged(flows)
        if not isinstance(query, exp.Select):
            inner = self.scopes.get(id(query.this)) if isinstance(query, exp.Subquery | exp.Table) else None
            if inner is not None:
                return self.rows(inner)
            return through(self._of_function(query, scope.parent or scope), "filter")
        looked_up = self._looked_up(query)
        flows = []
        for alias, (_, source) in scope.selected_sources.items():
            rows = self._rows_of_source(source, scope)
            # A left join gives no rows of its own; which there are of what is looked up it may still decide.
            flows.append(through(rows, "join") if alias in looked_up else rows)
        for join in query.args.get("joins") or ():
            flows.append(self._used(join.args.get("on"), scope, "join"))
            for name in join.args.get("using") or ():
                flows += [
                    through(self._from_source(source, name.name, scope), "join")
                    for source in self._sources(scope)
                    if self._offers(source, name.name)
                ]
        flows.append(self._used(query.args.get("where"), scope, "filter"))
        flows.append(self._used(query.args.get("having"), scope, "filter"))
        flows.append(self._used(query.args.get("qualify"), scope, "filter"))
        flows.append(self._used(query.args.get("group"), scope, "group"))
        distinct = query.args.get("distinct")
        if distinct:
            on = distinct.args.get("on")
            flows += [self._used(one, scope, "group") for one in ([on] if on else query.expressions)]
        if query.args.get("limit") or (distinct and distinct.args.get("on")):
            flows.append(self._used(query.args.get("order"), scope, "sort"))
        # A function beside the columns (`select unnest(x)`) gives rows, too.
        for one in query.find_all(exp.Explode, exp.Unnest, exp.GenerateSeries):
            if one.parent_select is query and one.find_ancestor(exp.From, exp.Join, exp.Lateral) is None:
                flows.append(self._used(one, scope, "filter"))
        return merged(flows)

    @staticmethod
    def _looked_up(query: exp.Select) -> set[str]:
        """Aliases of what is joined to the left."""
        return {
            join.this.alias_or_name
            for join in query.args.get("joins") or ()
            if join.side == "LEFT" and not isinstance(join.this, exp.Lateral)
        }

    def _sources(self, scope: Scope) -> list[Any]:
        return [source for _, source in scope.selected_sources.values()]

    def _rows_of_source(self, source: Any, scope: Scope) -> Flow:
        if isinstance(source, Scope):
            return self.rows(source)
        if not isinstance(source.this, exp.Identifier):
            return through(self._of_function(source, scope), "filter")
        return {Leaf(source.db, source.name, ROWS): frozenset({Way("rows")})}

    def _used(self, node: Any, scope: Scope, kind: str) -> Flow:
        return through(self.flow(node, scope), kind) if isinstance(node, exp.Expr) else NOTHING

    # Expressions

    def flow(self, node: exp.Expr, scope: Scope) -> Flow:
        """What an expression is made of."""
        if isinstance(node, exp.Column):
            return NOTHING if node.is_star else self._reference(node, scope)
        if isinstance(node, exp.Alias | exp.Paren):
            return self.flow(node.this, scope)
        if isinstance(node, exp.Query) or (isinstance(node, exp.Subquery) and id(node.this) in self.scopes):
            return self._subquery(node, scope)
        if isinstance(node, exp.Case):
            return self._case(node, scope)
        if isinstance(node, exp.If):
            return merged(
                [
                    self._used(node.this, scope, "condition"),
                    *(self.flow(node.args[arg], scope) for arg in ("true", "false") if node.args.get(arg)),
                ]
            )
        if isinstance(node, exp.Window):
            return self._window(node, scope)
        if isinstance(node, exp.Filter):
            return merged([self.flow(node.this, scope), self._used(node.expression, scope, "condition")])
        if isinstance(node, exp.WithinGroup):
            ordered = node.expression.find(exp.Order)
            values = [self.flow(one.this, scope) for one in ordered.expressions] if ordered else []
            return through(merged([self.flow(node.this, scope), *values]), "aggregation")
        if isinstance(node, exp.Order):
            value = [self.flow(node.this, scope)] if isinstance(node.this, exp.Expr) else []
            return merged([*value, *(self._used(one.this, scope, "sort") for one in node.expressions)])
        if isinstance(node, exp.JSONExtract | exp.JSONExtractScalar | exp.JSONBExtract | exp.JSONBExtractScalar):
            return self._json(node, scope)
        if isinstance(node, exp.Count):
            return self._count(node, scope)
        children = merged(self._children(node, scope))
        if isinstance(node, exp.Anonymous) and node.name.lower() in self.functions:
            children = merged([children, self.functions[node.name.lower()]])
        kind = _kind_of(node)
        if isinstance(node, exp.Sum) and not children:
            # A sum of ones is a count.
            return self._rows_counted(scope)
        return through(children, kind, barriers.crossed(node))

    def _children(self, node: exp.Expr, scope: Scope) -> list[Flow]:
        return [self.flow(child, scope) for child in node.iter_expressions() if not isinstance(child, exp.Identifier)]

    def _subquery(self, node: exp.Expr, scope: Scope) -> Flow:
        inner = self.scopes.get(id(node)) or self.scopes.get(id(node.this))
        if inner is None:
            return merged(self._children(node, scope))
        values = merged(self.column(inner, name) for name in self.names(inner) if name != ROWS)
        exists = isinstance(node.parent, exp.Exists)
        return merged(
            [
                # A subquery's rows decide which value it gives; of `exists` they are the value.
                through(values, "identity"),
                self.rows(inner) if exists else through(self.rows(inner), "filter"),
            ]
        )

    def _case(self, node: exp.Case, scope: Scope) -> Flow:
        tested = node.this
        flows = [self._used(tested, scope, "condition")]
        for branch in node.args.get("ifs") or ():
            flows.append(self._used(branch.this, scope, "condition"))
            crossed = barriers.crossed_by_condition(branch.this)
            flows.append(through(self.flow(branch.args["true"], scope), "transformation", crossed))
        if node.args.get("default") is not None:
            flows.append(through(self.flow(node.args["default"], scope), "transformation"))
        return merged(flows)

    def _window(self, node: exp.Window, scope: Scope) -> Flow:
        flows = [self.flow(node.this, scope)]
        for one in node.args.get("partition_by") or ():
            flows.append(self._used(one, scope, "window"))
        order = node.args.get("order")
        if order is not None:
            flows += [self._used(one.this, scope, "window") for one in order.expressions]
        named = node.args.get("alias")
        if named is not None and isinstance(scope.expression, exp.Select):
            for window in scope.expression.args.get("windows") or ():
                if window.name == named.name:
                    flows += [self._used(one, scope, "window") for one in window.args.get("partition_by") or ()]
                    if window.args.get("order") is not None:
                        flows += [self._used(one.this, scope, "window") for one in window.args["order"].expressions]
        return merged(flows)

    def _json(self, node: exp.Expr, scope: Scope) -> Flow:
        inner = self.flow(node.this, scope)
        path = _json_path(node.args.get("expression"))
        if path is None:
            # Which part is taken is known at run time only.
            return through(merged([inner, self._used(node.expression, scope, "condition")]), "transformation")
        found: dict[Leaf, frozenset[Way]] = {}
        for leaf, ways in inner.items():
            narrowed = leaf._replace(path=leaf.path + path) if any(w.kind == "identity" for w in ways) else leaf
            found[narrowed] = found.get(narrowed, frozenset()) | ways
        return found

    def _count(self, node: exp.Count, scope: Scope) -> Flow:
        if isinstance(node.this, exp.Star):
            return self._rows_counted(scope)
        return through(merged(self._children(node, scope)), "count") or self._rows_counted(scope)

    def _rows_counted(self, scope: Scope) -> Flow:
        looked_up = self._looked_up(scope.expression) if isinstance(scope.expression, exp.Select) else set()
        rows = merged(
            self._rows_of_source(source, scope)
            for alias, (_, source) in scope.selected_sources.items()
            if alias not in looked_up
        )
        # Which rows those are the rows of the statement say.
        whole = {leaf: frozenset(way for way in ways if way.kind in DIRECT) for leaf, ways in rows.items()}
        return through({leaf: ways for leaf, ways in whole.items() if ways}, "count")

    # Names

    def names(self, scope: Scope) -> list[str]:
        """A scope's columns in order, `*` for those nobody knows."""
        scope = self.scopes.get(id(scope.expression), scope)
        key = id(scope)
        if key not in self.names_of:
            # A recursive CTE asks for its own.
            self.names_of[key] = [ROWS]
            self.names_of[key] = self._names(scope)
        return self.names_of[key]

    def _names(self, scope: Scope) -> list[str]:
        query = scope.expression
        if isinstance(query, exp.SetOperation):
            return self.names(scope.set_operation_scopes[0]) if scope.set_operation_scopes else [ROWS]
        if isinstance(query, exp.Select):
            names: list[str] = []
            for one in query.expressions:
                names += self._starred(one, scope) if one.is_star else [one.alias_or_name]
            return names
        alias = query.args.get("alias")
        columns = alias.columns if isinstance(alias, exp.TableAlias) else []
        return [column.name for column in columns] or [ROWS]

    def _starred(self, star: exp.Expr, scope: Scope) -> list[str]:
        names: list[str] = []
        for alias, (_, source) in scope.selected_sources.items():
            if isinstance(star, exp.Column) and star.table and alias != star.table:
                continue
            known = self.names(source) if isinstance(source, Scope) else list(self._known(source) or [ROWS])
            names += known
        return names or [ROWS]

    def _same_place(self, union: Scope, side: Scope, name: str) -> str:
        names, others = self.names(union), self.names(side)
        if name in names and names.index(name) < len(others) and ROWS not in others:
            return others[names.index(name)]
        return name

    # What is shown

    def steps(self, scope: Scope, name: str) -> Iterable[tuple[str, str]]:
        """The expressions a column is made by, the last one first; plain handing on is left out."""
        waiting: list[tuple[Scope, str]] = [(scope, name)]
        seen: set[tuple[int, str]] = set()
        shown = 0
        while waiting and shown < MAX_STEPS:
            at, column = waiting.pop(0)
            if (id(at), column) in seen:
                continue
            seen.add((id(at), column))
            if isinstance(at.expression, exp.SetOperation):
                waiting += [(side, self._same_place(at, side, column)) for side in at.set_operation_scopes]
                continue
            found = _projection(at.expression, column) if isinstance(at.expression, exp.Select) else None
            if found is None:
                continue
            bare = found.unalias()
            if not isinstance(bare, exp.Column):
                shown += 1
                yield _name_of(at), bare.sql(DIALECT)
            for one in bare.find_all(exp.Column):
                source = at.sources.get(one.table)
                if isinstance(source, Scope):
                    waiting.append((source, one.name))


def _kind_of(node: exp.Expr) -> str:
    if isinstance(node, exp.Predicate | exp.Not | exp.Connector):
        return "predicate"
    if isinstance(node, exp.RowNumber):
        return "transformation"
    if isinstance(node, exp.AggFunc) or (
        isinstance(node, exp.Anonymous) and node.name.lower() in ("bool_or", "bool_and", "every", "percentile_disc")
    ):
        return "aggregation"
    return "transformation"


def _projection(query: exp.Expr, name: str) -> exp.Expr | None:
    for one in query.expressions:
        if not one.is_star and one.alias_or_name == name:
            return one  # type: ignore[no-any-return]
    return None


def _name_of(scope: Scope) -> str:
    """The CTE or alias a query is known by; '' for the statement's own."""
    parent = scope.expression.parent
    while isinstance(parent, exp.SetOperation | exp.Subquery):
        if isinstance(parent, exp.Subquery) and parent.alias:
            return str(parent.alias)
        parent = parent.parent
    return str(parent.alias) if isinstance(parent, exp.CTE) else ""


def _json_path(node: Any) -> str | None:
    """A constant path: `.email`, `.items[0].id`; None when it is made at run time."""
    if isinstance(node, exp.JSONPath):
        parts = []
        for part in node.expressions:
            if isinstance(part, exp.JSONPathKey):
                parts.append(f".{part.this}")
            elif isinstance(part, exp.JSONPathSubscript):
                parts.append(f"[{part.this}]")
            elif not isinstance(part, exp.JSONPathRoot):
                return None
        return "".join(parts)
    if isinstance(node, exp.Literal):
        if not node.is_string:
            return f"[{node.this}]"
        text = str(node.this)
        # #>> '{a,b}'
        keys = text[1:-1].split(",") if text.startswith("{") and text.endswith("}") else [text]
        return "".join(f"[{key}]" if key.isdigit() else f".{key}" for key in keys)
    return None

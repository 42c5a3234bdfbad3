"""What one statement is made of: values, rows, JSON paths, barriers; and what is unknown is said."""

import pytest

from orchestration.lineage.sql import Statement, find_broken, read_statement

TABLES = {
    "s": {
        "t": {"id": "integer", "a": "text", "b": "text", "n": "bigint", "at": "timestamptz", "doc": "jsonb"},
        "u": {"id": "integer", "c": "text", "t_id": "integer"},
        "ref": {"code": "text", "name": "text"},
    },
    "ops": {"token_key": {"inner_pad": "bytea", "outer_pad": "bytea"}},
}
TOKEN = (
    "cast(encode(substring(sha256((select outer_pad from ops.token_key) || "
    "sha256((select inner_pad from ops.token_key) || convert_to(cast({} as text), 'UTF8'))) from 1 for 16), 'hex') "
    "as uuid)"
)
# With a key that is a column anybody can read.
FALSE_TOKEN = TOKEN.format("a").replace("ops.token_key", "s.ref").replace("inner_pad", "code")
FALSE_TOKEN = FALSE_TOKEN.replace("outer_pad", "code")


def read(text: str) -> Statement:
    return read_statement(text, TABLES)


def flow(text: str, column: str = "x") -> dict[str, set[str]]:
    """leaf -> kinds of ways, of a column or (`*`) of the rows."""
    statement = read(text)
    assert not statement.unknown, statement.unknown
    output = statement.rows if column == "*" else statement.columns[column]
    assert not output.unknown, output.unknown
    return {
        f"{leaf.table}.{leaf.column}{leaf.path}": {way.kind for way in ways}
        for leaf, ways in sorted(output.flow.items())
    }


VALUES = {
    "a rename": ("select a as x from s.t", {"t.a": {"identity"}}),
    "a star over CTEs": (
        "with p as (select * from s.t), q as (select * from p) select q.a as x from q",
        {"t.a": {"identity"}},
    ),
    "a union by place": (
        "select a as x from s.t union all select c from s.u",
        {"t.a": {"identity"}, "u.c": {"identity"}},
    ),
    "three unions, starred": (
        "with p as (select a, b from s.t), q as (select c as a, c as b from s.u), r as (select * from p union all "
        "select * from q union all select b, a from p) select a as x from r",
        {"t.a": {"identity"}, "t.b": {"identity"}, "u.c": {"identity"}},
    ),
    "what except takes away": (
        "select a as x from s.t except select c from s.u",
        {"t.a": {"identity"}, "u.c": {"filter"}},
    ),
    "a window": (
        "select max(a) over (partition by b order by at) as x from s.t",
        {"t.a": {"aggregation"}, "t.at": {"window"}, "t.b": {"window"}},
    ),
    "a named window": (
        "select sum(n) over w as x from s.t window w as (partition by b)",
        {"t.b": {"window"}, "t.n": {"aggregation"}},
    ),
    "a rank": (
        "select row_number() over (partition by b order by at desc) as x from s.t",
        {"t.at": {"window"}, "t.b": {"window"}},
    ),
    "a case": (
        "select case when a = 'y' then b else cast(n as text) end as x from s.t",
        {"t.a": {"condition"}, "t.b": {"transformation"}, "t.n": {"transformation"}},
    ),
    "an ordered array": (
        "select (array_agg(a order by at) filter (where b is not null))[1] as x from s.t",
        {"t.a": {"aggregation"}, "t.at": {"sort"}, "t.b": {"condition"}},
    ),
    "a percentile": (
        "select percentile_cont(0.5) within group (order by n) as x from s.t",
        {"t.n": {"aggregation"}},
    ),
    "rows counted": ("select count(*) as x from s.t", {"t.*": {"count"}}),
    "rows counted by a sum of ones": (
        "with p as (select 1 as one, a from s.t) select sum(one) as x from p group by a",
        {"t.*": {"count"}},
    ),
    "values counted": ("select count(distinct a) as x from s.t", {"t.a": {"count"}}),
    "a comparison": ("select a = b as x from s.t", {"t.a": {"predicate"}, "t.b": {"predicate"}}),
    "a JSON path": ("select doc -> 'user' ->> 'email' as x from s.t", {"t.doc.user.email": {"identity"}}),
    "a JSON path with #>>": ("select doc #>> '{user,emails,0}' as x from s.t", {"t.doc.user.emails[0]": {"identity"}}),
    "a JSON path across CTEs": (
        "with p as (select doc -> 'user' as who from s.t) select who ->> 'email' as x from p",
        {"t.doc.user.email": {"identity"}},
    ),
    "a JSON path made at run time": (
        "select doc ->> a as x from s.t",
        {"t.a": {"condition"}, "t.doc": {"transformation"}},
    ),
    "elements of an array": (
        "select e.value ->> 'sku' as x from s.t cross join lateral jsonb_array_elements(t.doc -> 'items') as e (value)",
        {"t.doc.items": {"transformation"}},
    ),
    "a lateral series": (
        "select g.day as x from s.t cross join lateral generate_series(0, t.n) as g (day)",
        {"t.n": {"transformation"}},
    ),
    "a correlated subquery": (
        "select (select max(u.c) from s.u where u.t_id = t.id) as x from s.t",
        {"t.id": {"filter"}, "u.*": {"filter"}, "u.c": {"aggregation"}, "u.t_id": {"filter"}},
    ),
    "a recursive CTE": (
        "with recursive r as (select id, a from s.t union all select u.id, r.a from s.u inner join r on u.t_id = r.id) "
        "select a as x from r",
        {"t.a": {"identity"}},
    ),
    "a function nobody knows": ("select my_schema.clean(a, b) as x from s.t", None),
    "rows of values": ("select v.name as x from (values (1, 'a')) as v (id, name)", {}),
    "a constant": ("select cast(null as text) as x from s.t", {}),
    "an alias in GROUP BY": (
        "select lower(a) as x, count(*) as n from s.t group by x",
        {"t.a": {"transformation"}},
    ),
    "USING": ("select u.c as x from s.t inner join s.u using (id)", {"u.c": {"identity"}}),
    "quoted names": ('select "t"."a" as "x" from "db"."s"."t" as "t"', {"t.a": {"identity"}}),
}


@pytest.mark.parametrize(("text", "expected"), VALUES.values(), ids=VALUES.keys())
def test_a_value_is_followed(text: str, expected: dict[str, set[str]] | None) -> None:
    found = flow(text)
    assert found == (expected if expected is not None else {"t.a": {"transformation"}, "t.b": {"transformation"}})


ROWS = {
    "a filter": ("select a from s.t where b = 'y'", {"t.*": {"rows"}, "t.b": {"filter"}}),
    "an inner join": (
        "select a from s.t inner join s.u on t.id = u.t_id",
        {"t.*": {"rows"}, "t.id": {"join"}, "u.*": {"rows"}, "u.t_id": {"join"}},
    ),
    "a left join looks up": (
        "select a from s.t left join s.u on t.id = u.t_id",
        {"t.*": {"rows"}, "t.id": {"join"}, "u.*": {"join"}, "u.t_id": {"join"}},
    ),
    "grouping": (
        "select a from s.t group by a having max(n) > 1",
        {"t.*": {"rows"}, "t.a": {"group"}, "t.n": {"filter"}},
    ),
    "distinct": ("select distinct a from s.t", {"t.*": {"rows"}, "t.a": {"group"}}),
    "a subquery in a filter": (
        "select a from s.t where id in (select t_id from s.u where c = 'y')",
        {"t.*": {"rows"}, "t.id": {"filter"}, "u.*": {"filter"}, "u.c": {"filter"}, "u.t_id": {"filter"}},
    ),
    "a filter in a CTE": (
        "with p as (select * from s.t where b = 'y') select a from p where n > 1",
        {"t.*": {"rows"}, "t.b": {"filter"}, "t.n": {"filter"}},
    ),
    "the first by rank": (
        "with p as (select *, row_number() over (partition by a order by at) as r from s.t) "
        "select a from p where r = 1",
        {"t.*": {"rows"}, "t.a": {"filter", "window"}, "t.at": {"filter", "window"}},
    ),
}


@pytest.mark.parametrize(("text", "expected"), ROWS.values(), ids=ROWS.keys())
def test_rows_are_followed(text: str, expected: dict[str, set[str]]) -> None:
    found = flow(text, "*")
    assert found.keys() == expected.keys()
    for leaf, kinds in found.items():
        assert kinds <= expected[leaf]


def crossed(expression: str, rest: str = "from s.t") -> set[frozenset[str]]:
    """What the ways of column `a` cross."""
    output = read(f"select {expression} as x {rest}").columns["x"]
    return {way.barriers for leaf, ways in output.flow.items() if leaf.column == "a" for way in ways}


@pytest.mark.parametrize(
    ("expression", "barrier"),
    [
        ("md5(a)", "hash"),
        ("encode(sha256(convert_to(a, 'UTF8')), 'hex')", "hash"),
        ("encode(digest(a, 'sha256'), 'hex')", "hash"),
        ("substr(md5(coalesce(a, '')), 1, 8)", "hash"),
        (TOKEN.format("a"), "tokenise"),
        ("left(a, 2) || '***'", "mask"),
        ("split_part(a, '@', 2)", "mask"),
        ("substring(a from 1 for 3)", "mask"),
    ],
)
def test_a_barrier_is_seen(expression: str, barrier: str) -> None:
    assert all(barrier in one for one in crossed(expression))


@pytest.mark.parametrize(
    ("expression", "barrier"),
    [
        ("md5(a) || a", "hash"),
        ("case when md5(a) = 'x' then a end", "hash"),
        ("lower(a)", "hash"),
        ("left(a, 40)", "mask"),
        ("left(a, n)", "mask"),
        ("split_part(a, '@', 1)", "mask"),
        ("regexp_replace(a, '^$', '')", "mask"),
        ("md5(a)", "tokenise"),
        ("sha256(convert_to(a, 'UTF8'))", "tokenise"),
        ("sha256(convert_to('salt' || a, 'UTF8'))", "tokenise"),
        (FALSE_TOKEN, "tokenise"),
    ],
)
def test_what_is_no_barrier_is_not_taken_for_one(expression: str, barrier: str) -> None:
    assert not all(barrier in one for one in crossed(expression))


def test_an_aggregate_is_a_barrier_by_how_many_it_needs() -> None:
    assert crossed("sum(a)", "from s.t group by b having count(*) >= 10") == {frozenset({"aggregate:10"})}
    assert crossed("sum(a)", "from s.t group by b having count(*) > 10 and max(n) > 0") == {frozenset({"aggregate:11"})}
    assert crossed("case when count(*) >= 5 then avg(a) end", "from s.t group by b") == {frozenset({"aggregate:5"})}
    assert crossed("sum(a)", "from s.t group by b having count(*) >= 10 or max(n) > 0") == {frozenset()}
    # The greatest is somebody's own.
    assert crossed("max(a)", "from s.t group by b having count(*) >= 10") == {frozenset()}


def test_steps_say_how_a_column_is_made() -> None:
    column = read("with p as (select id, lower(a) as low from s.t) select low || '!' as x from p").columns["x"]
    assert column.expressions == (("", "p.low || '!'"), ("p", "LOWER(t.a)"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("select nothing as x from s.t", "nothing offers nothing"),
        ("with p as (select a from s.t) select b as x from p", "nothing offers b"),
        ("select t.gone as x from s.t", "no column gone in s.t"),
    ],
)
def test_what_cannot_be_resolved_is_unknown(text: str, reason: str) -> None:
    assert reason in read(text).columns["x"].unknown


def test_a_statement_that_cannot_be_read_is_unknown_as_a_whole() -> None:
    for text in ("select from where", "delete from s.t", "select (((", "", "copy s.t from stdin"):
        statement = read(text)
        assert statement.unknown
        assert not statement.columns


def test_a_star_over_a_table_nobody_knows() -> None:
    statement = read("select * from s.nobody")
    assert statement.columns["*"].unknown
    # Where its columns are known otherwise each is looked for there.
    named = read_statement("with p as (select * from s.nobody) select * from p", TABLES, ["id"])
    assert [leaf.column for leaf in named.columns["id"].flow] == ["id"]
    # A column that is named can come from one place only.
    assert flow("with p as (select * from s.nobody) select who as x from p") == {"nobody.who": {"identity"}}


def test_broken_references_are_found_wherever_they_stand() -> None:
    without = {"s": {"t": {"id": "integer", "b": "text"}, "u": TABLES["s"]["u"]}}
    for text in (
        "select a from s.t",
        "select id from s.t where a = 'x'",
        "select id from s.t order by a",
        "select t.id from s.t inner join s.u on t.a = u.c",
        "with unused as (select a from s.t) select id from s.t",
        "select id from s.t where exists (select 1 from s.u where u.c = t.a)",
        "select count(*) from s.t group by a",
    ):
        assert find_broken(text, without), text
        assert not find_broken(text, TABLES), text
    assert not find_broken("select * from s.t", without)


def test_functions_of_the_project_bring_what_they_read() -> None:
    body = read("select name from s.ref").columns["name"].flow
    statement = read_statement("select look_up(a) as x from s.t", TABLES, (), {"look_up": body})
    assert {f"{leaf.table}.{leaf.column}" for leaf in statement.columns["x"].flow} == {"t.a", "ref.name"}

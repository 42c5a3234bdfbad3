"""The personal-data policy: flows are followed, barriers are held against the SQL, and what is not said is found.

Each rule has its twin: a project that keeps it, and the same one with the rule broken.
"""

import hashlib
import hmac
import uuid

import pytest

from ingestion.errors import ConfigurationError, DataError
from ingestion.tokens import pads_of, token_of
from orchestration.lineage.diff import compare
from orchestration.lineage.graph import Graph, without_edges
from orchestration.lineage.personal import Personal, describe_violations, follow_personal_data, require_policy
from tests.harness.lineage import graph_of, manifest_of

SOURCES = {"people": {"id": {}, "email": {"pii": True}, "salary": {"pii": True}, "team": {}}}
PII = {"pii": True}


def project(
    mart: str, declared: dict[str, dict[str, object]], staging: dict[str, dict[str, object]] | None = None
) -> Graph:
    """people -> stg -> mid -> dim_people; the mart's SQL and declarations are what is tested."""
    said = {"email": PII, "salary": PII} if staging is None else staging
    return graph_of(
        manifest_of(
            {
                "stg": "select id, email, salary, team from raw.people",
                "mid": "with s as (select * from main.stg) select id, lower(email) as email, salary, team from s",
                "dim_people": mart,
            },
            sources=SOURCES,
            columns={"stg": said, "mid": {"email": PII, "salary": PII}, "dim_people": declared},
        )
    )


def found(graph: Graph) -> Personal:
    return follow_personal_data(graph)


def broken(graph: Graph) -> dict[str, str]:
    return {graph.show(one.column): one.reason for one in found(graph).violations}


KEPT = {
    "left out": ("select id, team from main.mid", {}),
    "hashed": ("select id, md5(email) as who from main.mid", {"who": {"barrier": "hash"}}),
    "masked": ("select id, left(email, 2) || '...' as who from main.mid", {"who": {"barrier": "mask"}}),
    "averaged over enough": (
        "select team, avg(salary) as pay from main.mid group by team having count(*) >= 10",
        {"pay": {"barrier": {"aggregate": 10}}},
    ),
    "counted": ("select team, count(distinct email) as people from main.mid group by team", {}),
    "asked about": ("select id, email is not null as has_email from main.mid", {}),
    "decided by": ("select id from main.mid where email like '%@example.com'", {}),
}


@pytest.mark.parametrize(("mart", "declared"), KEPT.values(), ids=KEPT.keys())
def test_the_policy_is_kept(mart: str, declared: dict[str, dict[str, object]]) -> None:
    graph = project(mart, declared)
    assert broken(graph) == {}
    ends = {graph.show(one.column): one.barrier for one in found(graph).endings}
    assert set(ends) == {f"dim_people.{name}" for name, meta in declared.items() if "barrier" in meta}
    require_policy(graph)


BROKEN = {
    "not said": ("select id, email as address from main.mid", {}, "without saying so"),
    "renamed and trimmed": ("select id, trim(email) || '' as note from main.mid", {}, "without saying so"),
    "in a mart, though said": ("select id, email from main.mid", {"email": PII}, "holds personal data in marts"),
    "a hash not declared": ("select id, md5(email) as who from main.mid", {}, "without saying so"),
    "a barrier that is not there": (
        "select id, lower(email) as who from main.mid",
        {"who": {"barrier": "hash"}},
        "none",
    ),
    "a hash with the value beside it": (
        "select id, coalesce(md5(email), email) as who from main.mid",
        {"who": {"barrier": "hash"}},
        "declares the barrier hash",
    ),
    "another barrier than declared": (
        "select id, md5(email) as who from main.mid",
        {"who": {"barrier": "tokenise"}},
        "declares the barrier tokenise",
    ),
    "too few": (
        "select team, avg(salary) as pay from main.mid group by team having count(*) >= 3",
        {"pay": {"barrier": {"aggregate": 10}}},
        "declares the barrier aggregate:10",
    ),
    "somebody's own": (
        "select team, max(salary) as pay from main.mid group by team having count(*) >= 10",
        {"pay": {"barrier": {"aggregate": 10}}},
        "declares the barrier aggregate:10",
    ),
    "one side of a union": (
        "select md5(email) as who from main.mid union all select email from main.mid",
        {"who": {"barrier": "hash"}},
        "declares the barrier hash",
    ),
    "out of JSON": (
        "select to_jsonb(row(email)) ->> 'f1' as who from main.mid",
        {},
        "without saying so",
    ),
    "where nobody can trace": ("select *, nonsense.* as x from main.mid, lateral", {}, "cannot be traced"),
}


@pytest.mark.parametrize(("mart", "declared", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_what_breaks_it_is_found(mart: str, declared: dict[str, dict[str, object]], reason: str) -> None:
    graph = project(mart, declared)
    wrong = broken(graph)
    assert len(wrong) == 1, wrong
    assert reason in next(iter(wrong.values()))
    with pytest.raises(DataError, match="personal data: 1 column breaks the policy"):
        require_policy(graph)


def test_a_layer_that_does_not_say_so_is_found_with_the_way() -> None:
    graph = project("select id from main.mid", {}, staging={"salary": PII})
    (line,) = describe_violations(found(graph))
    assert line.startswith("stg.email receives personal data without saying so")
    assert line.endswith("raw.people.email -> stg.email")


def test_the_way_begins_at_the_source() -> None:
    graph = project("select id, md5(email) as who from main.mid", {"who": {"barrier": "hash"}})
    personal = found(graph)
    (ending,) = personal.endings
    assert personal.show_way(personal.way_to(ending.sources[0])) == "raw.people.email -> stg.email -> mid.email"


def test_without_an_edge_the_flow_is_lost() -> None:
    """What the tests of the whole project hold on to: a graph that misses an edge says less."""
    graph = project("select id, email from main.mid", {"email": PII})
    cut = without_edges(graph, lambda edge: graph.show(edge.target) == "mid.email")
    assert "dim_people.email" in broken(graph)
    assert graph.show(
        found(cut).way_to(next(one for one in found(cut).reached if cut.show(one) == "mid.email"))[0]
    ) == ("mid.email")


def test_a_barrier_nobody_knows_is_refused() -> None:
    for barrier in ("encrypt", {"aggregate": 1}, {"aggregate": "many"}, ["hash"]):
        with pytest.raises(ConfigurationError, match=r"dim_people\.who declares the barrier"):
            project("select id, md5(email) as who from main.mid", {"who": {"barrier": barrier}})


def test_a_change_that_brings_personal_data_on_is_harmful() -> None:
    before = project("select id, team from main.mid", {})
    after = project("select id, team, email as contact from main.mid", {})
    change = compare(before, after)
    assert change.harmful
    assert [after.show(one) for one in change.added] == ["dim_people.contact"]
    ((column, way),) = change.newly_personal
    assert after.show(column) == "dim_people.contact"
    assert [after.show(one) for one in way] == ["raw.people.email", "stg.email", "mid.email", "dim_people.contact"]


def test_a_change_of_meaning_is_seen_and_harmless() -> None:
    before = project("select id, team from main.mid", {})
    after = project("select id, upper(team) as team from main.mid where id > 0", {})
    change = compare(before, after)
    assert not change.harmful
    ((column, was, now),) = [one for one in change.changed if after.show(one[0]) == "dim_people.team"]
    assert after.show(column) == "dim_people.team"
    assert was == "mid.team"
    assert "UPPER" in now
    assert not compare(before, before).changed


def test_tokens_are_hmac() -> None:
    """What macros/token.sql computes from the two pads is HMAC-SHA-256."""
    for secret in (b"k", b"key" * 40):
        inner, outer = pads_of(secret)
        value = "usr_000001"
        made = hashlib.sha256(outer + hashlib.sha256(inner + value.encode()).digest()).digest()
        assert made == hmac.digest(secret, value.encode(), "sha256")
        assert token_of(secret, value) == uuid.UUID(bytes=made[:16])

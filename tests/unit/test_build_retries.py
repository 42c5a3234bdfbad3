"""What of a build is tried again: what an outage took, and nothing else; never a failed test."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from ingestion.errors import AuthenticationError, DataError, TransientError
from ingestion.retry import RetryPolicy
from ingestion.settings import Settings
from orchestration import transform

GONE = "Database Error in model b: server closed the connection unexpectedly"


def result(**statuses: tuple[str, str]) -> Any:
    """dbt's results: node -> (status, message). A name with `__` is a test."""
    nodes = []
    for name, (status, message) in statuses.items():
        kind = "test" if "__" in name else "model"
        node = SimpleNamespace(unique_id=f"{kind}.p.{name}", resource_type=kind, fqn=["p", name])
        nodes.append(
            SimpleNamespace(
                node=node, status=status, message=message, adapter_response={}, execution_time=1.0, failures=None
            )
        )
    return SimpleNamespace(result=SimpleNamespace(results=nodes, elapsed_time=2.0))


class Dbt:
    """Stands in for dbt's command: answers in turn, keeps what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[Sequence[str]] = []

    def __call__(self, settings: Settings, arguments: Sequence[str], on_node: Any, project: Any) -> Any:
        self.asked.append(arguments)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def selected(self) -> list[list[str]]:
        return [[one for one in arguments if one.startswith("fqn:")] for arguments in self.asked]


@pytest.fixture
def settings(clean_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Tries without waits between them."""
    monkeypatch.setattr(transform, "policy_of", lambda _: RetryPolicy(base_s=0.0))
    return clean_settings


def build(settings: Settings, monkeypatch: pytest.MonkeyPatch, dbt: Dbt, **more: Any) -> transform.BuildReport:
    monkeypatch.setattr(transform, "run_dbt", dbt)
    return transform.run_build(settings, **more)


OUTAGE = {
    "a": ("success", ""),
    "a__is_unique": ("pass", ""),
    "b": ("error", GONE),
    "b__is_unique": ("skipped", ""),
    "c": ("skipped", ""),
}


def test_after_an_outage_only_what_failed_or_was_skipped_is_built(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    mended = result(b=("success", ""), b__is_unique=("pass", ""), c=("success", ""))
    dbt = Dbt(result(**OUTAGE), mended)

    report = build(settings, monkeypatch, dbt)

    assert dbt.selected == [[], ["fqn:p.b", "fqn:p.b__is_unique", "fqn:p.c"]]
    assert not report.failures
    assert [one.status for one in report.nodes] == ["success", "pass", "success", "pass", "success"]
    assert dict(report.counts) == {"model": 3, "test": 2}
    assert report.seconds == 4.0


def test_a_failed_test_is_not_tried_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in (
        {"a__is_unique": ("fail", "Got 3 results, configured to fail if != 0"), "b": ("skipped", "")},
        # Whatever the database says in it: a test that ran and failed is about the data.
        {"a__is_unique": ("fail", "server closed the connection")},
        {"a": ("error", "Database Error: division by zero"), "b": ("error", GONE)},
    ):
        dbt = Dbt(result(**broken))
        report = build(settings, monkeypatch, dbt)
        assert len(dbt.asked) == 1
        with pytest.raises(DataError):
            transform.require_built(report)


def test_a_database_that_stays_away_is_an_outage_with_what_was_built(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transform, "policy_of", lambda _: RetryPolicy(base_s=0.0, tries=2))
    report = build(settings, monkeypatch, Dbt(result(**OUTAGE), TransientError("down")))
    with pytest.raises(TransientError, match="server closed the connection"):
        transform.require_built(report)

    # The next try of the run goes on from there.
    again = Dbt(result(b=("success", ""), b__is_unique=("pass", ""), c=("success", "")))
    assert not build(settings, monkeypatch, again, before=report).failures
    assert again.selected == [["fqn:p.b", "fqn:p.b__is_unique", "fqn:p.c"]]


def test_a_build_that_never_began_is_asked_for_whole(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    dbt = Dbt(TransientError("down"), result(a=("success", "")))
    assert not build(settings, monkeypatch, dbt, select=["--select", "fqn:p.a"]).failures
    assert dbt.selected == [["fqn:p.a"], ["fqn:p.a"]]

    with pytest.raises(AuthenticationError):
        build(settings, monkeypatch, Dbt(AuthenticationError("no")))

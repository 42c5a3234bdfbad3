"""Declarations: what stands in the YAML is read whole; what cannot be understood names file, line and reason."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from ingestion.errors import ConfigurationError
from ingestion.feeds import (
    AcceptedValues,
    FeedSpec,
    KafkaOrigin,
    Range,
    RequestSpec,
    RestOrigin,
    load_feeds,
    select_feeds,
)
from ingestion.settings import Settings

SOURCES = "models/staging/payments/_payments__sources.yml"


@pytest.fixture
def project(tmp_path: Path, clean_settings: Settings) -> Settings:
    """A copy of the project's declarations and seeds."""
    for folder in ("models", "seeds"):
        shutil.copytree(clean_settings.project_dir / folder, tmp_path / folder)
    return replace(clean_settings, project_dir=tmp_path)


def edit(project: Settings, old: str, new: str) -> int:
    """Replace a text of the payments declaration; the line it stood on."""
    path = project.project_dir / SOURCES
    text = path.read_text()
    assert text.count(old) >= 1, f"{old!r} is not in the declaration"
    path.write_text(text.replace(old, new, 1))
    return text[: text.index(old)].count("\n") + 1


def test_the_declared_feeds(feed_named: Callable[[str], FeedSpec]) -> None:
    payments = feed_named("raw_payments.transaction_created")
    assert isinstance(payments.origin, KafkaOrigin)
    assert payments.origin.topic == "payments_transaction_created"
    assert [column.name for column in payments.columns if column.required] == [c.name for c in payments.columns]
    amount = payments.columns[1]
    assert amount.type.sql == "numeric(18,4)"
    assert Range(Decimal(0), None) in amount.rules
    assert payments.owner == "payments-platform"

    users = feed_named("raw_users.user_events")
    assert [column.name for column in users.columns if column.pii] == [
        "user_id", "email", "full_name", "phone", "ip_address",
    ]  # fmt: skip
    countries = next(rule for rule in users.columns[7].rules if isinstance(rule, AcceptedValues))
    assert len(countries.values) == 249
    assert "NA" in countries.values

    rates = feed_named("raw_fx.daily_rates")
    assert isinstance(rates.origin, RestOrigin)
    assert rates.origin.window.start == date(2025, 1, 1)
    assert datetime(2099, 12, 31, 23, 59, 59, tzinfo=UTC) in [
        rule.maximum for column in payments.columns for rule in column.rules if isinstance(rule, Range)
    ]


BROKEN = {
    "unknown type": ("data_type: numeric(18,4)", "data_type: money", "type `money` is not known"),
    "impossible numeric": ("data_type: numeric(18,4)", "data_type: numeric(4,18)", "not a valid numeric type"),
    "unknown rule": ("within_range:", "in_range:", "rule `in_range` is not known"),
    "range of a text": ("arguments: {min_value: 0}", "arguments: {min_value: low}", "min_value is not a numeric"),
    "empty range": ("arguments: {min_value: 0}", "arguments: {}", "needs min_value, max_value or both"),
    "unknown kind": ("kind: kafka", "kind: kinesis", "kind `kinesis` is not known"),
    "unknown idleness": ("format: json", "idle_partitions: fine", "`idle_partitions` is late or normal, not `fine`"),
    "unknown format": ("format: json", "format: avro", "format `avro` is not known"),
    "unknown setting": ("format: json", "formt: json", "no setting `formt`"),
    "no topic": ("topic: payments_transaction_created", "format: json", "stands twice"),
    "pattern": ("^usr_[0-9]{6}$", "^usr_[0-9{6}$", "not a regular expression"),
    "no such seed": ("ref('countries')", "ref('nations')", "no seed nations.csv"),
    "no such seed column": ("field: country_code", "field: alpha2", "no column alpha2"),
    "values": ("values: [USD, EUR, GBP, JPY, CAD]", "values: USD", "must be a list, not text"),
    "currency column": ("currency_column: currency", "currency_column: money", "money is not a column"),
    "column twice": ("- name: status", "- name: currency", "column currency stands twice"),
    "upper case": ("- name: status", "- name: Status", "lower-case snake case"),
    "long name": ("- name: status", f"- name: {'s' * 51}", "at most 50 characters"),
    "not YAML": ("columns:", "columns: [", "not valid YAML"),
    "naive time": ("2000-01-01T00:00:00Z", "2000-01-01T00:00:00", "a time needs its zone"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN, ids=list(BROKEN))
def test_a_declaration_that_cannot_be_understood_names_file_line_and_reason(project: Settings, case: str) -> None:
    old, new, reason = BROKEN[case]
    line = edit(project, old, new)
    with pytest.raises(ConfigurationError) as raised:
        load_feeds(project)
    where, _, message = raised.value.message.partition(": ")
    name, _, said = where.rpartition(":")
    assert name == SOURCES
    assert reason in message
    # The line named is the line at fault, or the head of the mapping it belongs to (for a YAML error, where it ends).
    assert case == "not YAML" or abs(int(said) - line) <= 12


def test_a_feed_declared_twice_names_both_places(project: Settings) -> None:
    path = project.project_dir / SOURCES
    shutil.copy(path, path.with_name("_more__sources.yml"))
    with pytest.raises(ConfigurationError, match=r"already declared in models/staging/payments/_more__sources\.yml:"):
        load_feeds(project)


def test_contract_version_follows_rules_not_words(project: Settings) -> None:
    def version() -> str:
        return next(f for f in load_feeds(project) if f.table == "transaction_created").contract_version

    first = version()
    edit(project, "Amount in major units", "An amount in major units")
    assert version() == first
    edit(project, "arguments: {min_value: 0}", "arguments: {min_value: 1}")
    assert version() != first


def test_feeds_are_selected_by_full_or_short_name(clean_settings: Settings) -> None:
    feeds = load_feeds(clean_settings)
    assert [f.name for f in select_feeds(feeds, [])] == [f.name for f in feeds]
    assert [f.name for f in select_feeds(feeds, ["daily_rates", "raw_users.user_events"])] == [
        "raw_fx.daily_rates", "raw_users.user_events",
    ]  # fmt: skip
    with pytest.raises(ConfigurationError, match="nothing is not declared"):
        select_feeds(feeds, ["nothing"])


def test_how_hard_an_api_may_be_asked(project: Settings) -> None:
    path = project.project_dir / "models/staging/fx/_fx__sources.yml"
    text = path.read_text()

    def declared(requests: str) -> RequestSpec:
        indent = " " * 14
        path.write_text(text.replace(f"{indent}records:\n", f"{indent}requests: {requests}\n{indent}records:\n"))
        (rates,) = [feed for feed in load_feeds(project) if isinstance(feed.origin, RestOrigin)]
        assert isinstance(rates.origin, RestOrigin)
        return rates.origin.requests

    assert declared("{concurrent: 4, per_minute: 120}") == RequestSpec(4, 120)
    assert declared("{}") == RequestSpec(1, None)
    for wrong, said in (
        ("{concurrent: 0}", "must be 1 or more"),
        ("{per_minute: 0}", "must be 1 or more"),
        ("{per_minute: 0.5}", "must be a whole number"),
        ("{per_second: 1}", "has no setting `per_second`"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            declared(wrong)

"""Lineage against what happens: a removed column and the build, a row and its records, a change and its review."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ingestion.errors import ConfigurationError, DataError
from ingestion.feeds import load_feeds
from ingestion.settings import Settings, load_settings
from ingestion.tokens import token_of
from orchestration import cli, transform
from orchestration.lineage.build import load_graph
from orchestration.lineage.compiled import load_compiled
from orchestration.lineage.impact import find_impact
from orchestration.lineage.incident import find_incident
from orchestration.lineage.names import find_column, find_node
from orchestration.lineage.personal import guard_policy
from orchestration.lineage.row import trace_row
from orchestration.run import prepare
from tests.harness.models import TRANSACTIONS, USER_EVENTS, Dbt, RawLog, failures, land_sample
from tests.harness.project_copy import copy_project

SECRET = "a-secret-of-the-tests"


def change(project: Path, file: str, old: str, new: str) -> None:
    path = project / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_impact_names_exactly_the_models_that_fail(
    warehouse: Settings, clean_settings: Settings, tmp_path: Path
) -> None:
    """Two columns are taken out of a copy of the project, and the copy is built."""
    graph, manifest = load_graph(clean_settings), load_compiled(clean_settings)
    said: set[str] = set()
    skipped: set[str] = set()
    for column in ("int_payments__transactions_converted.event_count", "int_users__latest.is_closed"):
        found = find_impact(graph, manifest, *find_column(graph, column))
        said |= {graph.datasets[one.model].name for one in found.broken}
        skipped |= {graph.datasets[one].name for one in found.skipped}
    assert said == {"int_payments__daily_totals", "fct_transactions", "dim_users"}

    project = copy_project(tmp_path / "project")
    change(
        project,
        "models/intermediate/payments/int_payments__transactions_converted.sql",
        "        received_at,\n        event_count,\n",
        "        received_at,\n",
    )
    latest = (project / "models/intermediate/users/int_users__latest.sql").read_text(encoding="utf-8")
    begin, end = latest.index("        coalesce(\n"), latest.index("        min(occurred_at) as first_event_at")
    change(project, "models/intermediate/users/int_users__latest.sql", latest[begin:end], "")
    settings = replace(warehouse, project_dir=project, home=tmp_path / "home")
    prepare(settings)
    report = transform.summarise(transform.run_dbt(settings, ["build", "--resource-type", "model", "seed"]))
    status = {node.node.rpartition(".")[2]: node.status for node in report.nodes}
    assert {name for name, how in status.items() if how == "error"} == said
    assert {name for name, how in status.items() if how == "skipped"} == skipped - said


def test_a_row_leads_back_to_its_records(
    log: RawLog, dbt: Dbt, clean_settings: Settings, query: Callable[..., list[tuple]]
) -> None:
    land_sample(log)
    log.land(TRANSACTIONS, [], dead=2)
    graph, manifest, feeds = load_graph(clean_settings), load_compiled(clean_settings), load_feeds(clean_settings)
    succeeded, results = dbt("build", "--select", "+fct_transactions", "+dim_users", "--resource-type", "model", "seed")
    assert succeeded, failures(results)
    connection = log.connection
    connection.autocommit = True

    def trace(model: str, *key: str):  # type: ignore[no-untyped-def]
        return trace_row(connection, graph, manifest, feeds, find_node(graph, model)[0], key)

    ((transaction, user, token),) = query(
        "select t.transaction_id::text, t.user_id, f.user_key::text from staging.stg_payments__transactions as t "
        "inner join marts.fct_transactions as f on t.transaction_id = f.transaction_id where t.event_count >= 2 limit 1"
    )
    landed = query(
        "select _kafka_partition || '@' || _kafka_offset, _dlt_load_id from raw_payments.transaction_created "
        "where transaction_id = %s",
        transaction,
    )
    by_id = trace("fct_transactions", transaction)
    assert {(one.place, one.load_id) for one in by_id.records} == set(landed)
    assert len(by_id.records) >= 2
    assert by_id.letters == ()

    # A token is looked for as a token: the user's events and payments, of both feeds.
    of_user = trace("dim_users", token)
    assert {one.feed for one in of_user.records} <= {".".join(TRANSACTIONS), ".".join(USER_EVENTS)}
    ((payments,),) = query("select count(*) from raw_payments.transaction_created where user_id = %s", user)
    assert sum(one.feed == ".".join(TRANSACTIONS) for one in of_user.records) + of_user.more >= min(payments, 50)
    # No mart holds who it was.
    for (table,) in query("select table_name from information_schema.tables where table_schema = 'marts'"):
        assert query(f"select count(*) from marts.{table} as t where t::text like '%%usr_%%'") == [(0,)]

    # A dead letter with the same key is found by its bytes.
    query(
        "update raw_payments._dead_letters set raw_value = convert_to(%s, 'UTF8') where dead_letter_id = "
        "(select min(dead_letter_id) from raw_payments._dead_letters)",
        f'{{"transaction_id": "{transaction}"}}',
    )
    assert [one.status for one in trace("fct_transactions", transaction).letters] == ["open"]
    with pytest.raises(ConfigurationError, match="has no row with"):
        trace("dim_users", "00000000-0000-0000-0000-000000000000")
    with pytest.raises(ConfigurationError, match="3 values, not 1"):
        trace("rpt_finance__daily_revenue", "2025-03-07")

    # What is odd before a moment comes first: a load that set all aside, a build that failed, code that changed.
    now = log.connection.cursor()
    now.execute("select now()")
    (moment,) = now.fetchone() or (datetime.now(UTC),)
    query(
        "insert into ops.runs values "
        "('a', 'run', 'manual', now() - interval '3 hour', now(), now(), 'success', null, null, 'code-1'), "
        "('b', 'run', 'manual', now() - interval '1 hour', now(), now(), 'failed', 'data', 'x', 'code-2')"
    )
    query(
        "insert into ops.run_steps values "
        "('b', 'build', '', now() - interval '1 hour', now(), 'failed', 'data', 'a test failed')"
    )
    where = find_column(graph, "fct_transactions.amount_minor")
    findings = find_incident(connection, graph, where, moment + timedelta(minutes=1))
    assert [one.kind for one in findings[:3]] == ["load", "run", "code"]
    assert findings[0].what.startswith("2 of 2 records set aside (100.0%")
    assert "a test failed" in findings[1].what
    assert {one.kind for one in findings} == {"run", "code", "load"}
    assert not any("raw_users" in one.subject for one in findings)


def test_a_change_that_brings_an_address_to_a_mart_is_stopped(
    tmp_path: Path, clean_settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = copy_project(tmp_path / "project")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "before"]):
        subprocess.run([*git, *command], cwd=project, check=True)
    change(
        project,
        "models/marts/core/dim_users.sql",
        "        profiles.country_code,\n",
        "        profiles.country_code,\n        profiles.email as contact,\n",
    )
    change(
        project,
        "models/marts/core/dim_users.sql",
        "        country_code,\n\n",
        "        country_code,\n        contact,\n\n",
    )
    change(
        project,
        "models/marts/core/_core__models.yml",
        "      - name: signed_up_at\n",
        "      - name: contact\n        description: How to reach the user.\n        data_type: text\n"
        "      - name: signed_up_at\n",
    )
    way = "user_events $.email -> raw_users.user_events.email -> stg_users__events.email -> int_users__latest.email"
    monkeypatch.setenv("WAREHOUSE_PROJECT_DIR", str(project))
    monkeypatch.setenv("WAREHOUSE_HOME", str(clean_settings.home))
    monkeypatch.setattr(sys, "argv", ["warehouse", "lineage", "diff", "--against", "HEAD"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 7
    assert f"dim_users.contact now holds personal data: {way} -> dim_users.contact" in said.err
    assert "+ dim_users.contact" in said.out
    # And nothing is built of it.
    with pytest.raises(DataError, match=r"dim_users\.contact receives personal data without saying so"):
        guard_policy(replace(load_settings(project), home=clean_settings.home))


def test_a_secret_makes_the_tokens(warehouse: Settings, query: Callable[..., list[tuple]]) -> None:
    """The token in SQL is HMAC-SHA-256 with the setting; another setting is refused."""
    secret = warehouse.with_env(WAREHOUSE_TOKEN_SECRET=SECRET)
    prepare(secret)
    macro = (secret.project_dir / "macros" / "token.sql").read_text(encoding="utf-8")
    body = macro[macro.index("cast(encode") : macro.index("{%- endmacro")].replace("{{ expression }}", "%s::text")
    ((made,),) = query(f"select ({body})::text", "usr_000001")
    assert made == str(token_of(SECRET.encode(), "usr_000001"))
    prepare(warehouse)
    with pytest.raises(ConfigurationError, match="WAREHOUSE_TOKEN_SECRET is not the key"):
        prepare(warehouse.with_env(WAREHOUSE_TOKEN_SECRET="another"))

"""The commands of dead letters and replays as they are installed: dry by default, and never a payload unasked."""

import json
import re
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from ingestion.feeds import FeedSpec, load_feeds
from ingestion.settings import Settings, load_settings
from tests.harness.project_copy import copy_project, run_warehouse

PAYMENTS = "raw_payments.transaction_created"
CANARY = "canary9c1d"

Query = Callable[..., list[tuple]]
Send = Callable[..., None]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    copied = copy_project(tmp_path / "project")
    for declaration in copied.glob("models/staging/*/_*__sources.yml"):
        declaration.write_text(re.sub(r"(topic: \w+)", rf"\1_{uuid.uuid4().hex[:8]}", declaration.read_text()))
    return copied


@pytest.fixture
def feed(project: Path) -> FeedSpec:
    return {one.name: one for one in load_feeds(load_settings(project))}[PAYMENTS]


@pytest.fixture
def run(project: Path, warehouse: Settings) -> Run:
    names = ("WAREHOUSE_DSN", "KAFKA_BOOTSTRAP_SERVERS", "KAFKA_CLUSTER_INCARNATION", "FX_API_BASE")
    own = {"WAREHOUSE_HOME": str(warehouse.home), "WAREHOUSE_EMBEDDED": "kafka"}
    settings = own | {name: warehouse.env[name] for name in names}
    return lambda *arguments: run_warehouse(project, *arguments, **settings)


def payment(**changes: object) -> bytes:
    record = {
        "transaction_id": str(uuid.uuid4()), "amount": 1, "currency": "USD", "user_id": "usr_123456",
        "merchant_id": "mer_12345", "country": "US", "created_at": "2026-01-02T03:04:05Z", "status": "completed",
    }  # fmt: skip
    return json.dumps({**record, **changes}).encode()


def correct_the_contract(project: Path) -> None:
    path = project / "models/staging/payments/_payments__sources.yml"
    path.write_text(path.read_text().replace("[USD, EUR, GBP, JPY, CAD]", "[USD, EUR, GBP, JPY, CAD, CHF]"))


def test_a_dry_run_on_a_warehouse_that_was_never_written_makes_nothing(run: Run, query: Query) -> None:
    result = run("dead-letters", "replay")
    assert (result.returncode, result.stdout) == (0, "no open dead letters\n"), result.stderr
    refused = run("replay", PAYMENTS, "--partition", "0", "--from-offset", "0", "--to-offset", "9")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "a dry run makes nothing" in refused.stderr
    assert query("select schemaname, tablename from pg_tables where schemaname not in ('pg_catalog', "
                 "'information_schema')") == []  # fmt: skip


def test_from_a_rejected_record_to_a_landed_one(
    run: Run, project: Path, feed: FeedSpec, send: Send, query: Query, tmp_path: Path
) -> None:
    send(feed, [(None, payment(currency="CHF", note=CANARY)) for _ in range(20)], 0)
    send(feed, [(None, payment()) for _ in range(90)] + [(None, b"{" + CANARY.encode())], 0)
    said = []

    def ask(*arguments: str, code: int = 0) -> str:
        result = run(*arguments)
        assert result.returncode == code, result.stderr
        said.append(result.stdout + result.stderr)
        return result.stdout

    # Over its budget the run fails, and everything is where it belongs.
    ask("ingest", PAYMENTS, code=7)
    assert "set 21 of 111 records aside (18.9%), its budget is 10.0%: not_accepted 20, malformed_json 1" in said[-1]
    assert query("select landed::int, dead::int from ops.ledger") == [(90, 21)]

    groups = json.loads(ask("dead-letters", "stats", "--json"))
    assert {(g["reason"], g["status"], g["letters"]) for g in groups} == {
        ("not_accepted", "open", 20),
        ("malformed_json", "open", 1),
    }
    correct_the_contract(project)
    forecast = json.loads(ask("dead-letters", "replay", "--json"))
    assert forecast["applied"] is False
    assert [(f["landed"], f["failed"]) for f in forecast["feeds"]] == [(20, 1)]
    assert query("select command from ops.runs") == [("ingest",)]
    done = json.loads(ask("dead-letters", "replay", "--apply", "--because", "francs", "--json"))
    assert [(f["landed"], f["failed"]) for f in done["feeds"]] == [(20, 1)]
    assert "dead-letters replay" in [row[0] for row in query("select command from ops.runs order by started_at")]
    # A replay is no read of the source: it does not make the feed fresh.
    assert query("select count(*)::int from ops.run_steps where feed = %s and outcome = 'success'", PAYMENTS) == [(0,)]
    assert "no open" not in ask("dead-letters", "replay", "--apply")
    ask("replay", PAYMENTS, "--partition", "0", "--from-offset", "0", "--to-offset", "200")
    assert re.search(r"111 +110 +0 +1 +0", said[-1])

    ask("dead-letters", "discard", "--because", "x", code=2)
    ask("dead-letters", "discard", "--because", "test traffic", "--reason", "malformed_json", "--apply")
    (row,) = query("select dead_letter_id, discarded_because from ops.dead_letters where status = 'discarded'")
    assert row[1] == "test traffic"
    ask("dead-letters", "list")
    assert "discarded by" in ask("dead-letters", "show", row[0])
    ask("dead-letters", "replay", "--id", "none", code=2)
    ask("dead-letters", "export", str(tmp_path / "all.jsonl"))
    assert "personal data" in said[-1]
    assert CANARY not in "".join(said)
    assert CANARY in run("dead-letters", "show", row[0], "--payload").stdout

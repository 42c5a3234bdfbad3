"""The command as it is installed: one message and a documented exit code for what a user got wrong, never a payload.

Commands that fail run as processes of their own, so that what reaches the terminal is all of what is checked; those
that work run in this process where that shows the same.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import typer
from psycopg2.extensions import make_dsn

from ingestion import errors, ledger
from ingestion.database import connect
from ingestion.ddl import ensure_schema
from ingestion.feeds import FeedSpec, load_feeds
from ingestion.settings import Settings, load_settings
from orchestration import cli
from tests.harness import apache_kafka
from tests.harness.project_copy import (
    OWN_SETTINGS,
    copy_project,
    environment_of,
    finish,
    run_warehouse,
    start_warehouse,
)
from tests.harness.records import payment

PAYMENTS = "raw_payments.transaction_created"
USERS = "raw_users.user_events"
RATES = "raw_fx.daily_rates"

Query = Callable[..., list[tuple]]
Send = Callable[..., None]
Result = "subprocess.CompletedProcess[str]"

CANARY = "canary7f3e"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project whose topics nobody else uses."""
    copied = copy_project(tmp_path / "project")
    for declaration in copied.glob("models/staging/*/_*__sources.yml"):
        text = declaration.read_text()
        declaration.write_text(re.sub(r"(topic: \w+)", rf"\1_{uuid.uuid4().hex[:8]}", text))
    return copied


@pytest.fixture
def served(warehouse: Settings) -> dict[str, str]:
    """Settings that name a database of the test's own, the session's broker and its API: nothing is embedded."""
    names = ("WAREHOUSE_DSN", "KAFKA_BOOTSTRAP_SERVERS", "KAFKA_CLUSTER_INCARNATION", "FX_API_BASE")
    # The embedded broker never answers what only a real one knows; who connects to it has to know that it is one.
    own = {"WAREHOUSE_HOME": str(warehouse.home), "WAREHOUSE_EMBEDDED": "kafka", "WAREHOUSE_RETRY_SECONDS": "0"}
    return own | {name: warehouse.env[name] for name in names}


@pytest.fixture
def cli_here(
    project: Path, served: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Callable[..., tuple[int, bytes, str]]:
    """Run a command in this process -> exit code, stdout, stderr."""

    def run(*arguments: str, **settings: str) -> tuple[int, bytes, str]:
        for name in list(os.environ):
            if name.startswith(OWN_SETTINGS):
                monkeypatch.delenv(name)
        for name, value in environment_of(project, **{**served, **settings}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["warehouse", *arguments])
        capfdbinary.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        sys.stdout.flush()
        out, err = capfdbinary.readouterr()
        return int(ended.value.code or 0), out, err.decode()

    return run


@pytest.fixture
def declared(project: Path) -> Callable[[str], FeedSpec]:
    """A feed as the copy declares it."""
    return {feed.name: feed for feed in load_feeds(load_settings(project))}.__getitem__


def assert_one_message(result: "subprocess.CompletedProcess[str]", code: int, message: str) -> None:
    """The documented exit code, one error that says what is wrong and what to do, and no stack trace."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.rstrip("\n").split("\n")
    assert sum(line.startswith("error: ") for line in lines) == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert lines[-1].startswith("  "), "the last line says what to do"
    assert not re.search(r"Traceback|^  File |DETAIL", result.stderr, re.MULTILINE), result.stderr
    assert result.stdout == ""


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


# --- settings that are wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dsn", "code", "message"),
    [
        ("nonsense", 2, "WAREHOUSE_DSN cannot be read as a Postgres connection string"),
        (f"mysql://root:{CANARY}@127.0.0.1/warehouse", 2, "WAREHOUSE_DSN cannot be read"),
        (f"postgresql://warehouse:{CANARY}@127.0.0.1:port/warehouse", 2, "parameter Postgres does not understand"),
        (f"host=127.0.0.1 port=99999 password={CANARY}", 2, "parameter Postgres does not understand"),
        (f"postgresql://warehouse:{CANARY}@127.0.0.1:1/warehouse?sslmode=maybe", 2, "parameter Postgres does not"),
        (f"postgresql://warehouse:{CANARY}@127.0.0.1:1/warehouse", 4, "Postgres at 127.0.0.1:1/warehouse does not"),
    ],
    ids=["no connection string", "another database", "port is a word", "port too high", "parameter", "server down"],
)
def test_a_wrong_dsn(project: Path, served: dict[str, str], dsn: str, code: int, message: str) -> None:
    result = run_warehouse(project, "dead-letters", "list", **{**served, "WAREHOUSE_DSN": dsn})
    assert_one_message(result, code, message)
    assert CANARY not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("run",), ("ingest",), ("dead-letters", "list"), ("docs",)],
    ids=lambda arguments: arguments[0],
)
def test_a_server_that_is_down_stops_every_command_alike(
    project: Path, served: dict[str, str], free_port: int, arguments: tuple[str, ...]
) -> None:
    dsn = f"postgresql://warehouse:secret@127.0.0.1:{free_port}/warehouse"
    result = run_warehouse(project, *arguments, **{**served, "WAREHOUSE_DSN": dsn})
    assert_one_message(result, 4, f"Postgres at 127.0.0.1:{free_port}/warehouse does not answer")


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({"password": CANARY}, 3, "refused the user or the password"),
        ({"user": "nobody_here"}, 3, "refused the user or the password"),
        ({"dbname": "not_there"}, 2, "/not_there has no such database"),
        ({"sslmode": "require"}, 2, "do not agree on SSL"),
    ],
    ids=["wrong password", "unknown user", "database missing", "SSL"],
)
def test_a_server_that_refuses(
    project: Path, served: dict[str, str], changed: dict[str, str], code: int, message: str
) -> None:
    """The embedded Postgres asks for passwords (scram) and has no SSL."""
    dsn = make_dsn(served["WAREHOUSE_DSN"], **changed)
    result = run_warehouse(project, "status", **{**served, "WAREHOUSE_DSN": dsn})
    assert_one_message(result, code, message)
    assert CANARY not in result.stderr


def test_a_user_without_rights(project: Path, served: dict[str, str], query: Query) -> None:
    role = f"reader_{uuid.uuid4().hex[:8]}"
    query(f"create role {role} login password 'reader'")
    try:
        dsn = make_dsn(served["WAREHOUSE_DSN"], user=role, password="reader")
        result = run_warehouse(project, "ingest", **{**served, "WAREHOUSE_DSN": dsn})
        assert_one_message(result, 3, "refused the user of WAREHOUSE_DSN: permission denied")
    finally:
        query(f"drop owned by {role}; drop role {role}")


def test_sources_that_are_down(project: Path, served: dict[str, str], free_port: int, query: Query) -> None:
    """All at once: a broker that is down is given its whole time to answer."""
    nobody = f"127.0.0.1:{free_port}"
    no_broker = {**served, "KAFKA_BOOTSTRAP_SERVERS": nobody}
    no_api = {**served, "FX_API_BASE": f"http://{nobody}"}
    waiting = {
        "broker": start_warehouse(project, "ingest", "-q", PAYMENTS, **no_broker),
        "api": start_warehouse(project, "ingest", "-q", "daily_rates", **no_api),
        "status": start_warehouse(project, "status", "--json", **no_broker),
        "doctor": start_warehouse(project, "doctor", "--json", **{**no_broker, "FX_API_BASE": "nonsense"}),
    }
    results = {name: finish(process) for name, process in waiting.items()}

    assert_one_message(results["broker"], 4, f"{PAYMENTS}: the broker at {nobody} does not answer for payments_")
    assert_one_message(results["api"], 4, f"{RATES}: http://{nobody} does not answer")
    # What can be said is said: the ledger needs no broker.
    assert results["status"].returncode == 0
    problems = {one["feed"]: one["problem"] for one in json.loads(results["status"].stdout)["feeds"]}
    assert problems[RATES] is None
    assert f"the broker at {nobody} does not answer" in problems[PAYMENTS]
    assert results["doctor"].returncode == 2
    checks = {one["name"].split("_")[0]: one for one in json.loads(results["doctor"].stdout)}
    assert {name: one["ok"] for name, one in checks.items()} == {
        **dict.fromkeys(("python", "project", "disk", "declarations", "postgres", "dbt profile"), True),
        **dict.fromkeys(("alerts", "alerts heartbeat"), True),
        **dict.fromkeys(("topic payments", "topic user", "api raw"), False),
    }
    assert all(one["hint"] for one in checks.values() if not one["ok"])
    assert {r.stderr for r in (results["status"], results["doctor"])} == {""}
    history = query("select command, outcome, error_class from ops.runs order by error_class")
    assert history == [("ingest", "failed", "transient")] * 2


@pytest.mark.parametrize(
    ("base", "message"),
    [("nonsense", "FX_API_BASE is not the address of an HTTP API"), ("{api}/v2", "answered with status 404")],
)
def test_a_wrong_api_address(project: Path, served: dict[str, str], base: str, message: str) -> None:
    changed = {**served, "FX_API_BASE": base.format(api=served["FX_API_BASE"])}
    result = run_warehouse(project, "ingest", "--quiet", "daily_rates", **changed)
    assert_one_message(result, 2, f"{RATES}: .*{message}")


def test_a_missing_topic(
    kafka: apache_kafka.ApacheKafka, project: Path, served: dict[str, str], declared: Callable[[str], FeedSpec]
) -> None:
    """Apache Kafka, because the embedded broker makes a topic when it is asked for one."""
    changed = {**served, "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap}
    del changed["KAFKA_CLUSTER_INCARNATION"], changed["WAREHOUSE_EMBEDDED"]
    feed = declared(PAYMENTS)
    topic = feed.origin.topic  # type: ignore[union-attr]
    result = run_warehouse(project, "ingest", "--quiet", PAYMENTS, **changed)
    assert_one_message(result, 2, f"{PAYMENTS}: the broker at {kafka.bootstrap} has no topic {topic}")
    assert f"{feed.file}:{feed.line}" in result.stderr
    result = run_warehouse(project, "sample", PAYMENTS, "--quiet", "--records", "5", **changed)
    assert_one_message(result, 2, f"has no topic {topic}")
    kafka.create_topic(topic)
    result = run_warehouse(project, "ingest", "--quiet", "--json", PAYMENTS, **changed)
    assert (result.returncode, json.loads(result.stdout)[0]["offered"]) == (0, 0), result.stderr


# --- declarations and names -------------------------------------------------------------------------------------------

BROKEN_DECLARATIONS = {
    "type": (("data_type: uuid", "data_type: guid"), "type `guid` is not known"),
    "rule": (("- matches_pattern:", "- matches_regex:"), "rule `matches_regex` is not known"),
    "kind": (("kind: kafka", "kind: carrier_pigeon"), "kind `carrier_pigeon` is not known"),
    "indentation": (("    tables:", "   tables:"), "not valid YAML"),
    "tab": (("    tables:", "\ttables:"), "not valid YAML"),
    "nothing": (("topic: payments", "topic: # payments"), "must be text, not nothing"),
}


@pytest.mark.parametrize("name", BROKEN_DECLARATIONS)
def test_an_unreadable_declaration(project: Path, served: dict[str, str], name: str) -> None:
    (old, new), message = BROKEN_DECLARATIONS[name]
    declaration = project / "models/staging/payments/_payments__sources.yml"
    text = declaration.read_text()
    assert old in text
    declaration.write_text(text.replace(old, new, 1))
    line = text[: text.index(old)].count("\n") + 1
    for command in ("feeds", "run") if name == "type" else ("feeds",):
        result = run_warehouse(project, command, **served)
        assert_one_message(result, 2, rf"models/staging/payments/_payments__sources\.yml:\d+: .*{message}")
        found = int(re.findall(r"__sources\.yml:(\d+)", result.stderr)[0])
        assert abs(found - line) <= 2, result.stderr
    if name == "type":
        result = run_warehouse(project, "doctor", "--json", **served)
        assert result.returncode == 2
        (check,) = [one for one in json.loads(result.stdout) if not one["ok"]]
        assert (check["name"], message in check["found"]) == ("declarations", True)


def test_a_declaration_that_cannot_be_opened(project: Path, served: dict[str, str]) -> None:
    (project / "models/gone.yml").symlink_to("nowhere")
    assert_one_message(run_warehouse(project, "feeds", **served), 2, r"models/gone\.yml: No such file")


def test_an_editors_lock_file_is_no_declaration(project: Path, served: dict[str, str]) -> None:
    (project / "models/.#sources.yml").symlink_to("nobody@nowhere")
    assert run_warehouse(project, "feeds", **served).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ingest", "payments.transactions"), "Feed payments.transactions is not declared"),
        (("dead-letters", "list", "--feed", "nope"), "Feed nope is not declared"),
        (("dead-letters", "show", "0123456789abcdef"), "There is no dead letter 0123456789abcdef"),
        (("dead-letters", "show", "' or true --", "--payload"), "There is no dead letter ' or true --"),
        (("sample", RATES, "--to", "x"), f"There is no sample data for the feed '{RATES}'"),
        (("sample", "--to", "/dev/null/x"), "/dev/null/x: Not a directory"),
        (("demo",), "KAFKA_BOOTSTRAP_SERVERS names a broker of yours"),
    ],
    ids=["unknown feed", "unknown feed of dead letters", "unknown id", "odd id", "no sample", "no folder", "demo"],
)
def test_a_name_that_means_nothing(
    project: Path, served: dict[str, str], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run_warehouse(project, *arguments, folder=tmp_path, **{**served, "WAREHOUSE_EMBEDDED": ""})
    assert_one_message(result, 2, re.escape(message))


@pytest.mark.parametrize(
    "arguments",
    [
        ("nope",),
        ("ingest", "--nope"),
        ("dead-letters", "list", "--reason", "bad_mood"),
        ("dead-letters", "list", "--since", "yesterday"),
        ("dead-letters", "list", "--limit", "0"),
        ("dead-letters", "show"),
        ("sample", "--bad-share", "2"),
        ("docs", "--port", "99999"),
    ],
    ids=" ".join,
)
def test_wrong_usage(cli_here: Callable[..., tuple[int, bytes, str]], arguments: tuple[str, ...]) -> None:
    code, out, err = cli_here(*arguments)
    assert (code, out) == (2, b"")
    assert err.startswith("Usage: ")
    assert "Traceback" not in err


def test_a_folder_without_a_project(tmp_path: Path) -> None:
    assert_one_message(run_warehouse(tmp_path, "feeds"), 2, f"No dbt_project.yml in {tmp_path}")
    outside = run_warehouse(tmp_path, "feeds", folder=tmp_path, WAREHOUSE_PROJECT_DIR="")
    assert_one_message(outside, 2, f"No dbt_project.yml in {tmp_path} or above it")


def test_a_feed_another_writer_holds(
    project: Path, served: dict[str, str], warehouse: Settings, declared: Callable[[str], FeedSpec]
) -> None:
    feed = declared(PAYMENTS)
    connection = connect(warehouse)
    try:
        ensure_schema(connection, [feed])
        with ledger.writing(connection, feed):
            result = run_warehouse(project, "ingest", "--quiet", PAYMENTS, **served)
    finally:
        connection.close()
    assert_one_message(result, 5, rf"{PAYMENTS} is being written by .+ pid {os.getpid()} since")


def test_a_source_that_is_not_the_one_read_before(
    cli_here: Callable[..., tuple[int, bytes, str]], send: Send, declared: Callable[[str], FeedSpec]
) -> None:
    send(declared(PAYMENTS), [(None, b"{}")])
    assert cli_here("ingest", "-q", PAYMENTS)[0] == 0
    code, out, err = cli_here("ingest", "-q", PAYMENTS, KAFKA_CLUSTER_INCARNATION="another")
    assert (code, out) == (6, b"")
    assert err.startswith(f"error: {PAYMENTS}: topic payments_transaction_created")


# --- exit codes of everything else ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error_class", errors.ErrorClass)
def test_every_class_of_failure_has_a_documented_exit_code(
    cli_here: Callable[..., tuple[int, bytes, str]], monkeypatch: pytest.MonkeyPatch, error_class: errors.ErrorClass
) -> None:
    failure = errors.WarehouseError("It failed.", hint="Try again.")
    failure.error_class = error_class
    monkeypatch.setattr("ingestion.feeds.load_feeds", _raiser(failure))
    code, _, err = cli_here("feeds")
    assert (code, err) == (cli.EXIT_CODES[error_class], "error: It failed.\n  Try again.\n")
    assert f"{code} " in (cli.app.info.help or "").partition("Exit codes:")[2]


def test_an_interrupt_says_what_stands(
    cli_here: Callable[..., tuple[int, bytes, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingestion.feeds.load_feeds", _raiser(KeyboardInterrupt()))
    code, out, err = cli_here("ingest")
    assert (code, out) == (130, b"")
    assert err.startswith("interrupted; what was committed stays")


def test_a_server_that_goes_away_meanwhile_is_an_outage(
    cli_here: Callable[..., tuple[int, bytes, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "orchestration.dead_letters.list_dead_letters",
        lambda connection, **_: connection.cursor().execute("select pg_terminate_backend(pg_backend_pid())"),
    )
    code, out, err = cli_here("dead-letters", "list")
    assert (code, out) == (4, b"")
    assert err.startswith("error: Postgres went away")


def test_twin_a_fault_of_ours_keeps_its_stack_trace(
    cli_here: Callable[..., tuple[int, bytes, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingestion.feeds.load_feeds", _raiser(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        cli_here("feeds")
    monkeypatch.setattr("ingestion.feeds.load_feeds", _raiser(psycopg2.ProgrammingError("ours")))
    with pytest.raises(psycopg2.ProgrammingError):
        cli_here("feeds")


def _raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


# --- commands that work -----------------------------------------------------------------------------------------------


def bad_payments() -> list[tuple[bytes | None, bytes | None]]:
    """Records broken in different ways, each with the canary where it broke, in its key or in a field's name."""
    key = CANARY.encode()
    records = [
        payment(user_id=CANARY),
        payment(amount=CANARY),
        payment(amount=-1, note=CANARY),
        payment(currency=CANARY),
        payment(created_at=CANARY),
        payment(transaction_id=CANARY),
        payment(merchant_id={CANARY: CANARY}),
        payment(status=None, **{CANARY * 9: 1}),
        b'{"transaction_id": "' + key,
        key,
        b'"' + key + b'"',
        b'{"' + key * 9 + b'": 1, "' + key * 9 + b'": 2}',
        b"\xff" + key,
        payment(country=CANARY + "\x00"),
    ]
    return [(key, record) for record in records]


def test_ingest_status_and_dead_letters(
    cli_here: Callable[..., tuple[int, bytes, str]], send: Send, declared: Callable[[str], FeedSpec], query: Query
) -> None:
    bad = bad_payments()
    send(declared(USERS), [(None, b"{}")])  # never read: it is listed too
    send(declared(PAYMENTS), [(None, payment()), *bad, (b"k", None)], 0)
    code, out, err = cli_here("ingest", "--json", PAYMENTS)
    assert code == 0, err
    (landing,) = json.loads(out)
    counts = {"landed": 1, "dead": len(bad), "tombstones": 1, "unchanged": 0, "lost": 0, "offered": 2 + len(bad)}
    assert landing.items() > {"feed": PAYMENTS, **counts}.items()
    assert sum(landing["reasons"].values()) == landing["dead"]
    assert f"{PAYMENTS}: offered {landing['offered']}" in err

    code, out, err = cli_here("status", "--json")
    assert (code, err) == (0, "")
    by_feed = {one["feed"]: one for one in json.loads(out)["feeds"]}
    assert set(by_feed) == {PAYMENTS, USERS, RATES}
    for name in ("offered", "landed", "dead", "tombstones"):
        assert by_feed[PAYMENTS][name] == landing[name]
    assert (by_feed[PAYMENTS]["lag"], by_feed[PAYMENTS]["open_dead_letters"]) == (0, landing["dead"])
    assert (by_feed[USERS]["offered"], by_feed[USERS]["last_success"]) == (0, None)
    send(declared(PAYMENTS), [(None, payment())] * 3)
    code, out, err = cli_here("status")
    assert code == 0, err
    said = out.decode()
    assert f"{2 + len(bad)} offered = 1 landed + {len(bad)} dead letters + 1 tombstone\n" in said
    assert f"{len(bad)} dead letters open, the oldest for " in said
    assert f"    warehouse dead-letters list --feed {PAYMENTS}\n" in said
    assert "; 3 waiting at the broker\n" in said
    assert "  nothing offered yet\n  never read; 1 waiting at the broker\n" in said
    assert "Reconciliation: not built yet" in said

    code, out, err = cli_here("dead-letters", "list", "--json", "--feed", "transaction_created")
    letters = json.loads(out)
    assert (code, err, len(letters)) == (0, "", landing["dead"])
    code, out, err = cli_here("dead-letters", "list", "--json", "--reason", "wrong_type", "--limit", "1")
    assert [(one["reason"]) for one in json.loads(out)] == ["wrong_type"]
    for nothing in (("--since", "2999-01-01"), ("--feed", USERS), ("--reason", "invalid_timestamp", "--feed", USERS)):
        assert cli_here("dead-letters", "list", *nothing)[:2] == (0, b"no dead letters\n")
    code, out, err = cli_here("dead-letters", "list", "--limit", "2")
    table = out.decode().splitlines()
    assert (len(table), table[-1]) == (4, "... the newest 2; --limit shows more")


def test_one_dead_letter_and_its_bytes(
    cli_here: Callable[..., tuple[int, bytes, str]], send: Send, declared: Callable[[str], FeedSpec], query: Query
) -> None:
    value = b'\xff\x00\n{"amount": ' + CANARY.encode()
    send(declared(USERS), [(b"key \xfe", value)], 0)
    assert cli_here("ingest", "-q", "user_events")[0] == 0
    ((letter_id, offset),) = query(
        "select dead_letter_id, kafka_offset from ops.dead_letters where raw_value = %s", value
    )
    where = f"{declared(USERS).origin.topic}/0@{offset}"  # type: ignore[union-attr]

    code, out, _ = cli_here("dead-letters", "show", letter_id, "--json")
    shown = json.loads(out)
    assert code == 0
    assert (shown["dead_letter_id"], shown["coordinates"], shown["reason"]) == (letter_id, where, "invalid_utf8")
    assert not any("hex" in name for name in shown)
    code, out, _ = cli_here("dead-letters", "show", letter_id)
    assert f"coordinates: {where}".encode() in out
    assert CANARY.encode() not in out

    code, out, _ = cli_here("dead-letters", "show", letter_id, "--payload", "--json")
    shown = json.loads(out)
    assert (bytes.fromhex(shown["value_hex"]), bytes.fromhex(shown["key_hex"])) == (value, b"key \xfe")
    code, out, _ = cli_here("dead-letters", "show", letter_id, "--payload")
    assert out.endswith(b"value: " + value + b"\n")


def test_nothing_but_the_payload_command_shows_a_payload(
    project: Path, served: dict[str, str], send: Send, declared: Callable[[str], FeedSpec], query: Query
) -> None:
    """Terminal, history, dead-letter lists, and every file the run leaves in its home."""
    send(declared(PAYMENTS), bad_payments(), 1)
    said = [
        run_warehouse(project, *arguments, **served)
        for arguments in (
            ("ingest", PAYMENTS),
            ("status",),
            ("dead-letters", "list", "--limit", "1000"),
            ("dead-letters", "list", "--limit", "1000", "--json"),
        )
    ]
    assert [one.returncode for one in said] == [0] * 4, said
    found = query("select count(*)::int from ops.dead_letters where position(%s in raw_value) > 0", CANARY.encode())
    assert found[0][0] >= len(bad_payments()), "the canary is there to be seen"
    for one in said:
        assert CANARY not in one.stdout + one.stderr
    history = query("select r::text from ops.runs r union all select s::text from ops.run_steps s")
    assert not any(CANARY in row[0] for row in history)
    assert files_with(Path(served["WAREHOUSE_HOME"]), CANARY) == []


def test_a_row_the_database_refuses_is_not_quoted(
    project: Path, served: dict[str, str], send: Send, declared: Callable[[str], FeedSpec], query: Query
) -> None:
    """Postgres quotes the row it refuses, and dlt what Postgres says."""
    send(declared(USERS), [(None, b"{}")])
    good = run_warehouse(project, "ingest", "-q", USERS, **served)
    assert good.returncode == 0, good.stderr
    query("alter table raw_users.user_events add constraint house_rule check (full_name is null)")
    event = {
        "event_id": str(uuid.uuid4()),
        "event_type": "signed_in",
        "user_id": "usr_000001",
        "full_name": CANARY,
        "occurred_at": "2026-01-02T03:04:05Z",
    }
    send(declared(USERS), [(CANARY.encode(), json.dumps(event).encode())])
    result = run_warehouse(project, "ingest", "--json", USERS, **served)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[0]["reasons"] == {"poison": 1}
    assert CANARY not in result.stdout + result.stderr
    ((message,),) = query("select message from ops.dead_letters where reason = 'poison'")
    assert CANARY not in message
    history = query("select r::text from ops.runs r union all select s::text from ops.run_steps s")
    assert not any(CANARY in row[0] for row in history)
    assert files_with(Path(served["WAREHOUSE_HOME"]), CANARY) == []


def test_a_rate_the_database_refuses_is_not_quoted(project: Path, served: dict[str, str], query: Query) -> None:
    connection = connect(load_settings(project).with_env(**served))
    ensure_schema(connection, load_feeds(load_settings(project)))
    connection.close()
    query("alter table raw_fx.daily_rates add constraint house_rule check (quote_currency <> 'SEK')")
    result = run_warehouse(project, "ingest", RATES, **served)
    assert result.returncode == 0, result.stderr
    assert "SEK" not in result.stdout + result.stderr
    ((letters, message),) = query("select count(*)::int, min(message) from ops.dead_letters where reason = 'poison'")
    assert letters > 0
    assert message.endswith("(house_rule)")
    assert not any("SEK" in row[0] for row in query("select s::text from ops.run_steps s"))


def files_with(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_feeds(cli_here: Callable[..., tuple[int, bytes, str]], declared: Callable[[str], FeedSpec]) -> None:
    code, out, err = cli_here("feeds", "--json")
    assert (code, err) == (0, "")
    by_name = {one["feed"]: one for one in json.loads(out)}
    assert set(by_name) == {PAYMENTS, USERS, RATES}
    assert by_name[USERS]["personal_data"] == ["user_id", "email", "full_name", "phone", "ip_address"]
    assert by_name[RATES]["columns"]["rate"] == "numeric(24,12)"
    place = f"{declared(RATES).file}:{declared(RATES).line}"
    assert by_name[RATES]["declared_in"] == place
    code, out, _ = cli_here("feeds")
    assert [line.split()[0] for line in out.decode().splitlines()] == ["feed", RATES, PAYMENTS, USERS]
    assert place in out.decode()


def test_sample_files_are_the_same_for_the_same_seed(
    cli_here: Callable[..., tuple[int, bytes, str]], tmp_path: Path
) -> None:
    for folder in ("a", "b"):
        code, out, err = cli_here(
            "sample", "-q", "--records", "200", "--start", "2026-01-05", "--to", str(tmp_path / folder)
        )
        assert (code, err) == (0, "")
        assert out.decode().splitlines()[0].startswith(f"{PAYMENTS}: 200 messages to {tmp_path / folder}")
    for name in (PAYMENTS, USERS):
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()


def test_doctor_is_content(
    cli_here: Callable[..., tuple[int, bytes, str]], send: Send, declared: Callable[[str], FeedSpec]
) -> None:
    for name in (PAYMENTS, USERS):
        send(declared(name), [(None, b"{}")])
    code, out, err = cli_here("doctor", "--json")
    assert code == 0, out
    assert all(one["ok"] for one in json.loads(out))
    code, out, err = cli_here("doctor")
    assert (code, err) == (0, "")
    assert {line[:5] for line in out.decode().splitlines()} == {"ok   "}


def test_services_start_status_stop(project: Path) -> None:
    """With nothing configured, from a home of its own; and the commands in between use what runs."""
    assert run_warehouse(project, "services", "status").stdout == "no embedded service runs\n"
    assert run_warehouse(project, "services", "stop").stdout == "nothing was running\n"
    refused = run_warehouse(project, "sample", "--records", "5")
    assert_one_message(refused, 2, "No broker runs that would keep the messages")
    try:
        started = run_warehouse(project, "services", "start", "--json")
        assert started.returncode == 0, started.stderr
        state = json.loads(started.stdout)
        assert (state["running"], state["stays"]) == (True, True)
        assert {one["name"] for one in state["services"]} == {"postgres", "kafka", "rates"}
        assert run_warehouse(project, "services", "status").stdout.count("127.0.0.1:") == 3
        sent = run_warehouse(project, "sample", "-q", PAYMENTS, "--records", "50", "--bad-share", "0")
        assert sent.stdout == f"{PAYMENTS}: 50 messages to Kafka\n"
        landed = run_warehouse(project, "ingest", "-q", "--json", PAYMENTS)
        assert json.loads(landed.stdout)[0]["offered"] == 50
        doctor = run_warehouse(project, "doctor")
        assert doctor.returncode == 0, doctor.stdout
        assert doctor.stdout.count("(embedded)") == 3
    finally:
        stopped = run_warehouse(project, "services", "stop")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped\n")
    assert json.loads(run_warehouse(project, "services", "status", "--json").stdout)["running"] is False


def test_the_lineage_page_is_served_until_interrupted(tmp_path: Path) -> None:
    page = tmp_path / "static_index.html"
    page.write_text("<title>lineage</title>")
    # A process started in the background inherits that SIGINT is ignored.
    script = (
        "import pathlib, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from orchestration.docs_server import serve_page; serve_page(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(page), "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().split()[0]
            assert address.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(address, timeout=10) as answer:
                assert answer.read() == page.read_bytes()
            port = address.rsplit(":")[2].partition("/")[0]
            taken = subprocess.run(
                [sys.executable, "-c", script, str(page), port], capture_output=True, text=True, check=False
            )
            assert f"ConfigurationError: Port {port} of 127.0.0.1 cannot be used" in taken.stderr
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        finally:
            process.kill()


# --- help -------------------------------------------------------------------------------------------------------------

HEAVY = ("dlt", "dbt", "dagster", "confluent_kafka", "psycopg2", "pyarrow", "yaml", "requests", "faker", "rich")


def commands_of(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command as it is typed, groups before what is in them."""
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from commands_of(child, (*path, name))


def test_help_has_examples_and_imports_nothing_heavy() -> None:
    """In one process: what one command imports would be there for the next."""
    script = (
        "import json, sys\n"
        "from orchestration.cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['warehouse', *arguments, '--help']\n"
        "    print('\\x1e', *arguments)\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as ended:\n"
        "        assert not ended.code, arguments\n"
        "print('\\x1e')\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    commands = list(commands_of(typer.main.get_command(cli.app)))
    assert {("demo",), ("run",), ("ingest",), ("services", "start"), ("dead-letters", "show")} < set(commands)
    found = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    _, *pages, modules = found.stdout.split("\x1e")
    assert set(json.loads(modules)).isdisjoint(HEAVY)
    assert len(pages) == len(commands)
    for command, page in zip(commands, pages, strict=True):
        assert "Usage: " in page
        assert re.search(r"Examples?:|Commands:", page), command
    assert "Exit codes: " in pages[0]


def test_twin_a_command_that_works_imports_what_help_does_not() -> None:
    script = (
        "import sys\n"
        "from orchestration.cli import main\n"
        "sys.argv = ['warehouse', 'feeds']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    assert 'yaml' in sys.modules\n"
        "    print('seen')\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("seen\n")

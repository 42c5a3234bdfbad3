"""What receivers of alerts are told, against their published schemas, and what their answers mean, over real HTTP."""

import base64
import copy
import hashlib
import hmac
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from ingestion.errors import ConfigurationError
from ingestion.settings import Settings
from orchestration import receivers
from orchestration.ages import TableAge
from orchestration.alerts import build_document, new_message_id
from orchestration.conditions import Kind, Severity, find_misses
from orchestration.receivers import (
    PAGERDUTY,
    SLACK,
    WEBHOOK,
    Receiver,
    find_heartbeat,
    find_receivers,
    render_pagerduty,
    render_slack,
    send,
    sign,
)
from tests.harness.alert_receiver import AlertReceiver

PROJECT = Path(__file__).parents[2]
FIXTURES = PROJECT / "tests" / "fixtures" / "alerts"
NOW = datetime(2026, 3, 1, 3, 0, tzinfo=UTC)
ROUTING_KEY = "0123456789abcdef0123456789abcdef"
SECRET_PATH = "/services/T000/B000/s3cr3t"


def schema(path: Path) -> Draft202012Validator:
    loaded = json.loads(path.read_text())
    Draft202012Validator.check_schema(loaded)
    return Draft202012Validator(loaded)


WEBHOOK_SCHEMA = schema(PROJECT / "orchestration" / "alert.schema.json")
SLACK_SCHEMA = schema(FIXTURES / "slack_message.schema.json")
PAGERDUTY_SCHEMA = schema(FIXTURES / "pagerduty_event.schema.json")


def document(event: str = "opened", **changes: Any) -> dict[str, Any]:
    incident = {
        "id": 7,
        "key": "run_failed/build",
        "kind": "run_failed",
        "severity": "error",
        "summary": "build failed: test not_null_a",
        "action": "`dbt retry` runs only what failed.",
        "details": {"run_id": "r1", "failed": ["test not_null_a"], "message": "said"},
        "opened_at": NOW.isoformat(),
        "resolved_at": NOW.isoformat() if event == "resolved" else None,
        "resolved_because": "it is over" if event == "resolved" else None,
        **changes,
    }
    return build_document(event, incident, message_id=new_message_id(), source="payments-warehouse", at=NOW)


LONG = {
    "summary": "<&>" * 3000,
    "action": "&" * 5000,
    "key": "k" * 400,
    "details": {f"detail {i}": "<&>" * 2000 for i in range(30)} | {"message": "&" * 9000},
}
EVENTS = ("opened", "escalated", "changed", "reminded", "resolved")
DOCUMENTS = [
    *(document(event) for event in EVENTS),
    *(document(severity=severity) for severity in ("warning", "critical")),
    *(document(event, **LONG) for event in EVENTS),
    document(details={}),
    document(details={"message": "", "feeds": []}),
    document("test", kind="test", key="test", severity="info", details={}),
]


@pytest.mark.parametrize("told", DOCUMENTS, ids=lambda one: one["event"])
def test_what_is_told_fits_the_schemas(told: dict[str, Any]) -> None:
    WEBHOOK_SCHEMA.validate(told)
    SLACK_SCHEMA.validate(render_slack(told))
    PAGERDUTY_SCHEMA.validate(render_pagerduty(told, ROUTING_KEY))


def test_every_kind_and_severity_is_in_the_schema() -> None:
    for kind in Kind:
        WEBHOOK_SCHEMA.validate(document(kind=kind.value))
    for severity in Severity:
        told = document(severity=severity.value)
        WEBHOOK_SCHEMA.validate(told)
        PAGERDUTY_SCHEMA.validate(render_pagerduty(told, ROUTING_KEY))


def test_twin_a_message_that_breaks_a_limit_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    told = document(**LONG)
    monkeypatch.setattr(receivers, "HEADER_CHARS", 151)
    assert not SLACK_SCHEMA.is_valid(render_slack(told))
    monkeypatch.setattr(receivers, "SUMMARY_CHARS", 1025)
    assert not PAGERDUTY_SCHEMA.is_valid(render_pagerduty(told, ROUTING_KEY))
    monkeypatch.undo()
    for name in ("SECTION_CHARS", "FIELD_CHARS", "FIELDS"):
        with monkeypatch.context() as patch:
            patch.setattr(receivers, name, getattr(receivers, name) * 2)
            assert not SLACK_SCHEMA.is_valid(render_slack(told)), name
    with monkeypatch.context() as patch:
        patch.setattr(receivers, "KEY_CHARS", 256)
        assert not PAGERDUTY_SCHEMA.is_valid(render_pagerduty(told, ROUTING_KEY))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("event",), "fixed"),
        (("version",), "2"),
        (("incident", "severity"), "fatal"),
        (("incident", "resolved_at"), NOW.isoformat()),
        (("incident", "payload"), "x"),
    ],
)
def test_twin_the_webhook_schema_refuses_what_is_not_one(where: tuple[str, ...], value: Any) -> None:
    told = copy.deepcopy(document())
    place = told
    for name in where[:-1]:
        place = place[name]
    place[where[-1]] = value
    assert not WEBHOOK_SCHEMA.is_valid(told)


def test_pagerduty_is_told_to_resolve_what_it_was_told_of() -> None:
    opened, resolved = document(), document("resolved")
    trigger, resolve = render_pagerduty(opened, ROUTING_KEY), render_pagerduty(resolved, ROUTING_KEY)
    assert (trigger["event_action"], resolve["event_action"]) == ("trigger", "resolve")
    assert trigger["dedup_key"] == resolve["dedup_key"] == "payments-warehouse:run_failed/build"
    assert trigger["payload"]["custom_details"]["what to do"] == opened["incident"]["action"]
    # A key that is too long is cut, and still tells two problems apart.
    keys = {render_pagerduty(document(key="k" * 300 + end), ROUTING_KEY)["dedup_key"] for end in ("a", "b")}
    assert len(keys) == 2


def test_slack_shows_what_to_do_with_and_without_blocks() -> None:
    told = render_slack(document(summary="a < b & c", action="look at <!channel>"))
    assert told["text"] == "Error: a &lt; b &amp; c\nWhat to do: look at &lt;!channel&gt;"
    assert told["blocks"][0]["text"]["text"] == "Error: a < b & c"
    said = json.dumps(told["blocks"])
    assert "*What to do*\\nlook at &lt;!channel&gt;" in said
    assert "<!channel>" not in said
    assert "What to do" not in json.dumps(render_slack(document("resolved")))


def test_the_signature_is_that_of_standard_webhooks() -> None:
    """Their published example."""
    assert (
        sign(
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1614265330,
            b'{"test": 2432232314}',
        )
        == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )


# --- settings ---------------------------------------------------------------------------------------------------------


def settings_with(settings: Settings, **values: str) -> Settings:
    return settings.with_env(**{f"WAREHOUSE_ALERT_{name}": value for name, value in values.items()})


def test_no_setting_is_no_receiver(clean_settings: Settings) -> None:
    assert find_receivers(clean_settings) == ([], [])
    assert find_heartbeat(clean_settings) is None


@pytest.mark.parametrize("url", ["https://hooks.example.com/x", "http://127.0.0.1:9/x", "http://localhost/x"])
def test_addresses_that_are_taken(clean_settings: Settings, url: str) -> None:
    found, wrong = find_receivers(
        settings_with(clean_settings, WEBHOOK_URL=url, SLACK_URL=url, PAGERDUTY_KEY=ROUTING_KEY, PAGERDUTY_URL=url)
    )
    assert [one.name for one in found] == [WEBHOOK, SLACK, PAGERDUTY]
    assert wrong == []
    assert found[2].url == url.rstrip("/") + "/v2/enqueue"


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/s3cr3t",
        "http://127.0.0.1.example.com/s3cr3t",
        "http://127.0.0.1@example.com/s3cr3t",
        "ftp://127.0.0.1/s3cr3t",
        "file:///s3cr3t",
        "https:///s3cr3t",
        "https://[s3cr3t",
        "https://host:port/s3cr3t",
        "https://host/s3cr3t\nX: y",
        "s3cr3t",
    ],
)
@pytest.mark.parametrize("name", ["WEBHOOK_URL", "SLACK_URL", "PAGERDUTY_URL", "HEARTBEAT_URL"])
def test_addresses_that_are_refused_and_not_shown(clean_settings: Settings, url: str, name: str) -> None:
    settings = settings_with(clean_settings, PAGERDUTY_KEY=ROUTING_KEY, **{name: url})
    if name == "HEARTBEAT_URL":
        with pytest.raises(ConfigurationError) as raised:
            find_heartbeat(settings)
        error = raised.value
    else:
        (error,) = find_receivers(settings)[1]
    assert error.message == f"WAREHOUSE_ALERT_{name} is not the https address of a receiver."
    assert "s3cr3t" not in error.message + error.hint


def test_a_wrong_setting_does_not_take_the_others_along(clean_settings: Settings) -> None:
    found, wrong = find_receivers(
        settings_with(
            clean_settings,
            WEBHOOK_URL="https://a.example.com",
            WEBHOOK_SECRET="whsec_not base64",
            SLACK_URL="https://b.example.com",
            PAGERDUTY_KEY="two words",
        )
    )
    assert [one.name for one in found] == [SLACK]
    assert [error.message.partition(" ")[0] for error in wrong] == [
        "WAREHOUSE_ALERT_WEBHOOK_SECRET",
        "WAREHOUSE_ALERT_PAGERDUTY_KEY",
    ]


def test_a_receiver_does_not_show_its_secrets() -> None:
    one = Receiver(SLACK, f"https://user:s3cr3t@hooks.example.com{SECRET_PATH}", "s3cr3t")
    assert one.host == "hooks.example.com"
    assert "s3cr3t" not in repr(one) + one.host + one.digest
    assert "s3cr3t" not in repr(receivers.render(one, document(), NOW))
    assert one.digest != replace(one, key="other").digest != replace(one, url="https://hooks.example.com").digest


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[AlertReceiver]:
    with AlertReceiver() as running:
        yield running


def test_the_webhook_gets_the_document_signed(server: AlertReceiver) -> None:
    secret = "whsec_" + base64.b64encode(b"a key of the test, 24 bytes at least").decode()
    told = document()
    assert send(Receiver(WEBHOOK, f"{server.base}/hook", secret), told, NOW).delivered
    (one,) = server.received
    assert one.document == told
    assert one.headers["content-type"] == "application/json"
    assert one.headers["webhook-id"] == told["id"]
    assert one.headers["webhook-timestamp"] == str(int(NOW.timestamp()))
    # Checked as a receiver does it.
    content = b".".join([told["id"].encode(), one.headers["webhook-timestamp"].encode(), one.body])
    key = base64.b64decode(secret.removeprefix("whsec_"))
    expected = base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
    assert one.headers["webhook-signature"] == f"v1,{expected}"
    # No secret, no signature.
    send(Receiver(WEBHOOK, f"{server.base}/hook"), told, NOW)
    assert "webhook-signature" not in server.received[1].headers


@pytest.mark.parametrize(
    ("answer", "refused", "retry_after_s", "problem"),
    [
        ((500, {}, b""), False, None, "answered with status 500"),
        ((503, {"Retry-After": "120"}, b""), False, 120.0, "answered with status 503"),
        ((429, {"Retry-After": "7"}, b"rate_limited"), False, 7.0, "answered with status 429"),
        ((408, {}, b""), False, None, "answered with status 408"),
        ((400, {}, b"invalid_payload"), True, None, "answered with status 400 (invalid_payload)"),
        ((404, {}, b"no_service\n"), True, None, "answered with status 404 (no_service)"),
        ((403, {}, b"you sent s3cr3t"), True, None, "answered with status 403"),
        ((302, {"Location": "http://127.0.0.1:1/else"}, b""), True, None, "answered with status 302"),
    ],
)
def test_what_an_answer_means(
    server: AlertReceiver, answer: Any, refused: bool, retry_after_s: float | None, problem: str
) -> None:
    server.answers = [answer]
    outcome = send(Receiver(SLACK, server.base + SECRET_PATH), document(), NOW)
    assert (outcome.delivered, outcome.refused, outcome.retry_after_s) == (False, refused, retry_after_s)
    assert outcome.problem == f"{server.base.removeprefix('http://')} {problem}"
    assert len(server.received) == 1


def test_a_receiver_that_is_not_there_is_an_outage_and_stays_unnamed(free_port: int) -> None:
    outcome = send(Receiver(SLACK, f"http://127.0.0.1:{free_port}{SECRET_PATH}"), document(), NOW)
    assert (outcome.delivered, outcome.refused) == (False, False)
    assert re.fullmatch(r"127\.0\.0\.1:\d+ cannot be reached \(\w+\)", outcome.problem)


def test_a_receiver_that_keeps_silent_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        outcome = send(Receiver(WEBHOOK, f"http://127.0.0.1:{silent.getsockname()[1]}/"), document(), NOW, 0.2)
        assert time.monotonic() - started < 5
    assert (outcome.delivered, outcome.refused) == (False, False)


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# --- tables that are late ---------------------------------------------------------------------------------------------


def age(table: str, hours: float | None, state: str, hop: str = "raw_payments.transaction_created") -> TableAge:
    measured = None if hours is None else timedelta(hours=hours)
    return TableAge(table, measured, timedelta(hours=2), timedelta(hours=24), state, f"{hop} partition 3: old", hop)


def test_tables_late_for_one_reason_are_one_miss() -> None:
    found = find_misses(
        [
            age("raw_payments.transaction_created", 25, "error"),
            age("marts.fct_transactions", 26, "error"),
            age("marts.dim_merchants", 3, "warn"),
            age("marts.fct_fx_rates", 3, "warn", hop="raw_fx.daily_rates"),
            age("raw_users.user_events", 1, "pass", hop="raw_users.user_events"),
            age("marts.dim_users", None, "unknown", hop="raw_users.user_events"),
        ]
    )
    assert [(one.key, one.severity.value, one.summary) for one in found] == [
        (
            "sla_missed/raw_payments.transaction_created",
            "error",
            "marts.fct_transactions is 1d 2h old, its budget is 1d; 2 more tables late for the same reason",
        ),
        ("sla_missed/raw_fx.daily_rates", "warning", "marts.fct_fx_rates is 3h old, its budget is 2h"),
    ]
    assert found[0].details["held_by"] == "raw_payments.transaction_created partition 3: old"
    assert found[0].details["tables"] == [
        "marts.dim_merchants",
        "marts.fct_transactions",
        "raw_payments.transaction_created",
    ]

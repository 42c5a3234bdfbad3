"""Where alerts go, what each receiver is told and what its answer means.

    document (alert.schema.json) -> webhook: as it is, signed | Slack: blocks and a text | PagerDuty: an event
    one POST -> delivered, later (an outage), or refused (a setting has to change)

Addresses and keys come from the settings; an address of Slack is a secret. None of them is printed, stored or part of
an error: a receiver is known by its kind and host, a changed setting by a digest.
"""

import base64
import binascii
import hashlib
import hmac
import json
import queue
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from ingestion.errors import ConfigurationError
from ingestion.retry import parse_retry_after
from ingestion.settings import Settings

WEBHOOK, SLACK, PAGERDUTY, HEARTBEAT = "webhook", "slack", "pagerduty", "heartbeat"
NAMES = (WEBHOOK, SLACK, PAGERDUTY)

PAGERDUTY_BASE = "https://events.pagerduty.com"
LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})

# Of a whole request, name lookup included, which the client's own timeouts do not bound.
REQUEST_S = 8.0
ANSWER_BYTES = 400

# PagerDuty's and Slack's limits, in characters: tests/fixtures/alerts names where they are published.
SUMMARY_CHARS = 1024
KEY_CHARS = 255
HEADER_CHARS = 150
SECTION_CHARS = 3000
FIELD_CHARS = 2000
FIELDS = 10

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Receiver:
    """One place alerts go to. `url` and `key` are secrets."""

    name: str
    url: str = field(repr=False)
    key: str = field(default="", repr=False)

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc.rpartition("@")[2]

    @property
    def digest(self) -> str:
        """Changes with the settings, and does not give them away."""
        return hashlib.sha256(f"{self.name}\0{self.url}\0{self.key}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Request:
    """What is posted."""

    url: str = field(repr=False)
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Outcome:
    """What became of one try. `problem` is in words without an address; `retry_after_s` as the receiver asked."""

    delivered: bool
    problem: str = ""
    refused: bool = False
    retry_after_s: float | None = None


def find_receivers(settings: Settings) -> tuple[list[Receiver], list[ConfigurationError]]:
    """The receivers the settings name, and what is wrong with those that cannot be used."""
    found: list[Receiver] = []
    problems: list[ConfigurationError] = []
    for build in (_webhook_of, _slack_of, _pagerduty_of):
        try:
            receiver = build(settings)
        except ConfigurationError as error:
            problems.append(error)
            continue
        if receiver is not None:
            found.append(receiver)
    return found, problems


def _webhook_of(settings: Settings) -> Receiver | None:
    url = settings.get("WAREHOUSE_ALERT_WEBHOOK_URL")
    secret = settings.get("WAREHOUSE_ALERT_WEBHOOK_SECRET") or ""
    if url is None:
        return None
    if secret:
        signing_key(secret)
    return Receiver(WEBHOOK, _require_url("WAREHOUSE_ALERT_WEBHOOK_URL", url), secret)


def _slack_of(settings: Settings) -> Receiver | None:
    url = settings.get("WAREHOUSE_ALERT_SLACK_URL")
    return None if url is None else Receiver(SLACK, _require_url("WAREHOUSE_ALERT_SLACK_URL", url))


def _pagerduty_of(settings: Settings) -> Receiver | None:
    key = settings.get("WAREHOUSE_ALERT_PAGERDUTY_KEY")
    if key is None:
        return None
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigurationError(
            "WAREHOUSE_ALERT_PAGERDUTY_KEY is no routing key.", hint="It is the integration key of Events API v2."
        )
    base = settings.get("WAREHOUSE_ALERT_PAGERDUTY_URL") or PAGERDUTY_BASE
    return Receiver(PAGERDUTY, _require_url("WAREHOUSE_ALERT_PAGERDUTY_URL", base).rstrip("/") + "/v2/enqueue", key)


def _require_url(name: str, url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
        parts = urlsplit("")
    is_safe = parts.scheme == "https" or (parts.scheme == "http" and host in LOCAL_HOSTS)
    # Not the value: it may be the secret.
    if not host or not is_safe or not re.fullmatch(r"[!-~]+", url):
        raise ConfigurationError(
            f"{name} is not the https address of a receiver.",
            hint="Its form is https://host/path; plain http is taken for 127.0.0.1 and localhost only.",
        )
    return url


def signing_key(secret: str) -> bytes:
    """The bytes of a secret: base64 behind `whsec_`, else as it stands."""
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        raise ConfigurationError(
            "WAREHOUSE_ALERT_WEBHOOK_SECRET begins with whsec_ and goes on with what is not base64.",
            hint="`openssl rand -base64 32` makes one; put whsec_ before it.",
        ) from None


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The signature of Standard Webhooks (v1, HMAC-SHA256 over id, time and body)."""
    content = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(signing_key(secret), content, hashlib.sha256).digest()).decode()


# --- what a receiver is told ------------------------------------------------------------------------------------------


def render(receiver: Receiver, document: Document, now: datetime) -> Request:
    """The request that tells a receiver."""
    headers = {"Content-Type": "application/json", "User-Agent": "payments-warehouse"}
    if receiver.name == SLACK:
        return Request(receiver.url, headers, _encode(render_slack(document)))
    if receiver.name == PAGERDUTY:
        return Request(receiver.url, headers, _encode(render_pagerduty(document, receiver.key)))
    body = _encode(document)
    timestamp = int(now.timestamp())
    headers |= {"webhook-id": document["id"], "webhook-timestamp": str(timestamp)}
    if receiver.key:
        headers["webhook-signature"] = sign(receiver.key, document["id"], timestamp, body)
    return Request(receiver.url, headers, body)


def _encode(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def render_pagerduty(document: Document, routing_key: str) -> dict[str, Any]:
    """An event of PagerDuty's Events API v2: trigger while the incident is open, resolve when it is over."""
    incident = document["incident"]
    event: dict[str, Any] = {
        "routing_key": routing_key,
        "event_action": "resolve" if document["event"] == "resolved" else "trigger",
        "dedup_key": _dedup_key(document["source"], incident["key"]),
    }
    if event["event_action"] == "trigger":
        event["client"] = document["source"]
        event["payload"] = {
            "summary": shorten(incident["summary"], SUMMARY_CHARS),
            "source": document["source"],
            "severity": incident["severity"],
            "timestamp": incident["opened_at"],
            "component": incident["key"],
            "class": incident["kind"],
            "custom_details": {"what to do": incident["action"], **incident["details"]},
        }
    return event


def _dedup_key(source: str, key: str) -> str:
    whole = f"{source}:{key}"
    if len(whole) <= KEY_CHARS:
        return whole
    return f"{whole[: KEY_CHARS - 17]}#{hashlib.sha256(whole.encode()).hexdigest()[:16]}"


def render_slack(document: Document) -> dict[str, Any]:
    """A message of a Slack incoming webhook: blocks, and a text that says it all where blocks are not shown."""
    incident = document["incident"]
    title = f"{_heading(document)}: {incident['summary']}"
    fields = [("Severity", incident["severity"]), ("What", incident["key"]), ("Since", incident["opened_at"])]
    if incident["resolved_at"]:
        fields.append(("Until", incident["resolved_at"]))
    for name, value in incident["details"].items():
        said = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        if name != "message" and said:
            fields.append((name.replace("_", " ").capitalize(), said))
    blocks: list[dict[str, Any]] = [
        {"type": "header", "text": {"type": "plain_text", "text": shorten(title, HEADER_CHARS), "emoji": False}},
        _section(_escape(incident["summary"], SECTION_CHARS)),
        {
            "type": "section",
            "fields": [
                {"type": "mrkdwn", "text": f"*{_escape(name, 100)}*\n{_escape(value, FIELD_CHARS - 200)}"}
                for name, value in fields[:FIELDS]
            ],
        },
    ]
    if message := incident["details"].get("message"):
        blocks.append(_section(_escape(str(message), SECTION_CHARS)))
    if document["event"] != "resolved":
        blocks.append(_section(f"*What to do*\n{_escape(incident['action'], SECTION_CHARS - 50)}"))
    blocks.append({"type": "context", "elements": [{"type": "mrkdwn", "text": _escape(document["source"], 300)}]})
    text = title if document["event"] == "resolved" else f"{title}\nWhat to do: {incident['action']}"
    return {"text": _escape(text, SECTION_CHARS), "blocks": blocks}


def _heading(document: Document) -> str:
    severity = str(document["incident"]["severity"]).capitalize()
    headings = {
        "opened": severity,
        "resolved": "Resolved",
        "escalated": f"Now {severity.lower()}",
        "changed": f"{severity}, more of it",
        "reminded": f"{severity}, still",
        "test": "Test",
    }
    return headings[document["event"]]


def _section(text: str) -> dict[str, Any]:
    return {"type": "section", "text": {"type": "mrkdwn", "text": text}}


def _escape(text: str, chars: int) -> str:
    """Slack's three control characters, escaped; the result is no longer than that many characters."""
    escaped = "".join({"&": "&amp;", "<": "&lt;", ">": "&gt;"}.get(one, one) for one in text)
    if len(escaped) <= chars:
        return escaped or "-"
    # Not in the middle of an escape.
    return re.sub(r"&[a-z]{0,3}$", "", escaped[: chars - 1]) + "…"


def shorten(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[: chars - 1] + "…"


# --- sending ----------------------------------------------------------------------------------------------------------


def send(receiver: Receiver, document: Document, now: datetime, within_s: float = REQUEST_S) -> Outcome:
    """Tell a receiver. Never raises: what went wrong is in the outcome."""
    return _ask(render(receiver, document, now), receiver.host, within_s, says_why=receiver.name == SLACK)


def find_heartbeat(settings: Settings) -> Receiver | None:
    """Who notices when nobody looks any more: asked for after each look, so that its silence means something.

    Raises:
        ConfigurationError: the setting is no address.
    """
    url = settings.get("WAREHOUSE_ALERT_HEARTBEAT_URL")
    return None if url is None else Receiver(HEARTBEAT, _require_url("WAREHOUSE_ALERT_HEARTBEAT_URL", url))


def beat(heartbeat: Receiver, within_s: float = REQUEST_S) -> Outcome:
    """Say that a look was taken."""
    return _ask(Request(heartbeat.url, {"User-Agent": "payments-warehouse"}, b""), heartbeat.host, within_s)


def _ask(request: Request, host: str, within_s: float, *, says_why: bool = False) -> Outcome:
    # Imported here, because only who has something to send needs it, and before the time runs.
    import requests

    answer: queue.SimpleQueue[tuple[int, str | None, bytes] | Exception] = queue.SimpleQueue()
    # A daemon: looking up a name can take minutes when the name server is away, and nobody stays for that.
    threading.Thread(target=_post, args=(requests.post, request, within_s, answer), daemon=True, name="alert").start()
    try:
        found = answer.get(timeout=within_s)
    except queue.Empty:
        return Outcome(False, f"{host} does not answer within {within_s:.0f} s")
    if isinstance(found, Exception):
        # Its text would quote the address.
        return Outcome(False, f"{host} cannot be reached ({type(found).__name__})")
    status, retry_after, body = found
    if 200 <= status < 300:
        return Outcome(True)
    said = f"{host} answered with status {status}"
    if status in (408, 429) or status >= 500:
        return Outcome(False, said, retry_after_s=parse_retry_after(retry_after))
    # Slack says why in one word; anything else might quote what it was sent.
    word = re.fullmatch(rb"[a-z_]{2,40}", body.strip()) if says_why else None
    return Outcome(False, said + (f" ({word[0].decode()})" if word else ""), refused=True)


def _post(post: Callable[..., Any], request: Request, within_s: float, answer: "queue.SimpleQueue[Any]") -> None:
    try:
        with post(
            request.url,
            data=request.body,
            headers=dict(request.headers),
            timeout=within_s,
            # To an address nobody set, with what was meant for the one that was.
            allow_redirects=False,
            stream=True,
        ) as response:
            body = response.raw.read(ANSWER_BYTES, decode_content=True) or b""
            answer.put((response.status_code, response.headers.get("Retry-After"), body))
    except Exception as error:
        answer.put(error)


def hint_of(name: str) -> str:
    """What to do about a receiver that refuses."""
    setting = {WEBHOOK: "WEBHOOK_URL", SLACK: "SLACK_URL", PAGERDUTY: "PAGERDUTY_KEY"}[name]
    return (
        f"Check WAREHOUSE_ALERT_{setting}; once `warehouse alerts test --receiver {name}` passes, what waits is sent."
    )

"""Incidents and the outbox: what is wrong becomes known once, and everybody who has to know is told at least once.

    conditions -> [one transaction: incidents opened, changed, resolved + a delivery per receiver] -> outbox
    outbox -> per receiver, in order: lock, send, mark -> delivered | again later | refused

A condition that stands has one open incident, and says nothing more unless it gets worse. A delivery is marked after it
was sent and under a lock on its receiver: who dies in between leaves it to be sent again (the same id tells a receiver
that it knows it already), and two who look at the same moment do not both send.
"""

import json
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import psycopg2.extensions

from ingestion.errors import ConfigurationError
from ingestion.retry import RetryPolicy
from orchestration.conditions import Condition, Found, Severity
from orchestration.receivers import REQUEST_S, Outcome, Receiver, send

Connection = psycopg2.extensions.connection
Cursor = psycopg2.extensions.cursor

SCHEMA_VERSION = "1"
# The bounds of the delays between tries: exponential, with full jitter.
POLICY = RetryPolicy(base_s=1.0, cap_s=300.0)
# A receiver that says to come back next year would never be told.
MAX_HOLD_S = 3600.0
LEAST_REQUEST_S = 1.0
# On a receiver: whoever has its row sends to it, the others pass it by.
TURN = "for update skip locked"


@dataclass(frozen=True)
class Change:
    """What became of an incident at a tick: opened, escalated, changed, reminded, resolved."""

    event: str
    key: str
    severity: str
    summary: str


class Clock:
    """Time as a tick sees it: its `now`, and what has passed since. A test gives its own."""

    def __init__(
        self,
        now: datetime,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._now, self._monotonic, self.sleep, self.draw = now, monotonic, sleep, draw
        self._started = monotonic()

    @property
    def passed_s(self) -> float:
        return self._monotonic() - self._started

    def time(self) -> datetime:
        return self._now + timedelta(seconds=self.passed_s)


@dataclass(frozen=True)
class Incident:
    """A row of ops.incidents."""

    incident_id: int
    key: str
    kind: str
    severity: str
    state: str
    summary: str
    action: str
    details: dict[str, Any]
    evidence: str
    parts: list[str]
    opened_at: datetime
    told_at: datetime
    resolved_at: datetime | None
    resolved_because: str | None

    def as_dict(self) -> dict[str, Any]:
        """As receivers and scripts read it."""
        return {
            "id": self.incident_id,
            "key": self.key,
            "kind": self.kind,
            "severity": self.severity,
            "state": self.state,
            "summary": self.summary,
            "action": self.action,
            "details": self.details,
            "opened_at": self.opened_at.isoformat(),
            "resolved_at": self.resolved_at.isoformat() if self.resolved_at else None,
            "resolved_because": self.resolved_because,
        }


_COLUMNS = (
    "incident_id, key, kind, severity, state, summary, action, details, evidence, parts, opened_at, told_at, "
    "resolved_at, resolved_because"
)


def take_turn(cursor: Cursor) -> bool:
    """Whether this transaction is the one that changes incidents now; the others leave it to that one."""
    cursor.execute("select pg_try_advisory_xact_lock(hashtext('payments-warehouse alerts'))")
    return bool((cursor.fetchone() or (False,))[0])


def update_incidents(
    cursor: Cursor,
    found: Found,
    receivers: Sequence[Receiver],
    *,
    source: str,
    now: datetime,
    remind_s: float = 0.0,
) -> list[Change]:
    """Open, change and resolve incidents as what was found asks for, with the deliveries that are due for it.

    All in the cursor's transaction. What is not known now stays as it is.
    """
    cursor.execute(f"select {_COLUMNS} from ops.incidents where state <> 'resolved' order by incident_id for update")
    standing = {incident.key: incident for incident in [Incident(*row) for row in cursor.fetchall()]}
    changes: list[Change] = []

    def tell(event: str, incident: Incident) -> None:
        changes.append(Change(event, incident.key, incident.severity, incident.summary))
        told = _told(cursor, incident)
        for receiver in receivers:
            if receiver.name in told:
                _enqueue(cursor, receiver, event, incident, source, now)

    for key, condition in found.conditions.items():
        incident = standing.pop(key, None)
        if incident is not None and incident.state == "closed":
            if incident.evidence == condition.evidence:
                continue
            _resolve(cursor, incident, now, None)
            incident = None
        if incident is None:
            tell("opened", _open(cursor, condition, now))
            continue
        event = _news(incident, condition, now, remind_s)
        incident = _change(cursor, incident, condition, now if event else None)
        if event:
            tell(event, incident)
    for incident in standing.values():
        tables = set(incident.details.get("tables", ()))
        if incident.kind not in found.known or tables & found.unknown_tables:
            continue
        resolved = _resolve(cursor, incident, now, "it is over")
        if incident.state == "open":
            tell("resolved", resolved)
    _tell_who_has_not_heard(cursor, receivers, source, now)
    return changes


def _news(incident: Incident, condition: Condition, now: datetime, remind_s: float) -> str | None:
    """Why an open incident is told again; None while it is the same."""
    if condition.severity.rank > Severity(incident.severity).rank:
        return "escalated"
    if condition.parts - set(incident.parts):
        return "changed"
    if remind_s and now - incident.told_at >= timedelta(seconds=remind_s):
        return "reminded"
    return None


def _open(cursor: Cursor, condition: Condition, now: datetime) -> Incident:
    cursor.execute(
        "insert into ops.incidents (key, kind, severity, state, summary, action, details, evidence, parts, opened_at, "
        f"told_at) values (%s, %s, %s, 'open', %s, %s, %s, %s, %s, %s, %s) returning {_COLUMNS}",
        (
            condition.key,
            condition.kind.value,
            condition.severity.value,
            condition.summary,
            condition.action,
            json.dumps(condition.details),
            condition.evidence,
            json.dumps(sorted(condition.parts)),
            now,
            now,
        ),
    )
    return Incident(*_one(cursor))


def _change(cursor: Cursor, incident: Incident, condition: Condition, told_at: datetime | None) -> Incident:
    """The incident as it stands now. Its severity never sinks, or each return would be an escalation."""
    severity = max(Severity(incident.severity), condition.severity, key=lambda one: one.rank)
    cursor.execute(
        "update ops.incidents set severity = %s, summary = %s, action = %s, details = %s, evidence = %s, parts = %s, "
        f"told_at = coalesce(%s, told_at) where incident_id = %s returning {_COLUMNS}",
        (
            severity.value,
            condition.summary,
            condition.action,
            json.dumps(condition.details),
            condition.evidence,
            json.dumps(sorted(condition.parts | set(incident.parts))),
            told_at,
            incident.incident_id,
        ),
    )
    return Incident(*_one(cursor))


def _resolve(cursor: Cursor, incident: Incident, now: datetime, because: str | None) -> Incident:
    cursor.execute(
        "update ops.incidents set state = 'resolved', resolved_at = coalesce(resolved_at, %s), "
        f"resolved_because = coalesce(resolved_because, %s) where incident_id = %s returning {_COLUMNS}",
        (now, because, incident.incident_id),
    )
    return Incident(*_one(cursor))


def close_incident(
    connection: Connection, key: str, because: str, receivers: Sequence[Receiver], *, source: str, now: datetime
) -> Incident:
    """Close an open incident by hand; it opens again when the same happens anew.

    Raises:
        ConfigurationError: none of that key is open.
    """
    with connection, connection.cursor() as cursor:
        cursor.execute(
            "update ops.incidents set state = 'closed', resolved_at = %s, resolved_because = %s "
            f"where key = %s and state = 'open' returning {_COLUMNS}",
            (now, because, key),
        )
        row = cursor.fetchone()
        if row is None:
            raise ConfigurationError(f"No alert {key} is open.", hint="`warehouse alerts list` shows those that are.")
        incident = Incident(*row)
        told = _told(cursor, incident)
        for receiver in receivers:
            if receiver.name in told:
                _enqueue(cursor, receiver, "resolved", incident, source, now)
    return incident


# --- the outbox -------------------------------------------------------------------------------------------------------


def build_document(
    event: str, incident: Mapping[str, Any], *, message_id: str, source: str, at: datetime
) -> dict[str, Any]:
    """What a receiver is told, in the shape of orchestration/alert.schema.json."""
    return {
        "version": SCHEMA_VERSION,
        "id": message_id,
        "event": event,
        "at": at.isoformat(),
        "source": source,
        "incident": {**incident, "state": "open" if incident["resolved_at"] is None else "resolved"},
    }


def new_message_id() -> str:
    return f"alert_{uuid.uuid4().hex}"


def _enqueue(cursor: Cursor, receiver: Receiver, event: str, incident: Incident, source: str, now: datetime) -> None:
    document = build_document(event, incident.as_dict(), message_id=new_message_id(), source=source, at=now)
    cursor.execute(
        "insert into ops.alert_deliveries (incident_id, receiver, event, document, created_at) "
        "values (%s, %s, %s, %s, %s)",
        (incident.incident_id, receiver.name, event, json.dumps(document), now),
    )


def _told(cursor: Cursor, incident: Incident) -> set[str]:
    """Receivers that hear of the incident."""
    cursor.execute("select distinct receiver from ops.alert_deliveries where incident_id = %s", (incident.incident_id,))
    return {row[0] for row in cursor.fetchall()}


def _tell_who_has_not_heard(cursor: Cursor, receivers: Sequence[Receiver], source: str, now: datetime) -> None:
    """What is open, also to receivers that were not named yet when it began."""
    for receiver in receivers:
        cursor.execute(
            f"select {_COLUMNS} from ops.incidents as i where state = 'open' and not exists (select from "
            "ops.alert_deliveries as d where d.incident_id = i.incident_id and d.receiver = %s) order by incident_id",
            (receiver.name,),
        )
        for row in cursor.fetchall():
            _enqueue(cursor, receiver, "opened", Incident(*row), source, now)


@dataclass
class Sent:
    """What a round of deliveries came to; `problems` are those nobody was told of yet, in words."""

    delivered: int = 0
    problems: list[str] = field(default_factory=list)


def deliver(
    connection: Connection,
    receivers: Sequence[Receiver],
    clock: Clock,
    *,
    within_s: float,
    post: Callable[[Receiver, Mapping[str, Any], datetime, float], Outcome] = send,
) -> Sent:
    """Send what is due, for about as long as given; a receiver that is down is tried again within it, and later.

    Each receiver gets its deliveries in their order, so that no problem is resolved before it was told.
    """
    sent = Sent()
    for receiver in receivers:
        _take_configuration(connection, receiver)
    while True:
        holds = []
        for receiver in receivers:
            hold_s: float | None = 0.0
            while hold_s == 0.0 and clock.passed_s < within_s:
                request_s = min(REQUEST_S, max(within_s - clock.passed_s, LEAST_REQUEST_S))
                hold_s = _deliver_next(connection, receiver, clock, sent, post, request_s)
            if hold_s is not None:
                holds.append(hold_s)
        left_s = within_s - clock.passed_s
        if not holds or min(holds) >= left_s:
            return sent
        clock.sleep(min(holds))


def _deliver_next(
    connection: Connection,
    receiver: Receiver,
    clock: Clock,
    sent: Sent,
    post: Callable[[Receiver, Mapping[str, Any], datetime, float], Outcome],
    request_s: float,
) -> float | None:
    """Send a receiver its oldest delivery; seconds until the next try, None when nothing is left to this process."""
    with connection, connection.cursor() as cursor:
        cursor.execute(
            f"select failures, hold_until, problem from ops.alert_receivers where receiver = %s {TURN}",
            (receiver.name,),
        )
        state = cursor.fetchone()
        if state is None:
            return None  # another process is at it
        failures, hold_until, known_problem = state
        cursor.execute(
            "select delivery_id, document from ops.alert_deliveries where receiver = %s and delivered_at is null "
            "and refused_at is null order by delivery_id limit 1",
            (receiver.name,),
        )
        due = cursor.fetchone()
        if due is None:
            return None
        delivery_id, document = due
        if hold_until is not None and hold_until > clock.time():
            return float((hold_until - clock.time()).total_seconds())
        outcome = post(receiver, document, clock.time(), request_s)
        if outcome.delivered:
            _mark_delivered(cursor, receiver, delivery_id, clock.time())
            sent.delivered += 1
            return 0.0
        if outcome.problem != known_problem:
            sent.problems.append(f"{receiver.name}: {outcome.problem}")
        if outcome.refused:
            _mark_refused(cursor, receiver, delivery_id, outcome.problem, clock.time())
            return 0.0
        delay = POLICY.delay(failures + 1, min(outcome.retry_after_s or 0.0, MAX_HOLD_S), clock.draw)
        _mark_failed(cursor, receiver, delivery_id, outcome.problem, clock.time(), delay)
        # Another one of this receiver would fail alike.
        return max(delay, 0.001)


def _mark_delivered(cursor: Cursor, receiver: Receiver, delivery_id: int, now: datetime) -> None:
    cursor.execute(
        "update ops.alert_deliveries set delivered_at = %s, tries = tries + 1 where delivery_id = %s",
        (now, delivery_id),
    )
    cursor.execute(
        "update ops.alert_receivers set failures = 0, hold_until = null, problem = null, problem_at = null, "
        "is_refusing = false, delivered_at = %s where receiver = %s",
        (now, receiver.name),
    )


def _mark_refused(cursor: Cursor, receiver: Receiver, delivery_id: int, problem: str, now: datetime) -> None:
    cursor.execute(
        "update ops.alert_deliveries set refused_at = %s, refused_because = %s, tries = tries + 1 "
        "where delivery_id = %s",
        (now, problem, delivery_id),
    )
    cursor.execute(
        "update ops.alert_receivers set failures = 0, hold_until = null, problem = %s, "
        "problem_at = case when is_refusing then problem_at else %s end, is_refusing = true where receiver = %s",
        (problem, now, receiver.name),
    )


def _mark_failed(
    cursor: Cursor, receiver: Receiver, delivery_id: int, problem: str, now: datetime, delay_s: float
) -> None:
    cursor.execute("update ops.alert_deliveries set tries = tries + 1 where delivery_id = %s", (delivery_id,))
    cursor.execute(
        "update ops.alert_receivers set failures = failures + 1, hold_until = %s, problem = %s, "
        "problem_at = coalesce(problem_at, %s), is_refusing = false where receiver = %s",
        (now + timedelta(seconds=delay_s), problem, now, receiver.name),
    )


def _take_configuration(connection: Connection, receiver: Receiver) -> None:
    """Note a receiver's settings by their digest. Others than before: what it refused is due again."""
    with connection, connection.cursor() as cursor:
        # Looks first: an upsert would wait for whoever is sending to it.
        cursor.execute("select configuration from ops.alert_receivers where receiver = %s", (receiver.name,))
        row = cursor.fetchone()
        if row is None:
            cursor.execute(
                "insert into ops.alert_receivers (receiver, configuration) values (%s, %s) on conflict do nothing",
                (receiver.name, receiver.digest),
            )
        elif row[0] != receiver.digest:
            release_refused(cursor, receiver)


def release_refused(cursor: Cursor, receiver: Receiver) -> None:
    """Make due again what a receiver refused, and what it is held for: its settings changed, or a test got through."""
    cursor.execute(
        "insert into ops.alert_receivers as r (receiver, configuration) values (%s, %s) on conflict (receiver) "
        "do update set configuration = excluded.configuration, failures = 0, hold_until = null, problem = null, "
        "problem_at = null, is_refusing = false",
        (receiver.name, receiver.digest),
    )
    cursor.execute(
        "update ops.alert_deliveries set refused_at = null, refused_because = null "
        "where receiver = %s and refused_at is not null and delivered_at is null",
        (receiver.name,),
    )


# --- what there is to see ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReceiverState:
    """How a receiver does: what waits for it, what it refused, and its problem."""

    receiver: str
    host: str | None
    waiting: int
    refused: int
    oldest_waiting: datetime | None
    problem: str | None
    problem_at: datetime | None
    is_refusing: bool
    delivered_at: datetime | None


def fetch_incidents(connection: Connection, *, everything: bool = False, limit: int = 50) -> list[Incident]:
    """Open incidents, the worst and oldest first; with `everything` the last ones of any state, newest first."""
    where = "true" if everything else "state = 'open'"
    order = (
        "opened_at desc" if everything else "array_position(array['critical', 'error', 'warning'], severity), opened_at"
    )
    with connection, connection.cursor() as cursor:
        cursor.execute(f"select {_COLUMNS} from ops.incidents where {where} order by {order} limit %s", (limit,))
        return [Incident(*row) for row in cursor.fetchall()]


def fetch_receiver_states(connection: Connection, receivers: Sequence[Receiver]) -> list[ReceiverState]:
    """Of every receiver that is configured, or for which something waits."""
    hosts = {receiver.name: receiver.host for receiver in receivers}
    with connection, connection.cursor() as cursor:
        cursor.execute(
            "select name, coalesce(d.waiting, 0), coalesce(d.refused, 0), d.oldest, r.problem, r.problem_at, "
            "coalesce(r.is_refusing, false), r.delivered_at "
            "from (select unnest(%s::text[]) as name union select receiver from ops.alert_deliveries "
            "where delivered_at is null) as n left join ops.alert_receivers as r on r.receiver = n.name "
            "left join (select receiver, count(*) filter (where refused_at is null) as waiting, "
            "count(*) filter (where refused_at is not null) as refused, min(created_at) as oldest "
            "from ops.alert_deliveries where delivered_at is null group by receiver) as d on d.receiver = n.name "
            "order by name",
            (list(hosts),),
        )
        return [ReceiverState(row[0], hosts.get(row[0]), *row[1:]) for row in cursor.fetchall()]


def _one(cursor: Cursor) -> tuple[Any, ...]:
    row = cursor.fetchone()
    assert row is not None, "returning gives the row"
    return row

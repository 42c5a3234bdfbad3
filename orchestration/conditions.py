"""What is wrong now: runs that failed or are stuck, late tables, budgets, losses, days that do not add up.

    ops.runs, ops.run_steps, _losses, the reconciliation, ages of tables -> conditions, each with a key of its own

Looks at states, never at events: what is asked twice is answered alike, and what is over is not found any more. A kind
that cannot be looked at now (its table is being built, a statement took too long) is not known, which is not "over".

Conditions hold coordinates, counts and messages the house wrote itself; dbt's and Postgres' texts, which quote rows,
stay out. A failure is judged by step and feed, whoever ran it: a later success of another command ends it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import psycopg2
import psycopg2.extensions
from psycopg2 import sql

from ingestion.errors import ErrorClass
from ingestion.feeds import FeedSpec, KafkaOrigin
from ingestion.settings import Settings
from orchestration.console import render_age

if TYPE_CHECKING:
    from orchestration.ages import TableAge

Cursor = psycopg2.extensions.cursor

STUCK_SETTING = "WAREHOUSE_ALERT_STUCK_SECONDS"
STUCK_S = 300.0
# What people run and look at themselves; a dry run that failed is nobody else's business.
ATTENDED = ("replay", "dead-letters replay", "dead-letters discard")
# A table somebody is building is asked again at the next tick.
LOCK_TIMEOUT = "2s"
STATEMENT_TIMEOUT = "10s"
NAMED = 20
# Failures that are about the server behind a feed, not about the feed.
OF_THE_SERVER = frozenset({ErrorClass.TRANSIENT.value, ErrorClass.AUTHENTICATION.value})
MESSAGE_CHARS = 500


class Kind(StrEnum):
    """Why somebody is told."""

    RUN_FAILED = "run_failed"
    RUN_STUCK = "run_stuck"
    SLA_MISSED = "sla_missed"
    DEAD_LETTERS = "dead_letters_over_budget"
    LOSS = "loss"
    RECONCILIATION = "reconciliation_over_budget"


class Severity(StrEnum):
    """How bad, from a look at it by day to the promise itself."""

    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        return list(Severity).index(self)


@dataclass(frozen=True)
class Condition:
    """Something wrong. `key` names it as long as it lasts; `action` is what to do next, a command first.

    `evidence` tells this occurrence from the next one. `parts`: where one more of them is news although the condition
    stands already (another failed test, another lost interval).
    """

    key: str
    kind: Kind
    severity: Severity
    summary: str
    action: str
    details: Mapping[str, Any] = field(default_factory=dict)
    evidence: str = ""
    parts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Found:
    """What is wrong, by key, and of which kinds and tables it is known."""

    conditions: Mapping[str, Condition]
    known: frozenset[Kind]
    unknown_tables: frozenset[str] = frozenset()


def find_conditions(
    settings: Settings, cursor: Cursor, feeds: Sequence[FeedSpec], ages: "Sequence[TableAge] | None", now: datetime
) -> Found:
    """Look at everything, inside the cursor's transaction.

    Args:
        ages: as measured at this tick; None when they were not.
    """
    cursor.execute(
        "select set_config('lock_timeout', %s, true), set_config('statement_timeout', %s, true)",
        (LOCK_TIMEOUT, STATEMENT_TIMEOUT),
    )
    probes: list[tuple[Kind, Callable[[], list[Condition]]]] = [
        (Kind.LOSS, lambda: _find_losses(cursor, feeds)),
        (Kind.DEAD_LETTERS, lambda: _find_excesses(cursor, feeds)),
        (Kind.RECONCILIATION, lambda: _find_broken_days(cursor, settings, feeds)),
        (Kind.RUN_STUCK, lambda: _find_stuck(cursor, now, settings.number(STUCK_SETTING, STUCK_S))),
    ]
    found: dict[Kind, list[Condition]] = {}
    for kind, look in probes:
        conditions = _attempt(cursor, look)
        if conditions is not None:
            found[kind] = conditions

    def is_told(kind: Kind, feed: str | None = None) -> bool:
        """Whether a condition tells it already; what is not known now counts as told."""
        told = [one.key for one in found.get(kind, ())]
        return kind not in found or (f"{kind}/{feed}" in told if feed else bool(told))

    failures = _attempt(cursor, lambda: _find_failures(cursor, feeds, is_told))
    if failures is not None:
        found[Kind.RUN_FAILED] = failures
    if ages is not None:
        found[Kind.SLA_MISSED] = find_misses(ages)
    return Found(
        {one.key: one for conditions in found.values() for one in conditions},
        frozenset(found),
        frozenset(age.table for age in ages or () if age.state == "unknown"),
    )


def _attempt(cursor: Cursor, look: Callable[[], list[Condition]]) -> list[Condition] | None:
    """What a probe found; None where it could not look."""
    cursor.execute("savepoint probe")
    try:
        found = look()
    except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
        if error.pgcode is None:
            raise  # the connection is gone
        found = None
    except psycopg2.Error:
        found = None
    cursor.execute("rollback to savepoint probe" if found is None else "release savepoint probe")
    return found


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Last:
    """The last outcome of a step (of a feed)."""

    step: str
    feed: str
    outcome: str
    error_class: str
    message: str
    finished_at: datetime
    run_id: str
    command: str
    trigger: str
    code_version: str
    node: str = ""


# Each (step, feed) by a walk from one to the next in the index, and its last outcome: the history may be long. A step
# that failed counts once its run has ended, because until then it may be tried again; but one that failed for an outage
# has used up its own tries, and counts until a later try succeeds. An interrupt by hand says nothing, and a killed run
# is told as one that shows no life.
_LAST_STEPS = """
with recursive units as (
    (select step, feed from ops.run_steps order by step, feed limit 1)
    union all
    select n.step, n.feed from units as u cross join lateral (
        select s.step, s.feed from ops.run_steps as s
        where (s.step, s.feed) > (u.step, u.feed) order by s.step, s.feed limit 1
    ) as n
)
select
    l.step, l.feed, l.outcome, coalesce(l.error_class, ''), coalesce(l.message, ''), l.finished_at,
    l.run_id, l.command, l.trigger, l.code_version
from units as u cross join lateral (
    select s.*, r.command, r.trigger, r.code_version
    from ops.run_steps as s inner join ops.runs as r on s.run_id = r.run_id
    where
        s.step = u.step and s.feed = u.feed
        and (
            s.outcome = 'success' or (s.outcome = 'failed' and r.outcome <> 'running')
            -- Of a step that is being tried again, the error is that of the try before.
            or (r.outcome = 'running' and s.error_class = 'transient')
        )
        and not coalesce(s.error_class = 'killed' or (s.error_class = 'interrupted' and r.trigger = 'manual'), false)
        and r.command <> all(%s)
    order by s.finished_at desc limit 1
) as l
where
    l.outcome <> 'success'
    and not exists (
        select from ops.run_nodes as n where n.run_id = l.run_id and n.status in ('fail', 'error', 'runtime error')
    )
order by l.finished_at
"""

# What fails in dbt's project: a build of another part of it does not end that.
_FAILING_NODES = """
select
    'build', '', 'failed', 'data', '', f.failed_at,
    f.run_id, coalesce(r.command, ''), coalesce(r.trigger, ''), coalesce(r.code_version, ''), f.kind || ' ' || f.node
from ops.failing_nodes as f left join ops.runs as r on f.run_id = r.run_id
where coalesce(r.outcome, '') <> 'running'
order by f.failed_at, f.kind, f.node
"""

# Runs that failed outside of any step, by command.
_LAST_RUNS = """
with recursive commands as (
    (select command from ops.runs order by command limit 1)
    union all
    select n.command from commands as c cross join lateral (
        select r.command from ops.runs as r where r.command > c.command order by r.command limit 1
    ) as n
)
select
    '', '', l.outcome, coalesce(l.error_class, ''), coalesce(l.message, ''), l.finished_at,
    l.run_id, l.command, l.trigger, l.code_version
from commands as c cross join lateral (
    select r.* from ops.runs as r
    where
        r.command = c.command and r.outcome <> 'running'
        and not coalesce(r.error_class = 'killed' or (r.error_class = 'interrupted' and r.trigger = 'manual'), false)
    order by r.started_at desc limit 1
) as l
where
    l.outcome = 'failed' and l.command <> all(%s)
    and not exists (select from ops.run_steps as s where s.run_id = l.run_id and s.outcome = 'failed')
order by l.finished_at
"""


def _find_failures(cursor: Cursor, feeds: Sequence[FeedSpec], is_told: Callable[..., bool]) -> list[Condition]:
    """What failed last, together where one server is behind it; not what another condition tells already."""
    declared = {feed.name: feed for feed in feeds}
    groups: dict[str, list[_Last]] = {}
    cursor.execute(_LAST_STEPS, (list(ATTENDED),))
    for last in [_Last(*row) for row in cursor.fetchall()]:
        # A folder landed by hand, or a feed nobody declares any more.
        if last.feed and last.feed not in declared:
            continue
        if (last.error_class == ErrorClass.LOSS and is_told(Kind.LOSS, last.feed)) or (
            last.error_class == ErrorClass.DATA and last.feed and is_told(Kind.DEAD_LETTERS, last.feed)
        ):
            continue
        groups.setdefault(_group(last, declared), []).append(last)
    cursor.execute(_FAILING_NODES)
    nodes = [_Last(*row) for row in cursor.fetchall()]
    of_reconciliation = all(one.node.startswith("test audit_reconciliation") for one in nodes)
    if nodes and not (of_reconciliation and is_told(Kind.RECONCILIATION)):
        groups[f"{Kind.RUN_FAILED}/models"] = nodes
    cursor.execute(_LAST_RUNS, (list(ATTENDED),))
    for last in [_Last(*row) for row in cursor.fetchall()]:
        groups.setdefault(f"{Kind.RUN_FAILED}/{last.command}", []).append(last)
    return [_to_failure(key, lasts) for key, lasts in groups.items()]


def _group(last: _Last, declared: Mapping[str, FeedSpec]) -> str:
    feed = declared.get(last.feed)
    if feed is None:
        return f"{Kind.RUN_FAILED}/{last.step}"
    if last.error_class in OF_THE_SERVER and isinstance(feed.origin, KafkaOrigin):
        return f"{Kind.RUN_FAILED}/{last.step}/kafka"
    return f"{Kind.RUN_FAILED}/{last.step}/{last.feed}"


def _to_failure(key: str, lasts: Sequence[_Last]) -> Condition:
    newest = lasts[-1]
    feeds = sorted(one.feed for one in lasts if one.feed)
    nodes = sorted(one.node for one in lasts if one.node)
    what = f"{newest.step or newest.command} of {_some(feeds)}" if feeds else newest.step or newest.command
    summary = f"{what} failed: {newest.error_class or 'failed'}"
    if nodes:
        summary = f"build failed: {_some(nodes, 3)}"
    details: dict[str, Any] = {
        "error_class": newest.error_class,
        "command": newest.command,
        "trigger": newest.trigger,
        "run_id": newest.run_id,
        "failed_at": newest.finished_at.isoformat(),
        "code_version": newest.code_version,
    }
    if feeds:
        details["feeds"] = feeds[:NAMED]
        # Of a feed's step the house wrote it, and no record is in it; a model's may quote rows.
        details["message"] = _say(newest.message)
    if nodes:
        details["failed"] = nodes[:NAMED]
    return Condition(
        key,
        Kind.RUN_FAILED,
        Severity.ERROR,
        summary,
        _remedy(newest, feeds),
        details,
        evidence=" ".join(sorted(one.run_id for one in lasts)),
        parts=frozenset(nodes),
    )


def _remedy(last: _Last, feeds: Sequence[str]) -> str:
    shown = f"`warehouse status` shows the rest; ops.runs has the message of run {last.run_id}."
    if last.error_class == ErrorClass.TRANSIENT:
        return f"`warehouse doctor` says which server does not answer. Nothing is lost: the next run reads on. {shown}"
    if last.error_class in (ErrorClass.CONFIGURATION, ErrorClass.AUTHENTICATION):
        return f"`warehouse doctor` says which setting, declaration or grant has to change. {shown}"
    if last.error_class == ErrorClass.BUSY:
        return "`warehouse status` names the writer; `warehouse ingest --take-over` ends one that is stuck."
    if last.error_class == ErrorClass.DATA and not feeds:
        return "`dbt retry` runs only what failed; target/compiled has the SQL of the tests."
    if last.error_class == ErrorClass.DATA:
        return f"`warehouse dead-letters list --feed {feeds[0]}` says what was set aside and why. {shown}"
    if last.error_class == "interrupted":
        return f"`warehouse run` again: it sweeps what was left and reads on. {shown}"
    return f"`warehouse run` again shows the stack trace of a fault of ours. {shown}"


def _find_stuck(cursor: Cursor, now: datetime, stuck_s: float) -> list[Condition]:
    """Runs that show no life: their process hangs or was killed. A later one of the same command that got through ends
    it.
    """
    cursor.execute(
        "select distinct on (r.command) r.run_id, r.command, r.trigger, r.started_at, r.heartbeat_at, "
        "(select string_agg(trim(s.step || ' ' || s.feed), ', ') from ops.run_steps as s "
        "where s.run_id = r.run_id and (s.outcome = 'running' or s.error_class = 'killed')) "
        "from ops.runs as r where ((r.outcome = 'running' and r.heartbeat_at < %s) or r.error_class = 'killed') "
        "and r.command <> all(%s) and not exists (select from ops.runs as n "
        "where n.command = r.command and n.started_at > r.started_at and n.outcome = 'success') "
        "order by r.command, r.started_at desc",
        (now - timedelta(seconds=stuck_s), list(ATTENDED)),
    )
    return [
        Condition(
            f"{Kind.RUN_STUCK}/{command}",
            Kind.RUN_STUCK,
            Severity.ERROR,
            f"{command} shows no life since {heartbeat_at:%Y-%m-%d %H:%M} UTC" + (f", at {steps}" if steps else ""),
            "`warehouse status` shows which feeds it holds. If its process is gone, `warehouse run` sweeps what it "
            "left; if it hangs, end it, or `warehouse ingest --take-over`.",
            {
                "command": command,
                "trigger": trigger,
                "run_id": run_id,
                "started_at": started_at.isoformat(),
                "heartbeat_at": heartbeat_at.isoformat(),
            },
            evidence=run_id,
        )
        for run_id, command, trigger, started_at, heartbeat_at, steps in cursor.fetchall()
    ]


# --- data -------------------------------------------------------------------------------------------------------------


def find_misses(ages: "Sequence[TableAge]") -> list[Condition]:
    """Tables over their budget of age, together by the hop that holds them back: one stopped partition is one miss."""
    groups: dict[str, list[TableAge]] = {}
    for age in ages:
        if age.state in ("warn", "error"):
            groups.setdefault(age.hop or age.table, []).append(age)
    found = []
    for hop, late in groups.items():
        worst = max(late, key=lambda age: (age.state == "error", age.age or timedelta()))
        is_error = worst.state == "error"
        limit = worst.error_after if is_error else worst.warn_after
        found.append(
            Condition(
                f"{Kind.SLA_MISSED}/{hop}",
                Kind.SLA_MISSED,
                Severity.ERROR if is_error else Severity.WARNING,
                f"{worst.table} is {_age(worst.age)} old, its budget is {_age(limit)}"
                + (f"; {_count(len(late) - 1, 'more table')} late for the same reason" if len(late) > 1 else ""),
                "`warehouse status` shows age and lag of every feed; then `warehouse run`, or see whether the sender "
                "sends.",
                {
                    "held_by": _say(worst.held_by),
                    "table": worst.table,
                    "age": _age(worst.age),
                    "budget": _age(limit),
                    "tables": sorted(age.table for age in late)[:NAMED],
                },
                evidence=hop,
            )
        )
    return found


def _find_excesses(cursor: Cursor, feeds: Sequence[FeedSpec]) -> list[Condition]:
    """Feeds whose last run that was offered anything was over its budget, with dead letters still open."""
    found = []
    for feed in feeds:
        cursor.execute(
            "select s.run_id, coalesce(s.offered, s.rows + s.dead), s.dead, s.finished_at from ops.run_steps as s "
            "inner join ops.runs as r on s.run_id = r.run_id "
            "where s.step = 'ingest' and s.feed = %s and coalesce(s.offered, s.rows + s.dead) > 0 "
            "and r.outcome <> 'running' "
            "and (s.outcome = 'success' or (s.outcome = 'failed' and s.error_class = 'data')) "
            "order by s.finished_at desc limit 1",
            (feed.name,),
        )
        for run_id, offered, dead, finished_at in cursor.fetchall():
            excess = feed.dead_letter_budget.find_excess(offered, dead)
            if excess is None or not _has_open_letters(cursor, feed):
                continue
            found.append(
                Condition(
                    f"{Kind.DEAD_LETTERS}/{feed.name}",
                    Kind.DEAD_LETTERS,
                    Severity.ERROR,
                    f"{feed.name} {excess}",
                    f"`warehouse dead-letters list --feed {feed.name}` says why. Correct the sender or the contract, "
                    "then `warehouse dead-letters replay`.",
                    {
                        "feed": feed.name,
                        "owner": feed.owner,
                        "offered": offered,
                        "dead": dead,
                        "reasons": _count_reasons(cursor, feed),
                        "run_id": run_id,
                        "failed_at": finished_at.isoformat(),
                    },
                    evidence=run_id,
                )
            )
    return found


def _has_open_letters(cursor: Cursor, feed: FeedSpec) -> bool:
    cursor.execute("select exists (select from ops.dead_letters where feed = %s and status = 'open')", (feed.name,))
    return bool((cursor.fetchone() or (False,))[0])


def _count_reasons(cursor: Cursor, feed: FeedSpec) -> list[str]:
    cursor.execute(
        "select reason, count(*) from ops.dead_letters where feed = %s and status = 'open' "
        "group by reason order by 2 desc, 1 limit 5",
        (feed.name,),
    )
    return [f"{reason} {count:,}" for reason, count in cursor.fetchall()]


def _find_losses(cursor: Cursor, feeds: Sequence[FeedSpec]) -> list[Condition]:
    """What sources lost and nobody has accepted."""
    cursor.execute("select schemaname from pg_tables where tablename = '_losses'")
    made = {row[0] for row in cursor.fetchall()}
    found = []
    for feed in feeds:
        if feed.source not in made:
            continue
        cursor.execute(
            sql.SQL(
                "select loss_id, detail, detected_at from {} where feed = %s and accepted_at is null order by loss_id"
            ).format(sql.Identifier(feed.source, "_losses")),
            (feed.name,),
        )
        losses = cursor.fetchall()
        if losses:
            found.append(
                Condition(
                    f"{Kind.LOSS}/{feed.name}",
                    Kind.LOSS,
                    Severity.CRITICAL,
                    f"{feed.name}: the source lost records: {_say(losses[-1][1])}"
                    + (f"; {len(losses) - 1:,} more" if len(losses) > 1 else ""),
                    "`warehouse status` tells them; when it is known why, "
                    f'`warehouse feeds accept-loss {feed.name} --reason "..."`.',
                    {
                        "feed": feed.name,
                        "owner": feed.owner,
                        "losses": [_say(detail) for _, detail, _ in losses[-NAMED:]],
                        "detected_at": losses[-1][2].isoformat(),
                    },
                    evidence=" ".join(str(row[0]) for row in losses),
                    parts=frozenset(str(row[0]) for row in losses),
                )
            )
    return found


def _find_broken_days(cursor: Cursor, settings: Settings, feeds: Sequence[FeedSpec]) -> list[Condition]:
    """Feeds of which the reconciliation does not add up on some day."""
    # As macros/generate_schema_name.sql names it.
    schema = settings.get("WAREHOUSE_SCHEMA") or "analytics"
    table = "audit" if schema == "analytics" else f"{schema}_audit"
    cursor.execute(
        sql.SQL(
            "select feed, array_agg(loaded_date::text order by loaded_date) from {} "
            "where not adds_up and feed = any(%s) group by feed"
        ).format(sql.Identifier(table, "audit_reconciliation")),
        ([feed.name for feed in feeds],),
    )
    owners = {feed.name: feed.owner for feed in feeds}
    return [
        Condition(
            f"{Kind.RECONCILIATION}/{feed}",
            Kind.RECONCILIATION,
            Severity.CRITICAL,
            f"{feed} does not add up on {_count(len(days), 'day')}, first on {days[0]}",
            f"`select * from {table}.audit_reconciliation where not adds_up` says at which hop; "
            "`dbt build --full-refresh --select audit_loads+ audit_amounts+` counts anew.",
            {"feed": feed, "owner": owners[feed], "days": days[:NAMED]},
            evidence=" ".join(days),
            parts=frozenset(days),
        )
        for feed, days in cursor.fetchall()
    ]


# --- words ------------------------------------------------------------------------------------------------------------


def _say(text: str) -> str:
    """The first line, without users, passwords and queries of addresses."""
    line = " ".join((text.splitlines() or [""])[0].split())
    line = re.sub(r"(\w+://)[^/\s@]*@", r"\1", line)
    line = re.sub(r"(\w+://[^\s?]+)\?\S*", r"\1", line)
    return line if len(line) <= MESSAGE_CHARS else line[: MESSAGE_CHARS - 1] + "…"


def _some(names: Iterable[str], shown: int = 2) -> str:
    listed = list(names)
    more = len(listed) - shown
    return ", ".join(listed[:shown]) + (f" and {more} more" if more > 0 else "")


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _age(age: timedelta | None) -> str:
    return render_age(age.total_seconds() if age is not None else None)

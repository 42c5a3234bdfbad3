"""What happened upstream of a column around a moment: loads, runs, failures, drift, code; the most suspicious first.

    column -> the graph, up to its feeds -> ledger and run history of the hours before -> findings with a weight

A weight says how far a thing is from what is usual for the feed; nearness in time counts. It orders a search and proves
nothing.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from orchestration.lineage.graph import ColumnId, Graph

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

# Loads before the window that say what is usual.
USUAL = 50
# What nearness halves in.
HALVED = timedelta(hours=6)


@dataclass(frozen=True)
class Finding:
    """Something that happened; the greater the weight, the odder."""

    weight: float
    at: datetime
    kind: str
    subject: str
    what: str


@dataclass(frozen=True)
class _Load:
    feed: str
    load_id: str
    at: datetime
    offered: int
    landed: int
    dead: int
    drifted: int
    lost: int
    restored: int
    kind: str
    contract: str


def upstream_feeds(graph: Graph, where: ColumnId) -> list[str]:
    """The feeds a column's value or rows come from, also those that only decide about it."""
    reached = {one.dataset for one in graph.walk(where, up=True, follow=lambda _edge: True)}
    # Which rows a model has decides about all of its columns.
    reached |= {
        one.dataset
        for dataset in list(reached)
        for one in graph.walk(ColumnId(dataset, "*"), up=True, follow=lambda _edge: True)
    }
    return sorted(
        graph.datasets[one].name
        for one in reached
        if graph.datasets[one].kind == "source" and graph.datasets[one].layer == "raw"
    )


def find_incident(
    connection: "Connection", graph: Graph, where: ColumnId, at: datetime, hours: float = 48
) -> list[Finding]:
    """What happened upstream of a column within the hours before a moment, the most suspicious first."""
    feeds = upstream_feeds(graph, where)
    since = at - timedelta(hours=hours)
    found = [*_of_loads(_loads(connection, feeds, at), since), *_of_runs(connection, feeds, since, at)]
    return sorted((_nearer(one, at) for one in found), key=lambda one: (-one.weight, -one.at.timestamp()))


def _nearer(finding: Finding, at: datetime) -> Finding:
    distance = abs(at - finding.at) / HALVED
    return replace(finding, weight=round(finding.weight * (0.4 + 0.6 * 0.5**distance), 1))


def _loads(connection: "Connection", feeds: Sequence[str], until: datetime) -> list[_Load]:
    """Committed loads of the feeds up to a moment, the oldest first."""
    with connection.cursor() as cursor:
        cursor.execute(
            "select l.feed, l.load_id, c.committed_at, sum(l.offered), sum(l.landed), sum(l.dead), sum(l.drifted), "
            "sum(l.lost), sum(l.restored), min(l.kind), max(l.contract_version) from ops.ledger as l "
            "inner join ops.loads as c on l.feed = c.feed and l.load_id = c.load_id "
            "where l.feed = any(%s) and c.committed_at <= %s group by 1, 2, 3 order by 3",
            (list(feeds), until),
        )
        return [_Load(*row[:3], *map(int, row[3:9]), *row[9:]) for row in cursor.fetchall()]


def _of_loads(loads: Sequence[_Load], since: datetime) -> Iterator[Finding]:
    for feed in dict.fromkeys(load.feed for load in loads):
        own = [load for load in loads if load.feed == feed]
        for place, load in enumerate(own):
            if load.at < since:
                continue
            before = own[max(0, place - USUAL) : place]
            for weight, what in _odd(load, before):
                yield Finding(weight, load.at, "load", f"{feed} load {load.load_id}", what)


def _odd(load: _Load, before: Sequence[_Load]) -> Iterator[tuple[float, str]]:
    """What is odd about a load; the load itself, with little weight, where nothing is."""
    told = False
    if load.lost:
        told = True
        yield 80, f"{load.lost:,} records lost at the source"
    if before and before[-1].contract != load.contract:
        told = True
        yield 60, f"first load under contract {load.contract}, before it {before[-1].contract}"
    share = load.dead / load.offered if load.offered else 0.0
    usual = (
        statistics.median(one.dead / one.offered for one in before if one.offered)
        if any(o.offered for o in before)
        else 0.0
    )
    if load.dead > 0 and share > 2 * usual:
        told = True
        yield (
            20 + 60 * min(1.0, share),
            f"{load.dead:,} of {load.offered:,} records set aside ({share:.1%}, usually {usual:.1%})",
        )
    drift_before = any(one.drifted for one in before[-5:])
    if load.drifted:
        told = True
        yield (
            (15 if drift_before else 55),
            f"{load.drifted:,} records with fields nobody declared" + ("" if drift_before else ", none before"),
        )
    if load.kind == "replay" or load.restored:
        told = True
        yield 35, f"replayed: {load.landed:,} landed, {load.restored:,} restored"
    sizes = [one.offered for one in before if one.offered]
    if load.offered and len(sizes) >= 3:
        ratio = load.offered / statistics.median(sizes)
        if ratio >= 4 or ratio <= 0.25:
            told = True
            yield min(50.0, 12 * abs(math.log2(ratio))), f"{load.offered:,} records, {ratio:.2g} times as many as usual"
    if not told:
        yield 3, f"{load.landed:,} landed, as usual"


def _of_runs(connection: "Connection", feeds: Sequence[str], since: datetime, at: datetime) -> Iterator[Finding]:
    with connection.cursor() as cursor:
        cursor.execute(
            "select s.started_at, s.step, s.feed, s.outcome, s.error_class, s.message, r.command, r.run_id "
            "from ops.run_steps as s inner join ops.runs as r on s.run_id = r.run_id "
            "where s.outcome <> 'success' and (s.feed = '' or s.feed = any(%s)) and s.started_at between %s and %s",
            (list(feeds), since, at),
        )
        steps: list[Any] = cursor.fetchall()
        cursor.execute(
            "select started_at, command, run_id, code_version, outcome, "
            "lag(code_version) over (order by started_at) from ops.runs where started_at <= %s order by started_at",
            (at,),
        )
        runs: list[Any] = cursor.fetchall()
    for started, step, feed, outcome, error_class, message, command, run_id in steps:
        first_line = (message or "").splitlines()[0] if message else "no message"
        what = "did not end" if outcome == "running" else f"failed ({error_class}): {first_line[:200]}"
        yield Finding(
            70 if feed or step == "build" else 45,
            started,
            "run",
            f"{command} {run_id}",
            f"{step} {feed} {what}".replace("  ", " "),
        )
    for started, command, run_id, code, _outcome, before in runs:
        if started >= since and before is not None and code != before:
            yield Finding(65, started, "code", f"{command} {run_id}", f"first run of code {code}, before it {before}")

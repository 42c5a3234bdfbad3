"""Where every feed stands: what was offered, landed, set aside or lost, how old it is and how far behind.

Reads the ledger and the broker; starts and changes nothing.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from ingestion import ledger
from ingestion.database import connect
from ingestion.errors import WarehouseError
from ingestion.feeds import FeedSpec, KafkaOrigin
from ingestion.settings import Settings
from orchestration.console import render_age, render_table


@dataclass(frozen=True)
class FeedStatus:
    """One feed's account over all time. offered = landed + dead + tombstones + unchanged.

    `age_seconds`: since the last successful run of its loader. `lag`: records waiting at the source; None where the
    source does not say (an API, or a broker that does not answer: `problem` tells).
    """

    feed: str
    kind: str
    offered: int
    landed: int
    dead: int
    tombstones: int
    unchanged: int
    lost: int
    open_dead_letters: int
    last_success: datetime | None
    age_seconds: float | None
    newest_record: datetime | None
    lag: int | None
    problem: str | None

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        for name in ("last_success", "newest_record"):
            values[name] = values[name].isoformat() if values[name] else None
        return values


_FIGURES = """
select
    f.feed,
    coalesce(sum(l.offered), 0)::bigint, coalesce(sum(l.landed), 0)::bigint, coalesce(sum(l.dead), 0)::bigint,
    coalesce(sum(l.tombstones), 0)::bigint, coalesce(sum(l.unchanged), 0)::bigint, coalesce(sum(l.lost), 0)::bigint,
    max(l.source_time_max),
    (select count(*) from ops.dead_letters d where d.feed = f.feed and d.status = 'open'),
    (select max(s.finished_at) from ops.run_steps s where s.feed = f.feed and s.outcome = 'success')
from unnest(%s) as f (feed)
left join ops.ledger l on l.feed = f.feed
group by f.feed order by f.feed
"""


def fetch_status(settings: Settings, feeds: Sequence[FeedSpec]) -> list[FeedStatus]:
    """The account of each feed, with the lag asked from the brokers in parallel."""
    connection = connect(settings, purpose="status")
    try:
        with ThreadPoolExecutor(max_workers=max(len(feeds), 1)) as pool:
            with connection.cursor() as cursor:
                cursor.execute(_FIGURES, ([feed.name for feed in feeds],))
                figures = {row[0]: row[1:] for row in cursor.fetchall()}
            lags = list(pool.map(lambda feed: _fetch_lag(settings, feed), feeds))
    finally:
        connection.close()
    now = datetime.now(UTC)
    statuses = []
    for feed, (lag, problem) in zip(feeds, lags, strict=True):
        offered, landed, dead, tombstones, unchanged, lost, newest, open_dead, last = figures[feed.name]
        statuses.append(
            FeedStatus(
                feed=feed.name,
                kind=feed.origin.kind,
                offered=offered,
                landed=landed,
                dead=dead,
                tombstones=tombstones,
                unchanged=unchanged,
                lost=lost,
                open_dead_letters=open_dead,
                last_success=last,
                age_seconds=(now - last).total_seconds() if last else None,
                newest_record=newest,
                lag=lag,
                problem=problem,
            )
        )
    return statuses


def _fetch_lag(settings: Settings, feed: FeedSpec) -> tuple[int | None, str | None]:
    if not isinstance(feed.origin, KafkaOrigin):
        return None, None
    if settings.kafka_bootstrap is None:
        return None, None
    from ingestion.kafka import TopicReader

    reader = TopicReader(settings, feed)
    try:
        topic = reader.fetch_topic()
        connection = connect(settings, purpose="status")
        try:
            identity = (topic.cluster, feed.origin.topic, topic.incarnation)
            stream = ledger.match_stream(ledger.find_streams(connection, feed), *identity)
            positions = ledger.fetch_positions(connection, feed, stream) if stream else {}
            open_losses = ledger.find_open_losses(connection, feed)
        finally:
            connection.close()
        lag = sum(max(end - positions.get(p, start), 0) for p, (start, end) in topic.bounds.items())
        losses = dict.fromkeys([*open_losses, *(loss.detail for loss in reader.find_losses(topic, positions))])
        return lag, "; ".join(losses) or None
    except WarehouseError as error:
        return None, error.message
    finally:
        reader.close()


def render_status(statuses: Sequence[FeedStatus]) -> str:
    """The table a person reads, with problems below it."""
    header = ("feed", "offered", "landed", "dead", "tombstones", "unchanged", "lost", "open", "last read", "lag")
    rows = [
        (
            s.feed,
            s.offered,
            s.landed,
            s.dead,
            s.tombstones,
            s.unchanged,
            s.lost,
            s.open_dead_letters,
            f"{render_age(s.age_seconds)} ago" if s.age_seconds is not None else "never",
            s.lag,
        )
        for s in statuses
    ]
    lines = [render_table(header, rows, indent="")]
    for s in statuses:
        if s.problem:
            lines.append(f"! {s.problem}")
        if s.open_dead_letters:
            lines.append(f"! {s.feed}: {s.open_dead_letters:,} open; `warehouse dead-letters list --feed {s.feed}`")
    return "\n".join(lines)

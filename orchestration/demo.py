"""The demo: sample payments through a Kafka protocol and an HTTP API to tested marts, on what is embedded.

sample -> Kafka and rates API -> raw tables -> marts -> what a newcomer wants to see
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from psycopg2 import sql

from ingestion.database import connect
from ingestion.errors import ConfigurationError
from ingestion.feeds import FeedSpec, KafkaOrigin, load_feeds
from ingestion.settings import Settings
from orchestration.console import Reporter, render_table
from orchestration.run import RunReport, run_all
from orchestration.transform import quoted_file_url

DEMO_DAYS = 7
USER_SHARE = 0.25
EVENTS_PER_SECOND = 10.0


@dataclass(frozen=True)
class DemoReport:
    """What the demo did and shows.

    `stored`: per feed the rows and dead letters counted in the tables afterwards. `page`: the report.
    """

    sent: Mapping[str, int]
    run: RunReport
    stored: Mapping[str, tuple[int, int]]
    revenue: list[tuple[Any, ...]]
    page: Path


def run_demo(settings: Settings, reporter: Reporter, *, records: int, seed: int, bad_share: float) -> DemoReport:
    """Send sample messages and run the main job on them.

    Raises:
        ConfigurationError: the settings name a real Kafka; sample data stays out of it.
    """
    if "kafka" not in settings.embedded:
        raise ConfigurationError(
            "The demo sends sample payments, and KAFKA_BOOTSTRAP_SERVERS names a broker of yours.",
            hint="Unset it for the demo. To send to it on purpose: `warehouse sample`, then `warehouse run`.",
        )
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(days=DEMO_DAYS)
    sent = {}
    for feed, count in (
        ("raw_payments.transaction_created", records),
        ("raw_users.user_events", int(records * USER_SHARE)),
    ):
        sent[feed] = send_sample(
            settings, reporter, feed, records=count, seed=seed, bad_share=bad_share, start=start, days=DEMO_DAYS
        )
    report = run_all(settings, reporter, command="demo", trigger="demo")
    # Imported here: matplotlib is the demo's and the report's alone.
    from orchestration.report import write_report

    with reporter.task("report"):
        page = write_report(settings)
    return DemoReport(sent, report, _count_stored(settings, report), _fetch_revenue(settings), page)


def send_sample(
    settings: Settings,
    reporter: Reporter,
    feed: str,
    *,
    records: int,
    seed: int,
    bad_share: float,
    start: datetime,
    days: float | None = None,
    folder: Path | None = None,
) -> int:
    """Generate a feed's sample messages into its topic, or into a JSON-lines file in `folder`; how many.

    Args:
        days: spread the records over this time; ten events a second by default.
    """
    from orchestration.sample import SampleSpec, generate, to_jsonl, to_kafka

    pace = max(records, 1) / (days * 86_400) if days else EVENTS_PER_SECOND
    spec = SampleSpec(records=records, seed=seed, start=start, bad_share=bad_share, events_per_second=pace)
    messages = generate(spec, feed)
    if folder is not None:
        return to_jsonl(messages, folder / f"{feed}.jsonl")
    from ingestion.kafka import client_config

    topics = {
        declared.name: declared.origin.topic
        for declared in load_feeds(settings)
        if isinstance(declared.origin, KafkaOrigin)
    }
    with reporter.task(f"sample {feed}") as task:
        by_topic = to_kafka(
            messages,
            settings.require("KAFKA_BOOTSTRAP_SERVERS", "sample messages need a broker"),
            topics.__getitem__,
            {k: v for k, v in client_config(settings).items() if k != "bootstrap.servers"},
            lambda done: task.update(done, records),
        )
    count = sum(by_topic.values())
    reporter.line(f"{feed}: {count:,} sample messages sent")
    return count


def _count_stored(settings: Settings, report: RunReport) -> dict[str, tuple[int, int]]:
    """Rows and dead letters of the run's loads, counted in the tables and not taken from the ledger."""
    stored = {}
    connection = connect(settings, purpose="demo")
    try:
        with connection.cursor() as cursor:
            for landing in report.landings:
                counts = []
                source, _, table = landing.feed.partition(".")
                for place in (table, "_dead_letters"):
                    cursor.execute(
                        sql.SQL("select count(*) from {} where _dlt_load_id = any(%s)").format(
                            sql.Identifier(source, place)
                        ),
                        (landing.loads,),
                    )
                    counts.append((cursor.fetchone() or (0,))[0])
                stored[landing.feed] = (counts[0], counts[1])
    finally:
        connection.close()
    return stored


def _fetch_revenue(settings: Settings) -> list[tuple[Any, ...]]:
    """Revenue of the last days by day and currency, in minor and major units."""
    connection = connect(settings, purpose="demo")
    try:
        with connection.cursor() as cursor:
            cursor.execute(
                "select r.revenue_date, r.currency_code, sum(r.transaction_count)::bigint, "
                "sum(r.revenue_minor)::bigint, round(sum(r.revenue_major), max(c.minor_unit_exponent)), "
                "round(sum(r.reporting_revenue_major), max(p.minor_unit_exponent)) "
                "from marts.rpt_finance__daily_revenue r "
                "join marts.dim_currencies c on c.currency_code = r.currency_code "
                "join marts.dim_currencies p on p.currency_code = r.reporting_currency_code "
                "where r.revenue_date > (select max(revenue_date) - 3 from marts.rpt_finance__daily_revenue) "
                "group by 1, 2 order by 1, 2"
            )
            return cursor.fetchall()
    finally:
        connection.close()


def render_demo(report: DemoReport, feeds: list[FeedSpec]) -> str:
    """What was offered became what, what was built, and where to look."""
    run = report.run
    assert run.build is not None, "a demo that got here was built"
    assert run.freshness is not None, "a demo that got here was checked"
    assert run.docs is not None, "a demo that got here was documented"
    counts = run.build.counts
    accounts = []
    for landing in run.landings:
        rows, dead = report.stored[landing.feed]
        sent = report.sent.get(landing.feed, landing.offered)
        adds_up = sent == landing.offered == rows + dead + landing.tombstones + landing.unchanged
        accounts.append(
            (landing.feed, sent, rows, dead, landing.tombstones, landing.unchanged, "yes" if adds_up else "NO")
        )
    reasons = [
        f"  {landing.feed}: " + ", ".join(f"{reason} {count:,}" for reason, count in landing.reasons.most_common())
        for landing in run.landings
        if landing.reasons
    ]
    fresh = run.freshness.counts["source"]
    late = len(run.freshness.warnings)
    return "\n".join(
        [
            "Every record is accounted for: offered = landed + dead + tombstones + unchanged (landed before)",
            render_table(
                ("feed", "offered", "landed", "dead", "tombstones", "unchanged", "adds up"),
                accounts,
            ),
            "",
            "Set aside with their bytes and a reason (`warehouse dead-letters list`)",
            *reasons,
            "",
            f"Built and tested: {counts['model']} models, {counts['seed']} seeds, {counts['test']} tests passed",
            f"Fresh: {fresh - late} of {fresh} sources",
            "",
            "Revenue of the last days, completed transactions (marts.rpt_finance__daily_revenue)",
            render_table(
                ("day", "currency", "transactions", "minor units", "major units", "in reporting currency"),
                [(str(d), c, n, minor, f"{major:,f}", f"{rep:,f}") for d, c, n, minor, major, rep in report.revenue],
            ),
            "",
            f"Lineage, models and columns: {quoted_file_url(run.docs)}",
            f"Age of the data, runs and queues: {quoted_file_url(report.page)}",
            "",
            "The broker of the demo forgets its messages when it stops; the warehouse keeps what landed.",
            "Next, in .venv/bin: warehouse status | warehouse ages | warehouse dead-letters list",
        ]
    )

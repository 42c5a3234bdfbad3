"""The main job: ingest every feed, build the models, check freshness, write the docs.

The command line and Dagster both call this; it stops at the first layer that fails, and the run's history says where.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingestion.database import Connection, connect
from ingestion.ddl import ensure_schema
from ingestion.errors import DataError, TransientError, WarehouseError
from ingestion.feeds import FeedSpec, load_feeds
from ingestion.retry import policy_of, retrying
from ingestion.settings import Settings
from orchestration import transform
from orchestration.console import Reporter
from orchestration.history import Run, recorded_run, retention_of, trim_history
from orchestration.lineage.personal import guard_policy
from orchestration.manifest import keep_manifest
from orchestration.standing import find_standing, note_standing, take_inputs
from orchestration.watch import watched

if TYPE_CHECKING:
    from ingestion.landing import Landing


@dataclass
class RunReport:
    """What a run did, layer by layer; a layer that was not reached is None."""

    landings: list["Landing"] = field(default_factory=list)
    build: transform.BuildReport | None = None
    freshness: transform.BuildReport | None = None
    docs: Path | None = None


def prepare(settings: Settings) -> list[FeedSpec]:
    """The declared feeds, with every table they need in place, so that plain dbt works before the first load.

    The run history is cut off at its retention.
    """
    feeds = load_feeds(settings)
    connection = connect(settings, purpose="prepare")
    try:
        ensure_schema(connection, feeds, settings.get("WAREHOUSE_TOKEN_SECRET"))
        trim_history(connection, retention_of(settings))
    finally:
        connection.close()
    transform.ensure_profiles(settings)
    return feeds


def write_pages(settings: Settings, built: Any = None) -> Path:
    """dbt's docs site, and the page of columns beside it; where the site stands.

    Args:
        built: the project a build has just compiled; None compiles.
    """
    page = transform.write_docs(settings, built)
    write_lineage(settings)
    return page


def write_lineage(settings: Settings) -> Path:
    """The page of columns, beside dbt's docs site."""
    from orchestration.lineage.build import load_graph
    from orchestration.lineage.page import PAGE, write_page

    return write_page(load_graph(settings), transform.docs_page(settings).with_name(PAGE))


def ingest(
    settings: Settings,
    feeds: Sequence[FeedSpec],
    run: Run,
    reporter: Reporter,
    report: RunReport | None = None,
    *,
    take_over: bool = False,
    folder: Path | None = None,
) -> list["Landing"]:
    """Land the feeds one after the other. A feed that fails does not keep the others from landing.

    With a folder its files are landed instead of what the feeds' sources hold.

    An outage is tried again within the retry policy; each try sweeps what the one before left and reads on from the
    last commit.

    Raises:
        WarehouseError: the first failure, after every feed had its turn.
    """
    # Imported here: dlt takes a second to import.
    from ingestion.files import stream_name
    from ingestion.landing import Landing, land_feed
    from ingestion.topic import loss_error

    policy = policy_of(settings)
    report = report or RunReport()
    failures: list[WarehouseError] = []
    for feed in feeds:
        # A step of the feed's own would pass for a read of its source and make it fresh.
        name = stream_name(folder) if folder else feed.name
        try:
            # Of all tries together: what one that failed had committed is part of the run.
            landing = Landing(feed.name)
            with run.step("ingest", name) as step, reporter.task(name) as task:
                try:
                    land = partial(land_feed, settings, feed, progress=task.update, take_over=take_over)
                    retrying(
                        partial(land, landing=landing, folder=folder),
                        policy,
                        on_retry=partial(announce_retry, reporter),
                    )
                finally:
                    step.rows, step.dead, step.offered = landing.landed, landing.dead, landing.offered
                report.landings.append(landing)
                if landing.open_losses:
                    raise loss_error(feed.name, landing.open_losses)
                require_within_budget(feed, landing)
        except WarehouseError as error:
            failures.append(error)
            reporter.line(f"{name}: failed: {error.message}")
            continue
        if landing.swept:
            reporter.line(f"{name}: swept {len(landing.swept)} load(s) an interrupted run left uncommitted")
        if landing.passed_over:
            more = f" and {len(landing.passed_over) - 3:,} more" if len(landing.passed_over) > 3 else ""
            reporter.line(f"{name}: not read, being no files: {', '.join(landing.passed_over[:3])}{more}")
        reporter.line(
            f"{name}: offered {landing.offered:,}, landed {landing.landed:,}, dead {landing.dead:,} "
            f"in {landing.seconds:.1f} s"
        )
    if failures:
        first = failures[0]
        if len(failures) > 1:
            first.message += "".join(f"\n  also: {error.message}" for error in failures[1:])
        raise first
    return report.landings


def announce_retry(reporter: Reporter, error: TransientError, delay: float) -> None:
    """An outage, and in how many seconds the same is tried again, as a line."""
    reporter.line(f"{error.message} Trying again in {delay:.1f} s.")


def require_within_budget(feed: FeedSpec, landing: "Landing") -> None:
    """Nothing while what a run set aside stays within the feed's budget. Everything has landed safely either way.

    Raises:
        DataError: it is over; the message says by how much and the reasons.
    """
    excess = feed.dead_letter_budget.find_excess(landing.offered, landing.dead)
    if excess is not None:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in landing.reasons.most_common(5))
        raise DataError(
            f"{feed.name} {excess}: {reasons}.",
            hint=f"Everything landed or is kept: `warehouse dead-letters list --feed {feed.name}` says why. "
            "Correct the sender or the contract, then `warehouse dead-letters replay`.",
        )


def describe_build(report: transform.BuildReport) -> str:
    """A build in one line."""
    counts = report.counts
    what = f"{counts['model']} models, {counts['test']} tests, {counts['seed']} seeds"
    if report.stands_since is not None:
        return f"dbt build: nothing new since {report.stands_since:%Y-%m-%d %H:%M} UTC: {what}"
    return f"dbt build: {what} in {report.seconds:.1f} s"


def run_all(settings: Settings, reporter: Reporter, *, command: str = "run", trigger: str = "manual") -> RunReport:
    """Ingest all feeds, dbt build, source freshness, docs. What stands as it would be built now is not built again.

    Nothing is built of a project that breaks the personal-data policy.

    Raises:
        WarehouseError: of the first layer that failed; layers before it stand.
    """
    feeds = prepare(settings)
    report = RunReport()
    connection = connect(settings, purpose=command)
    try:
        with (
            watched(settings, connection, reporter),
            recorded_run(connection, command, trigger, settings.project_dir) as run,
        ):
            _run_layers(settings, feeds, connection, run, reporter, report)
    finally:
        connection.close()
    return report


def _run_layers(
    settings: Settings,
    feeds: Sequence[FeedSpec],
    connection: Connection,
    run: Run,
    reporter: Reporter,
    report: RunReport,
) -> None:
    ingest(settings, feeds, run, reporter, report)
    project = None
    with run.step("build"), reporter.task("dbt build") as task:
        inputs = take_inputs(settings, connection)
        report.build = find_standing(connection, inputs)
        if report.build is None:
            project = transform.parse_project(settings)
            keep_manifest(settings, project)
            guard_policy(settings, project)
            report.build = transform.run_build(
                settings,
                on_node=lambda _n, _s, done, due: task.update(done, due),
                project=project,
                on_retry=partial(announce_retry, reporter),
            )
            run.record_nodes(report.build.nodes, whole=True)
            transform.require_built(report.build)
            note_standing(connection, inputs, report.build)
    reporter.line(describe_build(report.build))
    with run.step("freshness"), reporter.task("dbt source freshness"):
        report.freshness = transform.check_freshness(settings, project)
    report.docs = transform.docs_page(settings)
    if project is not None or not report.docs.is_file():
        with run.step("docs"), reporter.task("dbt docs generate"):
            report.docs = write_pages(settings, project)

"""The `warehouse` command. Adds to plain dbt and dlt, and hides neither.

Thin: each command reads settings, calls one function of the house and prints what came back. Imports what a command
needs inside it, so that `--help` answers at once.
"""

import errno
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ingestion.errors import ConfigurationError, ErrorClass, WarehouseError
from orchestration.cli_alerts import alerts_app, watch_command
from orchestration.cli_backfill import backfill_command
from orchestration.cli_base import AsJson, Quiet, with_connection
from orchestration.cli_base import make_reporter as _reporter
from orchestration.cli_base import print_json as _print_json
from orchestration.cli_base import project_settings as _settings
from orchestration.cli_base import services_running as _services
from orchestration.cli_replay import dead_letters_app, replay_window_command
from orchestration.cli_service_level import ages_command, metrics_command, report_command

if TYPE_CHECKING:
    from ingestion.feeds import FeedSpec
    from ingestion.settings import Settings

# Documented in README.md, "Exit codes".
EXIT_CODES = {
    ErrorClass.INTERNAL: 1,
    ErrorClass.CONFIGURATION: 2,
    ErrorClass.AUTHENTICATION: 3,
    ErrorClass.TRANSIENT: 4,
    ErrorClass.BUSY: 5,
    ErrorClass.LOSS: 6,
    ErrorClass.DATA: 7,
}

app = typer.Typer(
    name="warehouse",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=(
        "Payments warehouse: Kafka topics and REST APIs to tested marts, with every record accounted for.\n\n"
        "With no server configured, an embedded Postgres, broker and rates API start by themselves; "
        "WAREHOUSE_DSN, KAFKA_BOOTSTRAP_SERVERS and FX_API_BASE (environment or .env) name your own.\n\n"
        "Examples:\n\n"
        "  warehouse demo     sample payments to marts, on what is embedded\n\n"
        "  warehouse run      ingest, dbt build, freshness, docs\n\n"
        "  warehouse status   what was offered, landed, set aside, lost; the lag\n\n"
        "Exit codes: 0 fine, 1 fault of ours, 2 configuration or usage, 3 refused by a server, 4 a server is down,\n"
        "5 another writer holds the feed, 6 the source lost records, 7 a test or freshness check failed."
    ),
)
feeds_app = typer.Typer(help="What is declared; and losses of a source, accepted by name.")
services_app = typer.Typer(no_args_is_help=True, help="The embedded Postgres, broker and rates API.")
app.add_typer(feeds_app, name="feeds")
app.add_typer(services_app, name="services")
app.add_typer(dead_letters_app, name="dead-letters")
app.add_typer(alerts_app, name="alerts")

Seed = Annotated[int, typer.Option(help="Same seed, same bytes.")]
BadShare = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of known-bad records.")]


def main() -> None:
    """Entry point: runs a command, turns a failure into one message and an exit code."""
    try:
        app()
    except (KeyboardInterrupt, SystemExit) as ended:
        # typer turns an interrupt into an exit with 130, without a word.
        if isinstance(ended, SystemExit) and ended.code != 130:
            raise
        print("interrupted; what was committed stays, the next run sweeps the rest", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        named = _name_error(error)
        if named is None:
            raise
        from orchestration.console import render_error

        print(render_error(named), file=sys.stderr)
        sys.exit(EXIT_CODES[named.error_class])


def _name_error(error: Exception) -> WarehouseError | None:
    """The failure as one a user can act on; None for a fault of ours, which needs its stack trace."""
    if isinstance(error, WarehouseError):
        return error
    if isinstance(error, OSError) and (error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        place = f"{error.filename}: " if error.filename is not None else ""
        return ConfigurationError(f"{place}{error.strerror}.", hint="The system refused; check the path or the disk.")
    if "psycopg2" in sys.modules:
        import psycopg2

        if isinstance(error, psycopg2.Error):
            from ingestion.database import classify_error

            return classify_error(error)
    return None


def select_declared(names: list[str]) -> "list[FeedSpec]":
    """The declared feeds of these names; asked before a service starts, so that a mistyped name costs nothing."""
    from ingestion.feeds import load_feeds, select_feeds

    return select_feeds(load_feeds(_settings()), names)


@app.command()
def demo(
    records: Annotated[int, typer.Option(min=1, help="Payment messages to send.")] = 20_000,
    seed: Seed = 1,
    bad_share: BadShare = 0.01,
    quiet: Quiet = False,
) -> None:
    """Sample payments through a Kafka protocol and an HTTP API to tested marts.

    Example: warehouse demo --records 50000
    """
    from ingestion.feeds import load_feeds
    from orchestration.demo import render_demo, run_demo

    with _services() as settings:
        report = run_demo(settings, _reporter(quiet), records=records, seed=seed, bad_share=bad_share)
        print(render_demo(report, load_feeds(settings)))


@app.command()
def run(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Ingest all feeds, dbt build, source freshness, docs; stops at the first layer that fails.

    Example: WAREHOUSE_DSN=postgresql://... KAFKA_BOOTSTRAP_SERVERS=host:9092 warehouse run
    """
    from orchestration.run import run_all

    with _services() as settings:
        report = run_all(settings, _reporter(quiet))
        assert report.build is not None, "a run that got here was built"
        if as_json:
            _print_json(
                {
                    "feeds": [_landing_dict(landing) for landing in report.landings],
                    "build": dict(report.build.counts),
                    "stands_since": report.build.stands_since,
                    "lineage_page": str(report.docs),
                }
            )
        else:
            _print_landings(report.landings)


def _print_profiles(landings: list[Any]) -> None:
    """Seconds by stage of the two threads; each adds up to the wall time."""
    from ingestion.profile import ADVICE, COMMITTING, READING

    for landing in landings:
        profile = landing.profile
        print(f"{landing.feed}: {landing.offered:,} records in {profile.wall:.2f} s")
        for thread, stages in (("reading", READING), ("committing", COMMITTING)):
            parts = " + ".join(f"{stage} {profile.seconds.get(stage, 0.0):.2f}" for stage in stages)
            print(f"  {thread:<10}  {parts} = {profile.wall:.2f} s")
        print(f"  next bottleneck: {profile.bottleneck}: {ADVICE[profile.bottleneck]}")


def _landing_dict(landing: Any) -> dict[str, Any]:
    profile = {"profile": landing.profile.seconds}
    return {**landing.__dict__, "offered": landing.offered, "reasons": dict(landing.reasons), **profile}


def _print_landings(landings: list[Any]) -> None:
    from orchestration.console import render_table

    header = ("feed", "offered", "landed", "dead", "tombstones", "unchanged", "lost")
    rows = [(o.stream or o.feed, o.offered, o.landed, o.dead, o.tombstones, o.unchanged, o.lost) for o in landings]
    print(render_table(header, rows, indent=""))


@app.command()
def ingest(
    feeds: Annotated[list[str] | None, typer.Argument(help="Feeds by name; all for none.")] = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="End the right to commit of a writer that is stuck.")
    ] = False,
    from_files: Annotated[
        Path | None, typer.Option("--from-files", help="Land this folder's files instead, one record a file.")
    ] = None,
    feed: Annotated[str | None, typer.Option("--feed", help="One more feed by name.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Say where the time went.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Land what the sources offer now, without building models.

    A folder's files, whatever their names and bytes, are landed or set aside byte for byte. A second time only new
    files and files with other bytes are read. The feed's topic is left alone.

    Example: warehouse ingest raw_payments.transaction_created

    Example: warehouse ingest --from-files /srv/drop --feed raw_payments.transaction_created
    """
    from ingestion.database import connect
    from orchestration.history import recorded_run
    from orchestration.run import RunReport, prepare
    from orchestration.run import ingest as ingest_feeds
    from orchestration.watch import watched

    chosen = select_declared([*(feeds or []), *([feed] if feed else [])])
    if from_files is not None:
        _require_folder_of_one(from_files, chosen)
    report = RunReport()
    with _services() as settings:
        prepare(settings)
        connection = connect(settings, purpose="ingest")
        try:
            reporter = _reporter(quiet)
            with (
                watched(settings, connection, reporter),
                recorded_run(connection, "ingest", "manual", settings.project_dir) as recorded,
            ):
                ingest_feeds(settings, chosen, recorded, reporter, report, take_over=take_over, folder=from_files)
        finally:
            connection.close()
            # Also of a run that failed over its budget or a loss: what it landed has landed.
            if as_json and report.landings:
                _print_json([_landing_dict(landing) for landing in report.landings])
            elif report.landings:
                _print_landings(report.landings)
                if profile:
                    _print_profiles(report.landings)


def _require_folder_of_one(folder: Path, feeds: "list[FeedSpec]") -> None:
    """Nothing when the folder's files can land as records of the one feed; asked before a service starts."""
    from ingestion.files import require_folder

    if len(feeds) != 1:
        raise ConfigurationError(
            f"--from-files lands the files of one feed, not of {len(feeds)}.", hint="--feed NAME names it."
        )
    require_folder(_settings(), feeds[0], folder)


@app.command()
def sample(
    feed: Annotated[list[str] | None, typer.Argument(help="Feeds by name; all with sample data for none.")] = None,
    records: Annotated[int, typer.Option(min=1, help="Messages a feed.")] = 10_000,
    to: Annotated[str, typer.Option(help="'kafka', or a folder for JSON-lines files.")] = "kafka",
    seed: Seed = 1,
    bad_share: BadShare = 0.01,
    start: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="Time of the first message, UTC."),
    ] = None,
    days: Annotated[float | None, typer.Option(min=0.001, help="Spread over days; else ten a second.")] = None,
    quiet: Quiet = False,
) -> None:
    """Make sample messages, the same bytes for the same seed and start, and send or write them.

    Example: warehouse sample raw_payments.transaction_created --records 100000 --to /tmp/sample --start 2026-01-05
    """
    from ingestion.feeds import load_feeds, select_feeds
    from orchestration.demo import send_sample
    from orchestration.sample import FEEDS

    when = (start or datetime.now(UTC) - timedelta(days=days or 1)).replace(tzinfo=UTC, microsecond=0)
    folder = None if to == "kafka" else Path(to)
    settings = _settings()
    wanted = [one.name for one in select_feeds(load_feeds(settings), feed or list(FEEDS))]

    def make(settings: "Settings") -> None:
        for name in wanted:
            count = send_sample(
                settings,
                _reporter(quiet),
                name,
                records=records,
                seed=seed,
                bad_share=bad_share,
                start=when,
                days=days,
                folder=folder,
            )
            print(f"{name}: {count:,} messages to {folder / f'{name}.jsonl' if folder else 'Kafka'}")

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        make(settings)
        return
    from orchestration.services import status as services_status

    if settings.kafka_bootstrap is None and not services_status(settings).running:
        raise ConfigurationError(
            "No broker runs that would keep the messages: the embedded one forgets them when this command ends.",
            hint="`warehouse services start` first, or name yours in KAFKA_BOOTSTRAP_SERVERS, or use --to FOLDER.",
        )
    with _services() as running_settings:
        make(running_settings)


app.command("replay")(replay_window_command)
app.command("backfill")(backfill_command)
app.command("watch")(watch_command)


@app.command()
def status(as_json: AsJson = False) -> None:
    """Where every feed stands: offered, landed, set aside, lost, waiting; and whether every day adds up.

    Example: warehouse status --json
    """
    from ingestion.feeds import load_feeds
    from orchestration.status import answering_services, fetch_status, render_status

    settings = _settings()
    feeds = load_feeds(settings)
    with answering_services(settings) as served:
        found = fetch_status(served, feeds)
    if as_json:
        _print_json(found.as_dict())
    else:
        print(render_status(found))
    if found.problem is not None:
        # What is known was shown.
        raise found.problem


app.command("ages")(ages_command)
app.command("report")(report_command)
app.command("metrics")(metrics_command)


@feeds_app.callback(invoke_without_command=True)
def feeds(context: typer.Context, as_json: AsJson = False) -> None:
    """What is declared: each feed's origin, contract and where it stands in the project.

    Example: warehouse feeds --json
    """
    if context.invoked_subcommand is not None:
        return
    from ingestion.feeds import KafkaOrigin, load_feeds
    from orchestration.console import render_table

    declared = load_feeds(_settings())
    if as_json:
        _print_json(
            [
                {
                    "feed": one.name,
                    "kind": one.origin.kind,
                    "origin": one.origin.topic if isinstance(one.origin, KafkaOrigin) else one.origin.path,
                    "columns": {column.name: column.type.sql for column in one.columns},
                    "personal_data": [column.name for column in one.columns if column.pii],
                    "contract_version": one.contract_version,
                    "owner": one.owner,
                    "declared_in": f"{one.file}:{one.line}",
                }
                for one in declared
            ]
        )
        return
    rows = [
        (
            one.name,
            one.origin.kind,
            one.origin.topic if isinstance(one.origin, KafkaOrigin) else one.origin.path,
            len(one.columns),
            sum(column.pii for column in one.columns),
            one.contract_version,
            f"{one.file}:{one.line}",
        )
        for one in declared
    ]
    print(render_table(("feed", "kind", "origin", "columns", "personal", "contract", "declared in"), rows, indent=""))


@feeds_app.command("accept-loss")
def feeds_accept_loss(
    feed: Annotated[str, typer.Argument(help="The feed whose source lost records.")],
    reason: Annotated[str, typer.Option(help="Why this is so; kept beside the loss.")],
    as_json: AsJson = False,
) -> None:
    """Accept what a source lost, or that another source took its place, so that runs succeed again.

    Example: warehouse feeds accept-loss raw_payments.transaction_created --reason "retention was too short, #123"
    """
    from ingestion.ledger import accept_losses

    (chosen,) = select_declared([feed])
    accepted = with_connection(lambda connection: accept_losses(connection, chosen, reason), "feeds")
    if as_json:
        _print_json({"feed": chosen.name, "accepted": accepted, "reason": reason})
    else:
        print("\n".join(f"accepted: {detail}" for detail in accepted) or f"{chosen.name} has no open loss")


@app.command()
def docs(
    serve: Annotated[bool, typer.Option("--serve", help="Serve the page on 127.0.0.1 until interrupted.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port for --serve; 0 takes a free one.")] = 8080,
) -> None:
    """Write the dbt docs lineage site as one offline page.

    Example: warehouse docs --serve --port 8080
    """
    from orchestration.run import prepare
    from orchestration.transform import quoted_file_url, write_docs

    with _services() as settings:
        prepare(settings)
        page = write_docs(settings)
    print(quoted_file_url(page))
    if serve:
        from orchestration.docs_server import serve_page

        serve_page(page, port)


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 3000,
) -> None:
    """Start Dagster (web interface and daemon) on this warehouse, until interrupted.

    Schedules and sensors are off unless WAREHOUSE_ENVIRONMENT says otherwise or they are turned on in the interface.

    Example: warehouse ui --port 3000
    """
    from orchestration.run import prepare
    from orchestration.ui import serve_ui

    settings = _settings()
    # Held for as long: between runs nobody else would keep what is embedded.
    with _services() as served:
        prepare(served)
        serve_ui(settings, port)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check every setting, declaration and connection, and say what to do.

    Example: warehouse doctor
    """
    from ingestion.feeds import load_feeds
    from orchestration.doctor import examine
    from orchestration.services import running

    settings = _settings()
    topics: dict[str, int] | None = None
    try:
        load_feeds(settings)
    except ConfigurationError:
        topics = {}  # the broker starts without the declared topics, and the check of the declarations says why
    with running(settings, topics=topics) as served:
        checks = examine(served)
    if as_json:
        _print_json([check.__dict__ for check in checks])
    else:
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.found}")
            if not check.ok and check.hint:
                print(f"       {check.hint}")
    if not all(check.ok for check in checks):
        raise typer.Exit(EXIT_CODES[ErrorClass.CONFIGURATION])


@services_app.command("start")
def services_start(as_json: AsJson = False) -> None:
    """Start what no setting names and let it run; then plain dbt and dlt work as they are.

    Example: warehouse services start && dbt build
    """
    from ingestion.load import show_to_plain_dlt
    from orchestration.run import prepare
    from orchestration.services import start

    start(_settings())
    with _services() as settings:
        for feed in prepare(settings):
            show_to_plain_dlt(settings, feed)
    _show_services(as_json)


@services_app.command("stop")
def services_stop(
    force: Annotated[bool, typer.Option("--force", help="Also when other commands use them.")] = False,
) -> None:
    """Stop the embedded services. Postgres keeps its data, the broker forgets its messages.

    Example: warehouse services stop
    """
    from orchestration.services import stop

    print("stopped" if stop(_settings(), force=force) else "nothing was running")


@services_app.command("status")
def services_status_command(as_json: AsJson = False) -> None:
    """What runs embedded, and where.

    Example: warehouse services status --json
    """
    _show_services(as_json)


def _show_services(as_json: bool) -> None:
    from orchestration.console import render_table
    from orchestration.services import status as services_status

    found = services_status(_settings())
    if as_json:
        _print_json(found.as_dict())
    elif found.services:
        rows = [(one.name, one.address, one.pid, one.since) for one in found.services]
        print(render_table(("service", "address", "pid", "since"), rows, indent=""))
    else:
        print("no embedded service runs")

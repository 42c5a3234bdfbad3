"""The commands of dead letters and replays: look, try again, discard, export; read a window of a source again.

What changes something is a dry run until `--apply` is given, and says so.
"""

import sys
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ingestion.errors import ConfigurationError, Reason
from orchestration.cli_base import (
    AsJson,
    Quiet,
    make_reporter,
    print_json,
    project_settings,
    services_running,
    with_connection,
)
from orchestration.dead_letters import Filter, Status

if TYPE_CHECKING:
    from ingestion.feeds import FeedSpec
    from ingestion.replay import Coming, Replay
    from ingestion.replay_window import OffsetWindow, TimeWindow
    from ingestion.settings import Settings
    from orchestration.console import Reporter
    from orchestration.history import Run
    from orchestration.replay import Rebuild

TIME_FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]
WAIT_S = 60.0
# Of days that do not follow each other, the line of a model shows this many ranges.
RANGES_SHOWN = 4

dead_letters_app = typer.Typer(no_args_is_help=True, help="Records set aside, with their bytes and a reason.")

OneFeed = Annotated[str | None, typer.Option("--feed", help="Only this feed.")]
OneReason = Annotated[Reason | None, typer.Option("--reason", help="Only this reason class.")]
Since = Annotated[datetime | None, typer.Option("--since", formats=TIME_FORMATS, help="Set aside since, UTC.")]
Until = Annotated[datetime | None, typer.Option("--until", formats=TIME_FORMATS, help="Set aside before, UTC.")]
OneStatus = Annotated[Status | None, typer.Option("--status", help="Only these.")]
Ids = Annotated[list[str] | None, typer.Option("--id", help="Only this one; may stand several times.")]
Apply = Annotated[bool, typer.Option("--apply", help="Do it. Without it nothing changes.")]
Because = Annotated[str | None, typer.Option("--because", help="Why, for the audit.")]
Wait = Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for another writer of the feed.")]
WithModels = Annotated[
    bool, typer.Option("--with-models", help="Say which days of which models change, and rebuild only those.")
]


def _utc(when: datetime | None) -> datetime | None:
    return when.replace(tzinfo=UTC) if when else None


def declared_feeds(name: str | None) -> list["FeedSpec"]:
    from ingestion.feeds import load_feeds, select_feeds

    return select_feeds(load_feeds(project_settings()), [name] if name else [])


def _filter(
    feed: str | None, reason: Reason | None, status: Status | None, since: datetime | None, until: datetime | None
) -> Filter:
    named = declared_feeds(feed)[0].name if feed else None
    return Filter(named, reason, status, _utc(since), _utc(until))


@dead_letters_app.command("list")
def list_command(
    feed: OneFeed = None,
    reason: OneReason = None,
    status: OneStatus = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many, newest first.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Records set aside: coordinates, reason and path; never a payload.

    Example: warehouse dead-letters list --feed raw_payments.transaction_created --reason wrong_type
    """
    from orchestration import dead_letters
    from orchestration.console import render_table

    wanted = _filter(feed, reason, status, since, until)
    letters = with_connection(
        lambda connection: dead_letters.list_dead_letters(connection, wanted=wanted, limit=limit), "dead-letters"
    )
    if as_json:
        print_json([letter.as_dict() for letter in letters])
        return
    if not letters:
        print("no dead letters")
        return
    rows = [(o.dead_letter_id, o.coordinates, o.reason, o.path, o.message, o.status) for o in letters]
    print(render_table(("id", "where", "reason", "path", "message", "status"), rows, indent=""))
    if len(letters) == limit:
        print(f"... the newest {limit}; --limit shows more")


@dead_letters_app.command("stats")
def stats_command(
    feed: OneFeed = None,
    reason: OneReason = None,
    status: OneStatus = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
) -> None:
    """How many by feed, reason and status, and how old the oldest is.

    Example: warehouse dead-letters stats --status open
    """
    from orchestration.console import render_age, render_table
    from orchestration.dead_letters import count_dead_letters

    wanted = _filter(feed, reason, status, since, until)
    groups = with_connection(lambda connection: count_dead_letters(connection, wanted), "dead-letters")
    if as_json:
        print_json([group.as_dict() for group in groups])
    elif not groups:
        print("no dead letters")
    else:
        rows = [(g.feed, g.reason, g.status, g.letters, render_age(g.oldest_age_seconds)) for g in groups]
        print(render_table(("feed", "reason", "status", "letters", "oldest"), rows, indent=""))


@dead_letters_app.command("show")
def show_command(
    dead_letter_id: Annotated[str, typer.Argument(help="Id from `dead-letters list`.")],
    payload: Annotated[
        bool, typer.Option("--payload", help="Also print key, headers and bytes; they may hold personal data.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """One record set aside and what was done with it; its bytes only when asked for.

    Example: warehouse dead-letters show 3f9c0d5e7a1b2c4d --payload
    """
    from orchestration.dead_letters import fetch_dead_letter, fetch_events

    (letter, key, value, headers), events = with_connection(
        lambda connection: (fetch_dead_letter(connection, dead_letter_id), fetch_events(connection, dead_letter_id)),
        "dead-letters",
    )
    shown = letter.as_dict()
    if payload:
        shown |= {"key_hex": key.hex() if key is not None else None, "headers": headers, "value_hex": value.hex()}
    if as_json:
        print_json(shown | {"events": [one.as_dict() for one in events]})
        return
    for name, entry in shown.items():
        if entry is not None and name != "value_hex":
            print(f"{name}: {entry}")
    for one in events:
        print(f"event: {one}")
    if payload:
        sys.stdout.write("value: ")
        sys.stdout.flush()
        sys.stdout.buffer.write(value + b"\n")


@dead_letters_app.command("export")
def export_command(
    file: Annotated[Path, typer.Argument(help="A new file; one that is there is not overwritten.")],
    feed: OneFeed = None,
    reason: OneReason = None,
    status: OneStatus = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
) -> None:
    """Write dead letters with their bytes (base64) as JSON lines to a file only you can read.

    Example: warehouse dead-letters export /tmp/rejected.jsonl --reason malformed_json
    """
    from orchestration.dead_letters import export_dead_letters

    wanted = _filter(feed, reason, status, since, until)
    count = with_connection(lambda connection: export_dead_letters(connection, wanted, file), "dead-letters")
    if as_json:
        print_json({"file": str(file), "letters": count})
    else:
        print(f"{count:,} dead letters to {file}")
    print(f"{file} holds records as they were sent, personal data among them: delete it when done", file=sys.stderr)


@dead_letters_app.command("replay")
def replay_command(
    feed: OneFeed = None,
    reason: OneReason = None,
    since: Since = None,
    until: Until = None,
    ids: Ids = None,
    because: Because = None,
    apply: Apply = False,
    with_models: WithModels = False,
    wait: Wait = WAIT_S,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Try open dead letters again under the contract as it is declared now; each lands once, however often this runs.

    Example: warehouse dead-letters replay --feed raw_payments.transaction_created --reason not_accepted --apply
    """
    from ingestion.replay import Selection
    from orchestration.replay import recording, replay_letters

    chosen = declared_feeds(feed)
    selection = Selection(reason, _utc(since), _utc(until), tuple(ids or ()))
    reporter = make_reporter(quiet)
    coming: list[Coming] | None = [] if with_models and not apply else None
    with services_running() as settings:
        _require_ids(settings, selection.ids)
        with recording(settings, "dead-letters replay", apply) as run:
            replays = replay_letters(
                settings, chosen, selection, run, reporter, because=because, wait_s=wait, coming=coming
            )
            if not as_json:
                _print_replays(replays, apply)
            rebuild = _take_in(settings, replays, coming, run, reporter, with_models)
    if as_json:
        print_json({"applied": apply, "feeds": [one.as_dict() for one in replays], **_models_dict(rebuild)})
    else:
        print_models(replays, rebuild, apply)


def _print_replays(replays: Sequence["Replay"], applied: bool) -> None:
    from orchestration.console import render_table

    if not replays:
        print("no open dead letters")
        return
    header = (
        ("feed", "landed", "failed again", "superseded")
        if applied
        else ("feed", "would land", "would fail again", "superseded")
    )
    print(render_table(header, [(r.feed, r.landed, r.failed, r.superseded) for r in replays], indent=""))
    _print_reasons(replays)


def _print_reasons(replays: Sequence["Replay"]) -> None:
    for one in replays:
        if one.reasons:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in one.reasons.most_common())
            print(f"  {one.feed}: still {reasons}")


def _take_in(
    settings: "Settings",
    replays: Sequence["Replay"],
    coming: "list[Coming] | None",
    run: "Run | None",
    reporter: "Reporter",
    with_models: bool,
) -> "Rebuild | None":
    """What becomes of the models, or (no run) would; None where nobody asked."""
    from orchestration.replay import Rebuild, build_downstream, forecast_models

    if not with_models:
        return None
    if run is None:
        return Rebuild(forecast_models(settings, coming or [], reporter), [])
    return build_downstream(settings, replays, run, reporter)


def _models_dict(rebuild: "Rebuild | None") -> dict[str, Any]:
    if rebuild is None:
        return {"models": None}
    return {"models": [one.as_dict() for one in rebuild.models], "unforeseen": rebuild.unforeseen}


def print_models(replays: Sequence["Replay"], rebuild: "Rebuild | None", applied: bool) -> None:
    from orchestration.console import render_table
    from orchestration.replay import downstream

    if rebuild is None:
        if arguments := downstream(replays):
            print(f"The models take it in with the next run, or now: dbt build {' '.join(arguments)}")
    elif not rebuild.models:
        print("No model changes." if applied else "No model would change.")
    else:
        rows = [(one.model.name, render_days(one.days)) for one in rebuild.models if one.days is not None]
        if rows:
            print(render_table(("model", "days changed" if applied else "days that may change"), rows, indent=""))
        if dayless := [one.model.name for one in rebuild.models if one.days is None]:
            print(f"  without days, {'built too' if applied else 'would be built too'}: {', '.join(dayless)}")
        if rebuild.unforeseen:
            print(f"  something else landed meanwhile: see other days of {', '.join(rebuild.unforeseen)}, too")
    if replays and not applied:
        print("Nothing was changed; --apply does it.")


def render_days(days: Sequence[date | None]) -> str:
    """Days in order as ranges and how many they are: `2026-01-06 .. 2026-01-08 (3 days)`; of many ranges, the ends."""
    ranges: list[tuple[date, date]] = []
    for day in filter(None, days):
        if ranges and day - ranges[-1][1] == timedelta(days=1):
            ranges[-1] = (ranges[-1][0], day)
        else:
            ranges.append((day, day))
    shown = [f"{first}" if first == last else f"{first} .. {last}" for first, last in ranges]
    if len(shown) > RANGES_SHOWN:
        shown = [*shown[: RANGES_SHOWN - 1], "...", shown[-1]]
    if None in days:
        shown.append("no day")
    return f"{', '.join(shown)} ({len(days)} day{'' if len(days) == 1 else 's'})" if shown else "none"


def _require_ids(settings: Any, ids: Sequence[str]) -> None:
    from ingestion.database import connect
    from orchestration.dead_letters import require_letters

    if ids:
        connection = connect(settings, purpose="dead-letters")
        try:
            require_letters(connection, ids)
        finally:
            connection.close()


@dead_letters_app.command("discard")
def discard_command(
    because: Annotated[str, typer.Option("--because", help="Why; it stays with each of them.")],
    feed: OneFeed = None,
    reason: OneReason = None,
    since: Since = None,
    until: Until = None,
    ids: Ids = None,
    apply: Apply = False,
    wait: Wait = WAIT_S,
    as_json: AsJson = False,
) -> None:
    """Close open dead letters for good, by name and reason. Their bytes stay.

    Example: warehouse dead-letters discard --reason malformed_json --because "test traffic, INC-4711" --apply
    """
    from ingestion.replay import Selection
    from orchestration.replay import discard_letters, recording

    selection = Selection(reason, _utc(since), _utc(until), tuple(ids or ()))
    if selection.is_all and feed is None:
        raise ConfigurationError(
            "Discarding needs a filter.", hint="--feed, --reason, --since, --until or --id say which."
        )
    if not because.strip():
        raise ConfigurationError("--because is empty.", hint="Say why; it stays with each of them.")
    chosen = declared_feeds(feed)
    with services_running() as settings:
        _require_ids(settings, selection.ids)
        with recording(settings, "dead-letters discard", apply):
            counts = discard_letters(settings, chosen, selection, because.strip(), apply=apply, wait_s=wait)
    if as_json:
        print_json({"applied": apply, "discarded": counts})
        return
    for name, count in counts.items():
        print(f"{name}: {count:,} {'discarded' if apply else 'would be discarded'}")
    if not counts:
        print("no open dead letters")
    elif not apply:
        print("Nothing was changed; --apply does it.")


def replay_window_command(
    feed: Annotated[str, typer.Argument(help="Feed by name.")],
    start: Annotated[
        datetime | None, typer.Option("--from", formats=TIME_FORMATS, help="First moment, UTC, by the source's clock.")
    ] = None,
    stop: Annotated[
        datetime | None, typer.Option("--to", formats=TIME_FORMATS, help="First moment left out, UTC.")
    ] = None,
    partition: Annotated[int | None, typer.Option(min=0, help="A topic's partition, with offsets.")] = None,
    from_offset: Annotated[int | None, typer.Option(min=0, help="First offset.")] = None,
    to_offset: Annotated[int | None, typer.Option(min=0, help="Last offset; it belongs to the window.")] = None,
    because: Because = None,
    apply: Apply = False,
    with_models: WithModels = False,
    wait: Wait = WAIT_S,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Read a window of a feed's source again and land what is missing; what landed stays, positions stay.

    Example: warehouse replay raw_payments.transaction_created --from 2026-01-05 --to 2026-01-07
    """
    from orchestration.replay import recording, replay_source

    (chosen,) = declared_feeds(feed)
    window = _window(start, stop, partition, from_offset, to_offset)
    reporter = make_reporter(quiet)
    coming: list[Coming] | None = [] if with_models and not apply else None
    with services_running() as settings, recording(settings, "replay", apply) as run:
        result = replay_source(settings, chosen, window, run, reporter, because=because, wait_s=wait, coming=coming)
        if not as_json:
            print_window(result, apply)
        rebuild = _take_in(settings, [result], coming, run, reporter, with_models)
    if as_json:
        print_json({**result.as_dict(), **_models_dict(rebuild)})
    else:
        print_models([result], rebuild, apply)


def _window(
    start: datetime | None,
    stop: datetime | None,
    partition: int | None,
    from_offset: int | None,
    to_offset: int | None,
) -> "TimeWindow | OffsetWindow":
    from ingestion.replay_window import OffsetWindow, TimeWindow

    by_time = (start is not None, stop is not None)
    by_offset = (partition is not None, from_offset is not None, to_offset is not None)
    hint = "Either --from and --to, or --partition, --from-offset and --to-offset."
    if all(by_time) and not any(by_offset) and start is not None and stop is not None:
        if start >= stop:
            raise ConfigurationError("--to is not after --from.", hint="--to is the first moment left out.")
        return TimeWindow(start.replace(tzinfo=UTC), stop.replace(tzinfo=UTC))
    if partition is not None and from_offset is not None and to_offset is not None and not any(by_time):
        if from_offset > to_offset:
            raise ConfigurationError("--to-offset is before --from-offset.", hint=hint)
        return OffsetWindow(partition, from_offset, to_offset)
    raise ConfigurationError("The window is not said in full.", hint=hint)


def print_window(result: Any, applied: bool) -> None:
    from ingestion.replay_window import FIGURES
    from orchestration.console import render_table

    done = {"landed": "landed", "failed": "failed again", "restored": "restored", "dead": "set aside"}
    would = {"landed": "land", "failed": "fail again", "restored": "restore", "dead": "set aside"}
    figures = done if applied else {figure: f"would {verb}" for figure, verb in would.items()}
    names = {**figures, "unchanged": "landed before", "empty": "no value"}
    if result.days:
        rows = [(day, *(result.days[day][figure] for figure in FIGURES)) for day in sorted(result.days)]
        if len(rows) > 1:
            rows.append(("all", *(getattr(result, figure) for figure in FIGURES)))
        print(render_table(("day", *(names.get(figure, figure) for figure in FIGURES)), rows, indent=""))
    else:
        print("nothing of the window was read before")
    _print_reasons([result])
    if result.waiting:
        print(f"  {result.waiting:,} of the window are new: the normal run reads them (`warehouse ingest`)")
    if result.gone:
        print(f"  up to {result.gone:,} of the window are no longer at the source")

"""The commands of alerts: what is open and who was told, a look now, a test, closing one by hand; and the watch.

Addresses and keys of receivers are never shown: a receiver is its kind and its host.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ingestion.errors import ConfigurationError
from orchestration.cli_base import AsJson, Quiet, make_reporter, print_json, project_settings, services_running

if TYPE_CHECKING:
    from ingestion.settings import Settings
    from orchestration.alerts import Incident, ReceiverState

alerts_app = typer.Typer(no_args_is_help=True, help="What is wrong, who was told, and whether they can be told.")

NOBODY = "Nobody is told: no WAREHOUSE_ALERT_ setting names a receiver; see .env.example."


@contextmanager
def _warehouse(purpose: str) -> Iterator[tuple["Settings", Any]]:
    """Settings and a connection, with every table in place."""
    from ingestion.database import connect
    from orchestration.run import prepare

    with services_running() as settings:
        prepare(settings)
        connection = connect(settings, purpose=purpose)
        try:
            yield settings, connection
        finally:
            connection.close()


@alerts_app.command("list")
def list_command(
    everything: Annotated[bool, typer.Option("--all", help="Resolved ones too, newest first.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most this many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Open alerts with what to do next, what waits for each receiver, and what is wrong with it.

    Example: warehouse alerts list --all --json
    """
    from orchestration.alerts import fetch_incidents, fetch_receiver_states
    from orchestration.receivers import find_receivers

    with _warehouse("alerts") as (settings, connection):
        receivers, wrong = find_receivers(settings)
        incidents = fetch_incidents(connection, everything=everything, limit=limit)
        states = fetch_receiver_states(connection, receivers)
    if as_json:
        print_json(
            {
                "alerts": [one.as_dict() for one in incidents],
                "receivers": [one.__dict__ for one in states],
                "problems": [error.message for error in wrong],
            }
        )
        return
    for incident in incidents:
        _show_incident(incident, datetime.now(UTC))
    if not incidents:
        print("no alert is open" if not everything else "there was no alert yet")
    _show_receivers(states)
    for error in wrong:
        print(f"! {error.message}\n  {error.hint}")
    if not receivers and not wrong:
        print(NOBODY)


def _show_incident(one: "Incident", now: datetime) -> None:
    from orchestration.console import render_age

    ended = one.resolved_at or now
    lasted = render_age((ended - one.opened_at).total_seconds())
    if one.state == "open":
        print(f"{one.severity}: {one.summary}\n  {one.key}, for {lasted}\n  {one.action}")
    else:
        print(f"{one.state}: {one.summary}")
        print(f"  {one.key}, {ended:%Y-%m-%d %H:%M} UTC after {lasted}: {one.resolved_because}")


def _show_receivers(states: "list[ReceiverState]") -> None:
    from orchestration.console import render_table
    from orchestration.receivers import hint_of

    if not states:
        return
    rows = [
        (one.receiver, one.host or "not set", one.waiting, one.refused, _time(one.delivered_at), one.problem or "-")
        for one in states
    ]
    print(render_table(("receiver", "host", "waiting", "refused", "last delivery", "problem"), rows, indent=""))
    for one in states:
        if one.is_refusing:
            print(f"! {one.receiver}: {one.problem}, since {_time(one.problem_at)}\n  {hint_of(one.receiver)}")


def _time(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC" if moment else "-"


@alerts_app.command("check")
def check_command(as_json: AsJson = False) -> None:
    """Look at everything now: measure ages, open and resolve alerts, send what is due.

    Runs do it when they end, Dagster's sensor every minute, `warehouse watch` as often as it is told.

    Example: warehouse alerts check
    """
    from orchestration.watch import describe, tick

    with _warehouse("alerts") as (settings, connection):
        seen = tick(settings, connection, datetime.now(UTC))
    if as_json:
        print_json(
            {
                "changes": [change.__dict__ for change in seen.changes],
                "delivered": seen.delivered,
                "problems": seen.problems,
            }
        )
    else:
        print("\n".join(describe(seen)) or "nothing changed")


@alerts_app.command("test")
def try_command(
    receiver: Annotated[
        str | None, typer.Option("--receiver", help="Only this one: webhook, slack, pagerduty.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send a test alert to each receiver. One that takes it is sent what it had refused before.

    Example: warehouse alerts test --receiver slack
    """
    from orchestration.receivers import NAMES, find_receivers

    if receiver is not None and receiver not in NAMES:
        raise ConfigurationError(f"There is no receiver {receiver}.", hint=f"Receivers are {', '.join(NAMES)}.")
    found, wrong = find_receivers(project_settings())
    if wrong:
        raise wrong[0]
    if not any(receiver in (None, one.name) for one in found):
        raise ConfigurationError(
            f"{receiver or 'No receiver'} is {'not ' if receiver else ''}set.",
            hint="WAREHOUSE_ALERT_WEBHOOK_URL, WAREHOUSE_ALERT_SLACK_URL or WAREHOUSE_ALERT_PAGERDUTY_KEY names one; "
            "see .env.example.",
        )
    from orchestration.watch import send_test

    with _warehouse("alerts") as (settings, connection):
        outcomes = send_test(settings, connection, [one for one in found if receiver in (None, one.name)])
    if as_json:
        print_json(
            [
                {"receiver": one.name, "host": one.host, "delivered": said.delivered, "problem": said.problem or None}
                for one, said in outcomes
            ]
        )
    else:
        for one, said in outcomes:
            print(f"{one.name}: " + (f"delivered to {one.host}" if said.delivered else said.problem))
    if not all(said.delivered for _, said in outcomes):
        # Documented in README.md, "Exit codes".
        raise typer.Exit(2 if any(said.refused for _, said in outcomes) else 4)


@alerts_app.command("resolve")
def resolve_command(
    key: Annotated[str, typer.Argument(help="Key from `alerts list`.")],
    because: Annotated[str, typer.Option("--because", help="Why; kept beside the alert.")],
    as_json: AsJson = False,
) -> None:
    """Close an open alert by hand, for what will not be over by itself. It opens again when the same happens anew.

    Example: warehouse alerts resolve run_stuck/run --because "the machine was taken away"
    """
    from orchestration.alerts import close_incident
    from orchestration.receivers import find_receivers
    from orchestration.watch import source_of

    with _warehouse("alerts") as (settings, connection):
        receivers, _ = find_receivers(settings)
        closed = close_incident(connection, key, because, receivers, source=source_of(settings), now=datetime.now(UTC))
    if as_json:
        print_json(closed.as_dict())
    else:
        print(f"closed: {closed.summary}")


def watch_command(
    every: Annotated[str, typer.Option("--every", help="How often: 30s, 5m, 1h.")] = "60s",
    quiet: Quiet = False,
) -> None:
    """Look at everything every so often, until interrupted; for who has no Dagster that does.

    Example: warehouse watch --every 60s
    """
    from orchestration.watch import watch

    seconds = _seconds(every)
    try:
        with services_running() as settings:
            watch(settings, seconds, make_reporter(quiet))
    except KeyboardInterrupt:
        return


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,6})([smh]?)", text)
    seconds = int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0
    if seconds < 1:
        raise ConfigurationError(f"--every {text} is no time.", hint="Its form is 30s, 5m or 1h.")
    return float(seconds)

"""`warehouse backfill`: a range of days of a feed read again, the plan first, a dry run until told otherwise."""

from datetime import datetime
from typing import Annotated

import typer

from orchestration.cli_base import AsJson, Quiet, make_reporter, print_json, services_running
from orchestration.cli_replay import Apply, Because, declared_feeds, print_models, print_window

DAY = ["%Y-%m-%d"]


def backfill_command(
    feed: Annotated[str, typer.Argument(help="Feed by name.")],
    first: Annotated[datetime, typer.Option("--from", formats=DAY, help="First day, UTC, by the source's clock.")],
    last: Annotated[datetime, typer.Option("--to", formats=DAY, help="Last day; it belongs to the range.")],
    because: Because = None,
    apply: Apply = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Land what days of a feed are missing, a stretch of days at a time, then rebuild the models behind it.

    The plan comes first: each day, and which days of which models would change. Between two stretches the feed is free
    for the normal run. `warehouse replay` reads one window of moments or offsets.

    Example: warehouse backfill raw_fx.daily_rates --from 2026-01-05 --to 2026-03-31 --apply
    """
    from orchestration.backfill import DayRange, plan_backfill, run_backfill
    from orchestration.replay import Rebuild, build_downstream, recording

    (chosen,) = declared_feeds(feed)
    days = DayRange(first.date(), last.date())
    reporter = make_reporter(quiet)
    with services_running() as settings:
        plan = plan_backfill(settings, chosen, days, reporter)
        foreseen = Rebuild(list(plan.models), [])
        if not as_json:
            print_window(plan.found, False)
            stretches = ", ".join(map(str, plan.stretches)) or "nothing is missing"
            print(f"{len(plan.stretches)} stretches to land: {stretches}")
            print_models([], foreseen, False)
        if not apply:
            if as_json:
                print_json({"applied": False, **plan.as_dict()})
            else:
                print("Nothing was changed; --apply does it.")
            return
        with recording(settings, "backfill", apply) as run:
            assert run is not None, "what is applied is recorded"
            done = run_backfill(settings, chosen, plan, run, reporter, because)
            rebuild = build_downstream(settings, done, run, reporter)
    if as_json:
        print_json({"applied": True, **plan.as_dict(), "done": [one.as_dict() for one in done]})
    else:
        landed, restored, dead = (sum(getattr(one, name) for one in done) for name in ("landed", "restored", "dead"))
        print(f"Done: landed {landed:,}, restored {restored:,}, set aside {dead:,}.")
        print_models(done, rebuild, True)

"""kill -9 of the loader: at each commit boundary, at random instants, and in the middle of what it does to its disk."""

import signal
from random import Random

from tests.prove.outcome import Outcome, Plan
from tests.prove.stage import Site
from tests.prove.strikes import BEFORE_COMMIT, COMMIT_BOUNDARIES, SWEEP_BOUNDARIES, Boundary, Strikes

KILLS_PER_SITE = 50
TRIES = 4
# (boundary, whether the dead loader's statement outlives the start of the next one, whether the local disk is lost)
BOUNDARY_CASES = tuple(
    (boundary, late, wipe)
    for boundary in (*COMMIT_BOUNDARIES, *SWEEP_BOUNDARIES)
    for late in ((False, True) if boundary.moment != "COMMITTED" else (False,))
    for wipe in (False, True)
)


def kill_at_boundaries(plan: Plan, outcome: Outcome) -> None:
    """kill -9 before, after, and right after the commit of each statement that matters, the sweep's included."""
    cases = list(enumerate(BOUNDARY_CASES))
    if plan.short:
        cases = Random(plan.stage.seed).sample(cases, plan.repeats)
    with plan.stage.site("boundaries", records_per_load=max(plan.records // 2, 1)) as site:
        site.prepare()
        strikes = Strikes(site.database)
        for number, (boundary, late, wipe) in cases:
            if not plan.has_time:
                break
            # In turn the first, second and third file of a load, or the first and second load.
            skip = number % (3 if boundary.table == "transaction_created" else 2)
            for _ in range(TRIES):
                if _reach(outcome, site, strikes, boundary, skip, late=late, wipe=wipe, records=plan.records):
                    outcome.repeats += 1
                    break
                # Few records: perhaps no second load, or no dead letter.
                skip = 0
            else:
                outcome.notes.append(f"not reached: {boundary}")
            if not outcome.check(site):
                outcome.verdict.note(f"first seen after: {boundary}, late={late}, wipe={wipe}")
                break
        strikes.close()
        outcome.finish(site)


def _reach(
    outcome: Outcome,
    site: Site,
    strikes: Strikes,
    boundary: Boundary,
    skip: int,
    *,
    late: bool,
    wipe: bool,
    records: int,
) -> bool:
    """Kill a loader at the boundary; False when it never came there."""
    site.send(records)
    if boundary in SWEEP_BOUNDARIES:
        skip = 0
        _kill_at(outcome, site, strikes, BEFORE_COMMIT, 0)
        strikes.abort()
        left = site.query(
            "select count(*) from raw_payments._ledger where _dlt_load_id not in (select load_id from "
            "raw_payments._dlt_loads)"
        )
        outcome.require(left != [(0,)], "there was nothing to sweep")
    is_reached = _kill_at(outcome, site, strikes, boundary, skip)
    if wipe:
        site.wipe()
    if late and is_reached:
        # The dead loader's statement is still open while the next one works, waits for it or is told it is busy.
        heir = site.start()
        heir.pause(0.4)
        strikes.release()
        heir.wait()
        outcome.count(heir)
    strikes.release()
    return is_reached


def _kill_at(outcome: Outcome, site: Site, strikes: Strikes, boundary: Boundary, skip: int) -> bool:
    trapped = strikes.arm(boundary, skip)
    loader = site.start()
    strikes.catch(loader, trapped)
    strikes.disarm()
    struck = loader.kill()
    outcome.kills += struck
    outcome.count(loader)
    return struck


def kill_at_random(plan: Plan, outcome: Outcome) -> None:
    """kill -9 at random instants of a run's life, of every second restart too; half of them lose the local disk."""
    rng = Random(f"{plan.stage.seed}/instants")
    wiped = 0
    span = 0.0
    while outcome.kills < plan.repeats and plan.has_time and outcome.verdict.is_clean:
        target = min(outcome.kills + KILLS_PER_SITE, plan.repeats)
        with plan.stage.site("instants", records_per_load=max(plan.records // 3, 1)) as site:
            span = span or _measure(site, plan.records)
            while outcome.kills < target and plan.has_time and outcome.verdict.is_clean:
                site.send(plan.records)
                struck = True
                while struck and outcome.kills < target:
                    loader = site.start()
                    loader.pause(rng.uniform(0.0, span))
                    struck = loader.kill()
                    outcome.kills += struck
                    outcome.count(loader)
                    if not struck:
                        span = (span + loader.seconds) / 2
                    elif rng.random() < 0.5:
                        site.wipe()
                        wiped += 1
                    if rng.random() < 0.5:
                        break
                outcome.check(site)
            outcome.finish(site)
        outcome.repeats = outcome.kills
    outcome.notes.append(f"within {span:.1f} s of a run's life; {wiped} lost the local disk too")


def _measure(site: Site, records: int) -> float:
    """How long an undisturbed run takes, in seconds."""
    for _ in range(2):
        site.send(records)
        loader = site.run()
    return loader.seconds


def kill_at_the_disk(plan: Plan, outcome: Outcome) -> None:
    """kill -9 before a change of the loader's local disk, and of the restart while it clears away what that left."""
    rng = Random(f"{plan.stage.seed}/disk")
    with plan.stage.site("disk", records_per_load=max(plan.records // 2, 1)) as site:
        for _ in plan.cycles(outcome, site):
            for last in (250, 120):
                loader = site.run(dies_at=rng.randrange(1, last))
                outcome.count(loader)
                outcome.kills += loader.code == -signal.SIGKILL
            outcome.repeats += 1

"""kill -9 of the loader: at each commit boundary, and at random instants; with and without its local disk."""

import time
from random import Random

from tests.prove.outcome import Outcome, Plan
from tests.prove.stage import Loader, Site, wait_until
from tests.prove.strikes import BEFORE_COMMIT, COMMIT_BOUNDARIES, SWEEP_BOUNDARIES, Boundary, Strikes

KILLS_PER_SITE = 50


def kill_at_boundaries(plan: Plan) -> Outcome:
    """Before, after, and right after the commit of each statement that matters, the sweep's included.

    Variants of each: the server ends the dead loader's statement at once, or only when the next loader works; the
    local disk is kept or wiped.
    """
    outcome = Outcome("kill -9 at each commit boundary")
    rng = Random(f"{plan.stage.seed}/boundaries")
    cases = [
        (boundary, late, wipe)
        for boundary in (*COMMIT_BOUNDARIES, *SWEEP_BOUNDARIES)
        for late in ((False, True) if boundary.moment != "COMMITTED" else (False,))
        for wipe in (False, True)
    ]
    if plan.short:
        cases = rng.sample(cases, plan.repeats)
    outcome.wanted = len(cases)
    missed: list[str] = []
    with plan.stage.site("boundaries", records_per_load=max(plan.records // 3, 1)) as site:
        site.prepare()
        strikes = Strikes(site.database)
        for boundary, late, wipe in cases:
            if not plan.has_time:
                break
            site.send(plan.records)
            if boundary in SWEEP_BOUNDARIES:
                _strike(outcome, site, strikes, BEFORE_COMMIT, 0, late=False, wipe=wipe)
            skip = rng.randrange(3) if boundary.op == "INSERT" and boundary.moment != "COMMITTED" else 0
            if not _strike(outcome, site, strikes, boundary, skip, late=late, wipe=wipe):
                missed.append(str(boundary))
            outcome.runs += site.settle(outcome.verdict)
            outcome.repeats += 1
            if not outcome.verdict.is_clean:
                outcome.verdict.note(f"first seen after: {boundary}, late={late}, wipe={wipe}")
                break
        strikes.close()
        outcome.verdict += site.compare()
    if missed:
        outcome.notes.append(f"not reached: {', '.join(sorted(set(missed)))}")
    return outcome


def _strike(
    outcome: Outcome, site: Site, strikes: Strikes, boundary: Boundary, skip: int, *, late: bool, wipe: bool
) -> bool:
    """Kill a loader at the boundary; False when it never came there."""
    trapped = strikes.arm(boundary, skip)
    loader = site.start()
    caught = strikes.catch(loader, trapped)
    strikes.disarm()
    if caught:
        outcome.kills += loader.kill()
    outcome.count(loader)
    if wipe:
        site.wipe()
    if late and caught:
        # The dead loader's statement is still open while the next one works, waits for it or is told it is busy.
        heir = site.start()
        deadline = time.monotonic() + 0.7
        while heir.is_alive and time.monotonic() < deadline:
            time.sleep(0.005)
        strikes.release()
        heir.wait()
        outcome.count(heir)
    strikes.release()
    return caught


def kill_at_random(plan: Plan) -> Outcome:
    """At random instants of a run's life; half of them lose the local disk too."""
    outcome = Outcome("kill -9 at random instants", wanted=plan.repeats)
    rng = Random(f"{plan.stage.seed}/instants")
    wiped = 0
    while outcome.kills < plan.repeats and plan.has_time:
        target = min(outcome.kills + KILLS_PER_SITE, plan.repeats)
        with plan.stage.site("instants", records_per_load=max(plan.records // 8, 1)) as site:
            site.send(plan.records)
            span = _measure(site)
            while outcome.kills < target and plan.has_time:
                site.send(plan.records)
                for _ in range(8):
                    loader = site.start()
                    _sleep(loader, rng.uniform(0.0, span))
                    struck = loader.kill()
                    outcome.kills += struck
                    outcome.count(loader)
                    if struck and rng.random() < 0.5:
                        site.wipe()
                        wiped += 1
                    if not struck or outcome.kills >= target:
                        break
            outcome.runs += site.settle(outcome.verdict)
            outcome.verdict += site.compare()
            outcome.notes.append(f"span {span:.2f} s")
        outcome.repeats = outcome.kills
        if not outcome.verdict.is_clean:
            break
    outcome.notes = [f"{wiped} of {outcome.kills} lost the local disk too", *outcome.notes[-1:]]
    return outcome


def _measure(site: Site) -> float:
    """How long an undisturbed run takes, in seconds."""
    site.run()
    site.send(len(site.tallies[-1].partitions) and site.tallies[-1].count())
    loader = site.run()
    return time.monotonic() - loader.started


def _sleep(loader: Loader, seconds: float) -> None:
    """Until the instant, or the loader's own end."""
    end = time.monotonic() + seconds
    while loader.is_alive and time.monotonic() < end:
        time.sleep(0.001)


def pause(loader: Loader, seconds: float) -> None:
    """Public name of the wait, for the other scenarios."""
    _sleep(loader, seconds)


def gone(site: Site) -> None:
    """Wait until no session of a loader is left in the database."""
    sessions = "select 1 from pg_stat_activity where datname = current_database() and application_name <> 'prove'"
    wait_until(lambda: not site.query(sessions), "the dead loader's sessions to end")

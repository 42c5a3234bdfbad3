"""More than one writer: zombies that wake up after they were taken over, and ten loaders started together."""

from random import Random

from tests.prove.outcome import Outcome, Plan
from tests.prove.stage import Loader, Site, StuckError
from tests.prove.strikes import Boundary, Strikes

REPEATS_PER_SITE = 20
# The first ones are stopped where the server holds something open for them.
FREEZE_AT = tuple(
    Boundary(table, "INSERT", moment)
    for table in ("_loads_begun", "transaction_created", "_dead_letters", "_ledger", "_dlt_loads")
    for moment in ("BEFORE", "AFTER")
)
# What a taken-over writer may be told: that it was, or that its session is gone. Neither commits.
REFUSALS = ("busy", "transient")


def wake_zombies(plan: Plan, outcome: Outcome) -> None:
    """A loader stopped (SIGSTOP) at a random instant, taken over, woken up when the other is done: refused."""
    rng = Random(f"{plan.stage.seed}/zombies")
    shared = 0
    boundaries = list(FREEZE_AT)
    while outcome.repeats < plan.repeats and plan.has_time and outcome.verdict.is_clean:
        with plan.stage.site("zombies", records_per_load=max(plan.records // 2, 1)) as site:
            site.prepare()
            strikes = Strikes(site.database)
            for _ in plan.cycles(outcome, site, REPEATS_PER_SITE):
                same_disk = rng.random() < 0.5
                zombie = _freeze(site, strikes, rng, boundaries.pop() if boundaries else None)
                if _take_over(outcome, site, zombie, same_disk=same_disk, late=rng.random() < 0.5):
                    outcome.repeats += 1
                    shared += same_disk
            strikes.close()
    outcome.notes.append(f"all refused; {shared} shared the disk with who took over")


def _freeze(site: Site, strikes: Strikes, rng: Random, boundary: Boundary | None) -> Loader:
    """A loader stopped at a boundary (its transaction open in the server), or at a random instant."""
    if boundary is None:
        zombie = site.start()
        zombie.pause(rng.uniform(0.05, 0.6))
        zombie.freeze()
        return zombie
    trapped = strikes.arm(boundary)
    zombie = site.start()
    strikes.catch(zombie, trapped)
    zombie.freeze()
    strikes.disarm()
    strikes.release()
    return zombie


def _take_over(outcome: Outcome, site: Site, zombie: Loader, *, same_disk: bool, late: bool) -> bool:
    """Another loader takes the feed; the zombie wakes up in the middle of it, or (`late`) after it: is it refused?"""
    if not site.query("select 1 from raw_payments._writers where holder like %s", f"% pid {zombie.process.pid}"):
        # Stopped before it held the feed, or already done: it may write when it wakes up.
        zombie.thaw()
        zombie.wait()
        outcome.count(zombie)
        return False
    heir = site.start(take_over=True, home=site.home if same_disk else site.elsewhere())
    try:
        if late:
            heir.wait(30)
        else:
            heir.pause(0.4)
    except StuckError:
        outcome.verdict.note(f"the take-over waits for the frozen writer: {_waiting(site)}")
    woken_with = site.query("select count(*), max(token) from raw_payments._dlt_loads, raw_payments._writers")
    zombie.thaw()
    heir.wait()
    zombie.wait()
    outcome.count(heir)
    outcome.count(zombie)
    if late:
        outcome.require(heir.code == 0, f"the heir failed: {heir.error_class}: {heir.message}")
        now = site.query("select count(*), max(token) from raw_payments._dlt_loads, raw_payments._writers")
        outcome.require(now == woken_with, f"loads and token were {woken_with}, are {now} after the zombie woke up")
    outcome.require(zombie.code == 0 or zombie.error_class in REFUSALS, f"the zombie ended as {zombie.error_class!r}")
    return zombie.code != 0


def _waiting(site: Site) -> str:
    rows = site.query(
        "select a.query, b.query from pg_stat_activity a cross join lateral unnest(pg_blocking_pids(a.pid)) as p "
        "join pg_stat_activity b on b.pid = p where a.datname = current_database()"
    )
    return "; ".join(f"{waiter[:80]!r} waits for {holder[:80]!r}" for waiter, holder in rows)


def start_ten_at_once(plan: Plan, outcome: Outcome) -> None:
    """Ten loaders started together on one feed, the first time in an empty database: one works, nine say why not."""
    told = worked = 0
    with plan.stage.site("ten", records_per_load=max(plan.records // 5, 1)) as site:
        for _ in plan.cycles(outcome, site):
            loaders = [site.start(home=site.elsewhere(number)) for number in range(10)]
            for loader in loaders:
                loader.wait()
                outcome.count(loader)
                if loader.code == 0:
                    worked += 1
                else:
                    said = loader.message
                    outcome.require(loader.error_class == "busy", f"refused as {loader.error_class!r}: {said}")
                    outcome.require("written by" in said and "since" in said, f"it does not say who: {said}")
                    told += 1
            landed = [loader for loader in loaders if loader.code == 0 and loader.result["offered"]]
            outcome.require(len(landed) == 1, f"{len(landed)} of ten landed something")
            outcome.repeats += 1
    outcome.notes.append(f"{told} were told who holds the feed, {worked} had their turn")

"""Dead letters replayed over and over and by several at once, also killed: each record lands once."""

import hashlib
import subprocess
from random import Random

from orchestration.services.postgres_binaries import find_binaries
from tests.prove.outcome import Outcome, Plan
from tests.prove.stage import Site

# A status the contract of the first landing does not know yet: most sample payments carry it.
REFUSED = "completed"
PROCESSES = 4


def replay_dead_letters(plan: Plan, outcome: Outcome) -> None:
    """The same 1,000 dead letters: a dry run, killed replays, then three times by four processes at once."""
    rng = Random(f"{plan.stage.seed}/replay")
    with plan.stage.site("replay", records_per_load=max(plan.records // 4, 1)) as site:
        site.send(plan.records)
        outcome.runs += site.settle(outcome.verdict, refuses=REFUSED)
        bad = site.tallies[0].count("dead")
        good = _count_open(site) - bad
        outcome.require(plan.short or good >= 1000, f"only {good} good records among the dead letters")
        outcome.notes.append(f"{good:,} good records among the dead letters")

        before = _dump(site)
        dry = site.run(action="forecast")
        outcome.count(dry)
        outcome.require(_dump(site) == before, "a dry run changed the database")
        outcome.require(
            dry.result == {"landed": good, "failed": bad}, f"the forecast is {dry.result}, not {good}, {bad}"
        )

        for _ in range(6):
            loader = site.start(action="replay")
            loader.pause(rng.uniform(0.05, 0.6))
            outcome.kills += loader.kill()
            outcome.count(loader)
        while outcome.repeats < plan.repeats:
            loaders = [site.start(action="replay", home=site.elsewhere(number)) for number in range(PROCESSES)]
            for loader in loaders:
                loader.wait()
                outcome.count(loader)
                outcome.require(
                    loader.code == 0 or loader.error_class == "busy",
                    f"a replay failed: {loader.error_class}: {loader.message}",
                )
            outcome.repeats += 1
        outcome.require(_count_open(site) == bad, f"{_count_open(site)} letters are open, {bad} were forecast")
        outcome.finish(site)


def _count_open(site: Site) -> int:
    ((count,),) = site.query("select count(*) from ops.dead_letters where status = 'open'")
    return int(count)


def _dump(site: Site) -> str:
    """The whole database as pg_dump writes it, in one figure."""
    command = [find_binaries(None).program("pg_dump"), "--restrict-key=prove", site.database.dsn]
    return hashlib.sha256(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout).hexdigest()

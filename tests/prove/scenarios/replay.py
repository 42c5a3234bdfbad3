"""Dead letters replayed over and over and by several at once, also killed: each record lands once."""

import hashlib
from random import Random

from tests.prove.outcome import Outcome, Plan
from tests.prove.scenarios.kills import pause
from tests.prove.stage import Site

# A status the contract of the first landing does not know yet: most sample payments carry it.
REFUSED = "completed"
PROCESSES = 4
TIMES = 3


def replay_dead_letters(plan: Plan) -> Outcome:
    """The same dead letters replayed: a dry run, killed ones, then three times by four processes at once."""
    outcome = Outcome(f"replay: {TIMES} times, {PROCESSES} processes", wanted=TIMES)
    rng = Random(f"{plan.stage.seed}/replay")
    with plan.stage.site("replay", records_per_load=max(plan.records // 4, 1)) as site:
        site.send(plan.records)
        outcome.runs += site.settle(outcome.verdict, PROVE_REFUSES=REFUSED)
        good = _count_open(site) - site.tallies[0].count("dead")
        outcome.notes.append(f"{good:,} good records among the dead letters")

        before = _fingerprint(site)
        dry = site.run(PROVE_REPLAY="dry")
        outcome.count(dry)
        outcome.require(_fingerprint(site) == before, "a dry run changed the database")
        outcome.require(dry.result.get("landed") == good, f"the forecast is {dry.result}, not {good} landed")

        for _ in range(6):
            loader = site.start(PROVE_REPLAY="apply")
            pause(loader, rng.uniform(0.05, 0.6))
            outcome.kills += loader.kill()
            outcome.count(loader)
        for _ in range(TIMES):
            loaders = [
                site.start(PROVE_REPLAY="apply", WAREHOUSE_HOME=f"{site.home}-{number}") for number in range(PROCESSES)
            ]
            for loader in loaders:
                loader.wait()
                outcome.count(loader)
                outcome.require(
                    loader.code == 0 or loader.error_class == "busy",
                    f"a replay failed: {loader.error_class}: {loader.result.get('message')}",
                )
            outcome.repeats += 1
        outcome.require(_count_open(site) == site.tallies[0].count("dead"), f"{_count_open(site)} letters are open")
        outcome.runs += site.settle(outcome.verdict)
        outcome.verdict += site.compare()
    return outcome


def _count_open(site: Site) -> int:
    ((count,),) = site.query("select count(*) from ops.dead_letters where status = 'open'")
    return int(count)


def _fingerprint(site: Site) -> str:
    """Every row of every table of the database, in one figure."""
    digest = hashlib.sha256()
    tables = site.query(
        "select quote_ident(schemaname) || '.' || quote_ident(tablename) from pg_tables "
        "where schemaname not in ('pg_catalog', 'information_schema') order by 1"
    )
    for (table,) in tables:
        rows = site.query(f"select md5(t::text) from {table} as t order by 1")
        digest.update(repr((table, rows)).encode())
    return digest.hexdigest()

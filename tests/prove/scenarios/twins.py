"""Twins: one guarantee taken away, and the same checks must see it. A check that cannot fail proves nothing."""

import time
from collections.abc import Callable

from tests.prove.outcome import Caught
from tests.prove.stage import Loader, Stage
from tests.prove.strikes import AFTER_NOTE, BEFORE_COMMIT, BEFORE_LEDGER, BEFORE_ROWS, Strikes
from tests.prove.verify import Verdict

RECORDS = 200
TRIES = 5
# The twins' loaders neither put a missing guard back nor end a zombie's sessions: one guarantee at a time.
UNHELPED = ("schema", "sessions")
DROP_GUARD = "drop trigger _guard_commit on raw_payments._dlt_loads"
DROP_EXCLUSION = "alter table raw_payments._ledger drop constraint _ledger__no_overlap"


def _seen(verdict: Verdict) -> str:
    figures = f"lost {verdict.lost}, duplicate {verdict.duplicate}, altered {verdict.altered}"
    return figures if verdict.lost or verdict.duplicate or verdict.altered else "; ".join(verdict.problems[:1])


def _killed_before_commit(stage: Stage, *without: str) -> Verdict:
    """A load killed with everything copied; the next run; read by somebody who knows nothing of commits."""
    with stage.site("twin_sweep") as site:
        site.prepare()
        strikes = Strikes(site.database)
        site.send(RECORDS)
        trapped = strikes.arm(BEFORE_COMMIT)
        loader = site.start()
        strikes.catch(loader, trapped)
        strikes.disarm()
        loader.kill()
        strikes.abort()
        # A slow machine may need more than one run: the dead one's sessions, a server that does not answer yet.
        for _ in range(TRIES):
            site.run(without=without)
            verdict = site.compare(committed_only=False, leftovers=False)
            if verdict.duplicate or verdict.is_clean:
                break
        strikes.close()
        return verdict


def without_sweep(stage: Stage) -> Caught:
    """The sweep off, and readers that do not ask what is committed."""
    verdict = _killed_before_commit(stage, "sweep")
    control = _killed_before_commit(stage)
    return Caught(
        "sweep off, readers do not filter", verdict.duplicate > 0 and control.is_clean, _seen(verdict), _seen(control)
    )


def _zombie(stage: Stage, remove: tuple[str, ...], *, heir_dies: bool) -> tuple[Verdict, Loader]:
    """A loader frozen before a row of its rows or its ledger is copied, and taken over; then woken up."""
    # So many a load that all its rows are in one file.
    with stage.site("twin_zombie", records_per_load=RECORDS * 4) as site:
        site.prepare()
        strikes = Strikes(site.database)
        for statement in remove:
            site.query(statement)
        site.send(RECORDS)
        traps = [strikes.arm(boundary) for boundary in (BEFORE_ROWS, BEFORE_LEDGER)]
        zombie = site.start(without=UNHELPED)
        strikes.catch(zombie, lambda: any(trapped() for trapped in traps))
        zombie.freeze()
        # What it had sent by then gets into the traps as well.
        time.sleep(0.1)
        strikes.disarm()
        verdict = Verdict()
        trapped = strikes.arm(AFTER_NOTE) if heir_dies else lambda: False
        heir = site.start(without=UNHELPED, take_over=True, home=site.elsewhere())
        strikes.catch(heir, trapped)
        strikes.disarm()
        heir.kill()
        strikes.release()
        zombie.thaw()
        zombie.wait()
        if heir_dies:
            if site.query("select count(*) from raw_payments._dlt_loads") != [(0,)]:
                verdict.note("a writer that was taken over committed")
        else:
            site.settle(verdict, without=UNHELPED)
            verdict += site.compare(leftovers=False)
        strikes.close()
        return verdict, zombie


def without_fence(stage: Stage) -> Caught:
    """The guard of the commit point dropped: a writer that was taken over commits."""
    verdict, _ = _zombie(stage, (DROP_GUARD,), heir_dies=True)
    control, refused = _zombie(stage, (), heir_dies=True)
    return Caught(
        "fence off",
        not verdict.is_clean and refused.error_class in ("busy", "transient") and control.is_clean,
        _seen(verdict),
        f"refused as {refused.error_class}",
    )


def without_exclusion(stage: Stage) -> Caught:
    """The exclusion constraint dropped too: the zombie's rows stand beside those of its heir."""
    verdict, _ = _zombie(stage, (DROP_GUARD, DROP_EXCLUSION), heir_dies=False)
    control, refused = _zombie(stage, (DROP_GUARD,), heir_dies=False)
    return Caught(
        "fence off, exclusion constraint dropped",
        verdict.duplicate > 0 and control.is_clean,
        _seen(verdict),
        f"the constraint alone: refused as {refused.error_class}",
    )


_EAT_A_ROW = """
create function public.eat() returns trigger language plpgsql as $$
begin
    return case when new._kafka_offset = 3 then null else new end;
end $$;
create trigger eat before insert on raw_payments.transaction_created for each row execute function public.eat();
"""


def without_count(stage: Stage) -> Caught:
    """A database that loses a row on its way in: the commit point counts; without it the tally does."""

    def land(remove: tuple[str, ...]) -> tuple[Verdict, Loader]:
        with stage.site("twin_count") as site:
            site.prepare()
            site.query(_EAT_A_ROW)
            for statement in remove:
                site.query(statement)
            site.send(RECORDS)
            loader = site.run(without=UNHELPED)
            return (site.compare() if loader.code == 0 else Verdict()), loader

    verdict, _ = land((DROP_GUARD,))
    # Counted, such a load is refused; narrowed down, the records end in the dead letters: set aside, not lost.
    control, counted = land(())
    return Caught(
        "rows not counted at the commit point",
        verdict.lost > 0 and control.lost == 0,
        _seen(verdict),
        f"exit code {counted.code}, {_seen(control)}",
    )


def plain_dlt(stage: Stage) -> Caught:
    """Plain dlt append of dicts in place of ours, killed after a file's commit and resumed."""
    with stage.site("twin_plain") as site:
        site.send(RECORDS)
        # Between the commit of the rows and dlt's own note of it.
        site.run(action="plain", dies_at=1, dies_on=".pending_transitions/plain")
        resumed = [site.run(action="plain") for _ in range(2)]
        ((twice,),) = site.query("select count(*) - count(distinct (partition, position)) from plain.plain")
    is_wedged = all(loader.code for loader in resumed)
    seen = "wedged: every run after it fails" if is_wedged else f"duplicate {twice}"
    return Caught("plain dlt append in place of ours", is_wedged or twice > 0, seen)


def _tampered(stage: Stage, statement: str) -> Verdict:
    with stage.site("twin_tampered") as site:
        site.send(RECORDS * 4)
        site.run()
        site.query(statement)
        return site.compare()


def _tampering(name: str, statement: str, is_caught: Callable[[Verdict], bool]) -> Callable[[Stage], Caught]:
    def run(stage: Stage) -> Caught:
        verdict = _tampered(stage, statement)
        return Caught(name, is_caught(verdict), _seen(verdict))

    run.__doc__ = f"{name}: seen by the comparison with the tally."
    return run


_ONE_ROW = "ctid = (select ctid from raw_payments.transaction_created limit 1)"
_ONE_LETTER = "ctid = (select ctid from raw_payments._dead_letters limit 1)"

lost_row = _tampering(
    "a row deleted afterwards", f"delete from raw_payments.transaction_created where {_ONE_ROW}", lambda v: v.lost == 1
)
double_row = _tampering(
    "a row copied afterwards",
    f"insert into raw_payments.transaction_created select * from raw_payments.transaction_created where {_ONE_ROW}",
    lambda v: v.duplicate == 1,
)
altered_row = _tampering(
    "an amount changed by 0.0001 afterwards",
    f"update raw_payments.transaction_created set amount = amount + 0.0001 where {_ONE_ROW}",
    lambda v: v.altered == 1,
)
altered_letter = _tampering(
    "a byte of a dead letter changed afterwards",
    f"update raw_payments._dead_letters set raw_value = raw_value || '\\x00' where {_ONE_LETTER}",
    lambda v: v.altered == 1,
)

"""Postgres goes away, cuts connections, runs full, is locked, runs out of time: the loader comes back and adds up."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import psycopg2

from orchestration.services.postgres_place import system_account
from tests.prove.outcome import Outcome, Plan
from tests.prove.scenarios.kills import pause
from tests.prove.stage import Loader, Site

RETRYING = {"WAREHOUSE_RETRY_SECONDS": "60"}
OTHERS = "datname = current_database() and pid <> pg_backend_pid() and application_name <> 'prove'"
RAW = "raw_payments.transaction_created"


def _repeat(outcome: Outcome, plan: Plan, name: str, disturb: Callable[[Site, Loader, Random], None]) -> Outcome:
    """Land under disturbance as often as wanted; a loader that retries must come through by itself."""
    outcome.wanted = plan.repeats
    rng = Random(f"{plan.stage.seed}/{name}")
    with plan.stage.site(name.replace("-", "_"), records_per_load=max(plan.records // 8, 1)) as site:
        site.prepare()
        while outcome.repeats < plan.repeats and plan.has_time and outcome.verdict.is_clean:
            site.send(plan.records)
            loader = site.start(**RETRYING)
            pause(loader, rng.uniform(0.02, 0.8))
            disturb(site, loader, rng)
            loader.wait()
            outcome.count(loader)
            outcome.repeats += 1
            outcome.require(loader.code == 0, f"a retrying loader gave up: {loader.result.get('message')}")
        outcome.runs += site.settle(outcome.verdict)
        outcome.verdict += site.compare()
    return outcome


def restart_postgres(plan: Plan) -> Outcome:
    """Postgres stopped in `immediate` mode during load and started again."""

    def disturb(site: Site, loader: Loader, rng: Random) -> None:
        plan.stage.postgres_stop_immediately()
        time.sleep(rng.uniform(0.0, 1.0))
        plan.stage.postgres.start()

    return _repeat(Outcome("Postgres stopped at once, started again"), plan, "pg-restart", disturb)


def cut_connections(plan: Plan) -> Outcome:
    """Every connection of the loader cut (pg_terminate_backend), again and again."""

    def disturb(site: Site, loader: Loader, rng: Random) -> None:
        for _ in range(rng.randrange(1, 4)):
            with suppress(psycopg2.Error):
                site.query(f"select pg_terminate_backend(pid) from pg_stat_activity where {OTHERS}")
            pause(loader, rng.uniform(0.0, 0.3))

    return _repeat(Outcome("connections cut"), plan, "pg-cut", disturb)


def lock_table(plan: Plan) -> Outcome:
    """The raw table, the dead letters or the ledger locked by somebody for a while."""

    def disturb(site: Site, loader: Loader, rng: Random) -> None:
        table = rng.choice([RAW, "raw_payments._dead_letters", "raw_payments._ledger", "raw_payments._dlt_loads"])
        holder = psycopg2.connect(site.database.dsn, application_name="prove")
        with holder.cursor() as cursor:
            cursor.execute(f"lock table {table} in access exclusive mode")
            pause(loader, rng.uniform(0.2, 1.5))
        holder.rollback()
        holder.close()

    return _repeat(Outcome("lock held on a table"), plan, "pg-lock", disturb)


def time_out_statements(plan: Plan) -> Outcome:
    """statement_timeout and lock_timeout strike while a table is locked."""

    def disturb(site: Site, loader: Loader, rng: Random) -> None:
        setting = rng.choice(["statement_timeout", "lock_timeout"])
        name = site.query("select current_database()")[0][0]
        site.query(f"alter database \"{name}\" set {setting} = '150ms'")
        holder = psycopg2.connect(site.database.dsn, application_name="prove", options="-c statement_timeout=0")
        holder.autocommit = True
        with holder.cursor() as cursor:
            cursor.execute("set lock_timeout = 0")
            cursor.execute("begin")
            cursor.execute(f"lock table {RAW} in access exclusive mode")
            pause(loader, rng.uniform(0.3, 1.0))
            cursor.execute("rollback")
        holder.close()
        site.query(f'alter database "{name}" reset all')

    return _repeat(Outcome("statement and lock timeouts"), plan, "pg-timeout", disturb)


def sit_out_an_outage(plan: Plan) -> Outcome:
    """Postgres down for a minute under load: the loader waits, and no good record becomes a dead letter."""
    seconds = 60.0 if plan.repeats >= 60 else float(plan.repeats)
    outcome = Outcome(f"Postgres down for {seconds:.0f} s under load")
    with plan.stage.site("outage", records_per_load=max(plan.records // 10, 1)) as site:
        site.send(plan.records)
        loader = site.start(WAREHOUSE_RETRY_SECONDS="300")
        pause(loader, 0.4)
        plan.stage.postgres_stop_immediately()
        time.sleep(seconds)
        plan.stage.postgres.start()
        loader.wait(timeout_s=120)
        outcome.count(loader)
        outcome.require(loader.code == 0, f"the loader gave up: {loader.result.get('message')}")
        outcome.notes.append(f"{loader.result.get('retries')} tries again")
        outcome.runs += site.settle(outcome.verdict)
        outcome.verdict += site.compare()
        bad = sum(tally.count("dead") for tally in site.tallies)
        ((dead,),) = site.query("select count(*) from ops.dead_letters")
        outcome.require(dead == bad, f"{dead} dead letters, the tally says {bad}")
    return outcome


@contextmanager
def _small_disk(megabytes: int) -> Iterator[tuple[Path, Callable[[int], None]] | None]:
    """A disk of that size (a tmpfs) that Postgres' user owns, and how to resize it; None where mount is refused."""
    folder = Path(tempfile.mkdtemp(prefix="warehouse-prove-disk-", dir="/var/tmp"))
    account = system_account() if os.geteuid() == 0 else None
    owner = f",uid={account.uid},gid={account.gid}" if account else ""
    mounted = False
    try:
        with suppress(OSError):
            command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700{owner}", "tmpfs", str(folder)]
            mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0

        def resize(size: int) -> None:
            subprocess.run(["mount", "-o", f"remount,size={size}m", str(folder)], check=True)

        yield (folder, resize) if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)


_RAISE_FULL = """
create function public.full_disk() returns trigger language plpgsql as $$
begin
    if (select count(*) from raw_payments.transaction_created) > 500 then
        raise exception 'could not extend file: No space left on device' using errcode = '53100';
    end if;
    return null;
end $$;
create trigger full_disk after insert on raw_payments.transaction_created
for each statement execute function public.full_disk();
"""


def fill_disk(plan: Plan) -> Outcome:
    """The disk under the raw table full (a small tmpfs as tablespace), then enlarged; and the loader's own disk."""
    outcome = Outcome("disk full")
    with plan.stage.site("disk", records_per_load=max(plan.records // 8, 1)) as site, _small_disk(2) as disk:
        site.prepare()
        if disk is None:
            outcome.notes.append("substitute: a trigger that raises 53100, mount was refused")
            site.query(_RAISE_FULL)
        else:
            site.query(f"create tablespace prove_small location '{disk[0]}'")
            site.query(f"alter table {RAW} set tablespace prove_small")
        failures = 0
        for _ in range(60):
            site.send(plan.records if failures else plan.records * 4)
            loader = site.run()
            outcome.count(loader)
            failures += loader.code != 0
            if failures == 2:
                break
        outcome.require(failures == 2, "the disk never ran full")
        outcome.require(set(outcome.refusals) == {"transient"}, f"a full disk is called {outcome.refusals}")
        if disk is None:
            site.query(f"drop trigger full_disk on {RAW}")
        else:
            outcome.notes.append("tablespace on a tmpfs of 2 MB")
            disk[1](200)
        outcome.runs += site.settle(outcome.verdict)
        with _small_disk(1) as own:
            if own is not None:
                shutil.chown(own[0], os.geteuid())
                site.send(8000)
                loader = site.run(WAREHOUSE_HOME=str(own[0]), PROVE_RECORDS_PER_LOAD="8000")
                outcome.count(loader)
                outcome.require(loader.error_class == "transient", f"the loader's full disk is {loader.error_class!r}")
                outcome.notes.append("the loader's own disk too")
                outcome.runs += site.settle(outcome.verdict)
        outcome.verdict += site.compare()
        if disk is not None:
            site.query(f"alter table {RAW} set tablespace pg_default")
            site.query("drop tablespace prove_small")
    return outcome

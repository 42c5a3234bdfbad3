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
from tests.prove.stage import OTHERS, Loader, Site

RETRY_SECONDS = 60
RAW = "raw_payments.transaction_created"


def land_disturbed(plan: Plan, outcome: Outcome, name: str, disturb: Callable[[Site, Loader, Random], None]) -> None:
    """Land under disturbance; a loader that retries must come through by itself."""
    rng = Random(f"{plan.stage.seed}/{name}")
    with plan.stage.site(name, records_per_load=max(plan.records // 4, 1)) as site:
        site.prepare()
        for _ in plan.cycles(outcome, site):
            loader = site.start(retry_seconds=RETRY_SECONDS)
            loader.pause(rng.uniform(0.02, 0.8))
            disturb(site, loader, rng)
            require_success(outcome, loader)
            outcome.repeats += 1


def require_success(outcome: Outcome, loader: Loader) -> None:
    """A loader that tries again came through."""
    loader.wait()
    outcome.count(loader)
    outcome.require(loader.code == 0, f"a retrying loader gave up: {loader.message}")


def restart_postgres(plan: Plan, outcome: Outcome) -> None:
    """Postgres stopped in `immediate` mode during load and started again."""

    def disturb(site: Site, loader: Loader, rng: Random) -> None:
        plan.stage.postgres_stop_immediately()
        time.sleep(rng.uniform(0.0, 1.0))
        plan.stage.postgres.start()

    land_disturbed(plan, outcome, "pg_restart", disturb)


def cut_connections(plan: Plan, outcome: Outcome) -> None:
    """Every connection of the loader cut (pg_terminate_backend), again and again."""

    def disturb(site: Site, loader: Loader, rng: Random) -> None:
        for _ in range(rng.randrange(1, 4)):
            site.query(f"select pg_terminate_backend(pid) from pg_stat_activity where {OTHERS}")
            loader.pause(rng.uniform(0.0, 0.3))

    land_disturbed(plan, outcome, "pg_cut", disturb)


@contextmanager
def _locked(site: Site, table: str) -> Iterator[None]:
    holder = psycopg2.connect(
        site.database.dsn, application_name="prove", options="-c statement_timeout=0 -c lock_timeout=0"
    )
    try:
        holder.cursor().execute(f"lock table {table} in access exclusive mode")
        yield
    finally:
        holder.close()


def lock_table(plan: Plan, outcome: Outcome) -> None:
    """The raw table, the dead letters or the ledger locked by somebody for a while."""

    def disturb(site: Site, loader: Loader, rng: Random) -> None:
        table = rng.choice(["transaction_created", "_dead_letters", "_ledger", "_dlt_loads"])
        with _locked(site, f"raw_payments.{table}"):
            loader.pause(rng.uniform(0.2, 1.5))

    land_disturbed(plan, outcome, "pg_lock", disturb)


def time_out_statements(plan: Plan, outcome: Outcome) -> None:
    """statement_timeout and lock_timeout strike while a table is locked."""

    def disturb(site: Site, loader: Loader, rng: Random) -> None:
        setting = rng.choice(["statement_timeout", "lock_timeout"])
        site.query(f"alter database {site.topic} set {setting} = '150ms'")
        with _locked(site, RAW):
            loader.pause(rng.uniform(0.3, 1.0))
        site.query(f"alter database {site.topic} reset all")

    land_disturbed(plan, outcome, "pg_timeout", disturb)


def sit_out_an_outage(plan: Plan, outcome: Outcome) -> None:
    """Postgres down for 60 s under load: the loader waits, and no good record becomes a dead letter."""
    with plan.stage.site("pg_outage", records_per_load=max(plan.records // 10, 1)) as site:
        site.send(plan.records)
        loader = site.start(retry_seconds=300)
        loader.pause(0.4)
        plan.stage.postgres_stop_immediately()
        time.sleep(2 if plan.short else 60)
        plan.stage.postgres.start()
        loader.wait(timeout_s=120)
        outcome.count(loader)
        outcome.require(loader.code == 0, f"the loader gave up: {loader.message}")
        outcome.notes.append(f"{loader.result.get('retries')} tries again")
        outcome.repeats += 1
        outcome.finish(site)
        bad = site.tallies[0].count("dead")
        ((dead,),) = site.query("select count(*) from ops.dead_letters")
        outcome.require(dead == bad, f"{dead} dead letters, the tally says {bad}")


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
    if (select count(*) from raw_payments.transaction_created) > 3000 then
        raise exception 'could not extend file: No space left on device' using errcode = '53100';
    end if;
    return null;
end $$;
create trigger full_disk after insert on raw_payments.transaction_created
for each statement execute function public.full_disk();
"""


def fill_disk(plan: Plan, outcome: Outcome) -> None:
    """The disk under the raw table full (a small tmpfs as tablespace), then enlarged; and the loader's own disk."""
    with plan.stage.site("disk", records_per_load=max(plan.records // 2, 1)) as site, _small_disk(1) as disk:
        site.prepare()
        if disk is None:
            outcome.notes.append("substitute: a trigger that raises 53100, mount was refused")
            site.query(_RAISE_FULL)
        else:
            site.query(f"create tablespace prove_small location '{disk[0]}'")
            site.query(f"alter table {RAW} set tablespace prove_small")
        failures = 0
        for _ in range(60):
            site.send(plan.records)
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
            outcome.notes.append("tablespace on a tmpfs of 1 MB")
            disk[1](200)
        outcome.check(site)
        with _small_disk(1) as own:
            if own is not None:
                shutil.chown(own[0], os.geteuid())
                site.send(8000)
                loader = site.run(home=own[0], records_per_load=8000)
                outcome.count(loader)
                outcome.require(loader.error_class == "transient", f"the loader's full disk is {loader.error_class!r}")
                outcome.notes.append("the loader's own disk too")
        outcome.runs += site.settle(outcome.verdict, records_per_load=8000)
        outcome.repeats += 1
        outcome.finish(site)
        if disk is not None:
            site.query(f"alter table {RAW} set tablespace pg_default")
            site.query("drop tablespace prove_small")

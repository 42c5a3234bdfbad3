"""The broker goes away, is slow, loses records, forgets the topic, gets partitions: nothing is skipped unnamed."""

import os
import signal
import time
from random import Random

from confluent_kafka import TopicPartition
from confluent_kafka.admin import (
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    ResourceType,
)

from tests.prove.outcome import Outcome, Plan
from tests.prove.scenarios.postgres import RETRY_SECONDS, land_disturbed, require_success
from tests.prove.stage import PARTITIONS, Loader, Site, wait_until
from tests.prove.tally import Tally


def restart_broker(plan: Plan, outcome: Outcome) -> None:
    """The broker stopped or killed during load, and back after a while."""
    kafka = plan.stage.kafka

    def disturb(site: Site, loader: Loader, rng: Random) -> None:
        kafka.kill() if rng.random() < 0.5 else kafka.stop()
        time.sleep(rng.uniform(0.0, 2.0))
        kafka.start()

    land_disturbed(plan, outcome, "broker", disturb)


def slow_broker(plan: Plan, outcome: Outcome) -> None:
    """The broker's process stopped for some seconds (SIGSTOP) in the middle of a read."""

    def disturb(site: Site, loader: Loader, rng: Random) -> None:
        pid = plan.stage.kafka.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(rng.uniform(1.0, 4.0))
        finally:
            os.kill(pid, signal.SIGCONT)

    land_disturbed(plan, outcome, "slow", disturb)


def lose_leaders(plan: Plan, outcome: Outcome) -> None:
    """One of the broker's disks gone while it runs: half of the partitions have no leader until it is back."""
    kafka = plan.stage.kafka
    disk = kafka.work_dir / "disk"
    with plan.stage.site("leaders", records_per_load=max(plan.records // 4, 1)) as site:
        for _ in plan.cycles(outcome, site):
            disk.rename(disk.with_name("disk.gone"))
            wait_until(lambda: _leaderless(site), "the broker to miss its disk")
            outcome.notes = [f"{_leaderless(site)} of {PARTITIONS} partitions without a leader"]
            loader = site.run()
            outcome.count(loader)
            outcome.require(loader.error_class == "transient", f"no leader is called {loader.error_class!r}")
            loader = site.start(retry_seconds=RETRY_SECONDS)
            disk.with_name("disk.gone").rename(disk)
            kafka.stop()
            kafka.start()
            require_success(outcome, loader)
            outcome.repeats += 1


def _leaderless(site: Site) -> int:
    partitions = site.stage.kafka.admin().list_topics(site.topic, timeout=15).topics[site.topic].partitions
    return sum(partition.leader < 0 for partition in partitions.values())


def _require_loss(outcome: Outcome, site: Site, *, reads_on: bool) -> None:
    """Runs fail until somebody accepts the loss by name; then they succeed."""
    loads = site.query("select count(*) from raw_payments._dlt_loads")
    for attempt in range(2):
        loader = site.run()
        outcome.count(loader)
        outcome.require(loader.error_class == "loss", f"run {attempt} with a loss ended as {loader.error_class!r}")
    if not reads_on:
        after = site.query("select count(*) from raw_payments._dlt_loads")
        outcome.require(loads == after, "rows were read before the loss was accepted")
    accepted = site.accept_losses("part of the proof")
    outcome.require(bool(accepted), "there was nothing to accept")


def _land_part(outcome: Outcome, site: Site, records: int) -> None:
    """Half of a topic read, so that positions lie in the middle of the log."""
    site.send(records)
    loader = site.run()
    outcome.count(loader)
    site.send(records)


def _finish(outcome: Outcome, site: Site) -> None:
    outcome.repeats += 1
    outcome.finish(site)
    if outcome.verdict.named_lost:
        outcome.notes.append(f"{outcome.verdict.named_lost:,} named lost, by the ledger and by the tally")


def delete_records(plan: Plan, outcome: Outcome) -> None:
    """Records deleted below and above the position (DeleteRecords): a `lost` interval, no more and no less."""
    with plan.stage.site("deleted", records_per_load=max(plan.records // 4, 1)) as site:
        _land_part(outcome, site, plan.records)
        positions = dict(site.query("select partition, max(last_position) + 1 from ops.ledger group by 1"))
        ends = site.log_ends()
        # Unread records are lost in two partitions; in a third one only read ones go, which is no loss.
        below = {0: (positions[0] + ends[0]) // 2, 1: ends[1], 2: positions[2] // 2}
        futures = plan.stage.kafka.admin().delete_records(
            [TopicPartition(site.topic, partition, offset) for partition, offset in below.items()]
        )
        for future in futures.values():
            future.result(15)
        _require_loss(outcome, site, reads_on=True)
        lost = dict(site.query("select partition, sum(lost) from ops.ledger group by 1 having sum(lost) > 0"))
        expected = {partition: below[partition] - positions[partition] for partition in (0, 1)}
        outcome.require(lost == expected, f"the ledger names {lost} lost, deleted were {expected}")
        _finish(outcome, site)


def expire_records(plan: Plan, outcome: Outcome) -> None:
    """Retention takes what nobody has read yet."""
    with plan.stage.site("retention", records_per_load=max(plan.records // 4, 1)) as site:
        _land_part(outcome, site, plan.records)
        ends = site.log_ends()
        _configure(site, {"retention.ms": "1000"})
        wait_until(lambda: site.log_starts() == ends, "retention to take everything", every_s=0.1)
        _configure(site, {"retention.ms": "-1"})
        site.send(plan.records)
        _require_loss(outcome, site, reads_on=True)
        _finish(outcome, site)


def recreate_topic(plan: Plan, outcome: Outcome) -> None:
    """The topic deleted and made anew: refused before a row is read, then accepted by name and read from its start."""
    with plan.stage.site("recreated", records_per_load=max(plan.records // 4, 1)) as site:
        site.send(plan.records)
        outcome.runs += site.settle(outcome.verdict)
        site.recreate_topic()
        site.send(plan.records * 2)
        _require_loss(outcome, site, reads_on=False)
        _finish(outcome, site)


def add_partitions(plan: Plan, outcome: Outcome) -> None:
    """Partitions added while the topic is in use: read from their start."""
    with plan.stage.site("added", records_per_load=max(plan.records // 4, 1)) as site:
        _land_part(outcome, site, plan.records)
        wanted = PARTITIONS + 3
        plan.stage.kafka.admin().create_partitions([NewPartitions(site.topic, wanted)])[site.topic].result(15)
        wait_until(lambda: len(site.log_ends()) == wanted, "the new partitions", every_s=0.05)
        # A producer learns of new partitions with its next metadata; before that it refuses to write there.
        site.producer.partitions = wanted
        site.producer.refresh()
        site.send(plan.records)
        _finish(outcome, site)


def compact_topic(plan: Plan, outcome: Outcome) -> None:
    """A compacted topic: gaps in the log raise no alarm and the rest adds up."""
    with plan.stage.site("compacted", records_per_load=max(plan.records // 4, 1)) as site:
        _configure(
            site,
            {
                "cleanup.policy": "compact",
                "min.cleanable.dirty.ratio": "0.01",
                "segment.bytes": "1048576",
                "segment.ms": "100",
            },
        )
        # A new segment is begun by the first record after the old one's time.
        for _ in range(3):
            site.producer.send(plan.records, keys=40)
            time.sleep(0.3)
        full = site.tallies[0].count()
        wait_until(lambda: sum(map(len, site.read_log().values())) < full * 0.8, "the cleaner", every_s=0.5)
        _configure(site, {"cleanup.policy": "delete"})
        time.sleep(1.0)
        log = site.read_log()
        survivors = Tally()
        for partition, records in site.tallies[0].partitions.items():
            survivors.partitions[partition] = {
                offset: sent for offset, sent in records.items() if offset in log.get(partition, ())
            }
        site.tallies = [survivors]
        outcome.notes.append(f"{full - survivors.count():,} of {full:,} compacted away before they were read")
        _finish(outcome, site)


def _configure(site: Site, settings: dict[str, str]) -> None:
    entries = [
        ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in settings.items()
    ]
    resource = ConfigResource(ResourceType.TOPIC, site.topic, incremental_configs=entries)
    for future in site.stage.kafka.admin().incremental_alter_configs([resource]).values():
        future.result(15)

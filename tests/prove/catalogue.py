"""Every scenario and twin by name, with how much of it a full run wants.

`weight` shares out the time; `repeats` and `records` are the wish of a full run, cut short by the time.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tests.prove.outcome import Caught, Outcome, Plan
from tests.prove.scenarios import api, kafka, kills, postgres, replay, twins, writers
from tests.prove.stage import Stage


@dataclass(frozen=True)
class Scenario:
    run: Callable[[Plan], Outcome]
    weight: float
    repeats: int
    records: int


@dataclass(frozen=True)
class Twin:
    run: Callable[[Stage], Caught]


SCENARIOS = {
    "kill-boundaries": Scenario(kills.kill_at_boundaries, 4.5, 82, 120),
    "kill-random": Scenario(kills.kill_at_random, 4.5, 200, 600),
    "zombies": Scenario(writers.wake_zombies, 4.0, 100, 300),
    "ten-at-once": Scenario(writers.start_ten_at_once, 0.6, 5, 1000),
    "pg-restart": Scenario(postgres.restart_postgres, 1.0, 10, 1500),
    "pg-cut": Scenario(postgres.cut_connections, 1.0, 15, 1500),
    "pg-lock": Scenario(postgres.lock_table, 1.0, 15, 1500),
    "pg-timeout": Scenario(postgres.time_out_statements, 1.0, 15, 1500),
    "pg-disk-full": Scenario(postgres.fill_disk, 1.0, 1, 1000),
    "pg-outage": Scenario(postgres.sit_out_an_outage, 1.4, 60, 3000),
    "kafka-restart": Scenario(kafka.restart_broker, 1.5, 8, 2000),
    "kafka-slow": Scenario(kafka.slow_broker, 0.8, 5, 2000),
    "kafka-deleted": Scenario(kafka.delete_records, 0.3, 1, 600),
    "kafka-retention": Scenario(kafka.expire_records, 0.4, 1, 600),
    "kafka-recreated": Scenario(kafka.recreate_topic, 0.3, 1, 600),
    "kafka-partitions": Scenario(kafka.add_partitions, 0.3, 1, 600),
    "kafka-compacted": Scenario(kafka.compact_topic, 0.5, 1, 1000),
    "api-kills": Scenario(api.kill_api_loader, 1.2, 40, 0),
    "replay": Scenario(replay.replay_dead_letters, 0.8, 3, 1600),
}

TWINS = {
    "twin-sweep": Twin(twins.without_sweep),
    "twin-fence": Twin(twins.without_fence),
    "twin-exclusion": Twin(twins.without_exclusion),
    "twin-count": Twin(twins.without_count),
    "twin-plain-dlt": Twin(twins.plain_dlt),
    "twin-lost-row": Twin(twins.lost_row),
    "twin-double-row": Twin(twins.double_row),
    "twin-altered-row": Twin(twins.altered_row),
    "twin-altered-letter": Twin(twins.altered_letter),
}

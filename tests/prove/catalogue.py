"""Every scenario and twin by name, with its full count.

`seconds` is what a full run took on two cores: it shares out the time there is, nothing more.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tests.prove.outcome import Caught, Outcome, Plan
from tests.prove.scenarios import api, canaries, kafka, kills, postgres, replay, twins, writers
from tests.prove.stage import Stage


@dataclass(frozen=True)
class Scenario:
    run: Callable[[Plan, Outcome], None]
    repeats: int
    records: int
    seconds: float


SCENARIOS = {
    "kill-boundaries": Scenario(kills.kill_at_boundaries, len(kills.BOUNDARY_CASES), 60, 160),
    "kill-random": Scenario(kills.kill_at_random, 200, 60, 160),
    "kill-disk": Scenario(kills.kill_at_the_disk, 30, 60, 50),
    "zombies": Scenario(writers.wake_zombies, 100, 60, 200),
    "ten-at-once": Scenario(writers.start_ten_at_once, 5, 500, 15),
    "pg-restart": Scenario(postgres.restart_postgres, 10, 300, 30),
    "pg-cut": Scenario(postgres.cut_connections, 15, 300, 40),
    "pg-lock": Scenario(postgres.lock_table, 15, 300, 40),
    "pg-timeout": Scenario(postgres.time_out_statements, 15, 300, 40),
    "pg-disk-full": Scenario(postgres.fill_disk, 1, 1000, 15),
    "pg-outage": Scenario(postgres.sit_out_an_outage, 1, 3000, 70),
    "kafka-restart": Scenario(kafka.restart_broker, 8, 400, 60),
    "kafka-leaders": Scenario(kafka.lose_leaders, 2, 400, 20),
    "kafka-slow": Scenario(kafka.slow_broker, 5, 400, 25),
    "kafka-deleted": Scenario(kafka.delete_records, 1, 600, 6),
    "kafka-retention": Scenario(kafka.expire_records, 1, 600, 8),
    "kafka-recreated": Scenario(kafka.recreate_topic, 1, 600, 8),
    "kafka-partitions": Scenario(kafka.add_partitions, 1, 600, 6),
    "kafka-compacted": Scenario(kafka.compact_topic, 1, 1000, 8),
    "api-kills": Scenario(api.kill_api_loader, 40, 0, 60),
    "replay": Scenario(replay.replay_dead_letters, 3, 1600, 12),
    "canaries": Scenario(canaries.follow_canaries, 1, 0, 50),
}

TWINS: dict[str, Callable[[Stage], Caught]] = {
    "twin-sweep": twins.without_sweep,
    "twin-fence": twins.without_fence,
    "twin-exclusion": twins.without_exclusion,
    "twin-count": twins.without_count,
    "twin-plain-dlt": twins.plain_dlt,
    "twin-lost-row": twins.lost_row,
    "twin-double-row": twins.double_row,
    "twin-altered-row": twins.altered_row,
    "twin-altered-letter": twins.altered_letter,
}
TWIN_SECONDS = 5.0

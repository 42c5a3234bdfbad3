"""`make prove` in small: some of each kind of destruction, and the twins that must be caught.

The whole of it, with its repeats, is `python -m tests.prove`.
"""

import time
from collections.abc import Iterator

import pytest

from tests.harness import apache_kafka
from tests.prove.catalogue import TWINS
from tests.prove.outcome import Outcome, Plan
from tests.prove.scenarios import kafka, kills, postgres, replay, writers
from tests.prove.stage import Stage, opened

SEED = 7
SHORT = {
    "kill-boundaries": (kills.kill_at_boundaries, 3, 60),
    "kill-random": (kills.kill_at_random, 4, 200),
    "zombies": (writers.wake_zombies, 1, 120),
    "ten-at-once": (writers.start_ten_at_once, 1, 200),
    "pg-restart": (postgres.restart_postgres, 1, 200),
    "kafka-deleted": (kafka.delete_records, 1, 120),
    "replay": (replay.replay_dead_letters, 1, 150),
}
SHORT_TWINS = ("twin-sweep", "twin-fence", "twin-lost-row")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    reason = apache_kafka.available()
    if reason is not None:
        pytest.skip(reason)
    with opened(SEED) as found:
        yield found


@pytest.mark.parametrize("name", SHORT)
def test_every_record_is_accounted_for(stage: Stage, name: str) -> None:
    run, repeats, records = SHORT[name]
    outcome: Outcome = run(Plan(stage, repeats, records, time.monotonic() + 8, short=True))
    assert outcome.verdict.is_clean, outcome
    assert outcome.verdict.records > 0


@pytest.mark.parametrize("name", SHORT_TWINS)
def test_a_guarantee_taken_away_is_missed(stage: Stage, name: str) -> None:
    caught = TWINS[name].run(stage)
    assert caught.is_caught, caught

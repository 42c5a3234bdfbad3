"""`make prove` in small: some of each kind of destruction, and the twins that must be caught.

The whole of it, with its repeats, is `python -m tests.prove`.
"""

import time
from collections.abc import Iterator

import pytest

from tests.harness import apache_kafka
from tests.prove.catalogue import SCENARIOS, TWINS
from tests.prove.outcome import Outcome, Plan
from tests.prove.stage import Stage, opened

SEED = 7
# Scenario -> (repeats, records)
SHORT = {
    "kill-boundaries": (3, 60),
    "kill-random": (4, 60),
    "zombies": (2, 60),
    "ten-at-once": (1, 200),
    "pg-restart": (1, 200),
    "kafka-deleted": (1, 120),
    "replay": (1, 150),
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
    repeats, records = SHORT[name]
    outcome = Outcome(repeats)
    SCENARIOS[name].run(Plan(stage, repeats, records, time.monotonic() + 60, short=True), outcome)
    assert outcome.verdict.is_clean, outcome
    assert outcome.is_reached, outcome
    assert outcome.verdict.records > 0


@pytest.mark.parametrize("name", SHORT_TWINS)
def test_a_guarantee_taken_away_is_missed(stage: Stage, name: str) -> None:
    caught = TWINS[name](stage)
    assert caught.is_caught, caught

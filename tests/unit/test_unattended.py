"""What may run unattended, and when a waiting feed is read: by a clock of the test's own."""

from dataclasses import replace

import pytest

from ingestion.errors import ConfigurationError, ErrorClass
from ingestion.feeds import IngestWhen
from ingestion.settings import Settings
from orchestration.unattended import AGAIN, ALLOWED, Backlog, Decision, Memory, Trigger, decide, is_allowed

WHEN = IngestWhen(messages=100, seconds=60)


def ask(
    waiting: int,
    now: float,
    memory: Memory | None = None,
    *,
    position: int = 0,
    is_busy: bool = False,
    last_error: ErrorClass | None = None,
    draw: float = 1.0,
) -> Decision:
    backlog = Backlog(waiting, position)
    return decide(backlog, WHEN, memory, now, is_busy=is_busy, last_error=last_error, draw=draw)


def test_nothing_runs_where_nobody_named_an_environment(clean_settings: Settings) -> None:
    assert not any(is_allowed(clean_settings, trigger) for trigger in Trigger)
    assert all(is_allowed(clean_settings.with_env(WAREHOUSE_ENVIRONMENT="production"), one) for one in Trigger)
    with pytest.raises(ConfigurationError, match="development, staging, production"):
        is_allowed(clean_settings.with_env(WAREHOUSE_ENVIRONMENT="prod"), Trigger.HOURLY)
    assert all(allowed <= set(Trigger) for allowed in ALLOWED.values())


def test_a_feed_is_read_when_enough_waits() -> None:
    assert not ask(0, 0.0).start
    assert not ask(99, 0.0).start
    assert ask(100, 0.0).start


def test_a_feed_is_read_when_something_waits_for_long_enough() -> None:
    first = ask(1, 1000.0)
    assert not first.start
    assert not ask(5, 1059.0, first.memory).start
    assert ask(5, 1060.0, first.memory).start
    # What was read meanwhile, by whomever, starts the clock again.
    assert not ask(5, 1060.0, first.memory, position=7).start


def test_a_feed_that_is_being_read_is_not_asked_for_again() -> None:
    assert not ask(10_000, 0.0, is_busy=True).start
    # Its age counts on all the while.
    memory = ask(1, 0.0, is_busy=True).memory
    assert ask(1, 60.0, memory).start


def test_a_feed_that_does_not_move_is_asked_for_less_and_less() -> None:
    memory, now, pauses = None, 0.0, []
    for _ in range(8):
        decision = ask(500, now, memory, last_error=ErrorClass.TRANSIENT)
        assert decision.start
        memory = decision.memory
        assert not ask(500, memory.not_before - 1, memory, last_error=ErrorClass.TRANSIENT).start
        pauses.append(memory.not_before - now)
        now = memory.not_before
    assert pauses == sorted(pauses)
    assert pauses[0] == AGAIN.base_s
    assert pauses[-1] == AGAIN.cap_s
    # Full jitter: many feeds of one broker do not come back at the same moment.
    assert ask(500, 0.0, draw=0.25).memory.not_before == AGAIN.base_s / 4


@pytest.mark.parametrize("error", sorted(ErrorClass))
def test_only_what_can_pass_later_is_asked_for_again(error: ErrorClass) -> None:
    memory = replace(ask(500, 0.0).memory, not_before=0.0)
    again = ask(500, 10.0, memory, last_error=error)
    assert again.start is (error in (ErrorClass.TRANSIENT, ErrorClass.BUSY))
    # Once somebody has read on, what failed before says nothing.
    assert ask(500, 10.0, memory, position=3, last_error=error).start

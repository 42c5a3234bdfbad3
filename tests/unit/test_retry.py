"""Trying again after an outage, on a clock of the test's own: growing delays with full jitter, bounded three ways."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from ingestion.errors import (
    AuthenticationError,
    ConfigurationError,
    DataError,
    FeedBusyError,
    RefusedDataError,
    SourceLossError,
    TransientError,
    WarehouseError,
)
from ingestion.retry import RetryPolicy, policy_of, retrying
from ingestion.settings import Settings


@dataclass
class Clock:
    """Time that passes only when somebody sleeps or an action takes its time."""

    now: float = 0.0
    sleeps: list[float] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)
    draws: Callable[[float, float], float] = lambda low, high: high

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds

    def draw(self, low: float, high: float) -> float:
        assert low == 0.0, "full jitter begins at zero"
        self.bounds.append(high)
        return self.draws(low, high)

    def run(self, action: Callable[[], object], policy: RetryPolicy) -> object:
        return retrying(action, policy, sleep=self.sleep, clock=lambda: self.now, draw=self.draw)


def failing(times: int, clock: Clock, takes: float = 0.0, retry_after: float | None = None) -> Callable[[], str]:
    """An action that fails so often, each try taking some seconds."""
    tries = iter(range(1, times + 1))

    def act() -> str:
        clock.now += takes
        if next(tries, None) is not None:
            raise TransientError("away", retry_after_s=retry_after)
        return "done"

    return act


POLICY = RetryPolicy(base_s=0.5, cap_s=30.0, total_s=1_000.0)


def test_delays_grow_twofold_up_to_the_cap() -> None:
    clock = Clock()
    assert clock.run(failing(9, clock), POLICY) == "done"
    assert clock.bounds == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert clock.sleeps == clock.bounds
    # Twin: with no cap the delays go on growing.
    uncapped = Clock()
    uncapped.run(failing(9, uncapped), replace(POLICY, cap_s=1e9))
    assert uncapped.bounds[-3:] == [32, 64, 128]


def test_many_tries_do_not_overflow() -> None:
    clock = Clock(draws=lambda low, high: 0.0)
    assert clock.run(failing(5_000, clock), POLICY) == "done"
    assert set(clock.bounds[10:]) == {30.0}


def test_the_delay_is_drawn_from_zero_to_its_bound() -> None:
    """Full jitter: runners that failed together do not come back together."""
    drawn = random.Random(7)
    clocks = [Clock(draws=drawn.uniform) for _ in range(200)]
    for clock in clocks:
        clock.run(failing(4, clock), POLICY)
    fourth = [clock.sleeps[3] for clock in clocks]
    assert all(0 <= delay <= 4 for delay in fourth)
    assert min(fourth) < 0.4
    assert max(fourth) > 3.6
    # Twin: without jitter all of them wait the same.
    plain = [Clock() for _ in range(20)]
    for clock in plain:
        clock.run(failing(4, clock), POLICY)
    assert len({clock.sleeps[3] for clock in plain}) == 1


@pytest.mark.parametrize(("takes", "tries"), [(0.0, 5), (20.0, 3), (55.0, 2), (59.0, 1)])
def test_all_tries_together_are_bounded(takes: float, tries: int) -> None:
    """Time in tries counts as well as time between them; no wait begins that would end too late."""
    policy = RetryPolicy(base_s=4.0, cap_s=30.0, total_s=60.0)
    clock = Clock()
    with pytest.raises(TransientError):
        clock.run(failing(1_000, clock, takes), policy)
    assert len(clock.sleeps) + 1 == tries
    assert clock.now <= policy.total_s + takes
    # Twin: the bound is what ends it.
    longer = Clock()
    assert longer.run(failing(20, longer, takes), replace(policy, total_s=1e9)) == "done"


def test_no_total_is_one_try() -> None:
    clock = Clock()
    with pytest.raises(TransientError):
        clock.run(failing(1, clock), RetryPolicy(total_s=0.0))
    assert clock.sleeps == []


def test_the_number_of_tries_can_be_bounded() -> None:
    clock = Clock()
    with pytest.raises(TransientError):
        clock.run(failing(100, clock), replace(POLICY, tries=6))
    assert len(clock.sleeps) == 5
    assert clock.run(failing(5, clock), replace(POLICY, tries=6)) == "done"


def test_who_says_when_to_come_back_is_not_asked_earlier() -> None:
    clock = Clock()
    assert clock.run(failing(2, clock, retry_after=45.0), POLICY) == "done"
    assert clock.sleeps == [45.0, 45.0], "beyond the cap: the server knows best"
    # Nor later than the jitter would have it, where that is longer.
    clock = Clock()
    clock.run(failing(4, clock, retry_after=1.0), POLICY)
    assert clock.sleeps == [1.0, 1.0, 2.0, 4.0]
    # Twin: unasked, the first wait is short.
    clock = Clock()
    clock.run(failing(1, clock), POLICY)
    assert clock.sleeps == [0.5]


def test_who_asks_for_more_patience_than_there_is_gets_none() -> None:
    clock = Clock()
    with pytest.raises(TransientError) as caught:
        clock.run(failing(9, clock, retry_after=3_600.0), POLICY)
    assert (caught.value.retry_after_s, clock.sleeps) == (3_600.0, [])


@pytest.mark.parametrize(
    "error",
    [
        AuthenticationError("no"),
        ConfigurationError("no"),
        DataError("no"),
        FeedBusyError("no"),
        RefusedDataError("no"),
        SourceLossError("no"),
        WarehouseError("no"),
        ValueError("no"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_only_an_outage_is_tried_again(error: BaseException) -> None:
    clock = Clock()
    calls = []

    def act() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        clock.run(act, POLICY)
    assert (len(calls), clock.sleeps) == (1, [])


def test_who_watches_is_told_of_each_wait() -> None:
    clock = Clock()
    told: list[tuple[str, float]] = []
    retrying(
        failing(2, clock),
        POLICY,
        on_retry=lambda error, delay: told.append((error.message, delay)),
        sleep=clock.sleep,
        clock=lambda: clock.now,
        draw=clock.draw,
    )
    assert told == [("away", 0.5), ("away", 1.0)]


def test_the_setting_bounds_the_total(clean_settings: Settings) -> None:
    assert policy_of(clean_settings).total_s == 60.0
    assert policy_of(clean_settings.with_env(WAREHOUSE_RETRY_SECONDS="7.5")).total_s == 7.5
    for text in ("-1", "soon", "inf", "nan"):
        with pytest.raises(ConfigurationError, match="WAREHOUSE_RETRY_SECONDS"):
            policy_of(clean_settings.with_env(WAREHOUSE_RETRY_SECONDS=text))

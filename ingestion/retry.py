"""Trying again after an outage: exponential backoff with full jitter, bounded in delay and in total.

Only transient errors are tried again. A configuration, a refusal or bad data stays what it is however often one asks.
Full jitter (a delay drawn from zero up to the backoff) keeps many runners from coming back at the same moment.
"""

import datetime as dt
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeVar

from ingestion.errors import TransientError
from ingestion.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """Seconds: the first delay's bound, the largest delay, and how long all tries together may go on; how many."""

    base_s: float = 0.5
    cap_s: float = 30.0
    total_s: float = 60.0
    tries: int | None = None

    def delay(self, attempt: int, retry_after_s: float | None, draw: Callable[[float, float], float]) -> float:
        """The wait before try number `attempt` + 1 (attempts count from 1).

        A server that said when to come back (Retry-After) is not asked earlier, whatever the cap.
        """
        drawn = draw(0.0, min(self.cap_s, self.base_s * 2.0 ** min(attempt - 1, 60)))
        return max(drawn, retry_after_s or 0.0)


def policy_of(settings: Settings) -> RetryPolicy:
    """WAREHOUSE_RETRY_SECONDS bounds the total; 0 means one try."""
    return RetryPolicy(total_s=settings.number("WAREHOUSE_RETRY_SECONDS", RetryPolicy.total_s))


def retrying(
    action: Callable[[], T],
    policy: RetryPolicy,
    *,
    on_retry: Callable[[TransientError, float], None] = lambda error, delay: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    draw: Callable[[float, float], float] = random.uniform,
) -> T:
    """The action's result; a `TransientError` is tried again until the policy's total or tries are used up.

    Raises:
        TransientError: the last one, once the next wait would pass the total.
        Any other error of the action, at once.
    """
    started = clock()
    attempt = 0
    while True:
        attempt += 1
        try:
            return action()
        except TransientError as error:
            delay = policy.delay(attempt, error.retry_after_s, draw)
            if attempt == policy.tries or clock() - started + delay > policy.total_s:
                raise
            on_retry(error, delay)
            sleep(delay)


def parse_retry_after(text: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110: seconds, or a date); None for none and for what is neither."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max((when.replace(tzinfo=when.tzinfo or dt.UTC) - dt.datetime.now(dt.UTC)).total_seconds(), 0)

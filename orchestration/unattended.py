"""What runs without being asked, and when: which triggers an environment turns on, and when a waiting feed is read.

    WAREHOUSE_ENVIRONMENT -> ALLOWED -> schedules and sensors that are on where nobody has said otherwise in the UI
    lag of a feed + its `ingest_when` + what was asked before -> `decide` -> ask for a run, or why not

No Dagster and no server here: the sensor (orchestration/triggers.py) supplies what is known, tests their own clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from ingestion.errors import ConfigurationError, ErrorClass
from ingestion.feeds import IngestWhen
from ingestion.retry import RetryPolicy
from ingestion.settings import Settings

ENVIRONMENT_SETTING = "WAREHOUSE_ENVIRONMENT"


class Trigger(StrEnum):
    """What can start a run by itself. Its value is the name of the schedule or sensor."""

    HOURLY = "hourly"
    DAILY = "daily"
    NIGHTLY = "nightly"
    BACKLOG = "backlog"
    MODELS = "models"
    WATCH = "watch"


# To open the web interface on a laptop must not start to read a production topic.
ALLOWED: Mapping[str, frozenset[Trigger]] = {
    "development": frozenset(),
    # A rehearsal: as in production, less the hours of full tests.
    "staging": frozenset(Trigger) - {Trigger.NIGHTLY},
    "production": frozenset(Trigger),
}

# Classes for which the same attempt can succeed later. Data and configuration stay wrong until somebody changes them.
RETRYABLE = frozenset({ErrorClass.TRANSIENT, ErrorClass.BUSY})

# A feed that was asked for and did not move waits so long, drawn anew each time, before it is asked for again.
AGAIN = RetryPolicy(base_s=60.0, cap_s=3600.0)


def is_allowed(settings: Settings, trigger: Trigger) -> bool:
    """Whether this environment runs it unattended.

    Raises:
        ConfigurationError: WAREHOUSE_ENVIRONMENT names none there is.
    """
    name = settings.get(ENVIRONMENT_SETTING) or "development"
    if name not in ALLOWED:
        raise ConfigurationError(
            f"{ENVIRONMENT_SETTING} is {name!r}; there are {', '.join(ALLOWED)}.", hint="See .env.example."
        )
    return trigger in ALLOWED[name]


@dataclass(frozen=True)
class Backlog:
    """What waits at a feed's source, and the position it was read to: as long as that stays, nothing was read since.

    `read_at`: when a run last read all there was, in epoch seconds.
    """

    waiting: int
    position: int
    read_at: float | None = None


@dataclass(frozen=True)
class Memory:
    """What the sensor remembers of a feed. Times are epoch seconds; `asked` counts runs asked for at this position."""

    position: int
    waiting_since: float | None = None
    asked: int = 0
    not_before: float = 0.0


@dataclass(frozen=True)
class Decision:
    """Whether to start ingestion, and what to remember; `reason` says why or why not, in words."""

    start: bool
    reason: str
    memory: Memory


def decide(
    backlog: Backlog,
    when: IngestWhen,
    memory: Memory | None,
    now: float,
    *,
    is_busy: bool,
    last_error: ErrorClass | None,
    draw: float,
) -> Decision:
    """Whether a feed is to be read now.

    Args:
        is_busy: a run of the feed is queued or running.
        last_error: the class of the feed's last run, where that failed.
        draw: a number from 0 to 1, for the jitter of asking again.
    """
    if memory is None or memory.position != backlog.position:
        memory = Memory(backlog.position)
    if not backlog.waiting:
        return Decision(False, "nothing waits", Memory(backlog.position))
    since = now if memory.waiting_since is None else memory.waiting_since
    memory = Memory(memory.position, since, memory.asked, memory.not_before)
    if is_busy:
        return Decision(False, f"{backlog.waiting:,} wait; a run of it is queued or running", memory)
    if backlog.waiting < when.messages and now - since < when.seconds:
        return Decision(False, f"{backlog.waiting:,} wait, for {now - since:.0f} s", memory)
    if memory.asked and last_error is not None and last_error not in RETRYABLE:
        return Decision(
            False, f"{backlog.waiting:,} wait; the last run failed ({last_error}) and trying again cannot help", memory
        )
    if now < memory.not_before:
        return Decision(
            False, f"{backlog.waiting:,} wait; asked before, again in {memory.not_before - now:.0f} s", memory
        )
    pause = AGAIN.delay(memory.asked + 1, None, lambda low, high: low + draw * (high - low))
    # Its age counts anew: what comes while this run reads is the next one's.
    asked = Memory(memory.position, None, memory.asked + 1, now + pause)
    return Decision(True, f"{backlog.waiting:,} wait", asked)

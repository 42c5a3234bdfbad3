"""What the sample feeds share: delivery times, timestamps as text, identifiers, and the deliveries still to come.

Times are whole microseconds since 1970. Draws are made from `Random.random()` and `getrandbits` only: Python promises
to keep their results from version to version, those of the other methods it does not.
"""

import heapq
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Generic, TypeVar

from orchestration.sample.model import SampleSpec

T = TypeVar("T")
Draw = Callable[[], float]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NAIVE_EPOCH = datetime(1970, 1, 1)

# Zones some senders write their local time in; the others write Z.
OFFSETS = (("+02:00", 7200), ("-05:00", -18000), ("+09:00", 32400), ("+05:30", 19800), ("-03:30", -12600))


def to_micros(moment: datetime) -> int:
    """Microseconds since 1970 of a moment with a zone, exact."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def delivery_times(spec: SampleSpec, random: Draw) -> Iterator[int]:
    """When each message is delivered: evenly spaced slots, a random moment in each, so never backwards."""
    start = to_micros(spec.start)
    slot_nanos = round(1_000_000_000 / spec.events_per_second)
    for slot in range(spec.records):
        yield start + (slot * slot_nanos + int(random() * slot_nanos)) // 1000


def render_time(micros: int, draw: float) -> str:
    """RFC 3339 with six decimals: nine in ten as Z, the others (by `draw` in [0, 1)) in a local zone."""
    if draw >= 0.1:
        return (_NAIVE_EPOCH + timedelta(microseconds=micros)).isoformat(timespec="microseconds") + "Z"
    suffix, seconds = OFFSETS[int(draw * 10 * len(OFFSETS))]
    local = _NAIVE_EPOCH + timedelta(microseconds=micros, seconds=seconds)
    return local.isoformat(timespec="microseconds") + suffix


def to_uuid4(rng: Random) -> str:
    """A random UUID, version 4, as text."""
    digits = f"{rng.getrandbits(128):032x}"
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def skewed_index(draw: float, count: int) -> int:
    """An index in [0, count): the low ones are busy, most of the others are seldom seen."""
    return int(count * (draw * draw))


class Deliveries(Generic[T]):
    """Messages that come later in the stream, by slot.

    Delays count messages, not seconds: whatever the rate, at most a few thousand are waiting.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, T]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, due_slot: int, item: T) -> None:
        self._count += 1
        heapq.heappush(self._waiting, (due_slot, self._count, item))

    def due(self, slot: int) -> T | None:
        """The earliest one whose slot has come, if any; call again at the next slot for the others."""
        if self._waiting and self._waiting[0][0] <= slot:
            return heapq.heappop(self._waiting)[2]
        return None

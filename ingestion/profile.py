"""Where the time of a landing goes: two threads, each with stages that add up to its wall time.

reading      consume, decode, write, wait (for the load before), other
committing   copy, commit (what dlt and the guard do besides), idle
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

READING = ("consume", "decode", "write", "wait", "other")
COMMITTING = ("copy", "commit", "idle")
# What to look at when a stage is the largest one.
ADVICE = {
    "consume": "the broker or the network to it is the bottleneck",
    "decode": "decoding takes most of the time: Python's share, one core",
    "write": "writing the files takes most of the time: the local disk, or Python's share",
    "copy": "Postgres takes most of the time to copy: its processor, its disk, or indexes on the raw table",
    "commit": "the fixed cost of loads weighs most: there is little to load, or loads are small",
    "other": "the fixed cost of a run weighs most: connections, positions, sweep",
}


@dataclass
class Profile:
    """Seconds by stage, of one landing."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    wall: float = 0.0

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds of a stage. Each stage belongs to one thread."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what the block takes."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - started)

    def finish(self) -> None:
        """The landing is over: what no stage took is other, or idle."""
        self.wall = time.monotonic() - self.started
        for stages, rest in ((READING, "other"), (COMMITTING, "idle")):
            self.seconds[rest] = self.wall - sum(self.seconds.get(stage, 0.0) for stage in stages if stage != rest)

    @property
    def bottleneck(self) -> str:
        """The largest stage in which a thread does something."""
        return max(ADVICE, key=lambda stage: self.seconds.get(stage, 0.0))

"""What a scenario or a twin came to, and the shape of the report."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.prove.stage import Loader, Stage
from tests.prove.verify import Verdict


@dataclass
class Outcome:
    """One line of the report. `done` of `wanted` repeats fitted the time."""

    name: str
    runs: int = 0
    kills: int = 0
    repeats: int = 0
    wanted: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    refusals: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, loader: Loader) -> None:
        """Count an ended run: how it ended, by the class the warehouse gave it."""
        self.runs += 1
        if loader.error_class:
            self.refusals[loader.error_class] = self.refusals.get(loader.error_class, 0) + 1
            if loader.error_class.startswith(("unnamed", "internal")):
                self.verdict.note(f"a failure without a name: {loader.error_class}: {loader.result['message'][:300]}")

    def require(self, condition: bool, text: str) -> None:
        """A promise of the scenario's own, beside the tally."""
        if not condition:
            self.verdict.note(text)

    def document(self) -> dict[str, Any]:
        return asdict(self) | {"is_clean": self.verdict.is_clean}


@dataclass
class Caught:
    """A twin: a guarantee taken away, and what the checks saw. `control`: with it in place they saw nothing."""

    name: str
    is_caught: bool
    seen: str
    control: str = ""

    def document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Plan:
    """How much of a scenario: repeats wanted, records a round, and the second it has to be over."""

    stage: Stage
    repeats: int
    records: int
    deadline: float
    short: bool = False

    @property
    def has_time(self) -> bool:
        return time.monotonic() < self.deadline

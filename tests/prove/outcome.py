"""What a scenario or a twin came to, and the cycle every repeat goes through."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.prove.stage import Loader, Site, Stage
from tests.prove.verify import Verdict


@dataclass
class Outcome:
    """One line of the report: `repeats` of `wanted` were reached."""

    wanted: int = 1
    runs: int = 0
    kills: int = 0
    repeats: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    refusals: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_reached(self) -> bool:
        return self.repeats >= self.wanted

    def count(self, loader: Loader) -> None:
        """Count an ended run: how it ended, by the class the warehouse gave it."""
        self.runs += 1
        if loader.error_class:
            self.refusals[loader.error_class] = self.refusals.get(loader.error_class, 0) + 1
            if loader.error_class.startswith(("unnamed", "internal")):
                self.verdict.note(f"a failure without a name: {loader.error_class}: {loader.message[:300]}")

    def require(self, condition: bool, text: str) -> None:
        """A promise of the scenario's own, beside the tally."""
        if not condition:
            self.verdict.note(text)

    def check(self, site: Site) -> bool:
        """The end of a cycle: every record accounted for, once what is left has been landed. Whether all is well."""
        seen = site.compare_new()
        for until_idle in (False, True):
            # What is missing now, the next run lands; what stands twice or is altered, no run can mend.
            if seen.is_clean or seen.duplicate or seen.altered:
                break
            self.runs += site.settle(self.verdict, until_idle=until_idle)
            seen = site.compare_new()
        for problem in seen.problems:
            self.verdict.note(problem)
        return self.verdict.is_clean

    def finish(self, site: Site) -> None:
        """The end of a site: the whole of it compared from the beginning."""
        if self.verdict.is_clean:
            self.runs += site.settle(self.verdict)
        self.verdict += site.compare()

    def document(self) -> dict[str, Any]:
        return asdict(self) | {"is_clean": self.verdict.is_clean, "is_reached": self.is_reached}


@dataclass
class Caught:
    """A twin: a guarantee taken away, and what the checks saw. `control`: with it in place they saw nothing."""

    what: str
    is_caught: bool
    seen: str
    control: str = ""

    def document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Plan:
    """How much of a scenario: repeats wanted, records a repeat, and the second it has to be over."""

    stage: Stage
    repeats: int
    records: int
    deadline: float
    short: bool = False

    @property
    def has_time(self) -> bool:
        return time.monotonic() < self.deadline

    def cycles(self, outcome: Outcome, site: Site, most: int = 1_000_000) -> Iterator[None]:
        """New records, what the caller does with them, everything accounted for; as long as repeats are wanted."""
        for _ in range(most):
            if outcome.repeats >= self.repeats or not self.has_time or not outcome.verdict.is_clean:
                break
            site.send(self.records)
            yield
            outcome.check(site)
        outcome.finish(site)

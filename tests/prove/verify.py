"""The check at the end of every scenario: the database against the producer's tally, and nothing else.

Every record of the tally is in the raw table with the same content, or in the dead letters with the same bytes, or a
counted tombstone, or named in a `lost` interval; once; and per partition
landed + dead + tombstones + control + lost = end - start. The decoding here shares no code with the product's.
"""

import json
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from tests.prove.tally import Sent, Tally

Query = Callable[..., list[tuple[Any, ...]]]
# stream, partition, offset
Place = tuple[Any, ...]

FIELDS = ("transaction_id", "amount", "currency", "user_id", "merchant_id", "country", "created_at", "status")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SHOWN = 5


@dataclass
class Verdict:
    """What is wrong. All zero and no problem: every record is accounted for."""

    records: int = 0
    lost: int = 0
    duplicate: int = 0
    altered: int = 0
    named_lost: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.duplicate or self.altered or self.problems)

    def note(self, text: str) -> None:
        if len(self.problems) < SHOWN and text not in self.problems:
            self.problems.append(text)

    def __iadd__(self, other: "Verdict") -> "Verdict":
        self.records += other.records
        self.lost += other.lost
        self.duplicate += other.duplicate
        self.altered += other.altered
        self.named_lost += other.named_lost
        for problem in other.problems:
            self.note(problem)
        return self


class Comparison:
    """The database against the tallies of a topic's incarnations.

    Asked again, it reads only the loads committed since and remembers the others: load ids grow. What somebody does to
    an older load in between, only a new comparison sees.
    """

    def __init__(self, query: Query, *, committed_only: bool = True) -> None:
        """`committed_only`: False reads as somebody who knows nothing of commits would."""
        self._query = query
        self._loads = (
            "raw_payments._dlt_loads"
            if committed_only
            else "(select load_id from raw_payments._dlt_loads union "
            "select load_id from raw_payments._loads_begun) as begun"
        )
        self._mark = ""
        self._intervals: list[tuple[Any, ...]] = []
        self._rows: dict[Place, tuple[Any, ...]] = {}
        self._letters: dict[Place, tuple[Any, ...]] = {}
        # How often a coordinate stands: in all, and among the dead letters.
        self._times: Counter[Place] = Counter()
        self._letter_times: Counter[Place] = Counter()
        self._good: set[Place] = set()

    def verdict(
        self, tallies: Sequence[Tally], ends: Sequence[Mapping[int, int]], *, leftovers: bool = True
    ) -> Verdict:
        """What is wrong now.

        Args:
            tallies: oldest first.
            ends: per tally, partition -> end of the log, asked from the broker.
            leftovers: also ask that nothing uncommitted lies about (the last run has swept).
        """
        if is_made := self._is_made():
            self._read()
        verdict = Verdict(records=sum(tally.count() for tally in tallies))
        streams = sorted({row[0] for row in self._intervals})
        if len(streams) != len([tally for tally in tallies if tally.count()]):
            verdict.note(f"{len(streams)} streams in the ledger, {len(tallies)} incarnations of the topic")
        for place, times in self._times.items():
            # A replayed letter is kept as evidence; its record stands in the raw table.
            times = max(times, self._letter_times[place])
            if times > 1:
                verdict.duplicate += times - 1
                verdict.note(f"stream, partition, offset {place} stands {times} times")
        for stream, tally, log_end in zip(streams, tallies, ends, strict=False):
            self._compare_stream(verdict, stream, tally, log_end)
        if leftovers and is_made:
            self._look_for_leftovers(verdict)
        return verdict

    def _is_made(self) -> bool:
        """Whether the first run lived long enough to make the tables."""
        ((missing,),) = self._query(
            "select count(*) from unnest(%s) as t (name) where to_regclass('raw_payments.' || name) is null",
            ["transaction_created", "_dead_letters", "_ledger", "_dlt_loads"],
        )
        return not missing

    def _read(self) -> None:
        # Asked once: a dead loader's last statement may commit between two of the questions below.
        ((loads,),) = self._query(f"select array_agg(load_id) from {self._loads} where load_id > %s", self._mark)
        loads = loads or []
        self._mark = max(loads, default=self._mark)
        rows = self._query(
            f"select _stream_id, _kafka_partition, _kafka_offset, {', '.join(FIELDS)}, _extra, _kafka_timestamp, "
            f"_kafka_key, _kafka_headers from raw_payments.transaction_created where _dlt_load_id = any(%s)",
            loads,
        )
        letters = self._query(
            "select _stream_id, _kafka_partition, _kafka_offset, raw_value, raw_key, headers, source_time, reason, "
            "coalesce(replay_load_id in (select load_id from raw_payments._dlt_loads), false) "
            "from raw_payments._dead_letters where _dlt_load_id = any(%s)",
            loads,
        )
        intervals = self._query(
            "select stream_id, partition, first_position, last_position, landed, dead, tombstones, control, lost "
            "from raw_payments._ledger where _dlt_load_id = any(%s)",
            loads,
        )
        self._intervals += intervals
        self._rows |= {row[:3]: row[3:] for row in rows}
        self._letters |= {row[:3]: row[3:] for row in letters}
        self._times.update(row[:3] for row in [*rows, *(row for row in letters if not row[-1])])
        self._letter_times.update(row[:3] for row in letters)

    def _look_for_leftovers(self, verdict: Verdict) -> None:
        for table in ("transaction_created", "_dead_letters", "_ledger"):
            ((left,),) = self._query(
                f"select count(*) from raw_payments.{table} where _dlt_load_id not in "
                "(select load_id from raw_payments._dlt_loads)"
            )
            if left:
                verdict.note(f"{left} uncommitted rows in {table} after the last sweep")
        ((empty,),) = self._query(
            "select count(*) from raw_payments._dlt_loads where load_id not in "
            "(select _dlt_load_id from raw_payments._ledger)"
        )
        if empty:
            verdict.note(f"{empty} committed loads without an interval in the ledger")

    def _compare_stream(self, verdict: Verdict, stream: int, tally: Tally, log_end: Mapping[int, int]) -> None:
        named: set[tuple[int, int]] = set()
        sums: dict[int, list[int]] = {}
        reached: dict[int, int] = {}
        own = [row[1:] for row in self._intervals if row[0] == stream]
        for partition, first, last, *figures in sorted(own, key=lambda row: (row[0], row[1] is not None, row[1])):
            sums[partition] = [a + b for a, b in zip(sums.get(partition, [0] * 5), figures, strict=True)]
            if first is None:  # a replay: it lands what was dead, and reads nothing
                continue
            if first != reached.get(partition, 0):
                verdict.note(
                    f"partition {partition}: an interval begins at {first}, not at {reached.get(partition, 0)}"
                )
            reached[partition] = last + 1
            if figures[4]:
                named.update((partition, offset) for offset in range(first, last + 1))
        for partition, end in log_end.items():
            if reached.get(partition, 0) != end or sum(sums.get(partition, [])) != end:
                verdict.note(
                    f"partition {partition}: the log ends at {end}, the ledger at {reached.get(partition, 0)} "
                    f"with {sum(sums.get(partition, []))} accounted for"
                )
        tombstones: Counter[int] = Counter()
        for partition, records in tally.partitions.items():
            for offset, sent in records.items():
                place = (stream, partition, offset)
                if sent.expected == "tombstone" and (partition, offset) not in named:
                    tombstones[partition] += 1
                if place not in self._good:
                    self._compare_record(verdict, place, sent, is_named_lost=(partition, offset) in named)
        for place in [*self._rows, *self._letters]:
            if place[0] == stream and place[2] not in tally.partitions.get(place[1], {}):
                verdict.altered += 1
                verdict.note(f"{place} was never offered (aborted, or of another topic)")
        landed = Counter(place[:2] for place in self._rows)
        dead = Counter(place[:2] for place, letter in self._letters.items() if not letter[-1])
        for partition, figures in sums.items():
            if figures[2] != tombstones[partition]:
                verdict.lost += max(tombstones[partition] - figures[2], 0)
                verdict.note(f"partition {partition}: {tombstones[partition]} tombstones sent, {figures[2]} counted")
            counts = [landed[stream, partition], dead[stream, partition]]
            if figures[:2] != counts:
                verdict.note(
                    f"partition {partition}: the ledger says {figures[:2]} landed and dead, the tables {counts}"
                )

    def _compare_record(self, verdict: Verdict, place: Place, sent: Sent, *, is_named_lost: bool) -> None:
        row, letter = self._rows.get(place), self._letters.get(place)
        if is_named_lost:
            verdict.named_lost += 1
            if row or letter:
                verdict.note(f"{place} is named lost and is there")
        elif sent.expected == "tombstone":
            if row or letter:
                verdict.altered += 1
                verdict.note(f"{place} is a tombstone and is stored")
        elif row is None and letter is None:
            verdict.lost += 1
            verdict.note(f"{place} ({sent.defect or 'ordinary'}) is nowhere")
        else:
            fault = _fault(sent, row, letter)
            if fault:
                verdict.altered += 1
                verdict.note(f"{place} ({sent.defect or 'ordinary'}): {fault}")
            else:
                self._good.add(place)


def _fault(sent: Sent, row: tuple[Any, ...] | None, letter: tuple[Any, ...] | None) -> str:
    """What differs between a record as sent and as stored; empty when nothing does."""
    if letter is not None:
        raw_value, raw_key, headers, source_time, reason, is_replayed = letter
        if is_replayed and row is None:
            return "replayed, and its row is nowhere"
        if is_replayed and bytes(raw_value) == sent.value:
            return _fault(sent, row, None)
        if sent.expected != "dead":
            return f"dead-lettered as {reason}, was to be {sent.expected}"
        if bytes(raw_value) != sent.value:
            return "its bytes differ"
        return _envelope_fault(sent, raw_key, headers, source_time)
    assert row is not None
    if sent.expected != "landed":
        return f"landed, was to be {sent.expected}"
    *cells, extra, timestamp, key, headers = row
    document = json.loads(sent.value or b"", parse_float=Decimal, parse_int=Decimal)
    for name, cell in zip(FIELDS, cells, strict=True):
        if not _same(name, document.pop(name), cell):
            return f"{name} differs"
    if (extra or {}) != json.loads(json.dumps(document, default=float)):
        return "its undeclared fields differ"
    return _envelope_fault(sent, key, headers, timestamp)


def _same(name: str, sent: Any, stored: Any) -> bool:
    if name == "transaction_id":
        return uuid.UUID(sent) == uuid.UUID(str(stored))
    if name == "amount":
        return bool(Decimal(sent) == stored)
    if name == "created_at":
        moment = datetime.fromisoformat(sent)
        return bool(abs(moment - stored) <= timedelta(microseconds=1))
    return bool(sent == stored)


def _envelope_fault(sent: Sent, key: Any, headers: Any, timestamp: Any) -> str:
    if (None if key is None else bytes(key)) != sent.key:
        return "its key differs"
    if [(name, text) for name, text in headers or []] != [(name, value.decode()) for name, value in sent.headers]:
        return "its headers differ"
    if (timestamp - EPOCH) // timedelta(milliseconds=1) != sent.timestamp_ms:
        return "its time differs"
    return ""

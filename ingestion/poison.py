"""Finding the record that makes loads die, so that it can be set aside and the rest go on.

Two ways a record can do that. The database refuses it (a constraint nobody declared): the load is halved until one
record is left. Or it makes the process die: after some loads died while reading the same batch, each record is noted
before it is decoded, and the one noted when the process died again is the one.

An outage proves nothing about a record: loads it ended are excused, and a load that died while it was being copied
does not count.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import psycopg2
from psycopg2 import sql

from ingestion.contract import Rejection
from ingestion.errors import Reason
from ingestion.feeds import FeedSpec
from ingestion.ledger import Connection, Stream

# Loads that died on one batch before its records are noted one by one; noting costs a round trip each.
DEATHS_BEFORE_NOTING = 3
# Deaths on one noted record that make it poison: one may be an operator's kill.
DEATHS_OF_ONE_RECORD = 2
NOTED_RECORDS_PER_LOAD = 1_000

KILLED = Rejection(Reason.POISON, "$", f"the loader died {DEATHS_OF_ONE_RECORD} times on this record")
REFUSED = Rejection(Reason.POISON, "$", "the database refused this record; see the raw table's constraints")

Place = tuple[int, int]  # (partition, offset)


@dataclass
class Suspicion:
    """How carefully the next load reads: how many records at most, and whether each is noted first."""

    connection: Connection
    feed: FeedSpec
    usual_limit: int
    limit: int
    noting: bool = False
    # Loads died before: the next one is committed before another is read, or the deaths of the first would hide others.
    is_recovering: bool = False
    poison: dict[Place, Rejection] = field(default_factory=dict)
    _suspected_until: dict[int, int] = field(default_factory=dict)

    @classmethod
    def after(
        cls, connection: Connection, feed: FeedSpec, stream: Stream, positions: Mapping[int, int], usual_limit: int
    ) -> "Suspicion":
        """What earlier loads that died say about the batch that begins at `positions`."""
        with connection.cursor() as cursor:
            cursor.execute(
                sql.SQL(
                    "select coalesce(batch = %s, false), noted, count(*) from {begun} where feed = %s "
                    "and phase = 'reading' and load_id not in (select load_id from {loads}) group by 1, 2"
                ).format(
                    begun=sql.Identifier(feed.source, "_loads_begun"), loads=sql.Identifier(feed.source, "_dlt_loads")
                ),
                (_batch(stream, positions), feed.name),
            )
            found = cursor.fetchall()
        deaths: dict[str | None, int] = {noted: count for is_own, noted, count in found if is_own}
        suspicion = cls(connection, feed, usual_limit, usual_limit, is_recovering=bool(found))
        if sum(deaths.values()) >= DEATHS_BEFORE_NOTING:
            suspicion.noting = True
            suspicion.limit = min(usual_limit, NOTED_RECORDS_PER_LOAD)
        for noted, count in deaths.items():
            if noted is not None and count >= DEATHS_OF_ONE_RECORD:
                partition, offset = json.loads(noted)
                suspicion.poison[(partition, offset)] = KILLED
        return suspicion

    @property
    def is_careful(self) -> bool:
        """Whether each load is committed before the next one is read."""
        return self.noting or self.is_recovering or self.limit < self.usual_limit

    def settle(self) -> None:
        """Everything is read and committed: earlier deaths say nothing more."""
        if self.is_recovering:
            with self.connection.cursor() as cursor:
                cursor.execute(
                    sql.SQL("update {} set phase = 'excused' where feed = %s and phase = 'reading'").format(
                        sql.Identifier(self.feed.source, "_loads_begun")
                    ),
                    (self.feed.name,),
                )

    def note_batch(self, load_id: str, stream: Stream, positions: Mapping[int, int]) -> None:
        """A load begins to read at these positions."""
        self._update(load_id, "batch", _batch(stream, positions))

    def note_record(self, load_id: str, place: Place) -> None:
        """A record is about to be decoded."""
        self._update(load_id, "noted", json.dumps(place))

    def note_decoded(self, load_id: str) -> None:
        """The noted records are decoded; who dies now dies waiting for the next."""
        self._update(load_id, "noted", None)

    def note_read(self, load_id: str) -> None:
        """A load has read and decoded everything; what ends it now is not a record's doing."""
        self._update(load_id, "phase", "read")

    def excuse(self, load_id: str) -> None:
        """A load ended for a reason of its own: an outage, a setting."""
        # A session that was ended must not hide what ended the load.
        with contextlib.suppress(psycopg2.Error):
            self._update(load_id, "phase", "excused")

    def refused(self, places: list[Place], ends: Mapping[int, int]) -> bool:
        """The database refused a load of these records: narrow down; False when nothing is left to narrow.

        Args:
            places: the coordinates of the load's records, as many as `limit` at most.
            ends: partition -> offset behind the last of them.
        """
        suspects = [place for place in places if place not in self.poison]
        if not suspects:
            return False
        if len(suspects) == 1:
            self.poison[suspects[0]] = REFUSED
        else:
            self._suspected_until = self._suspected_until or dict(ends)
            self.limit = max(1, len(suspects) // 4)
        return True

    def committed(self, positions: Mapping[int, int]) -> None:
        """A load went through: larger ones again, and the usual size once the suspected stretch is behind."""
        if all(positions.get(partition, 0) >= end for partition, end in self._suspected_until.items()):
            self._suspected_until = {}
        if not self.noting:
            self.limit = min(self.limit * 4, self.usual_limit) if self._suspected_until else self.usual_limit

    def _update(self, load_id: str, column: str, value: str | None) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute(
                sql.SQL("update {} set {} = %s where load_id = %s").format(
                    sql.Identifier(self.feed.source, "_loads_begun"), sql.Identifier(column)
                ),
                (value, load_id),
            )


def _batch(stream: Stream, positions: Mapping[int, int]) -> str:
    return json.dumps([stream.stream_id, stream.edition, sorted(positions.items())])

"""What sample data is made of: the message and the request for a stream of them."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from ingestion.errors import ConfigurationError

TRANSACTIONS = "raw_payments.transaction_created"
USER_EVENTS = "raw_users.user_events"
FEEDS = (TRANSACTIONS, USER_EVENTS)

Expected = Literal["landed", "dead", "tombstone"]

# The widths of `usr_000001` and `mer_00001`.
MAX_USERS = 999_999
MAX_MERCHANTS = 99_999


@dataclass(frozen=True, slots=True)
class SampleMessage:
    """One Kafka message and what must become of it.

    `timestamp_ms` is when the broker got it, which for a late event is long after the event. `defect` names an entry
    of `orchestration.sample.defects`; None is an ordinary record.
    """

    feed: str
    key: bytes | None
    value: bytes | None
    timestamp_ms: int
    headers: list[tuple[str, bytes]]
    defect: str | None
    expected: Expected


@dataclass(frozen=True)
class SampleSpec:
    """A stream of sample messages. Two equal specs give the same bytes.

    `records`: messages in the stream, every kind counted. `start`: delivery time of the first one, with a zone;
    nothing depends on the current time. `events_per_second` spreads the stream over time: 50,000 records at 0.1 a
    second are six days. A longer stream begins with the shorter one.
    """

    records: int
    seed: int
    start: datetime
    bad_share: float = 0.01
    users: int = 50_000
    merchants: int = 5_000
    events_per_second: float = 10

    def __post_init__(self) -> None:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise ConfigurationError(f"Sample data: {message}")

        require(self.records >= 0, f"records must be 0 or more, not {self.records}")
        require(self.start.tzinfo is not None, "start needs a time zone")
        # The feeds declare 2000 to 2099; late events lie days before the start.
        require(2001 <= self.start.year <= 2098, f"start must lie between 2001 and 2098, not in {self.start.year}")
        require(0 <= self.bad_share <= 1, f"bad_share must lie between 0 and 1, not {self.bad_share}")
        require(1 <= self.users <= MAX_USERS, f"users must lie between 1 and {MAX_USERS}, not {self.users}")
        require(
            1 <= self.merchants <= MAX_MERCHANTS,
            f"merchants must lie between 1 and {MAX_MERCHANTS}, not {self.merchants}",
        )
        require(
            0 < self.events_per_second <= 1_000_000,
            f"events_per_second must lie above 0 and at most 1,000,000, not {self.events_per_second}",
        )
        seconds_left = (datetime(2099, 1, 1, tzinfo=self.start.tzinfo) - self.start) / timedelta(seconds=1)
        require(
            self.records / self.events_per_second < seconds_left,
            f"{self.records} records at {self.events_per_second} a second end after 2098",
        )

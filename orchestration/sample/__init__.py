"""Sample data: a seed -> the messages of the Kafka feeds, and the rates of the REST feed.

The same spec gives the same bytes on every machine: nothing depends on the current time, the hash seed or the locale.
Good records follow declared distributions; a share of them is spoilt in the ways of the catalogue (`defects`), each
marked with what must become of it, so that a load can be checked against its source.

    spec = SampleSpec(records=1000, seed=1, start=datetime(2026, 1, 5, tzinfo=UTC))
    to_jsonl(generate(spec, "raw_payments.transaction_created"), Path("transactions.jsonl"))
"""

from collections.abc import Iterator

from ingestion.errors import ConfigurationError
from orchestration.sample.model import (
    FEEDS,
    TRANSACTIONS,
    USER_EVENTS,
    Expected,
    SampleMessage,
    SampleSpec,
)
from orchestration.sample.output import read_jsonl, to_jsonl, to_kafka
from orchestration.sample.transactions import generate_transactions
from orchestration.sample.users import generate_user_events

__all__ = [
    "FEEDS",
    "TRANSACTIONS",
    "USER_EVENTS",
    "Expected",
    "SampleMessage",
    "SampleSpec",
    "generate",
    "read_jsonl",
    "to_jsonl",
    "to_kafka",
]

_GENERATORS = {TRANSACTIONS: generate_transactions, USER_EVENTS: generate_user_events}


def generate(spec: SampleSpec, feed: str) -> Iterator[SampleMessage]:
    """The messages of one feed in delivery order; memory does not grow with their number.

    `ConfigurationError` for a feed without sample data.
    """
    if feed not in _GENERATORS:
        raise ConfigurationError(
            f"There is no sample data for the feed {feed!r}.", hint=f"Feeds with sample data: {', '.join(FEEDS)}."
        )
    return _GENERATORS[feed](spec)

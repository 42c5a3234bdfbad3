"""The transaction stream: the same bytes for the same seed, the declared shares, and bounded memory."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from itertools import islice

import pytest

from ingestion.errors import ConfigurationError
from orchestration.sample import FEEDS, TRANSACTIONS, SampleMessage, SampleSpec, defects, generate
from orchestration.sample.output import render_line

START = datetime(2026, 1, 5, tzinfo=UTC)
EXPONENTS = {"USD": 2, "EUR": 2, "GBP": 2, "JPY": 0, "CAD": 2}


def spec(records: int = 1000, seed: int = 7, **changes: object) -> SampleSpec:
    return SampleSpec(records=records, seed=seed, start=START, **changes)  # type: ignore[arg-type]


def digest(messages: Iterable[SampleMessage]) -> str:
    sha = hashlib.sha256()
    for message in messages:
        sha.update(render_line(message).encode() + b"\n")
    return sha.hexdigest()


@pytest.fixture(scope="module")
def stream() -> list[SampleMessage]:
    return list(generate(spec(60_000, seed=1), TRANSACTIONS))


@pytest.fixture(scope="module")
def good(stream: list[SampleMessage]) -> list[dict[str, object]]:
    return [json.loads(m.value or b"", parse_float=Decimal) for m in stream if m.defect is None]


def test_same_seed_gives_these_bytes() -> None:
    # A change here changes everybody's sample data, and the recorded fixtures with it. Without bad records: a new
    # entry of the catalogue may change those.
    assert (
        digest(generate(spec(5000, bad_share=0), TRANSACTIONS))
        == "d7d003c7e30d27480a6c5f1c0c7d57624299fcc7bdb96d92043328a1345f3255"
    )


@pytest.mark.parametrize("feed", FEEDS)
def test_other_seed_gives_other_bytes(feed: str) -> None:
    assert digest(generate(spec(50, seed=1), feed)) != digest(generate(spec(50, seed=2), feed))


def test_bytes_do_not_depend_on_the_process() -> None:
    program = (
        "import hashlib; from datetime import UTC, datetime\n"
        "from orchestration.sample import FEEDS, SampleSpec, generate\n"
        "from orchestration.sample.output import render_line\n"
        "spec = SampleSpec(records=400, seed=3, start=datetime(2026, 1, 5, tzinfo=UTC), bad_share=0.2)\n"
        "print([hashlib.sha256(''.join(map(render_line, generate(spec, f))).encode()).hexdigest() for f in FEEDS])"
    )
    surroundings = (
        {"PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C"},
        {"PYTHONHASHSEED": "4242", "TZ": "Asia/Tokyo", "LC_ALL": "de_DE.UTF-8", "LANG": "fr_FR.UTF-8"},
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **extra}, capture_output=True, text=True, check=True
        ).stdout
        for extra in surroundings
    ]
    assert outputs[0] == outputs[1]


def test_start_in_another_zone_is_the_same_start() -> None:
    tokyo = START.astimezone(timezone(timedelta(hours=9)))
    other = SampleSpec(records=100, seed=7, start=tokyo)
    assert digest(generate(spec(100), TRANSACTIONS)) == digest(generate(other, TRANSACTIONS))


@pytest.mark.parametrize("feed", FEEDS)
def test_longer_stream_begins_with_the_shorter_one(feed: str) -> None:
    shorter = list(generate(spec(300), feed))
    assert list(islice(generate(spec(900), feed), 300)) == shorter


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("records", [0, 1, 777])
def test_gives_as_many_messages_as_asked(feed: str, records: int) -> None:
    assert sum(1 for _ in generate(spec(records), feed)) == records


def test_delivery_times_never_go_back_and_keep_the_rate(stream: list[SampleMessage]) -> None:
    times = [m.timestamp_ms for m in stream]
    assert times == sorted(times)
    assert times[0] >= START.timestamp() * 1000
    assert (times[-1] - times[0]) / 1000 == pytest.approx(len(stream) / 10, abs=1)


def test_rate_spreads_the_stream_over_days() -> None:
    messages = list(generate(spec(500, events_per_second=0.001), TRANSACTIONS))
    assert messages[-1].timestamp_ms - messages[0].timestamp_ms == pytest.approx(500_000_000, abs=2_000_000)


def test_good_record_is_compact_json_in_the_declared_form(stream: list[SampleMessage]) -> None:
    patterns = {
        "transaction_id": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
        "user_id": r"usr_[0-9]{6}",
        "merchant_id": r"mer_[0-9]{5}",
        "country": r"[A-Z]{2}",
        "created_at": r"2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)",
        "status": "completed|failed|pending",
    }
    for message in stream:
        if message.defect is not None:
            continue
        assert message.value is not None
        assert 220 <= len(message.value) <= 250
        record = json.loads(message.value, parse_float=Decimal)
        assert message.key == record["transaction_id"].encode()
        for field, pattern in patterns.items():
            assert re.fullmatch(pattern, record[field]), (field, record)
        exponent = EXPONENTS[record["currency"]]
        written = re.search(rb'"amount": ([0-9]+(?:\.([0-9]+))?),', message.value)
        assert written is not None
        assert len(written[2] or b"") == exponent
        datetime.fromisoformat(record["created_at"])


def test_distributions_are_the_declared_ones(good: list[dict[str, object]]) -> None:
    latest: dict[object, dict[str, object]] = {}
    for record in good:
        before = latest.get(record["transaction_id"])
        if before is None or moment(record) >= moment(before):
            latest[record["transaction_id"]] = record
    count = len(latest)

    currencies = Counter(r["currency"] for r in latest.values())
    for currency, share in {"USD": 0.60, "EUR": 0.20, "GBP": 0.10, "JPY": 0.05, "CAD": 0.05}.items():
        assert currencies[currency] / count == pytest.approx(share, abs=0.01)

    statuses = Counter(r["status"] for r in latest.values())
    for status, share in {"completed": 0.92, "failed": 0.05, "pending": 0.03}.items():
        assert statuses[status] / count == pytest.approx(share, abs=0.008)

    logs = [math.log(r["amount"]) for r in latest.values() if r["currency"] == "USD" and r["amount"] > 0]  # type: ignore[operator, arg-type]
    mean = sum(logs) / len(logs)
    sigma = math.sqrt(sum((x - mean) ** 2 for x in logs) / len(logs))
    assert mean == pytest.approx(3.5, abs=0.03)
    assert sigma == pytest.approx(1.2, abs=0.03)

    offsets = sum(not str(r["created_at"]).endswith("Z") for r in latest.values())
    assert 0.08 < offsets / count < 0.12
    assert len({r["user_id"] for r in latest.values()}) > 15_000
    assert len({r["merchant_id"] for r in latest.values()}) > 4_000


def test_second_deliveries_have_the_declared_shares(stream: list[SampleMessage]) -> None:
    seen: dict[bytes, list[tuple[bytes, datetime, str]]] = {}
    late = 0
    for message in stream:
        if message.defect is not None:
            continue
        assert message.key is not None
        assert message.value is not None
        record = json.loads(message.value)
        created = moment(record)
        events = seen.setdefault(message.key, [])
        events.append((message.value, created, record["status"]))
        if len(events) == 1 and message.timestamp_ms / 1000 - created.timestamp() > 3600:
            late += 1
            assert message.timestamp_ms / 1000 - created.timestamp() < 6 * 86400

    twice = [events for events in seen.values() if len(events) > 1]
    assert all(len(events) == 2 for events in twice)
    duplicates = [e for e in twice if e[0][0] == e[1][0]]
    changes = [e for e in twice if e[0][2] == "pending" and e[1][2] != "pending"]
    reversed_ = [e for e in twice if e[0][2] != "pending" and e[1][2] == "pending"]
    assert len(duplicates) + len(changes) + len(reversed_) == len(twice)
    assert all(first[1] < second[1] for first, second in changes)
    assert all(first[1] > second[1] for first, second in reversed_)
    for found, share in ((duplicates, 0.01), (changes, 0.05), (reversed_, 0.01)):
        assert len(found) / len(seen) == pytest.approx(share, rel=0.2)
    assert late / len(seen) == pytest.approx(0.01, rel=0.2)


def test_no_event_is_from_the_future(stream: list[SampleMessage]) -> None:
    for message in stream:
        if message.defect is None:
            assert moment(json.loads(message.value or b"")).timestamp() * 1000 <= message.timestamp_ms


@pytest.mark.parametrize("feed", FEEDS)
def test_bad_records_have_their_share_and_every_kind_comes(feed: str) -> None:
    kinds = [d.name for d in defects.catalogue(feed)]
    marked = [m for m in generate(spec(20_000), feed) if m.defect is not None]
    assert len(marked) / 20_000 == pytest.approx(0.01, rel=0.25)
    rounds, rest = divmod(len(marked), len(kinds))
    counts = Counter(m.defect for m in marked)
    assert set(counts.values()) <= {rounds, rounds + (1 if rest else 0)}
    for message in marked:
        assert message.expected == defects.find_defect(feed, message.defect or "").expected
        assert message.headers == [(defects.DEFECT_HEADER, (message.defect or "").encode())]


@pytest.mark.parametrize("feed", FEEDS)
def test_share_of_bad_records_can_be_none_or_all(feed: str) -> None:
    assert all(m.defect is None for m in generate(spec(500, bad_share=0), feed))
    # The first user event is a sign-up: there is nobody else yet.
    assert sum(m.defect is None for m in generate(spec(500, bad_share=1), feed)) <= 1


@pytest.mark.parametrize("rate", [0.001, 10, 1_000_000])
def test_memory_does_not_grow_with_the_stream(rate: float) -> None:
    messages = generate(spec(25_000, events_per_second=rate), TRANSACTIONS)
    tracemalloc.start()
    try:
        for _ in islice(messages, 5_000):
            pass
        full = tracemalloc.get_traced_memory()[0]
        for _ in messages:
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - full < 300_000


@pytest.mark.parametrize(
    "changes",
    [
        {"records": -1},
        {"start": datetime(2026, 1, 5)},
        {"start": datetime(1999, 1, 5, tzinfo=UTC)},
        {"start": datetime(2098, 12, 1, tzinfo=UTC), "records": 1_000_000, "events_per_second": 0.1},
        {"bad_share": 1.5},
        {"bad_share": float("nan")},
        {"users": 0},
        {"users": 1_000_000},
        {"merchants": 100_000},
        {"events_per_second": 0},
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="Sample data: "):
        SampleSpec(**{"records": 10, "seed": 1, "start": START, **changes})  # type: ignore[arg-type]


def test_unknown_feed_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"raw_fx\.daily_rates") as caught:
        generate(spec(), "raw_fx.daily_rates")
    assert TRANSACTIONS in caught.value.hint


def moment(record: dict[str, object]) -> datetime:
    return datetime.fromisoformat(str(record["created_at"])).astimezone(UTC)

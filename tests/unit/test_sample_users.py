"""The user-event stream: sign-up first, nothing after closing, no real person's data."""

import hashlib
import json
import re
from collections import Counter
from datetime import UTC, datetime
from itertools import islice

import pytest

from orchestration.sample import TRANSACTIONS, USER_EVENTS, SampleMessage, SampleSpec, generate
from orchestration.sample.output import render_line

START = datetime(2026, 1, 5, tzinfo=UTC)
FIELDS = [
    "event_id",
    "event_type",
    "user_id",
    "email",
    "full_name",
    "phone",
    "ip_address",
    "country",
    "occurred_at",
]


def messages(records: int, users: int = 50_000, bad_share: float = 0.0) -> list[SampleMessage]:
    spec = SampleSpec(records=records, seed=7, start=START, users=users, bad_share=bad_share)
    return list(generate(spec, USER_EVENTS))


def events(stream: list[SampleMessage]) -> list[dict[str, str]]:
    return [json.loads(m.value or b"") for m in stream if m.defect is None]


@pytest.fixture(scope="module")
def stream() -> list[SampleMessage]:
    return messages(20_000, bad_share=0.01)


def test_same_seed_gives_these_bytes() -> None:
    # Names are Faker's: besides a change of ours, another Faker release may change them.
    sha = hashlib.sha256()
    for message in messages(3000):
        sha.update(render_line(message).encode() + b"\n")
    assert sha.hexdigest() == "5485a169c10fd05340c050fd1bdd6a9be74d6ec1acc6a9a098ead6781b7cc89c"


def test_records_have_the_declared_form(stream: list[SampleMessage]) -> None:
    for message in stream:
        if message.defect is not None:
            continue
        record = json.loads(message.value or b"")
        assert list(record) == FIELDS
        assert message.key == record["user_id"].encode()
        assert re.fullmatch(r"usr_[0-9]{6}", record["user_id"])
        assert record["event_type"] in {"signed_up", "profile_updated", "signed_in", "closed"}
        at = datetime.fromisoformat(record["occurred_at"])
        assert at.timestamp() * 1000 <= message.timestamp_ms
    kinds = Counter(e["event_type"] for e in events(stream))
    assert set(kinds) == {"signed_up", "profile_updated", "signed_in", "closed"}
    times = [m.timestamp_ms for m in stream]
    assert times == sorted(times)


@pytest.mark.parametrize("users", [1, 2, 50, 5000])
def test_sign_up_comes_first_and_nothing_follows_closing(users: int) -> None:
    seen: dict[str, list[dict[str, str]]] = {}
    ids: set[str] = set()
    for event in events(messages(4000, users=users)):
        if event["event_id"] not in ids:
            ids.add(event["event_id"])
            seen.setdefault(event["user_id"], []).append(event)
    assert len(seen) <= users
    for user, history in seen.items():
        assert history[0]["event_type"] == "signed_up", user
        assert [e["event_type"] for e in history].count("signed_up") == 1
        joined = datetime.fromisoformat(history[0]["occurred_at"])
        assert all(datetime.fromisoformat(e["occurred_at"]) > joined for e in history[1:])
        if any(e["event_type"] == "closed" for e in history):
            assert history[-1]["event_type"] == "closed"


def test_some_events_come_twice_and_some_late(stream: list[SampleMessage]) -> None:
    values = Counter(m.value for m in stream if m.defect is None)
    twice = [value for value, count in values.items() if count > 1]
    assert 0.003 < len(twice) / len(values) < 0.02
    assert all(values[value] == 2 for value in twice)
    delays = [
        m.timestamp_ms / 1000 - datetime.fromisoformat(json.loads(m.value or b"")["occurred_at"]).timestamp()
        for m in stream
        if m.defect is None and m.value not in twice
    ]
    assert sum(delay > 5 for delay in delays) > 20


def test_profiles_change_only_by_profile_updates(stream: list[SampleMessage]) -> None:
    emails: dict[str, str] = {}
    ids: set[str] = set()
    changed = 0
    for event in events(stream):
        if event["event_id"] in ids:
            continue
        ids.add(event["event_id"])
        before = emails.get(event["user_id"])
        if before is not None and before != event["email"]:
            assert event["event_type"] == "profile_updated"
            changed += 1
        emails[event["user_id"]] = event["email"]
    assert changed > 500
    assert len(set(emails.values())) == len(emails)


def test_nothing_can_belong_to_a_real_person(stream: list[SampleMessage]) -> None:
    for event in events(stream):
        assert re.fullmatch(r"[a-z.]+\.[0-9]+(\+[0-9]+)?@example\.(com|org|net)", event["email"]), event["email"]
        assert re.match(r"192\.0\.2\.|198\.51\.100\.|203\.0\.113\.|2001:db8::", event["ip_address"])
        assert re.fullmatch(r"\+[0-9]{1,2}555[0-9]{9}", event["phone"])


def test_names_are_not_all_ascii(stream: list[SampleMessage]) -> None:
    names = {e["full_name"] for e in events(stream)}
    assert len(names) > 1000
    assert sum(not name.isascii() for name in names) > 100


def test_users_are_those_of_the_transactions(stream: list[SampleMessage]) -> None:
    known = {e["user_id"] for e in events(stream)}
    spec = SampleSpec(records=2000, seed=7, start=START, bad_share=0)
    paying = {json.loads(m.value or b"")["user_id"] for m in islice(generate(spec, TRANSACTIONS), 2000)}
    assert len(known & paying) / len(paying) > 0.3

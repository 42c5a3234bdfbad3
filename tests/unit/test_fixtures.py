"""The fixtures agree with themselves: raw files with their maker, expected files with a second computation."""

import csv
import importlib.util
import json
import shutil
from decimal import Decimal
from pathlib import Path
from types import ModuleType

import pytest

from orchestration.sample import read_jsonl, to_jsonl
from orchestration.sample.defects import find_defect

FIXTURES = Path(__file__).parents[1] / "fixtures"
RAW = sorted(FIXTURES.glob("*/raw/*.jsonl"))
KEYS = {"payments": "transaction_id", "users": "event_id"}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FIXTURES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path: str) -> list[dict[str, str]]:
    with (FIXTURES / path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def make_expected() -> ModuleType:
    return load("make_expected")


def test_expected_files_are_what_the_raw_files_give(make_expected: ModuleType) -> None:
    computed = make_expected.compute()
    for name, content in computed.items():
        assert (FIXTURES / name).read_bytes().decode() == content, f"run tests/fixtures/make_expected.py: {name}"
    assert {str(p.relative_to(FIXTURES)) for p in FIXTURES.glob("*/expected/*")} == set(computed)


def test_changed_raw_file_changes_what_is_expected(make_expected: ModuleType, tmp_path: Path) -> None:
    for area in KEYS:
        shutil.copytree(FIXTURES / area / "raw", tmp_path / area / "raw")
    valid = tmp_path / "payments" / "raw" / "valid.jsonl"
    text = valid.read_text()
    assert '\\"amount\\": 1.07,' in text
    valid.write_text(text.replace('\\"amount\\": 1.07,', '\\"amount\\": 1.08,', 1))
    before, after = make_expected.compute(), make_expected.compute(tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"payments/expected/normalised_transactions.csv", "payments/expected/daily_revenue.csv"}


def test_raw_files_are_what_their_maker_writes(tmp_path: Path) -> None:
    load("make_raw").main(tmp_path)
    made = sorted(tmp_path.glob("*/raw/*.jsonl"))
    assert [p.relative_to(tmp_path) for p in made] == [p.relative_to(FIXTURES) for p in RAW]
    for path in made:
        committed = FIXTURES / path.relative_to(tmp_path)
        assert path.read_bytes() == committed.read_bytes(), f"run tests/fixtures/make_raw.py: {committed}"


@pytest.mark.parametrize("path", RAW, ids=lambda p: f"{p.parts[-3]}-{p.stem}")
def test_raw_file_is_in_the_format_of_the_sample_command(path: Path, tmp_path: Path) -> None:
    messages = list(read_jsonl(path))
    assert 10 <= len(messages) <= 500
    to_jsonl(messages, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()
    times = [m.timestamp_ms for m in messages]
    assert times == sorted(times)


@pytest.mark.parametrize("area", KEYS)
def test_files_share_no_business_key(area: str) -> None:
    owner: dict[str, str] = {}
    for path in RAW:
        if path.parts[-3] != area:
            continue
        for message in read_jsonl(path):
            if message.value is None or message.defect is not None:
                continue
            identifier = json.loads(message.value)[KEYS[area]]
            assert owner.setdefault(identifier, path.name) == path.name


@pytest.mark.parametrize("area", KEYS)
def test_accounting_agrees_with_the_marks_on_the_messages(area: str, make_expected: ModuleType) -> None:
    declared = make_expected.FIELDS[KEYS[area]]
    dead = {(r["file"], int(r["line"])): r for r in rows(f"{area}/expected/dead_letters.csv")}
    for counts in rows(f"{area}/expected/accounting.csv"):
        found = {"landed": 0, "dead": 0, "tombstone": 0}
        for line, message in enumerate(read_jsonl(FIXTURES / area / "raw" / counts["file"]), start=1):
            found[message.expected] += 1
            letter = dead.get((counts["file"], line))
            assert (letter is not None) == (message.expected == "dead"), (counts["file"], line)
            if letter is not None:
                assert message.defect is not None
                defect = find_defect(message.feed, message.defect)
                assert letter["reason"] == defect.reason
                if defect.field:
                    assert letter["field"] == (defect.field if defect.field in declared else "*")
        assert found == {
            "landed": int(counts["landed"]),
            "dead": int(counts["dead"]),
            "tombstone": int(counts["tombstones"]),
        }
        assert int(counts["offered"]) == sum(found.values())


@pytest.mark.parametrize(
    ("area", "result"), [("payments", "normalised_transactions"), ("users", "deduplicated_user_events")]
)
def test_every_landed_event_counts_towards_one_row(area: str, result: str) -> None:
    landed = sum(int(r["landed"]) for r in rows(f"{area}/expected/accounting.csv"))
    expected = rows(f"{area}/expected/{result}.csv")
    assert sum(int(r["events"]) for r in expected) == landed
    assert len({r[KEYS[area]] for r in expected}) == len(expected) < landed


def test_daily_revenue_sums_to_the_completed_transactions() -> None:
    completed: dict[str, int] = {}
    for row in rows("payments/expected/normalised_transactions.csv"):
        if row["status"] == "completed":
            completed[row["currency_code"]] = completed.get(row["currency_code"], 0) + int(row["amount_minor"])
    revenue: dict[str, int] = {}
    for row in rows("payments/expected/daily_revenue.csv"):
        minor = int(row["revenue_minor"])
        revenue[row["currency_code"]] = revenue.get(row["currency_code"], 0) + minor
        assert Decimal(row["revenue_major"]) * (1 if row["currency_code"] == "JPY" else 100) == minor
    assert revenue == completed
    assert set(revenue) == {"USD", "EUR", "GBP", "JPY", "CAD"}


def test_status_changes_end_as_a_person_would_say() -> None:
    """The cases of `status_changes.jsonl`, by hand."""
    found = {
        int(row["transaction_id"][-12:], 16): (row["status"], int(row["amount_minor"]), row["currency_code"])
        for row in rows("payments/expected/normalised_transactions.csv")
        if row["file"] == "status_changes.jsonl"
    }
    assert found == {
        1: ("completed", 10000, "USD"),
        2: ("failed", 20000, "EUR"),
        3: ("failed", 30000, "USD"),
        4: ("completed", 400, "JPY"),
        5: ("completed", 50000, "USD"),
        6: ("failed", 60000, "CAD"),
        7: ("completed", 70000, "USD"),
        8: ("pending", 80000, "USD"),
        9: ("completed", 90000, "GBP"),
        10: ("completed", 100000, "USD"),
        11: ("completed", 1100, "USD"),
        12: ("completed", 1040, "EUR"),
        13: ("pending", 1300, "USD"),
        14: ("completed", 1400, "USD"),
        15: ("completed", 1500, "USD"),
    }

"""The catalogue of bad and odd records against a second reading of the contract (`tests/fixtures/make_expected.py`)."""

import csv
import importlib.util
import json
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

from ingestion.errors import Reason
from orchestration.sample import FEEDS, TRANSACTIONS, USER_EVENTS
from orchestration.sample import defects as catalogue_module
from orchestration.sample.defects import Defect, catalogue, find_defect, render

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOOD = {
    TRANSACTIONS: {
        "transaction_id": '"0b6cbd6f-3c1c-4a51-9d0b-2f4c5c1a7e11"',
        "amount": "33.10",
        "currency": '"EUR"',
        "user_id": '"usr_000042"',
        "merchant_id": '"mer_00042"',
        "country": '"DE"',
        "created_at": '"2026-01-05T09:00:00.123456Z"',
        "status": '"completed"',
    },
    USER_EVENTS: {
        "event_id": '"0b6cbd6f-3c1c-4a51-9d0b-2f4c5c1a7e11"',
        "event_type": '"signed_in"',
        "user_id": '"usr_000042"',
        "email": '"a@example.com"',
        "full_name": '"Zoë Ångström"',
        "phone": '"+4955500000042"',
        "ip_address": '"192.0.2.1"',
        "country": '"DE"',
        "occurred_at": '"2026-01-05T09:00:00.123456Z"',
    },
}
ENTRIES = [pytest.param(feed, d, id=f"{feed}-{d.name}") for feed in FEEDS for d in catalogue(feed, bulky=True)]


def load_make_expected() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_expected", FIXTURES / "make_expected.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def contract() -> ModuleType:
    return load_make_expected()


def judge(contract: ModuleType, feed: str, value: bytes | None) -> tuple[str, str | None, str | None]:
    """Outcome, reason and field by the second reading."""
    if value is None:
        return "tombstone", None, None
    with (FIXTURES.parents[1] / "seeds" / "reference" / "countries.csv").open(encoding="utf-8") as file:
        countries = {row["country_code"] for row in csv.DictReader(file)}
    read = contract.transaction if feed == TRANSACTIONS else contract.user_event
    try:
        read(value, countries)
    except contract.Bad as bad:
        return "dead", bad.reason, bad.field or None
    return "landed", None, None


@pytest.mark.parametrize(("feed", "defect"), ENTRIES)
def test_entry_ends_as_it_says(contract: ModuleType, feed: str, defect: Defect) -> None:
    # Several draws, for entries with variants and cuts.
    for draw in range(1 if defect.bulky else 25):
        key, value = defect.build(Random(draw), GOOD[feed])
        found = judge(contract, feed, value)
        named = defect.field if defect.reason is not Reason.MISSING_FIELD or defect.field else found[2]
        assert found == (defect.expected, defect.reason, named), (draw, value)
        assert key is None or key.endswith(GOOD[feed][catalogue_module.KEY_FIELDS[feed]].strip('"').encode())


@pytest.mark.parametrize("feed", FEEDS)
def test_good_record_is_good(contract: ModuleType, feed: str) -> None:
    assert judge(contract, feed, render(GOOD[feed].items()).encode()) == ("landed", None, None)


@pytest.mark.parametrize(("feed", "defect"), ENTRIES)
def test_entry_is_declared_whole(feed: str, defect: Defect) -> None:
    assert (defect.reason is not None) == (defect.expected == "dead")
    assert defect.field is None or defect.reason is not None
    _, value = defect.build(Random(0), GOOD[feed])
    # What is not bulky must be small: streams are made of it.
    assert defect.bulky == (value is not None and len(value) > 5000)
    assert value != render(GOOD[feed].items()).encode() or defect.name in {"null_key", "binary_key"}


@pytest.mark.parametrize("feed", FEEDS)
def test_names_are_unique(feed: str) -> None:
    names = [d.name for d in catalogue(feed, bulky=True)]
    assert len(names) == len(set(names))
    assert all(find_defect(feed, name).name == name for name in names)


@pytest.mark.parametrize("feed", FEEDS)
def test_bulky_entries_stay_out_unless_asked_for(feed: str) -> None:
    bulky = {d.name for d in catalogue(feed, bulky=True)} - {d.name for d in catalogue(feed)}
    assert bulky == {"one_megabyte", "nesting_200000"}


def test_every_reason_has_an_entry() -> None:
    # Poison is what no rule names: the contract never says it.
    assert {d.reason for d in catalogue(TRANSACTIONS) if d.reason} == set(Reason) - {Reason.POISON}


def test_same_draw_gives_the_same_bytes() -> None:
    for feed in FEEDS:
        for defect in catalogue(feed):
            assert defect.build(Random(5), GOOD[feed]) == defect.build(Random(5), GOOD[feed])


def test_odd_record_keeps_its_money() -> None:
    for defect in catalogue(TRANSACTIONS):
        if defect.expected == "landed" and not defect.name.startswith(("amount", "escaped")):
            _, value = defect.build(Random(0), GOOD[TRANSACTIONS])
            assert json.loads(value or b"")["amount"] == 33.10, defect.name

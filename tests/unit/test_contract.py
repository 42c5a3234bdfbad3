"""The decoder at the door: every verdict, its reason and path; nothing altered; both ways agree."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal

import pytest

from ingestion.contract import MAX_DEPTH, Contract, Rejection, Row
from ingestion.errors import Reason
from ingestion.feeds import ColumnType, FeedSpec

GOOD = {
    "transaction_id": "6f9619ff-8b86-4011-b42d-00c04fc964ff",
    "amount": 12.5,
    "currency": "USD",
    "user_id": "usr_123456",
    "merchant_id": "mer_12345",
    "country": "US",
    "created_at": "2026-01-02T03:04:05.123Z",
    "status": "completed",
}


@pytest.fixture
def contract(feed_named: Callable[[str], FeedSpec]) -> Contract:
    return Contract(feed_named("raw_payments.transaction_created"))


def record(**changes: object) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def with_amount(token: str, **changes: object) -> bytes:
    """A record whose amount is this very text."""
    return record(amount=0, **changes).replace(b'"amount": 0', b'"amount": ' + token.encode())


DEAD = {
    "empty": (b"", Reason.EMPTY_VALUE, "$"),
    "blanks": (b" \n", Reason.EMPTY_VALUE, "$"),
    "invalid utf-8": (record().replace(b"completed", b"compl\xffted"), Reason.INVALID_UTF8, "$"),
    "bom": (b"\xef\xbb\xbf" + record(), Reason.MALFORMED_JSON, "$"),
    "truncated": (record()[:-20], Reason.MALFORMED_JSON, "$"),
    "two documents": (record() + record(), Reason.MALFORMED_JSON, "$"),
    "NaN": (with_amount("NaN"), Reason.MALFORMED_JSON, "$"),
    "-Infinity": (with_amount("-Infinity"), Reason.MALFORMED_JSON, "$"),
    "leading zero": (with_amount("012.5"), Reason.MALFORMED_JSON, "$"),
    "too deep": (record()[:-1] + b',"x":' + b"[" * 600 + b"]" * 600 + b"}", Reason.MALFORMED_JSON, "$"),
    "far too deep": (b"[" * 200_000, Reason.MALFORMED_JSON, "$"),
    "array": (b"[" + record() + b"]", Reason.NOT_AN_OBJECT, "$"),
    "scalar": (b"17", Reason.NOT_AN_OBJECT, "$"),
    "null": (b"null", Reason.NOT_AN_OBJECT, "$"),
    "repeated key": (record()[:-1] + b',"amount":1}', Reason.DUPLICATE_KEY, "$.amount"),
    "repeated key, escaped": (record()[:-1] + b',"\\u0061mount":1}', Reason.DUPLICATE_KEY, "$.amount"),
    "repeated key inside": (record()[:-1] + b',"x":[{"y":1,"y":1}]}', Reason.DUPLICATE_KEY, "$.*[0].*"),
    "missing": (
        json.dumps({k: v for k, v in GOOD.items() if k != "user_id"}).encode(),
        Reason.MISSING_FIELD,
        "$.user_id",
    ),
    "other case": (record().replace(b'"amount"', b'"Amount"'), Reason.MISSING_FIELD, "$.amount"),
    "null field": (record(user_id=None), Reason.NULL_FIELD, "$.user_id"),
    "amount as text": (record(amount="12.50"), Reason.WRONG_TYPE, "$.amount"),
    "amount as truth": (record(amount=True), Reason.WRONG_TYPE, "$.amount"),
    "number as text": (record(currency=840), Reason.WRONG_TYPE, "$.currency"),
    "not a uuid": (record(transaction_id="6f9619ff"), Reason.WRONG_TYPE, "$.transaction_id"),
    "negative": (with_amount("-0.01"), Reason.OUT_OF_RANGE, "$.amount"),
    "2**70": (with_amount(str(2**70)), Reason.OUT_OF_RANGE, "$.amount"),
    "40 digits": (with_amount("1" * 40 + ".5"), Reason.OUT_OF_RANGE, "$.amount"),
    "40 decimals": (with_amount("1." + "1" * 40), Reason.OUT_OF_RANGE, "$.amount"),
    "huge exponent": (with_amount("1e999999999999999999"), Reason.OUT_OF_RANGE, "$.amount"),
    "tiny exponent": (with_amount("1e-999999999999999999"), Reason.OUT_OF_RANGE, "$.amount"),
    "yen with decimals": (with_amount("10.5", currency="JPY"), Reason.OUT_OF_RANGE, "$.amount"),
    "a tenth of a cent": (with_amount("10.005"), Reason.OUT_OF_RANGE, "$.amount"),
    "unknown currency": (record(currency="XXX"), Reason.NOT_ACCEPTED, "$.currency"),
    "unknown country": (record(country="ZZ"), Reason.NOT_ACCEPTED, "$.country"),
    "pattern": (record(user_id="usr_12345"), Reason.PATTERN_MISMATCH, "$.user_id"),
    "pattern, line end": (record(user_id="usr_123456\n"), Reason.PATTERN_MISMATCH, "$.user_id"),
    "pattern, other digits": (record(user_id="usr_١٢٣٤٥٦"), Reason.PATTERN_MISMATCH, "$.user_id"),
    "no zone": (record(created_at="2026-01-02T03:04:05"), Reason.INVALID_TIMESTAMP, "$.created_at"),
    "year 0": (record(created_at="0000-01-02T03:04:05Z"), Reason.INVALID_TIMESTAMP, "$.created_at"),
    "month 13": (record(created_at="2026-13-01T00:00:00Z"), Reason.INVALID_TIMESTAMP, "$.created_at"),
    "year 9999": (record(created_at="9999-12-31T23:59:59Z"), Reason.OUT_OF_RANGE, "$.created_at"),
    "offset of 20 hours": (record(created_at="2026-01-02T03:04:05+20:00"), Reason.INVALID_TIMESTAMP, "$.created_at"),
    "NUL": (record(status="comp\x00leted"), Reason.INVALID_TEXT, "$.status"),
    "NUL in an unknown key": (record(**{"a\x00b": 1}), Reason.INVALID_TEXT, "$"),
    "lone surrogate": (record(note="\ud800"), Reason.INVALID_TEXT, "$.*"),
    "unknown number beyond numeric": (record()[:-1] + b',"x":1e200000}', Reason.OUT_OF_RANGE, "$.*"),
}


@pytest.mark.parametrize("case", DEAD, ids=list(DEAD))
def test_a_record_that_breaks_the_contract_is_named(contract: Contract, case: str) -> None:
    value, reason, path = DEAD[case]
    verdict = contract.decode(value)
    assert isinstance(verdict, Rejection), verdict
    assert (verdict.reason, verdict.path) == (reason, path)


@pytest.mark.parametrize("case", DEAD, ids=list(DEAD))
def test_a_message_never_quotes_the_record(contract: Contract, case: str) -> None:
    verdict = contract.decode(DEAD[case][0])
    assert isinstance(verdict, Rejection)
    for text in ("usr_1", "6f9619ff", "12.50", "2026-01-02T"):
        assert text not in verdict.message


LANDED = {
    "plain": (record(), "12.5", None),
    "zero": (with_amount("0"), "0", None),
    "all its digits": (with_amount("12345678901234.50"), "12345678901234.50", None),
    "trailing zeros": (with_amount("12.500000000"), "12.500000000", None),
    "exponent": (with_amount("1.25E1"), "12.5", None),
    "zero with an exponent": (with_amount("0e5"), "0", None),
    "yen": (with_amount("1050", currency="JPY"), "1050", None),
    "Namibia": (record(country="NA"), "12.5", None),
    "offset": (record(created_at="2026-01-02T03:04:05+05:30"), "12.5", None),
    "escaped": (record().replace(b"USD", b"\\u0055SD"), "12.5", None),
    "unknown field": (record()[:-1] + b',"note": "a\\"b"}', "12.5", '{"note":"a\\"b"}'),
    "unknown number": (record()[:-1] + b',"x": 1.500}', "12.5", '{"x":1.500}'),
    "unknown object": (record()[:-1] + b',"x":{"y":[1, 2.0]}}', "12.5", '{"x":{"y":[1, 2.0]}}'),
    "200 levels": (
        record()[:-1] + b',"x":' + b"[" * 200 + b"]" * 200 + b"}",
        "12.5",
        '{"x":' + "[" * 200 + "]" * 200 + "}",
    ),
    "1 MB": (record(note="y" * 1_000_000), "12.5", '{"note":"' + "y" * 1_000_000 + '"}'),
}


@pytest.mark.parametrize("case", LANDED, ids=list(LANDED))
def test_a_record_that_fits_lands_unaltered(contract: Contract, case: str) -> None:
    value, amount, extra = LANDED[case]
    row = contract.decode(value)
    assert isinstance(row, Row), row
    assert row.extra == extra
    assert Decimal(str(row.cells[1])) == Decimal(amount)
    document = json.loads(value)
    for index in (0, 2, 3, 4, 5, 6, 7):
        assert row.cells[index] == document[contract.feed.columns[index].name]


def test_depth_limit_is_exact(contract: Contract) -> None:
    # The record itself is the first level.
    inside = MAX_DEPTH - 1
    fits = record()[:-1] + b',"x":' + b"[" * inside + b"]" * inside + b"}"
    too_deep = record()[:-1] + b',"x":[' + b"[" * inside + b"]" * inside + b"]}"
    assert isinstance(contract.decode(fits), Row)
    assert isinstance(contract.decode(too_deep), Rejection)


@pytest.mark.parametrize(
    ("number", "type_", "fits"),
    [
        ("0.125", (3, 3), True),
        ("0", (3, 3), True),
        ("-0.999", (3, 3), True),
        ("1", (3, 3), False),
        ("0.1250", (3, 3), True),
        ("0.0001", (3, 3), False),
        ("0.00012e3", (3, 3), True),
        ("12e-3", (3, 3), True),
        ("1e2", (3, 0), True),
        ("1e3", (3, 0), False),
        ("0e99999999999999", (3, 0), False),
    ],
)
def test_numeric_room_is_exact(
    feed_named: Callable[[str], FeedSpec], number: str, type_: tuple[int, int], fits: bool
) -> None:
    feed = feed_named("raw_payments.transaction_created")
    amount = replace(feed.columns[1], type=ColumnType("numeric", *type_), rules=())
    contract = Contract(replace(feed, columns=(amount,)))
    verdict = contract.decode(b'{"amount": ' + number.encode() + b"}")
    assert isinstance(verdict, Row) == fits, verdict
    if isinstance(verdict, Row):
        assert Decimal(str(verdict.cells[0])) == Decimal(number)


def mutate(rng: random.Random, value: bytes) -> bytes:
    """A record spoilt somewhere: bytes changed, dropped, repeated, or swapped for awkward ones."""
    data = bytearray(value)
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        place = rng.randrange(len(data)) if data else 0
        match rng.randrange(5):
            case 0:
                data[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[place : place + rng.randint(1, 12)]
            case 2:
                data[place:place] = data[place : place + rng.randint(1, 40)]
            case 3:
                data[place:place] = rng.choice([b'"', b"\\", b"\\u0000", b"\\ud800", b"{", b"null", b"1e9", b","])
            case _:
                part = rng.choice([b"12.5", b"USD", b"usr_", b"2026", b"Z", b":", b"completed"])
                data = data.replace(part, rng.choice([b"", b"0", b"-1", b"1E2", b"JPY", b"null", b"true", b"[]"]), 1)
    return bytes(data)


def test_quick_and_careful_ways_agree(contract: Contract) -> None:
    rng = random.Random(7)
    verdicts = {Row: 0, Rejection: 0}
    values = [record(), with_amount("3", currency="JPY"), record(note="x"), *(value for value, *_ in DEAD.values())]
    for _ in range(20_000):
        value = mutate(rng, rng.choice(values[:3])) if rng.random() < 0.9 else rng.choice(values)
        verdict = contract.decode(value)
        assert verdict == contract._decode_carefully(value), value
        verdicts[type(verdict)] += 1
    # Neither kind may be absent, or the comparison shows nothing.
    assert min(verdicts.values()) > 500, verdicts

"""The catalogue of known-bad and odd records: each entry spoils a good record in one way and says what becomes of it.

An entry gets a good record as field -> JSON token (`{"amount": "33.10", "user_id": '"usr_000001"', ...}`), so it can
write what no JSON encoder would. A bad record ends in the dead letters with the named reason; an odd one is valid,
however strange, and lands; a tombstone is counted. Entries marked `bulky` are megabytes: tests use them, generated
streams leave them out (a partition of the embedded broker holds 5 MB).

Anything the contract calls wrong belongs here first: the tests of the decoder run over this list.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random

from ingestion.errors import Reason
from orchestration.sample.model import TRANSACTIONS, USER_EVENTS, Expected, SampleMessage, SampleSpec

Tokens = Mapping[str, str]
KeyValue = tuple[bytes | None, bytes | None]
Builder = Callable[[Random, Tokens], KeyValue]

# The field that is the Kafka key, so that all events of one thing share a partition.
KEY_FIELDS = {TRANSACTIONS: "transaction_id", USER_EVENTS: "user_id"}

# On spoilt messages of a generated stream, so that a dead letter explains itself.
DEFECT_HEADER = "sample-defect"


@dataclass(frozen=True)
class Defect:
    """One way a record can be bad or odd.

    `reason` and `field` are what the dead letter must name; `field` is None where the fault is the whole value's.
    """

    name: str
    build: Builder
    expected: Expected
    reason: Reason | None = None
    field: str | None = None
    bulky: bool = False


class DefectPicker:
    """Decides which slots of a stream are spoilt and how: every kind once, in a new order, before any kind again."""

    def __init__(self, feed: str, spec: SampleSpec) -> None:
        self._feed = feed
        self._share = spec.bad_share
        # Its own generator: the share of bad records leaves the draws for the good ones alone.
        self._rng = Random(f"{spec.seed}:{feed}:defects")
        self._deck: list[Defect] = []

    def strikes(self) -> bool:
        return self._rng.random() < self._share

    def message(self, good: Tokens, timestamp_ms: int) -> SampleMessage:
        """A spoilt version of the good record."""
        if not self._deck:
            self._deck = list(catalogue(self._feed))
        defect = self._deck.pop(int(self._rng.random() * len(self._deck)))
        key, value = defect.build(self._rng, good)
        headers = [(DEFECT_HEADER, defect.name.encode())]
        return SampleMessage(self._feed, key, value, timestamp_ms, headers, defect.name, defect.expected)


def catalogue(feed: str, *, bulky: bool = False) -> tuple[Defect, ...]:
    """The entries of a feed, the bulky ones only on request."""
    return tuple(defect for defect in _CATALOGUE[feed] if bulky or not defect.bulky)


def find_defect(feed: str, name: str) -> Defect:
    """The entry of that name; `KeyError` when the feed has none."""
    return _BY_NAME[feed][name]


def render(fields: Iterable[tuple[str, str]]) -> str:
    """A JSON object from field names and JSON tokens, in this order, repeated names kept."""
    return "{" + ", ".join(f'"{name}": {token}' for name, token in fields) + "}"


def _key(tokens: Tokens) -> bytes:
    field = "user_id" if "event_id" in tokens else "transaction_id"
    return tokens[field].strip('"').encode()


def _pick(rng: Random, choices: tuple[str, ...]) -> str:
    return choices[int(rng.random() * len(choices))]


def _with(field: str, *tokens: str) -> Builder:
    """One field's token replaced (or added at the end), by one of these."""

    def build(rng: Random, good: Tokens) -> KeyValue:
        return _key(good), render({**good, field: _pick(rng, tokens)}.items()).encode()

    return build


def _with_several(fields: Tokens) -> Builder:
    def build(rng: Random, good: Tokens) -> KeyValue:
        return _key(good), render({**good, **fields}.items()).encode()

    return build


def _appended(*fields: str) -> Builder:
    """Raw text of a member (`"amount": 1`) written after the last one."""

    def build(rng: Random, good: Tokens) -> KeyValue:
        return _key(good), (render(good.items())[:-1] + ", " + _pick(rng, fields) + "}").encode()

    return build


def _without(field: str) -> Builder:
    def build(rng: Random, good: Tokens) -> KeyValue:
        return _key(good), render((name, token) for name, token in good.items() if name != field).encode()

    return build


def _renamed(field: str, other: str) -> Builder:
    def build(rng: Random, good: Tokens) -> KeyValue:
        return _key(good), render((other if name == field else name, token) for name, token in good.items()).encode()

    return build


def _reshaped(change: Callable[[bytes], bytes]) -> Builder:
    """The bytes of the good record, changed."""

    def build(rng: Random, good: Tokens) -> KeyValue:
        return _key(good), change(render(good.items()).encode())

    return build


def _constant(*values: bytes) -> Builder:
    def build(rng: Random, good: Tokens) -> KeyValue:
        return _key(good), values[int(rng.random() * len(values))]

    return build


def _spliced(field: str, raw: bytes) -> Builder:
    """Raw bytes as the content of a text field."""

    def build(rng: Random, good: Tokens) -> KeyValue:
        return _key(good), render({**good, field: '"@@"'}.items()).encode().replace(b"@@", raw)

    return build


def _truncated(rng: Random, good: Tokens) -> KeyValue:
    # Cut between characters: half a character would be another fault.
    text = render(good.items())
    return _key(good), text[: 1 + int(rng.random() * (len(text) - 2))].encode()


def _tombstone(rng: Random, good: Tokens) -> KeyValue:
    return _key(good), None


def _null_key(rng: Random, good: Tokens) -> KeyValue:
    return None, render(good.items()).encode()


def _binary_key(rng: Random, good: Tokens) -> KeyValue:
    # As a schema-registry serializer would frame it: not UTF-8.
    return b"\x00\x00\xff\xfe" + _key(good), render(good.items()).encode()


def _repeated(field: str, alias: str | None = None, *, first: bool = False) -> Builder:
    """The field twice: itself and, as a JSON string, `alias`, which reads the same."""

    def build(rng: Random, good: Tokens) -> KeyValue:
        again = (alias or field, good[field])
        members = [again, *good.items()] if first else [*good.items(), again]
        return _key(good), render(members).encode()

    return build


def _reordered(rng: Random, good: Tokens) -> KeyValue:
    return _key(good), render(reversed(list(good.items()))).encode()


def _upper(field: str) -> Builder:
    def build(rng: Random, good: Tokens) -> KeyValue:
        return _key(good), render({**good, field: good[field].upper()}.items()).encode()

    return build


def _nested(levels: int) -> str:
    return "[" * levels + "]" * levels


def _pretty(value: bytes) -> bytes:
    return value.replace(b"{", b"{\n  ", 1).replace(b', "', b',\n  "')[:-1] + b"\n}"


def _dead(name: str, reason: Reason, build: Builder, field: str | None = None, *, bulky: bool = False) -> Defect:
    return Defect(name, build, "dead", reason, field, bulky)


def _odd(name: str, build: Builder, *, bulky: bool = False) -> Defect:
    return Defect(name, build, "landed", bulky=bulky)


# A text that would break a careless CSV or COPY writer.
_HOSTILE_TEXT = r'"a,\"b\"\r\n\\N\t\\.\nO' + "'" + r'Brien; --\u2028é漢😀"'


def _any_value(*, id_field: str, time_field: str, text_field: str) -> tuple[Defect, ...]:
    """Entries that hold for every feed: its UUID, its time and a text field of it."""
    return (
        Defect("tombstone", _tombstone, "tombstone"),
        _dead("empty_value", Reason.EMPTY_VALUE, _constant(b"")),
        _dead("invalid_utf8", Reason.INVALID_UTF8, _spliced(text_field, b"caf\xe9")),
        _dead("invalid_utf8_surrogate_bytes", Reason.INVALID_UTF8, _spliced(text_field, b"\xed\xa0\x80")),
        _dead("utf16_value", Reason.INVALID_UTF8, _reshaped(lambda v: b"\xff\xfe" + v.decode().encode("utf-16-le"))),
        _dead("bom", Reason.MALFORMED_JSON, _reshaped(lambda v: b"\xef\xbb\xbf" + v)),
        _dead("truncated_json", Reason.MALFORMED_JSON, _truncated),
        _dead("trailing_data", Reason.MALFORMED_JSON, _reshaped(lambda v: v + b"}")),
        # One message that a reader of JSON lines would take for two records, or for a good one and an empty one.
        _dead("two_objects_on_two_lines", Reason.MALFORMED_JSON, _reshaped(lambda v: v + b"\n" + v)),
        _dead("two_objects_on_one_line", Reason.MALFORMED_JSON, _reshaped(lambda v: v + b" " + v)),
        _dead("not_json", Reason.MALFORMED_JSON, _constant(b"hello", b"<html></html>", b"{'a': 1}")),
        _dead("raw_nul_in_text", Reason.MALFORMED_JSON, _spliced(text_field, b"a\x00b")),
        _dead("raw_newline_in_text", Reason.MALFORMED_JSON, _spliced(text_field, b"a\nb")),
        _dead("nesting_1000", Reason.MALFORMED_JSON, _with("nested", _nested(1000))),
        _dead("nesting_200000", Reason.MALFORMED_JSON, _with("nested", _nested(200_000)), bulky=True),
        _dead("array_at_top", Reason.NOT_AN_OBJECT, _reshaped(lambda v: b"[" + v + b"]")),
        _dead("scalar_at_top", Reason.NOT_AN_OBJECT, _constant(b'"text"', b"42", b"true", b"null")),
        _dead("unknown_field_twice", Reason.DUPLICATE_KEY, _appended('"channel": "web", "channel": "app"'), "channel"),
        _dead("nul_in_text", Reason.INVALID_TEXT, _with(text_field, r'"a\u0000b"'), text_field),
        _dead("nul_in_unknown_field", Reason.INVALID_TEXT, _with("note", r'"a\u0000b"'), "note"),
        _dead("lone_surrogate", Reason.INVALID_TEXT, _with(text_field, r'"a\ud800b"', r'"\udc00"'), text_field),
        _dead("lone_surrogate_in_unknown_field", Reason.INVALID_TEXT, _with("note", r'"a\ud83d"'), "note"),
        _dead("missing_" + time_field, Reason.MISSING_FIELD, _without(time_field), time_field),
        _dead(id_field + "_null", Reason.NULL_FIELD, _with(id_field, "null"), id_field),
        _dead(
            id_field + "_not_a_uuid",
            Reason.WRONG_TYPE,
            _with(
                id_field, '"12"', '""', '"0b6cbd6f3c1c4a519d0b2f4c5c1a7e11"', '"0b6cbd6f-3c1c-4a51-9d0b-2f4c5c1a7e1g"'
            ),
            id_field,
        ),
        _dead("null_user_id", Reason.NULL_FIELD, _with("user_id", "null"), "user_id"),
        _dead("missing_user_id", Reason.MISSING_FIELD, _without("user_id"), "user_id"),
        _dead("user_id_as_number", Reason.WRONG_TYPE, _with("user_id", "12"), "user_id"),
        _dead("user_id_pattern", Reason.PATTERN_MISMATCH, _with("user_id", '"user_12"', '"usr_1234567"'), "user_id"),
        _dead("user_id_empty", Reason.PATTERN_MISMATCH, _with("user_id", '""'), "user_id"),
        # Python's `$` matches before the newline.
        _dead("user_id_newline", Reason.PATTERN_MISMATCH, _with("user_id", r'"usr_000001\n"'), "user_id"),
        # Digits, but not of 0 to 9.
        _dead("user_id_wide_digits", Reason.PATTERN_MISMATCH, _with("user_id", '"usr_00000１"'), "user_id"),
        _dead("unknown_country", Reason.NOT_ACCEPTED, _with("country", '"ZZ"', '"us"', '"USA"'), "country"),
        _dead(
            "timestamp_without_zone",
            Reason.INVALID_TIMESTAMP,
            _with(time_field, '"2026-01-02T03:04:05"', '"2026-01-02T03:04:05.678901"'),
            time_field,
        ),
        _dead(
            "timestamp_impossible",
            Reason.INVALID_TIMESTAMP,
            _with(time_field, '"2026-13-01T00:00:00Z"', '"2026-02-30T00:00:00Z"', '"2026-01-02T25:00:00Z"'),
            time_field,
        ),
        _dead("timestamp_year_0", Reason.INVALID_TIMESTAMP, _with(time_field, '"0000-01-01T00:00:00Z"'), time_field),
        _dead(
            "timestamp_not_a_time",
            Reason.INVALID_TIMESTAMP,
            _with(time_field, '"yesterday"', '"2026-01-02"', '""'),
            time_field,
        ),
        _dead("timestamp_as_number", Reason.WRONG_TYPE, _with(time_field, "1767322800"), time_field),
        _dead(
            "timestamp_out_of_range",
            Reason.OUT_OF_RANGE,
            _with(time_field, '"9999-12-31T23:59:59Z"', '"1900-01-01T00:00:00Z"', '"2100-01-01T00:00:00Z"'),
            time_field,
        ),
        _odd("unknown_field", _with("channel", '"web"', "7", "null", '{"kind": "app", "version": [1, 2.50]}')),
        _odd("hostile_unknown_field", _with("note", _HOSTILE_TEXT)),
        _odd("nesting_200", _with("nested", _nested(200))),
        _odd("long_number_in_unknown_field", _with("score", "1" * 40 + "." + "9" * 40, "1E-30")),
        _odd("one_megabyte", _with("padding", '"' + "x" * 1_000_000 + '"'), bulky=True),
        _odd("pretty_printed", _reshaped(_pretty)),
        _odd("surrounding_whitespace", _reshaped(lambda v: b" \r\n\t" + v + b"\r\n")),
        _odd("fields_reordered", _reordered),
        _odd("uuid_in_capitals", _upper(id_field)),
        _odd("null_key", _null_key),
        _odd("binary_key", _binary_key),
    )


_JPY = {"currency": '"JPY"'}

_TRANSACTION_DEFECTS = (
    *_any_value(id_field="transaction_id", time_field="created_at", text_field="merchant_id"),
    _dead("empty_object", Reason.MISSING_FIELD, _constant(b"{}")),
    _dead("amount_nan", Reason.MALFORMED_JSON, _with("amount", "NaN")),
    _dead("amount_infinity", Reason.MALFORMED_JSON, _with("amount", "Infinity", "-Infinity")),
    _dead("amount_bad_number", Reason.MALFORMED_JSON, _with("amount", "01.50", ".5", "1.", "+1", "0x10", "1_000")),
    _dead("amount_2_to_the_70", Reason.OUT_OF_RANGE, _with("amount", str(2**70)), "amount"),
    # numeric(18,4) holds 14 digits before the point.
    _dead("amount_15_digits", Reason.OUT_OF_RANGE, _with("amount", "1" + "0" * 14, "9" * 15), "amount"),
    _dead("amount_40_digits", Reason.OUT_OF_RANGE, _with("amount", "1" * 40, "1" * 38 + ".25"), "amount"),
    _dead("amount_40_decimals", Reason.OUT_OF_RANGE, _with("amount", "1." + "1234567890" * 4), "amount"),
    # Written out, the second one would fill the memory.
    _dead("amount_huge_exponent", Reason.OUT_OF_RANGE, _with("amount", "1e400", "1e999999999"), "amount"),
    _dead("amount_tiny_exponent", Reason.OUT_OF_RANGE, _with("amount", "1e-400", "1e-999999999"), "amount"),
    _dead("amount_negative", Reason.OUT_OF_RANGE, _with("amount", "-12.34", "-1", "-0.01"), "amount"),
    _dead(
        "amount_more_decimals_than_declared",
        Reason.OUT_OF_RANGE,
        _with_several({"amount": "10.12345", "currency": '"USD"'}),
        "amount",
    ),
    _dead(
        "amount_more_decimals_than_currency",
        Reason.OUT_OF_RANGE,
        _with_several({"amount": "10.125", "currency": '"EUR"'}),
        "amount",
    ),
    _dead("amount_yen_with_decimals", Reason.OUT_OF_RANGE, _with_several({"amount": "100.5", **_JPY}), "amount"),
    _dead("amount_as_text", Reason.WRONG_TYPE, _with("amount", '"33.10"', '""'), "amount"),
    _dead("amount_as_boolean", Reason.WRONG_TYPE, _with("amount", "true", "false"), "amount"),
    _dead("amount_as_object", Reason.WRONG_TYPE, _with("amount", '{"value": 1}', "[1]"), "amount"),
    _dead("amount_null", Reason.NULL_FIELD, _with("amount", "null"), "amount"),
    _dead("amount_other_case", Reason.MISSING_FIELD, _renamed("amount", "Amount"), "amount"),
    _dead("amount_twice", Reason.DUPLICATE_KEY, _appended('"amount": 1.00'), "amount"),
    _dead("status_twice_first", Reason.DUPLICATE_KEY, _repeated("status", first=True), "status"),
    _dead("amount_twice_escaped", Reason.DUPLICATE_KEY, _repeated("amount", r"\u0061mount"), "amount"),
    _dead("currency_unknown", Reason.NOT_ACCEPTED, _with("currency", '"BTC"', '"usd"', '"XXX"', '""'), "currency"),
    _dead("status_unknown", Reason.NOT_ACCEPTED, _with("status", '"settled"', '"Completed"'), "status"),
    _dead("merchant_id_pattern", Reason.PATTERN_MISMATCH, _with("merchant_id", '"mer_1234"', '"12345"'), "merchant_id"),
    _odd("amount_exponent", _with_several({"amount": "1.25e2", "currency": '"USD"'})),
    _odd("amount_without_decimals", _with_several({"amount": "12", "currency": '"USD"'})),
    _odd("escaped_text", _with_several({"currency": r'"\u0055SD"', "status": r'"complete\u0064"', "amount": "7.50"})),
)

_USER_EVENT_DEFECTS = (
    *_any_value(id_field="event_id", time_field="occurred_at", text_field="full_name"),
    _dead("event_type_unknown", Reason.NOT_ACCEPTED, _with("event_type", '"deleted"', '"SIGNED_UP"'), "event_type"),
    _dead("event_type_missing", Reason.MISSING_FIELD, _without("event_type"), "event_type"),
    _dead("event_type_null", Reason.NULL_FIELD, _with("event_type", "null"), "event_type"),
    _dead("email_as_number", Reason.WRONG_TYPE, _with("email", "42", "true"), "email"),
    _dead("email_as_object", Reason.WRONG_TYPE, _with("email", '{"work": "a@example.com"}', "[]"), "email"),
    _dead("email_twice", Reason.DUPLICATE_KEY, _repeated("email"), "email"),
    _odd("full_name_empty", _with("full_name", '""')),
    _odd("full_name_hostile", _with("full_name", _HOSTILE_TEXT)),
    _odd("phone_null", _with("phone", "null")),
    _odd("phone_absent", _without("phone")),
)

_CATALOGUE = {TRANSACTIONS: _TRANSACTION_DEFECTS, USER_EVENTS: _USER_EVENT_DEFECTS}
_BY_NAME = {feed: {defect.name: defect for defect in entries} for feed, entries in _CATALOGUE.items()}

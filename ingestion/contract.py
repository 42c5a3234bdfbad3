"""The decoder at the door: the bytes of one record -> the cells of one raw row, or the reason it cannot be one.

Bytes that fit the declared contract become text cells Postgres parses without loss (numbers keep their digits, never
a float). Everything else is a `Rejection` that names the path inside the record; no record raises.

Two ways to one verdict. The quick way decodes straight into a struct; whatever it cannot vouch for (an unknown
field, a repeated key, a null, an escape it does not look into) goes the careful way, which finds the exact reason.
"""

import datetime as dt
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NoReturn

import msgspec

from ingestion.errors import Reason
from ingestion.feeds import AcceptedValues, ColumnSpec, ExactInCurrency, FeedSpec, Pattern, Range, Rule

# Postgres' stack bounds how deep jsonb may nest (some thousand levels); Python's parser less. Far above real records.
MAX_DEPTH = 500
# Texts, commas and brackets of a record: parsing takes some 300 bytes for each. Above any record of Kafka's usual 1 MB.
MAX_TOKENS = 1_000_000
TOKEN = re.compile(rb'"[^"]*"|[,\[{]')
# What Postgres' numeric can hold: digits before and after the decimal point as written, and the exponent itself.
MAX_INTEGER_DIGITS = 131_072
MAX_FRACTION_DIGITS = 16_383
MAX_EXPONENT = 2**30 - 2

# Values of one column whose verdict is remembered.
MAX_KNOWN = 65_536

# A key inside a path.
KEY = re.compile(r"\.(\w+)")
INTEGER = re.compile(r"-?[0-9]+")
PLAIN_NUMBER = re.compile(r"-?([0-9]+)(?:\.([0-9]+))?")
DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
# RFC 3339 with an offset Postgres takes (less than 16 hours).
TIMESTAMP = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ](?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:\.[0-9]{1,9})?)?"
    r"(?:Z|[+-](?:0[0-9]|1[0-5]):[0-5][0-9])"
)
TIMESTAMP_WITHOUT_ZONE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]+)?)?")

INTEGER_BOUNDS = {"integer": (-(2**31), 2**31 - 1), "bigint": (-(2**63), 2**63 - 1)}


@dataclass(frozen=True)
class Row:
    """A record that fits: one text cell a declared column (None is NULL), and the unknown fields as JSON text."""

    cells: list[str | None]
    extra: str | None


@dataclass(frozen=True)
class Rejection:
    """Why a record does not fit. `path` is a JSON path into it; `message` never quotes the record."""

    reason: Reason
    path: str
    message: str


class _RejectedError(Exception):
    """Carries a rejection out of the checks of one value."""

    def __init__(self, reason: Reason, message: str, path: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.path = path


# A check takes the JSON value's text (a string's content, or a number's digits) and returns the cell, or rejects.
Check = Callable[[str], str]


class Contract:
    """What one feed's records must look like, compiled for decoding."""

    def __init__(self, feed: FeedSpec) -> None:
        self.feed = feed
        self.version = feed.contract_version
        self._columns = [_Column(column) for column in feed.columns]
        self._by_name = {column.name: column for column in self._columns}
        self._exact = [
            (index, feed.columns.index(_named(feed, rule.currency_column)), rule.exponents, column.name)
            for index, column in enumerate(feed.columns)
            for rule in column.rules
            if isinstance(rule, ExactInCurrency)
        ]
        self._quick = _quick_decoder(self._columns)
        self._raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])

    def decode(self, value: bytes) -> Row | Rejection:
        """One record's bytes -> its row, or why not. Never raises for what the bytes hold."""
        try:
            struct = self._quick.decode(value)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return self._decode_carefully(value)
        cells: list[str | None] = []
        quotes = 0
        try:
            for column, item in zip(self._columns, msgspec.structs.astuple(struct), strict=True):
                if item.__class__ is str:
                    quotes += 4
                elif item is msgspec.UNSET:
                    if column.required:
                        return self._decode_carefully(value)
                    cells.append(None)
                    continue
                elif item is None or column.kind == "json":
                    return self._decode_carefully(value)
                else:
                    quotes += 2
                    if column.kind == "number":
                        item = str(item, "ascii")
                known = column.known
                cell = known.get(item)
                if cell is None:
                    cell = column.check(item)
                    if column.repeats:
                        if len(known) >= MAX_KNOWN:
                            known.clear()
                        known[item] = cell
                cells.append(cell)
            if self._exact:
                self._check_exact(cells)
        except (_RejectedError, UnicodeDecodeError):
            return self._decode_carefully(value)
        # A repeated key, an escaped quote or a nested object each add quotes: as many as there must be means none.
        if value.count(b'"') != quotes or b"\\u0000" in value:
            return self._decode_carefully(value)
        return Row(cells, None)

    def accepts(self, index: int, text: str) -> bool:
        """Whether a column takes a text's content, or a number's digits, as its cell just as it is."""
        try:
            return bool(self._columns[index].check(text) == text)
        except _RejectedError:
            return False

    def _decode_carefully(self, value: bytes) -> Row | Rejection:
        try:
            document = _parse(value)
            fields = self._raw_fields.decode(value)
            cells = [self._cell(column, document, fields) for column in self._columns]
            self._check_exact(cells)
            return Row(cells, self._extra(document, fields))
        except _RejectedError as rejected:
            return Rejection(rejected.reason, self._shown(rejected.path) or "$", rejected.message)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            # Python's parser took what msgspec's does not: never seen, and a record all the same.
            return Rejection(Reason.MALFORMED_JSON, "$", f"not valid JSON ({type(error).__name__})")

    def _shown(self, path: str) -> str:
        """A path with the declared names only: a key nobody declared may be anything, a person's id too."""
        return KEY.sub(lambda key: key[0] if key[1] in self._by_name else ".*", path)

    def _cell(self, column: "_Column", document: Mapping[str, Any], fields: Mapping[str, msgspec.Raw]) -> str | None:
        path = f"$.{column.name}"
        if column.name not in document:
            if not column.required:
                return None
            other = next((key for key in document if key.lower() == column.name and key.isidentifier()), None)
            hint = " (a field of that name in other case is there)" if other else ""
            raise _RejectedError(Reason.MISSING_FIELD, f"required field is missing{hint}", path)
        item = document[column.name]
        if item is None:
            if column.required:
                raise _RejectedError(Reason.NULL_FIELD, "required field is null", path)
            return None
        try:
            return column.from_json(item, fields[column.name])
        except _RejectedError as rejected:
            raise _RejectedError(rejected.reason, rejected.message, path) from None

    def _check_exact(self, cells: list[str | None]) -> None:
        for amount_index, currency_index, exponents, name in self._exact:
            amount, currency = cells[amount_index], cells[currency_index]
            if amount is None or currency is None:
                continue
            exponent = exponents.get(currency)
            if exponent is None:
                raise _RejectedError(Reason.NOT_ACCEPTED, "the amount's currency is not in ISO 4217", f"$.{name}")
            point = amount.find(".")
            if point < 0 or len(amount) - point - 1 <= exponent:
                continue
            decimals = len(amount[point + 1 :].rstrip("0"))
            if decimals > exponent:
                raise _RejectedError(
                    Reason.OUT_OF_RANGE, f"has {decimals} decimals, its currency has {exponent}", f"$.{name}"
                )

    def _extra(self, document: Mapping[str, Any], fields: Mapping[str, msgspec.Raw]) -> str | None:
        unknown = [name for name in document if name not in self._by_name]
        if not unknown:
            return None
        return "{" + ",".join(f"{_json_text(name)}:{str(bytes(fields[name]), 'utf-8')}" for name in unknown) + "}"


def _named(feed: FeedSpec, name: str) -> ColumnSpec:
    return next(column for column in feed.columns if column.name == name)


def _json_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class _Column:
    """One declared column: which JSON kind it takes, and the check of its value."""

    def __init__(self, spec: ColumnSpec) -> None:
        self.name = spec.name
        self.required = spec.required
        self.kind = {
            "integer": "number",
            "bigint": "number",
            "numeric": "number",
            "boolean": "boolean",
            "jsonb": "json",
        }.get(spec.type.name, "text")
        self.check: Any = _build_check(spec)
        # A check is a function of the value alone. Most columns repeat their values, keys and times do not.
        self.repeats = spec.type.name not in ("uuid", "timestamptz", "jsonb")
        self.known: dict[Any, str] = {}

    def from_json(self, item: Any, raw: msgspec.Raw) -> str:
        """The cell of a parsed value (`item`) whose exact text is `raw`."""
        kind = _kind_of(item)
        if self.kind == "json":
            return str(bytes(raw), "utf-8")
        if kind != self.kind:
            raise _RejectedError(Reason.WRONG_TYPE, f"expected {_say[self.kind]}, got {_say[kind]}")
        if kind == "boolean":
            return str(self.check(item))
        return str(self.check(str(item)))


_say = {
    "number": "a number",
    "text": "a text",
    "boolean": "true or false",
    "json": "any JSON value",
    "object": "an object",
    "array": "an array",
    "null": "null",
}


class _Number(str):
    """A JSON number's exact digits."""

    __slots__ = ()


def _kind_of(item: Any) -> str:
    if isinstance(item, _Number):
        return "number"
    if isinstance(item, str):
        return "text"
    if isinstance(item, bool):
        return "boolean"
    if item is None:
        return "null"
    return "object" if isinstance(item, dict) else "array"


def _quick_decoder(columns: list[_Column]) -> msgspec.json.Decoder[Any]:
    types: dict[str, Any] = {
        "text": str | None | msgspec.UnsetType,
        "boolean": bool | None | msgspec.UnsetType,
        "number": msgspec.Raw,
        "json": msgspec.Raw,
    }
    struct = msgspec.defstruct(
        "Record",
        # Numbered, and renamed to the column: a column may be named like a Python keyword.
        [(f"c{index}", types[column.kind], msgspec.UNSET) for index, column in enumerate(columns)],
        rename={f"c{index}": column.name for index, column in enumerate(columns)},
        forbid_unknown_fields=True,
        gc=False,
    )
    return msgspec.json.Decoder(struct)


class _Object(dict[str, Any]):
    """A parsed object that remembers a repeated key."""

    __slots__ = ("repeated",)

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated: str | None = None
        if len(self) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            self.repeated = next(key for key, count in counts.items() if count > 1)


def _refuse_constant(name: str) -> NoReturn:
    raise _RejectedError(Reason.MALFORMED_JSON, f"{name} is not a JSON value")


def _parse(value: bytes) -> Mapping[str, Any]:
    """Bytes -> one JSON object whose every text, number and depth Postgres can hold; rejects anything else."""
    if not value.strip():
        raise _RejectedError(Reason.EMPTY_VALUE, "the value is empty")
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _RejectedError(Reason.INVALID_UTF8, f"not UTF-8 at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise _RejectedError(Reason.MALFORMED_JSON, "begins with a byte order mark")
    if len(value) > MAX_TOKENS and _has_too_many_tokens(value):
        raise _RejectedError(Reason.MALFORMED_JSON, f"holds more than {MAX_TOKENS:,} texts, commas and brackets")
    try:
        document = json.loads(
            text,
            object_pairs_hook=_Object,
            parse_float=_Number,
            parse_int=_Number,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        raise _RejectedError(Reason.MALFORMED_JSON, f"{error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _RejectedError(Reason.MALFORMED_JSON, f"nested deeper than {MAX_DEPTH} levels") from None
    if not isinstance(document, _Object):
        raise _RejectedError(Reason.NOT_AN_OBJECT, f"expected an object, got {_say[_kind_of(document)]}")
    _inspect(document)
    return document


def _has_too_many_tokens(value: bytes) -> bool:
    """Whether parsing the value would take memory out of proportion; looks no further than it must."""
    without_escapes = value.replace(b"\\\\", b"").replace(b'\\"', b"")
    return next(itertools.islice(TOKEN.finditer(without_escapes), MAX_TOKENS, None), None) is not None


def _inspect(document: _Object) -> None:
    """Walk a document without recursion and reject what Postgres could not store."""
    todo: list[tuple[str, int, Any]] = [("$", 1, document)]
    while todo:
        path, depth, item = todo.pop()
        if isinstance(item, _Number):
            _inspect_number(item, path)
        elif isinstance(item, str):
            _inspect_text(item, path)
        elif isinstance(item, dict | list):
            if depth > MAX_DEPTH:
                raise _RejectedError(Reason.MALFORMED_JSON, f"nested deeper than {MAX_DEPTH} levels")
            if isinstance(item, list):
                todo.extend((f"{path}[{index}]", depth + 1, child) for index, child in enumerate(item))
                continue
            if isinstance(item, _Object) and item.repeated is not None:
                raise _RejectedError(Reason.DUPLICATE_KEY, "a key stands twice", f"{path}.{_shown(item.repeated)}")
            for key, child in item.items():
                _inspect_text(key, path)
                todo.append((f"{path}.{_shown(key)}", depth + 1, child))


def _shown(key: str) -> str:
    """A key as part of a path; nothing says that keys are short or printable."""
    return key if key.isidentifier() and len(key) <= 60 else "*"


def _inspect_text(text: str, path: str) -> None:
    if "\x00" in text:
        raise _RejectedError(Reason.INVALID_TEXT, "holds a NUL character, which Postgres cannot store", path)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _RejectedError(Reason.INVALID_TEXT, "holds half of a surrogate pair", path) from None


def _inspect_number(number: _Number, path: str) -> None:
    if len(number) < 40 and "e" not in number and "E" not in number:
        return
    _require_room(number, path)


def _require_room(number: str, path: str = "") -> None:
    """Postgres counts the digits as they are written: zero with an exponent can be beyond it, and 1 with many zeros."""
    mantissa, _, exponent = number.lower().partition("e")
    whole, _, part = mantissa.lstrip("-").partition(".")
    power = exponent.lstrip("+-0")
    shift = int(power[:12] or "0") * (-1 if exponent.startswith("-") else 1)
    significant = len((whole + part).lstrip("0"))
    if (
        abs(shift) > MAX_EXPONENT
        or len(part) - shift > MAX_FRACTION_DIGITS
        or (significant and significant - len(part) + shift > MAX_INTEGER_DIGITS)
    ):
        raise _RejectedError(Reason.OUT_OF_RANGE, "a number beyond what Postgres can hold", path)


def _digits(number: str) -> tuple[int, int]:
    """How many digits before and after the decimal point a JSON number needs when written out; 0.125 needs 0 and 3."""
    _, digits, power = Decimal(number).as_tuple()
    assert isinstance(power, int), "a JSON number is finite"
    count = len(digits)
    while count and digits[count - 1] == 0:
        count, power = count - 1, power + 1
    return (max(count + power, 0), max(-power, 0)) if count else (0, 0)


def _build_check(spec: ColumnSpec) -> Check | Callable[[bool], str]:
    rules = [_build_rule(rule, spec) for rule in spec.rules if not isinstance(rule, ExactInCurrency)]
    match spec.type.name:
        case "boolean":
            return lambda item: "true" if item else "false"
        case "uuid":
            return _then(_check_uuid, rules)
        case "integer" | "bigint":
            return _then(_build_integer_check(spec.type.name), rules)
        case "numeric":
            return _then(_build_numeric_check(spec.type.precision, spec.type.scale), rules)
        case "date":
            return _then(_check_date, rules)
        case "timestamptz":
            return _remember_days(_then(_check_timestamp, rules), spec)
        case _:
            return _then(None, rules)


def _then(check: Check | None, rules: list[Callable[[str], None]]) -> Check:
    if not rules:
        return check if check is not None else lambda text: text
    if len(rules) == 1 and check is not None:
        (rule,) = rules

        def check_one(text: str) -> str:
            cell = check(text)
            rule(cell)
            return cell

        return check_one

    def check_all(text: str) -> str:
        cell = check(text) if check is not None else text
        for rule in rules:
            rule(cell)
        return cell

    return check_all


def _check_uuid(text: str) -> str:
    # Five times quicker than a regular expression; fromhex skips blanks, so the length is looked at too.
    if len(text) == 36 and text[8] == text[13] == text[18] == text[23] == "-":
        try:
            if len(bytes.fromhex(text.replace("-", ""))) == 16:
                return text
        except ValueError:
            pass
    raise _RejectedError(Reason.WRONG_TYPE, "not a UUID")


def _build_integer_check(name: str) -> Check:
    low, high = INTEGER_BOUNDS[name]

    def check(digits: str) -> str:
        if not INTEGER.fullmatch(digits):
            raise _RejectedError(Reason.WRONG_TYPE, "expected a whole number")
        if len(digits) > 20 or not low <= int(digits) <= high:
            raise _RejectedError(Reason.OUT_OF_RANGE, f"beyond {name} ({low} to {high})")
        return digits

    return check


def _build_numeric_check(precision: int, scale: int) -> Check:
    room = precision - scale

    def check(number: str) -> str:
        plain = PLAIN_NUMBER.fullmatch(number)
        if plain is not None:
            whole, part = plain.groups()
            if (len(whole) <= room or whole == "0") and (part is None or len(part) <= scale):
                return number
        elif not (number[:1].isdigit() or number[:1] == "-"):
            raise _RejectedError(Reason.WRONG_TYPE, "expected a number")
        _require_room(number)
        integer, fraction = _digits(number)
        if integer > room or fraction > scale:
            raise _RejectedError(
                Reason.OUT_OF_RANGE,
                f"has {integer} digits and {fraction} decimals, numeric({precision},{scale}) holds {room} and {scale}",
            )
        return format(Decimal(number), "f") if (integer, fraction) != (0, 0) else "0"

    return check


def _check_date(text: str) -> str:
    try:
        if not DATE.fullmatch(text):
            raise ValueError
        dt.date.fromisoformat(text)
    except ValueError:
        raise _RejectedError(Reason.INVALID_TIMESTAMP, "not a date of the calendar (YYYY-MM-DD)") from None
    return text


def _check_timestamp(text: str) -> str:
    try:
        if not TIMESTAMP.fullmatch(text):
            zone = "has no time zone" if TIMESTAMP_WITHOUT_ZONE.fullmatch(text) else "not an RFC 3339 time"
            raise _RejectedError(Reason.INVALID_TIMESTAMP, zone)
        dt.datetime.fromisoformat(text)
    except ValueError:
        raise _RejectedError(Reason.INVALID_TIMESTAMP, "not a time of the calendar") from None
    return text


def _remember_days(check: Check, spec: ColumnSpec) -> Check:
    """The same check, quicker: a day that stands in the calendar and well inside the ranges is looked at once.

    Within such a day the form alone decides; an offset moves a time by less than a day.
    """
    if any(not isinstance(rule, Range) for rule in spec.rules):
        return check
    good_days: set[str] = set()
    has_form = TIMESTAMP.fullmatch

    def check_day_once(text: str) -> str:
        day = text[:10]
        if day in good_days and has_form(text):
            return text
        cell = check(text)
        try:
            middle = dt.date.fromisoformat(day)
            for other in (middle - dt.timedelta(days=2), middle + dt.timedelta(days=2)):
                check(f"{other.isoformat()}T00:00:00Z")
        except (_RejectedError, OverflowError):
            return cell
        if len(good_days) >= MAX_KNOWN:
            good_days.clear()
        good_days.add(day)
        return cell

    return check_day_once


def _build_rule(rule: Rule, spec: ColumnSpec) -> Callable[[str], None]:
    match rule:
        case AcceptedValues(values):

            def accepted(text: str) -> None:
                if text not in values:
                    raise _RejectedError(Reason.NOT_ACCEPTED, f"not one of the {len(values)} accepted values")

            return accepted
        case Pattern():
            matches = rule.compiled.search

            def pattern(text: str) -> None:
                if matches(text) is None:
                    raise _RejectedError(Reason.PATTERN_MISMATCH, f"does not match {rule.pattern}")

            return pattern
        case Range(minimum, maximum):
            parse = _range_parser(spec)

            def within(text: str) -> None:
                try:
                    value = parse(text)
                    low, high = minimum is None or value >= minimum, maximum is None or value <= maximum
                except OverflowError:
                    low, high = True, False
                if not low:
                    raise _RejectedError(Reason.OUT_OF_RANGE, f"below {minimum}")
                if not high:
                    raise _RejectedError(Reason.OUT_OF_RANGE, f"above {maximum}")

            return within
    raise AssertionError(f"no check for {rule}")


def _range_parser(spec: ColumnSpec) -> Callable[[str], Any]:
    match spec.type.name:
        case "date":
            return dt.date.fromisoformat
        case "timestamptz":
            return dt.datetime.fromisoformat
        case _:
            return Decimal

"""Rows in COPY's binary format, whole columns at a time: Postgres reads one in less than half the time of its text.

    columns -> bytes of fixed width or of any -> rows: number of columns, then for each its length and its bytes

The format is that of the types' send and receive functions (https://www.postgresql.org/docs/current/sql-copy.html,
"Binary Format"): numbers big-endian, times in microseconds since 2000, a `numeric` as digits to the base of 10,000.

What has no exact form here (a wide number, a time finer than microseconds) raises `NoBinaryFormError`, and its batch is
written as text: Postgres then reads what the message said, as it always did.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

# Of Arrow's decimals.
MAX_PRECISION = 38
# To the base of 10,000.
DIGITS_OF_64_BITS = 5
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECONDS_TO_EPOCH = int(_EPOCH.timestamp()) * 1_000_000
_DAYS_TO_EPOCH = (_EPOCH.date() - datetime(1970, 1, 1, tzinfo=UTC).date()).days
_NULL = struct.pack(">i", -1)

# An Arrow array; Arrow has no type annotations.
Column = Any


class NoBinaryFormError(Exception):
    """A column holds what this module has no exact form for."""


@dataclass(frozen=True)
class _Fixed:
    """A column without nulls whose values have one width: its bytes, row after row."""

    width: int
    data: bytes | bytearray


def binary_rows(types: Sequence[str], columns: Sequence[Column | str | None]) -> memoryview:
    """The rows, without the header and trailer of a file.

    Args:
        types: SQL type of each column, as declared.
        columns: Arrow arrays, of text as Postgres reads it or of numbers, times and bytes themselves; or one text (or
            None) for every row.

    Raises:
        NoBinaryFormError: write them as text.
    """
    rows = max(len(column) for column in columns if isinstance(column, pa.Array))
    line = _Line(rows, len(columns))
    try:
        for type_, column in zip(types, columns, strict=True):
            if not isinstance(column, pa.Array):
                line.add_constant(None if column is None else _encode(type_, pa.array([column], pa.string())))
            elif column.null_count == rows:
                line.add_constant(None)
            else:
                line.add(column, _encode(type_, column))
    except pa.ArrowInvalid as error:
        raise NoBinaryFormError from error
    return line.join()


class _Line:
    """Rows being put together: bytes every row has at the same place, then a value of any width, and so on."""

    def __init__(self, rows: int, columns: int) -> None:
        self._rows = rows
        self._pieces: list[Column] = []
        # Of the stretch of fixed width under way: what is the same in every row, and what is not, with its place.
        self._same = bytearray(struct.pack(">h", columns))
        self._differing: list[tuple[int, _Fixed]] = []

    def add_constant(self, value: "_Fixed | Column | None") -> None:
        if value is None:
            self._same += _NULL
        else:
            data = bytes(value.data) if isinstance(value, _Fixed) else value[0].as_py()
            self._same += struct.pack(">i", len(data)) + data

    def add(self, column: Column, values: "_Fixed | Column") -> None:
        if isinstance(values, _Fixed):
            if not column.null_count:
                self._same += struct.pack(">i", values.width)
                self._differ(values)
                return
            values = _as_binary(values, self._rows)
        lengths = pc.binary_length(values)
        if column.null_count:
            present = column.is_valid()
            lengths = pc.if_else(present, lengths, pa.scalar(-1, pa.int32()))
            values = pc.if_else(present, values, b"")
        self._differ(_Fixed(4, _big_endian("i", lengths)))
        self._end_stretch()
        self._pieces.append(values)

    def _differ(self, values: _Fixed) -> None:
        self._differing.append((len(self._same), values))
        self._same += bytes(values.width)

    def _end_stretch(self) -> None:
        width = len(self._same)
        stretch = self._same * self._rows
        for place, values in self._differing:
            for byte in range(values.width):
                stretch[place + byte :: width] = values.data[byte :: values.width]
        self._pieces.append(_as_binary(_Fixed(width, stretch), self._rows))
        self._same, self._differing = bytearray(), []

    def join(self) -> memoryview:
        self._end_stretch()
        joined = pc.binary_join_element_wise(*self._pieces, b"")
        return memoryview(joined.buffers()[2])[: pc.sum(pc.binary_length(joined)).as_py()]


def _as_binary(values: _Fixed, rows: int) -> Column:
    """As Arrow's bytes of any width."""
    fixed = pa.Array.from_buffers(pa.binary(values.width), rows, [None, pa.py_buffer(values.data)])
    return fixed.cast(pa.binary())


def _big_endian(code: str, column: Column) -> bytes:
    """The numbers of a column; what stands for a null is not looked at."""
    numbers = array(code)
    start = column.offset * numbers.itemsize
    numbers.frombytes(memoryview(column.buffers()[1])[start : start + len(column) * numbers.itemsize])
    numbers.byteswap()
    return numbers.tobytes()


def _encode(type_: str, column: Column) -> "_Fixed | Column":
    """The values of a column as bytes, without their lengths; of a null, anything."""
    name, _, rest = type_.partition("(")
    match name:
        case "text":
            return column.cast(pa.binary())
        case "bytea":
            return column
        case "jsonb":
            return pc.binary_join_element_wise(b"\x01", column.cast(pa.binary()), b"")
        case "boolean":
            return _Fixed(1, column.cast(pa.bool_()).cast(pa.int8()).buffers()[1].to_pybytes()[: len(column)])
        case "integer":
            return _Fixed(4, _big_endian("i", column.cast(pa.int32())))
        case "bigint":
            return _Fixed(8, _big_endian("q", column.cast(pa.int64())))
        case "date":
            days = column.cast(pa.date32()).cast(pa.int32())
            return _Fixed(4, _big_endian("i", pc.subtract(days, pa.scalar(_DAYS_TO_EPOCH, pa.int32()))))
        case "timestamptz":
            times = column.cast(pa.timestamp("us", "UTC")).cast(pa.int64())
            return _Fixed(8, _big_endian("q", pc.subtract(times, _MICROSECONDS_TO_EPOCH)))
        case "uuid":
            return _encode_uuids(column)
        case "numeric" if rest:
            precision, scale = map(int, rest.rstrip(")").split(","))
            return _encode_numbers(column, precision, scale)
    raise NoBinaryFormError(type_)


def _encode_uuids(column: Column) -> _Fixed:
    digits = pc.replace_substring(pc.fill_null(column, "0" * 32), "-", "")
    lengths = pc.min_max(pc.binary_length(digits))
    if (lengths["min"].as_py(), lengths["max"].as_py()) != (32, 32):
        raise NoBinaryFormError("uuid")
    try:
        return _Fixed(16, bytes.fromhex(digits.buffers()[2].to_pybytes()[: 32 * len(digits)].decode()))
    except ValueError as error:
        raise NoBinaryFormError("uuid") from error


def _encode_numbers(column: Column, precision: int, scale: int) -> _Fixed:
    """Digits to the base of 10,000, the same number of them for every row; Postgres drops zeros at either end."""
    behind = -(-scale // 4)
    if 4 * behind > MAX_PRECISION:
        raise NoBinaryFormError("a number with so many decimals")
    precision = min(precision + 4 * behind - scale, MAX_PRECISION)
    decimals = pc.fill_null(column, "0").cast(pa.decimal128(precision, 4 * behind))
    halves = array("q")
    start = 16 * decimals.offset
    halves.frombytes(memoryview(decimals.buffers()[1])[start : start + 16 * len(decimals)])
    numbers, above = (
        pa.Array.from_buffers(pa.int64(), len(decimals), [None, pa.py_buffer(halves[half::2])]) for half in (0, 1)
    )
    negative = pc.less(numbers, 0)
    if not pc.all(pc.equal(above, pc.negate(negative.cast(pa.int64())))).as_py():
        raise NoBinaryFormError("a number of more than 64 bits")
    count = min(-(-precision // 4), DIGITS_OF_64_BITS)
    rest = pc.abs_checked(numbers)
    parts = [(4, pc.if_else(negative, pa.scalar(0x4000, pa.int16()), pa.scalar(0, pa.int16())))]
    for place in range(count - 1, -1, -1):
        quotient = pc.divide(rest, 10_000)
        parts.append((8 + 2 * place, pc.subtract(rest, pc.multiply(quotient, 10_000)).cast(pa.int16())))
        rest = quotient
    width = 8 + 2 * count
    # Digits, weight of the first of them, sign, decimals shown; then the digits.
    data = bytearray(struct.pack(f">hhhh{2 * count}x", count, count - behind - 1, 0, scale) * len(column))
    for place, part in parts:
        big_endian = _big_endian("h", part)
        data[place::width], data[place + 1 :: width] = big_endian[::2], big_endian[1::2]
    return _Fixed(width, data)

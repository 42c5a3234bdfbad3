"""What COPY reads, read back in Python by the rules of the Postgres manual: text, and binary with the types' own bytes.

The other half of `ingestion.package` and `ingestion.binary`, written without a look at them.
"""

import re
import struct
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

SIGNATURE = b"PGCOPY\n\xff\r\n\0"
_SIGNS = {0x0000: 0, 0x4000: 1}


def read_text(data: bytes) -> list[tuple[str | None, ...]]:
    """The cells of lines in COPY's text format."""
    escapes = {"t": "\t", "n": "\n", "r": "\r", "\\": "\\"}
    lines = data.decode().split("\n")
    assert lines.pop() == "", "the last line is ended"
    assert "\r" not in data.decode()
    return [
        tuple(
            None if field == "\\N" else re.sub(r"\\(.)", lambda found: escapes[found[1]], field)
            for field in line.split("\t")
        )
        for line in lines
    ]


def read_binary(data: bytes) -> list[tuple[bytes | None, ...]]:
    """The fields of rows in COPY's binary format, with its header and trailer."""
    assert data.startswith(SIGNATURE)
    flags, extension = struct.unpack_from(">ii", data, len(SIGNATURE))
    assert (flags, extension) == (0, 0)
    place = len(SIGNATURE) + 8
    rows = []
    while True:
        (columns,) = struct.unpack_from(">h", data, place)
        place += 2
        if columns == -1:
            assert place == len(data), "nothing behind the trailer"
            return rows
        row: list[bytes | None] = []
        for _ in range(columns):
            (length,) = struct.unpack_from(">i", data, place)
            place += 4
            row.append(None if length == -1 else data[place : place + length])
            place += max(length, 0)
        rows.append(tuple(row))


def value_of_text(type_: str, text: str | None) -> Any:
    """The value Postgres makes of a cell."""
    if text is None:
        return None
    match type_.partition("(")[0]:
        case "boolean":
            return {"true": True, "false": False}[text]
        case "integer" | "bigint":
            return int(text)
        case "numeric":
            return Decimal(text)
        case "date":
            return date.fromisoformat(text)
        case "timestamptz":
            return datetime.fromisoformat(text).astimezone(UTC)
        case "uuid":
            return UUID(text)
        case "bytea":
            return bytes.fromhex(text.removeprefix("\\x"))
    return text


def value_of_bytes(type_: str, data: bytes | None) -> Any:
    """The value Postgres makes of a binary field."""
    if data is None:
        return None
    match type_.partition("(")[0]:
        case "boolean":
            return {b"\1": True, b"\0": False}[data]
        case "integer":
            return struct.unpack(">i", data)[0]
        case "bigint":
            return struct.unpack(">q", data)[0]
        case "numeric":
            return _number(data)
        case "date":
            return date(2000, 1, 1) + timedelta(days=struct.unpack(">i", data)[0])
        case "timestamptz":
            return datetime(2000, 1, 1, tzinfo=UTC) + timedelta(microseconds=struct.unpack(">q", data)[0])
        case "uuid":
            return UUID(bytes=data)
        case "bytea":
            return data
        case "jsonb":
            assert data[0] == 1, "the version of jsonb's binary form"
            return data[1:].decode()
    return data.decode()


def _number(data: bytes) -> Decimal:
    count, weight, sign, _ = struct.unpack_from(">hhHh", data)
    digits: Sequence[int] = struct.unpack_from(f">{count}h", data, 8)
    assert len(data) == 8 + 2 * count
    assert all(0 <= digit < 10_000 for digit in digits)
    whole = sum(digit * 10_000 ** (count - 1 - index) for index, digit in enumerate(digits))
    value = Decimal((0, tuple(map(int, str(whole))), 4 * (weight - count + 1)))
    return value.copy_negate() if _SIGNS[sign] else value

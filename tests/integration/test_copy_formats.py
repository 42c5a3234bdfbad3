"""Postgres makes the same rows of COPY's binary format as of its text format; and a twin that is caught."""

import io
import random
from collections.abc import Sequence
from typing import Any

import psycopg2.extensions
import pyarrow as pa
import pytest

import ingestion.binary
from ingestion.binary import binary_rows
from ingestion.package import BINARY_HEADER, BINARY_TRAILER, copy_lines
from tests.unit.test_batch import BINARY_CELLS

ROWS = 500


def make_columns() -> list[Any]:
    rng = random.Random(4)
    return [pa.array(rng.choices(cells, k=ROWS), pa.string()) for cells in BINARY_CELLS.values()]


def count_differences(connection: psycopg2.extensions.connection, columns: Sequence[Any]) -> int:
    """Rows that are in one of the tables only, one filled from text and the other from binary."""
    types = list(BINARY_CELLS)
    declared = ", ".join(f"c{index} {type_}" for index, type_ in enumerate(types))
    shown = ", ".join(f"c{index}::text" for index in range(len(types)))
    text, binary = bytes(copy_lines(columns)), bytes(binary_rows(types, columns))
    with connection.cursor() as cursor:
        for name, options, data in (
            ("as_text", "text", text),
            ("as_binary", "binary", BINARY_HEADER + binary + BINARY_TRAILER),
        ):
            cursor.execute(f"create temp table {name} (place integer generated always as identity, {declared})")
            names = ", ".join(f"c{index}" for index in range(len(types)))
            cursor.copy_expert(f"copy {name} ({names}) from stdin (format {options})", io.BytesIO(data))
        cursor.execute(
            f"select count(*) from (select place, {shown} from as_text) as a "
            f"full join (select place, {shown} from as_binary) as b on a = b where a is null or b is null"
        )
        row = cursor.fetchone()
        cursor.execute("select count(*) from as_text")
        assert cursor.fetchone() == (ROWS,)
        cursor.execute("drop table as_text, as_binary")
    assert row is not None
    return int(row[0])


def test_both_formats_land_the_same_rows(connection: psycopg2.extensions.connection) -> None:
    columns = make_columns()
    assert min(column.null_count for column in columns) > 0
    assert count_differences(connection, columns) == 0


def test_twin_a_time_off_by_a_microsecond_is_seen(
    connection: psycopg2.extensions.connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingestion.binary, "_MICROSECONDS_TO_EPOCH", ingestion.binary._MICROSECONDS_TO_EPOCH + 1)
    columns = make_columns()
    times = columns[list(BINARY_CELLS).index("timestamptz")]
    assert count_differences(connection, columns) == 2 * (ROWS - times.null_count)

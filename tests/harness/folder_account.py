"""What became of a folder's files, told from the files and the tables alone: nothing of the loader is asked.

    assert find_discrepancies(query, folder) == []

Every file is landed once or set aside once, under the latest position its path was given; what is set aside has the
file's bytes, what landed has the values Python's own parser reads there, digit by digit; the ledger adds up to both.
"""

import datetime as dt
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

Query = Callable[..., list[tuple]]

SCHEMA, TABLE = "raw_payments", "transaction_created"
COLUMNS = ("transaction_id", "amount", "currency", "user_id", "merchant_id", "country", "created_at", "status")
_COMMITTED = f"_dlt_load_id in (select load_id from {SCHEMA}._dlt_loads)"
_OF_FILES = f"_stream_id in (select stream_id from {SCHEMA}._streams where kind = 'files')"


def read_folder(folder: Path) -> dict[bytes, bytes]:
    """Path below the folder -> bytes, of every file; links to folders are not followed."""
    root = os.fsencode(folder)
    found = {}
    for place, _, names in os.walk(root):
        for name in names:
            whole = os.path.join(place, name)
            if os.path.isfile(whole):
                with open(whole, "rb") as file:
                    found[os.path.relpath(whole, root)] = file.read()
    return found


def find_discrepancies(query: Query, folder: Path) -> list[str]:
    """What is wrong, in words; empty when every file is accounted for. For one folder read into the payments."""
    files = read_folder(folder)
    placed: dict[bytes, list[tuple[int, str, Any]]] = defaultdict(list)
    rows = query(
        f"select _kafka_key, _kafka_offset, {', '.join(COLUMNS)}, _extra::text from {SCHEMA}.{TABLE} "
        f"where {_COMMITTED} and {_OF_FILES}"
    )
    for path, offset, *values in rows:
        placed[bytes(path)].append((offset, "landed", values))
    letters = query(
        f"select raw_key, _kafka_offset, raw_value from {SCHEMA}._dead_letters where {_COMMITTED} and {_OF_FILES} "
        f"and (replay_load_id in (select load_id from {SCHEMA}._dlt_loads)) is not true"
    )
    for path, offset, value in letters:
        placed[bytes(path)].append((offset, "dead", bytes(value)))

    wrong = [f"{path!r} is in no table" for path in files.keys() - placed.keys()]
    positions = sorted(offset for places in placed.values() for offset, _, _ in places)
    if positions != list(range(len(positions))):
        wrong.append("positions are missing or given twice")
    ((offered, landed, dead),) = query(
        f"select coalesce(sum(offered), 0)::int, coalesce(sum(landed), 0)::int, coalesce(sum(dead), 0)::int "
        f"from {SCHEMA}._ledger where {_COMMITTED} "
        f"and stream_id in (select stream_id from {SCHEMA}._streams where kind = 'files')"
    )
    if (offered, landed, dead) != (len(rows) + len(letters), len(rows), len(letters)):
        wrong.append(f"the ledger says {landed} + {dead} of {offered}, there are {len(rows)} + {len(letters)}")
    for path, places in placed.items():
        places.sort(key=lambda place: place[0])
        if any(before[1:] == after[1:] for before, after in itertools.pairwise(places)):
            wrong.append(f"{path!r} stands twice with the same content")
        if path in files:
            _, kind, what = places[-1]
            wrong += [f"{path!r} {said}" for said in _compare(kind, what, files[path])]
    return sorted(wrong)


def _compare(kind: str, what: Any, content: bytes) -> Iterator[str]:
    if kind == "dead":
        if what != content:
            yield "was set aside with other bytes"
        return
    document = _parse(content.decode("utf-8"))
    *values, extra = what
    for name, value in zip(COLUMNS, values, strict=True):
        expected = document.pop(name)
        if isinstance(value, dt.datetime):
            expected = dt.datetime.fromisoformat(expected)
        if value != expected:
            yield f"landed with another {name}"
    if (_parse(extra) if extra is not None else {}) != document:
        yield "landed with other unknown fields"


def _parse(text: str) -> Any:
    return json.loads(text, parse_int=Decimal, parse_float=Decimal)

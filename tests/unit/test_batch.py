"""Batches: the verdicts of `Contract.decode` on every record, whatever is beside it; and the twins that are caught.

The values: generated samples, the whole catalogue of known-bad records, records of every type and rule, all of these
spoilt at random. Each is judged in batches of several make-ups and by itself.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from confluent_kafka import Message

from ingestion.batch import BatchDecoder, MessageBatch, split_by_size, times_of, to_re2
from ingestion.binary import NoBinaryFormError, binary_rows
from ingestion.contract import Contract, Rejection, Row
from ingestion.ddl import raw_columns
from ingestion.feeds import (
    AcceptedValues,
    ColumnSpec,
    ColumnType,
    ExactInCurrency,
    FeedSpec,
    KafkaOrigin,
    Pattern,
    Range,
    Rule,
)
from ingestion.ledger import Stream, Writer
from ingestion.package import (
    BINARY_HEADER,
    BINARY_TRAILER,
    Package,
    cell,
    copy_line,
    copy_lines,
    headers_json,
    hex_texts,
)
from ingestion.profile import Profile
from ingestion.topic import Tally, decode_messages
from orchestration.sample import FEEDS, TRANSACTIONS, USER_EVENTS, SampleSpec, generate
from orchestration.sample.defects import catalogue
from tests.harness.copy_formats import SIGNATURE, read_binary, read_text, value_of_bytes, value_of_text

EVERY_TYPE = "raw_tests.every_type"
START = datetime(2026, 1, 5, tzinfo=UTC)


def column(name: str, type_: ColumnType, *rules: Rule, required: bool = False) -> ColumnSpec:
    return ColumnSpec(name, type_, required, rules, pii=False, subject_key=False)


EXPONENTS = {"USD": 2, "JPY": 0, "KWD": 3, "CLF": 4}
COLUMNS = (
    column("yes", ColumnType("boolean"), required=True),
    column("maybe", ColumnType("boolean")),
    column("count", ColumnType("integer"), Range(Decimal(-5), Decimal("100.5"))),
    column("size", ColumnType("integer")),
    column("number", ColumnType("bigint"), required=True),
    column("ratio", ColumnType("numeric", 10, 2), Range(Decimal("-1.005"), Decimal("99.5"))),
    column("part", ColumnType("numeric", 3, 3)),
    column("wide", ColumnType("numeric", 60, 3)),
    column("price", ColumnType("numeric", 12, 3), ExactInCurrency("currency", EXPONENTS)),
    column("cost", ColumnType("numeric", 50, 4), Range(Decimal(0), None), ExactInCurrency("currency", EXPONENTS)),
    column("currency", ColumnType("text")),
    column("day", ColumnType("date"), Range(date(2000, 1, 1), None)),
    column("at", ColumnType("timestamptz")),
    column("since", ColumnType("timestamptz"), Range(datetime(2000, 1, 1, tzinfo=UTC), None)),
    column("id", ColumnType("uuid")),
    column("class", ColumnType("text"), AcceptedValues(frozenset({"a", "b", ""})), Pattern("^[a-b]?$")),
    column("email", ColumnType("text"), Pattern("^[^@ ]+@[a-z.]+$")),
    column("odd", ColumnType("text"), Pattern(r"^(?=.)\S+$")),
    column("note", ColumnType("text")),
    column("more", ColumnType("jsonb")),
)
FEED_OF_EVERY_TYPE = FeedSpec("raw_tests", "every_type", KafkaOrigin("every_type", "json"), COLUMNS, "tests", "-", 1)
TOKENS: dict[str, tuple[list[str], list[str]]] = {
    # field: tokens that fit, tokens that do not (or may not)
    "yes": (["true", "false"], ["null", '"true"', "1"]),
    "maybe": (["true", "false", "null"], ['""', "0"]),
    "count": (["0", "-5", "100", "-0"], ["101", "-6", "1.0", "1e1", "9" * 30, '"1"']),
    "size": (["0", "2147483647", "-2147483648"], ["2147483648", "-2147483649", "null", "[]", '{"a": "b"}']),
    "number": (["12", "9223372036854775807", "-9223372036854775808"], ["9223372036854775808", "null", "01", "1E0"]),
    "ratio": (["1.5", "-1", "99.5", "99.50", "-1.00"], ["-1.01", "99.51", "1.505", "99.500", "1e-1", "-1.005", '"1"']),
    "part": (["null"], ["0.125", "1", "0", "0.1250", ".5"]),
    "wide": (["1" * 50 + ".125", "0", "-1.5"], ["1" * 58, "1e3", "0.12345"]),
    "price": (["1.5", "10", "10.0", "10.12", "10.123", "10.100"], ["10.1234", "1e2", "-0", "null"]),
    "cost": (["1.5", "0", "10.1000", "10.12"], ["-1", "10.123", "10.1234", "10.12345"]),
    "currency": (['"USD"', '"JPY"', '"KWD"', '"CLF"', "null"], ['"XXX"', '""', "1"]),
    "day": (['"2026-01-02"', '"2000-01-01"', "null"], ['"1999-12-31"', '"2026-02-30"', '"20260102"', '""']),
    "at": (
        ['"2026-01-02T03:04:05Z"', '"2026-01-02 03:04+05:30"', '"1970-01-01T00:00:00.123456789Z"'],
        ['"0001-01-01T00:00:00Z"', '"9999-12-31T23:59:59-01:00"', '"2026-W01-1T00:00:00Z"', '"2026-01-02T24:00:00Z"'],
    ),
    "since": (
        ['"2026-01-02T03:04:05Z"', '"2026-01-02T03:04:05.5-03:30"'],
        ['"2000-01-01T00:00:00Z"', '"2000-01-01T05:00:00+05:30"', '"1999-12-31T23:59:59Z"', '"2026-02-29T00:00:00Z"'],
    ),
    "id": (
        ['"6f9619ff-8b86-4011-b42d-00c04fc964ff"', '"6F9619FF-8B86-4011-B42D-00C04FC964FF"'],
        ['"6f9619ff-8b86-4011-b42d-00c04fc964f "', '"{6f9619ff-8b86-4011-b42d-00c04fc964f}"', '""'],
    ),
    "class": (['"a"', '"b"', '""', "null"], ['"c"', '"A"', '"a\\n"', '"a "']),
    "email": (['"a@b.c"', '"é漢😀@b"', '"\\u00e9@b"', "null"], ['"a@"', '"a@b.c\\n"', '"a@b@c"', '"\\""', '""']),
    "odd": (['"a"', '"é,b"'], ['""', '"a b"', '"\\u00a0"', '"a\\n"']),
    "note": (
        ['""', '" "', '"NULL"', '"\\\\N"', '"a,b"', '"\\\\."', '"\\u0022\\n\\r\\t"', '"\\u2028é漢😀"', '"😀"', "null"],
        ['"\\u0000"', '"a\\u0000b"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\\\u0000"', '"\x00"', '"\x01"', '"a\nb"', "7"],
    ),
    "more": (["null"], ['{"a": [1, 2.50]}', '"text"', "1e400", "[" * 600 + "]" * 600]),
}


@pytest.fixture
def feed(request: pytest.FixtureRequest, feed_named: Callable[[str], FeedSpec]) -> FeedSpec:
    return FEED_OF_EVERY_TYPE if request.param == EVERY_TYPE else feed_named(request.param)


every_feed = pytest.mark.parametrize("feed", [*FEEDS, EVERY_TYPE], indirect=True)


def of_every_type(rng: random.Random, bad_share: float) -> bytes:
    """A record of some of the fields; now and then one that does not fit, a repeated or an unknown one."""
    names = [name for name in TOKENS if name in ("yes", "number") or rng.random() < 0.7]
    if rng.random() < 0.2:
        rng.shuffle(names)
    members = [(name, rng.choice(TOKENS[name][rng.random() < bad_share / 5])) for name in names]
    if rng.random() < bad_share:
        extra = rng.choice([*members, ("note", '"x"'), ("n\\u006fte", '"x"'), ("yes", "null"), ("other", "{}")])
        members.insert(rng.randrange(len(members) + 1), extra)
    comma, colon = rng.choice([(", ", ": "), (",", ":"), (" ,\n", "\t: ")])
    return ("{" + comma.join(f'"{name}"{colon}{token}' for name, token in members) + "}").encode()


def ordinary(feed: FeedSpec, count: int, seed: int = 5) -> list[bytes]:
    """Records that fit."""
    if feed.name == EVERY_TYPE:
        rng = random.Random(seed)
        return [of_every_type(rng, 0.0) for _ in range(count)]
    spec = SampleSpec(records=count, seed=seed, start=START, bad_share=0.0)
    return [message.value for message in generate(spec, feed.name) if message.value is not None]


def mutate(rng: random.Random, value: bytes) -> bytes:
    """A record spoilt somewhere: bytes changed, dropped, repeated, or swapped for awkward ones."""
    data = bytearray(value)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(data)) if data else 0
        match rng.randrange(6):
            case 0:
                data[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[place : place + rng.randint(1, 12)]
            case 2:
                data[place:place] = data[place : place + rng.randint(1, 40)]
            case 3:
                awkward = [b'"', b"\\", b"\\u0000", b"\\ud800", b"\\u0022", b"{", b"null", b"1e9", b",", b"\n", b"\x00"]
                data[place:place] = rng.choice(awkward)
            case 4:
                # A member again, which any parser that keeps one of them would not notice.
                members = re.findall(rb'"\w+"\s*:\s*(?:"[^"]*"|[-\w.]+)', bytes(data))
                if members:
                    data[1:1] = rng.choice(members) + b","
            case _:
                part = rng.choice([b"12", b"USD", b"usr_", b"2026", b"Z", b":", b"completed", b"-", b"T", b".", b'""'])
                data = data.replace(part, rng.choice([b"", b"0", b"-1", b"1E2", b"JPY", b"null", b"true", b"[]"]), 1)
    return bytes(data)


def corpus(feed: FeedSpec, count: int, seed: int = 11) -> list[bytes | None]:
    """Records good and bad in every known way, and spoilt at random."""
    rng = random.Random(seed)
    values: list[bytes | None]
    if feed.name == EVERY_TYPE:
        values = [of_every_type(rng, rng.choice([0, 0.02, 0.5])) for _ in range(count // 2)]
    else:
        values = []
        for share in (0.0, 0.03, 0.5):
            spec = SampleSpec(records=count // 6, seed=seed, start=START, bad_share=share)
            values += [message.value for message in generate(spec, feed.name)]
    good = ordinary(feed, 300, seed)
    values += [mutate(rng, rng.choice(good)) for _ in range(count // 2)]
    rng.shuffle(values)
    return values


def judge(decoder: BatchDecoder, values: Sequence[bytes | None]) -> list[Row | Rejection | None]:
    """The verdicts of a batch, one a value; None where there is none. Nothing may have two."""
    decoded = decoder.decode(values)
    verdicts: list[Row | Rejection | None] = [None] * len(values)
    (indices,) = decoded.select([pa.array(range(len(values)))])
    rows = zip(*(column.to_pylist() for column in decoded.cells), strict=True)
    for index, cells in zip(indices.to_pylist(), rows, strict=True):
        verdicts[index] = Row(list(cells), None)
    for index, verdict in decoded.others:
        assert verdicts[index] is None, "a record has one verdict"
        verdicts[index] = verdict
    return verdicts


def assert_same_verdicts(feed: FeedSpec, values: Sequence[bytes | None], sizes: Iterable[int]) -> None:
    """In batches of these sizes every value gets the verdict `Contract.decode` gives it by itself."""
    contract, decoder = Contract(feed), BatchDecoder(Contract(feed))
    singly = [None if value is None else contract.decode(value) for value in values]
    for size in sizes:
        for start in range(0, len(values), size):
            together = judge(decoder, values[start : start + size])
            for value, one, other in zip(values[start:], singly[start : start + size], together, strict=False):
                assert other == one, value


@every_feed
def test_a_batch_gives_the_verdicts_of_one_by_one(feed: FeedSpec) -> None:
    values = corpus(feed, 9000)
    assert_same_verdicts(feed, values, (len(values), 700, 129))
    kinds = Counter(type(verdict) for verdict in judge(BatchDecoder(Contract(feed)), values))
    # Neither kind may be absent, or the comparison shows nothing.
    assert min(kinds[Row], kinds[Rejection]) > 1500, kinds


@every_feed
def test_a_batch_of_any_size_will_do(feed: FeedSpec) -> None:
    assert_same_verdicts(feed, corpus(feed, 300), (1, 2, 3))
    empty = BatchDecoder(Contract(feed)).decode([])
    assert ([len(cells) for cells in empty.cells], empty.others) == ([0] * len(feed.columns), [])
    nothing = BatchDecoder(Contract(feed)).decode([None, None])
    assert ([len(cells) for cells in nothing.cells], nothing.others) == ([0] * len(feed.columns), [])


@pytest.mark.parametrize("feed", FEEDS, indirect=True)
def test_every_known_defect_is_judged_alike_alone_and_among_good_records(feed: FeedSpec) -> None:
    rng = random.Random(3)
    good = ordinary(feed, 400)
    tokens = dict(re.findall(r'"(\w+)": ("[^"]*"|[^,}]+)', good[0].decode()))
    spoilt = [defect.build(rng, tokens)[1] for defect in catalogue(feed.name, bulky=True) for _ in range(3)]
    mixed = [*good, *spoilt]
    rng.shuffle(mixed)
    assert_same_verdicts(feed, mixed, (len(mixed), 50))
    assert_same_verdicts(feed, spoilt, (len(spoilt), 1))


@every_feed
def test_ordinary_records_are_vouched_for_together(feed: FeedSpec) -> None:
    values = ordinary(feed, 5000)
    decoded = BatchDecoder(Contract(feed)).decode(values)
    # In the feed of every type some amounts do not fit their currency.
    assert all(isinstance(verdict, Rejection) and feed.name == EVERY_TYPE for _, verdict in decoded.others)
    assert len(decoded.cells[0]) > 0.85 * len(values)


@pytest.mark.parametrize("feed", FEEDS, indirect=True)
def test_one_bad_record_leaves_the_others_of_its_batch_to_the_quick_way(feed: FeedSpec) -> None:
    good = ordinary(feed, 1000)
    decoder = BatchDecoder(Contract(feed))
    first = dict(re.findall(r'"(\w+)": ("[^"]*"|[^,}]+)', good[0].decode()))
    for defect in catalogue(feed.name, bulky=True):
        spoilt = defect.build(random.Random(1), first)[1]
        decoded = decoder.decode([*good[:500], spoilt, *good[500:]])
        assert [index for index, _ in decoded.others] in ([500], []), defect.name
        assert len(decoded.cells[0]) >= len(good), defect.name


def test_what_one_record_lacks_does_not_hide_what_another_has_too_much(feed_named: Callable[[str], FeedSpec]) -> None:
    feed = feed_named(TRANSACTIONS)
    (good,) = ordinary(feed, 1)
    contract, decoder = Contract(feed), BatchDecoder(Contract(feed))
    for again in (b'"status": "failed"', b'"amount": 1', b'"status": null', b'"x": "y"'):
        surplus = good[:1] + again + b", " + good[1:]
        for cut in range(len(good)):
            values = [good, good[:cut], surplus, good]
            assert judge(decoder, values) == [contract.decode(value) for value in values], (again, cut)


def test_a_feed_with_a_column_nothing_vouches_for_goes_one_by_one() -> None:
    columns = (column("id", ColumnType("text"), required=True), column("more", ColumnType("jsonb"), required=True))
    feed = FeedSpec("raw_tests", "documents", KafkaOrigin("documents", "json"), columns, "tests", "-", 1)
    assert_same_verdicts(feed, [b'{"id":"a","more":{"b":1}}', None, b'{"id":"a"}', b'{"id":"a","more":null}', b""], [5])


# --- Twins: a careless check lets something through that the comparison above names -----------------------------------

CARELESS: dict[str, tuple[str, Any]] = {
    "quotes are not counted: repeated keys pass": ("_find_surplus", lambda values, quotes: []),
    "escapes are not looked at: NUL passes": (
        "_find_surplus",
        lambda values, quotes: (i for i, v in enumerate(values) if v.count(b'"') != quotes[i]),
    ),
    "a time is its form: days beyond the calendar pass": ("_TimeCheck._is_good", lambda self, day: True),
    "edges of a range are not looked at": ("_days_around", lambda day: [day] if day > "1999" else []),
    "decimals are not compared with the currency": ("_ExactCheck.__call__", lambda self, columns: None),
    "accepted values are not looked up": ("_DistinctCheck._passes", lambda self, text: True),
    "forms end where they end": ("_FormCheck.__call__", lambda self, columns: None),
    "null and absent are not told apart": ("_ABSENT", "null"),
}


@pytest.mark.parametrize("fault", CARELESS)
def test_a_careless_check_is_caught(
    monkeypatch: pytest.MonkeyPatch, feed_named: Callable[[str], FeedSpec], fault: str
) -> None:
    name, careless = CARELESS[fault]
    monkeypatch.setattr(f"ingestion.batch.{name}", careless)
    caught = []
    for feed in (feed_named(TRANSACTIONS), feed_named(USER_EVENTS), FEED_OF_EVERY_TYPE):
        try:
            assert_same_verdicts(feed, corpus(feed, 3000), [1000])
        except AssertionError:
            caught.append(feed.name)
    assert caught


# --- Patterns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    ["^usr_[0-9]{6}$", "^[A-Z]{2}$", "[a-z]+", r"^\d+(?:\.\d{1,2})?$", "^(a|b)+c*$", "^[^@ ]+@x$", r"a\$", "^a|b"],
)
def test_patterns_both_engines_read_alike_are_handed_on(pattern: str) -> None:
    form = to_re2(pattern)
    assert form is not None
    rng = random.Random(pattern)
    texts = ["".join(rng.choice("ab c@x019.$\nÉ٣_usrAZ") for _ in range(rng.randrange(9))) for _ in range(3000)]
    texts += [
        "usr_123456",
        "usr_123456\n",
        "usr_١٢٣٤٥٦",
        "AZ",
        "12.50",
        "aab",
        "a@x",
        "a@x\n",
        "a\n@x",
        "a$",
        "a",
        "a\n",
        "",
    ]
    matches = pc.match_substring_regex(pa.array(texts), form).to_pylist()
    python = Pattern(pattern).compiled
    assert any(matches)
    for text, match in zip(texts, matches, strict=True):
        assert not match or python.search(text), text


@pytest.mark.parametrize(
    "pattern", [r"(?=a)b", r"(a)\1", "a.c", r"\bword", "(?i)a", "a+?", "^a^b", "^a$|b", r"[\w-]+", r"\Aa", "é"]
)
def test_patterns_the_engines_may_read_differently_are_not(pattern: str) -> None:
    assert to_re2(pattern) is None


# --- Messages and what is written -------------------------------------------------------------------------------------


def split_header(data: bytes) -> tuple[list[str], list[tuple[str | None, ...]]]:
    names, lines = data.split(b"\n", 1)
    return names.decode().split(" "), read_text(lines)


NASTY = [
    "",
    " ",
    '"',
    '""',
    ",",
    "a,b",
    "\n",
    "\r\n",
    "\r",
    "NULL",
    "\\N",
    "\\.",
    "é漢😀",
    "\u2028",
    "'",
    "\t",
    "\x7f",
    None,
]


def test_columns_are_written_as_single_lines_are() -> None:
    rng = random.Random(1)
    rows = [tuple(rng.choice(NASTY) for _ in range(4)) for _ in range(2000)]
    columns = [pa.array(cells, pa.string()) for cells in zip(*rows, strict=True)]
    constants = (None, 'constant,\t"quoted"')
    written = bytes(copy_lines([*columns, *constants]))
    assert written.decode() == "".join(copy_line((*row, *constants)) for row in rows)
    assert read_text(written) == [(*row, *constants) for row in rows]


@pytest.mark.parametrize("nasty", NASTY)
def test_one_nasty_cell_in_a_plain_column(nasty: str | None) -> None:
    cells = ["plain", None, "", nasty, "plain"]
    written = bytes(copy_lines([pa.array(cells, pa.string()), pa.array([b"\x00"] * 5, pa.binary()), "1"]))
    assert read_text(written) == [(cell, "\\x00", "1") for cell in cells]


def messages_of(feed: FeedSpec, count: int) -> list[Message]:
    """A batch over four partitions with all that messages may have and lack."""
    rng = random.Random(9)
    offsets = Counter({partition: rng.randrange(1000) for partition in range(4)})
    messages = []
    for value in corpus(feed, count):
        partition = rng.choice([0, 0, 0, 1, 2, 3])
        offsets[partition] += rng.choice([1, 1, 1, 5])
        messages.append(
            Message(
                topic="t",
                partition=partition,
                offset=offsets[partition],
                key=rng.choice([None, b"", b"key", b"\x00\xff\\x", value]),
                value=value,
                headers=rng.choice([None, None, [("a", b"b")], [("a", None), ("b\x00", b"\xff"), ("c", b"\x00")]]),
                timestamp=rng.choice([(0, -1), (1, 1_767_571_200_021), (2, -1), (1, 2**62), (1, rng.randrange(2**41))]),
            )
        )
    return messages


@pytest.mark.parametrize("feed", [TRANSACTIONS, USER_EVENTS], indirect=True)
def test_what_is_written_is_what_one_by_one_would_be(feed: FeedSpec, tmp_path: Path) -> None:
    messages = messages_of(feed, 1500)
    package = Package(tmp_path, feed, Stream(7, "c", "t", ""), Writer(feed, 1), "1.5")
    firsts = {p: min(m.offset() for m in messages if m.partition() == p) for p in range(4)}
    tallies = {partition: Tally(first) for partition, first in firsts.items()}
    reasons: Counter[str] = Counter()
    decode_messages(messages, BatchDecoder(Contract(feed)), package, tallies, reasons, Profile())
    package.close()
    files = {(table, path.suffix): path.read_bytes() for table, path, _ in package.files()}

    contract = Contract(feed)
    rows, dead, tombstones = [], [], 0
    for message in messages:
        value = message.value()
        if value is None:
            tombstones += 1
            continue
        kind, milliseconds = message.timestamp()
        sent_at = cell(times_of(pa.array([milliseconds if kind else None], pa.int64()))[0].as_py())
        place = (str(message.partition()), str(message.offset()), sent_at)
        key = None if message.key() is None else "\\x" + message.key().hex()
        verdict = contract.decode(value)
        if isinstance(verdict, Row):
            tail = (package.loaded_at.isoformat(), "1.5")
            rows.append((*verdict.cells, verdict.extra, "7", *place, key, headers_json(message.headers()), *tail))
        else:
            dead.append((*place, verdict.reason.value, verdict.path, verdict.message, key, "\\x" + value.hex()))

    columns = [(name, type_) for name, type_, _ in raw_columns(feed)]
    names, written = split_header(files[feed.table, ".text"])
    assert names == [name for name, _ in columns]
    names, in_binary = files[feed.table, ".binary"].split(b"\n", 1)
    assert names.decode().split(" ") == [name for name, _ in columns]
    types = [type_ for _, type_ in columns]
    values = [tuple(map(value_of_text, types, row)) for row in written]
    values += [tuple(map(value_of_bytes, types, row)) for row in read_binary(in_binary)]
    assert Counter(values) == Counter(tuple(map(value_of_text, types, row)) for row in rows)
    names, letters = split_header(files["_dead_letters", ".text"])
    wanted = ("_kafka_partition", "_kafka_offset", "source_time", "reason", "path", "message", "raw_key", "raw_value")
    picked = [names.index(name) for name in wanted]
    assert Counter(tuple(letter[i] for i in picked) for letter in letters) == Counter(dead)
    assert reasons == Counter(letter[3] for letter in dead)

    for partition, tally in tallies.items():
        own = [message for message in messages if message.partition() == partition]
        mine = str(partition)
        times = [t for kind, t in (m.timestamp() for m in own) if kind]
        assert (tally.seen, tally.next) == (len(own), own[-1].offset() + 1)
        assert tally.landed == sum(row[len(feed.columns) + 2] == mine for row in rows)
        assert tally.dead == sum(letter[0] == mine for letter in dead)
        assert tally.tombstones == sum(message.value() is None for message in own)
        assert tally.bytes == sum(len(message.value() or b"") for message in own)
        assert (tally.earliest, tally.latest) == (min(times), max(times))
    drifted = sum(row[len(feed.columns)] is not None for row in rows)
    assert sum(tally.drifted for tally in tallies.values()) == drifted > 0
    assert sum(tally.tombstones for tally in tallies.values()) == tombstones > 0


def test_bytes_are_written_as_hexadecimal_digits() -> None:
    items = [b"key", None, b"", b"\x00\xff", b"\\x41", None]
    for some in (items, items[1:3], [None], [b""], []):
        column = pa.array([b"before", *some], pa.binary())[1:]
        assert hex_texts(column).to_pylist() == [None if item is None else "\\\\x" + item.hex() for item in some]


def test_times_to_the_millisecond_and_none_beyond_the_calendar() -> None:
    times = [0, -1, 1_767_571_200_021, 253_402_300_799_999, 253_402_300_800_000, None, -(2**62), -62_135_596_800_000]
    column = times_of(pa.array(times, pa.int64()))
    texts = [
        "1970-01-01 00:00:00.000Z",
        "1969-12-31 23:59:59.999Z",
        "2026-01-05 00:00:00.021Z",
        "9999-12-31 23:59:59.999Z",
        None,
        None,
        None,
        "0001-01-01 00:00:00.000Z",
    ]
    assert read_text(bytes(copy_lines([column]))) == [(text,) for text in texts]
    assert in_binary(["timestamptz"], [column]) == [(value_of_text("timestamptz", text),) for text in texts]
    assert times_of(pa.array([None], pa.int64())).to_pylist() == [None]


def in_binary(types: Sequence[str], columns: Sequence[Any]) -> list[tuple[Any, ...]]:
    """What Postgres makes of the columns in COPY's binary format."""
    data = BINARY_HEADER + bytes(binary_rows(types, columns)) + BINARY_TRAILER
    return [tuple(map(value_of_bytes, types, row)) for row in read_binary(data)]


BINARY_CELLS: dict[str, list[str | None]] = {
    "boolean": ["true", "false", None],
    "integer": ["0", "-1", "2147483647", "-2147483648", None],
    "bigint": ["0", "-1", "9223372036854775807", "-9223372036854775808", None],
    "numeric(18,4)": ["0", "-0.0", "0.0001", "-0.0001", "99999999999999.9999", "-12345.6", "10000", "123.4500", None],
    "numeric(12,3)": ["0.001", "999999999.999", "-1.5", "20000.02", None],
    "numeric(38,9)": ["0.000000001", "9223372.036854775", "-1", None],
    "numeric(60,3)": ["1", "-922337203685477.580", None],
    "numeric(3,3)": ["0.999", "-0.001", "0", None],
    "numeric(6,0)": ["999999", "-10000", "1", None],
    "date": ["2000-01-01", "1999-12-31", "0001-01-01", "9999-12-31", None],
    "timestamptz": [
        "2026-01-05T10:11:12.123456Z",
        "2026-01-05 10:11:12+05:30",
        "1999-12-31T23:59:59.999999-15:59",
        "2026-01-05T10:11Z",
        None,
    ],
    "uuid": ["00000000-0000-0000-0000-000000000001", "FFFFFFFF-ffff-4fff-8fff-fffffffffff0", None],
    "text": ["", " ", "é漢😀", "\\N", "\t\n", None],
    "jsonb": ['{"a": [1, "b"]}', '""', None],
}


@pytest.mark.parametrize("type_", BINARY_CELLS)
def test_every_type_in_binary_is_what_its_text_says(type_: str) -> None:
    cells = BINARY_CELLS[type_]
    for some in (cells, cells[:-1], [*cells[:1], *cells, *cells], [None], [None, cells[0]]):
        # A part of a column, as a filter leaves it.
        column = pa.array([cells[0], *some, None], pa.string()).slice(1, len(some))
        expected = [(value_of_text(type_, text), 7, value_of_text(type_, cells[0]), "end") for text in some]
        assert in_binary([type_, "integer", type_, "text"], [column, "7", cells[0], "end"]) == expected


@pytest.mark.parametrize(
    ("type_", "text"),
    [
        ("timestamptz", "2026-01-05T10:11:12.1234567Z"),
        ("numeric(38,9)", "9223372036.854775808"),
        ("numeric(38,2)", "123456789012345678901234567890.12"),
        ("numeric(60,3)", "1" * 57),
        ("numeric(60,40)", "1"),
        ("numeric", "1"),
        ("numeric(18,4)", "0.00001"),
        ("uuid", "0-0"),
        ("uuid", "g" * 32),
        ("interval", "1 day"),
    ],
)
def test_what_has_no_exact_binary_form_is_left_to_the_text(type_: str, text: str) -> None:
    with pytest.raises(NoBinaryFormError):
        binary_rows([type_], [pa.array([text], pa.string())])


def test_binary_begins_as_no_text_can() -> None:
    assert BINARY_HEADER[: len(SIGNATURE)] == SIGNATURE
    with pytest.raises(UnicodeDecodeError):
        BINARY_HEADER.decode()


def test_large_batches_are_taken_in_parts() -> None:
    sizes = [10, 50, 60, 200, 1, 1, 0]
    messages = [Message(topic="t", value=b"x" * size) for size in sizes]
    parts = [[len(message) for message in part] for part in split_by_size(messages, 100)]
    assert parts == [[10, 50], [60], [200], [1, 1, 0]]
    assert list(split_by_size(messages, 1000)) == [messages]
    assert [len(part) for part in split_by_size(messages, 0)] == [1] * len(messages)


def test_counts_of_a_batch_without_times() -> None:
    (count,) = MessageBatch([Message(topic="t", partition=3, offset=8, value=None)]).count_partitions()
    assert (count.partition, count.seen, count.last_offset, count.tombstones) == (3, 1, 8, 1)
    assert (count.bytes, count.earliest, count.latest) == (0, None, None)

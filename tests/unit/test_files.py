"""Reading a folder: every file in one order, whole or not at all; and the corpus of JSON, judged twice alike."""

import os
import random
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from ingestion import files
from ingestion.batch import BatchDecoder, MessageBatch
from ingestion.contract import MAX_TOKENS, Contract, Rejection, Row
from ingestion.errors import ConfigurationError, TransientError
from ingestion.feeds import FeedSpec
from ingestion.files import File, FileRecord, Folder, require_folder, show_path, stream_name, to_milliseconds
from ingestion.settings import Settings
from tests.fixtures.json_corpus import corpus, payment, write_corpus
from tests.harness.folder_account import read_folder

PAYMENTS = "raw_payments.transaction_created"

FeedNamed = Callable[[str], FeedSpec]


def open_folder(path: Path) -> Folder:
    return Folder(os.fsencode(path))


# --- which files ------------------------------------------------------------------------------------------------------


def test_the_corpus_is_large_odd_and_the_same_each_time(tmp_path: Path) -> None:
    cases = corpus()
    assert len(cases) == len({case.path for case in cases}) == len(set(cases)) > 1_000
    assert cases == corpus()
    verdicts = Counter((case.path.split(b"/")[0].decode(), case.verdict) for case in cases)
    assert min(verdicts[kind, "landed"] for kind in ("extra", "amount", "key", "document", "names")) > 5
    assert min(verdicts[kind, "dead"] for kind in ("bare", "extra", "amount", "key", "document")) > 50
    write_corpus(tmp_path)
    assert read_folder(tmp_path) == {case.path: case.content for case in cases}


def test_every_file_is_listed_once_in_the_order_of_its_paths_bytes(tmp_path: Path) -> None:
    cases = write_corpus(tmp_path)
    passed_over: list[str] = []
    assert list(open_folder(tmp_path).list_paths(passed_over.append)) == sorted(cases)
    assert passed_over == []


def test_any_tree_is_listed_in_that_order(tmp_path: Path) -> None:
    rng = random.Random(7)
    names = [b"a", b"a.", b"a-", b"a0", b"a b", b"A", b"\xff", b"\x01", b".", b"..", b"b" * 40]
    for _ in range(300):
        parts = [rng.choice(names) + rng.choice([b"", b"", b"x"]) for _ in range(rng.randint(1, 6))]
        path = os.path.join(os.fsencode(tmp_path), *(part + b"_" if part in (b".", b"..") else part for part in parts))
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            open(path, "wb").close()
        except OSError:
            continue  # a file stands where a folder would have to, or the other way round
    listed = list(open_folder(tmp_path).list_paths())
    assert len(listed) > 100
    assert listed == sorted(read_folder(tmp_path))


def test_links_to_files_are_read_and_what_is_no_file_is_named(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "outside").write_bytes(b"{}")
    (inside / "a").write_bytes(b"1")
    (inside / "link").symlink_to("a")
    (inside / "link_out").symlink_to(tmp_path / "outside")
    (inside / "up").symlink_to(tmp_path)
    (inside / "self").symlink_to(".")
    os.mkfifo(inside / "pipe")
    (inside / "to_pipe").symlink_to("pipe")
    (inside / "null").symlink_to(os.devnull)
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(inside)  # the path of a socket is short
        try:
            server.bind("sock\n")
        finally:
            os.chdir(here)
        passed_over: list[str] = []
        assert list(open_folder(inside).list_paths(passed_over.append)) == [b"a", b"link", b"link_out"]
    assert passed_over == [
        "null (no regular file)",
        "pipe (no regular file)",
        "self (link to a folder)",
        "sock%0A (no regular file)",
        "to_pipe (no regular file)",
        "up (link to a folder)",
    ]


@pytest.mark.parametrize(
    ("target", "error", "said"),
    [
        ("nowhere", ConfigurationError, "x is a link that leads nowhere"),
        ("x", ConfigurationError, "x cannot be read: Too many levels of symbolic links"),
        ("n" * 300, ConfigurationError, "x cannot be read: File name too long"),
    ],
    ids=["dangling", "loop", "too long"],
)
def test_a_link_that_cannot_be_followed_stops_the_run(
    tmp_path: Path, target: str, error: type[Exception], said: str
) -> None:
    (tmp_path / "x").symlink_to(target)
    with pytest.raises(error, match=said):
        list(open_folder(tmp_path).list_paths())


def test_a_path_as_text_is_printable_and_its_own(tmp_path: Path) -> None:
    assert show_path("a/é漢 😀.json".encode()) == "a/é漢 😀.json"
    assert show_path(b"a%\n\x1b\xff") == "a%25%0A%1B%FF"
    assert show_path("a\u202e\u00a0b".encode()) == "a%E2%80%AE%C2%A0b"
    rng = random.Random(1)
    alphabet = [b"a", b"%", b"F", b"f", b"\xff", b"\xc3", b"\xa9", b"\n", b"/", b"\\", "é".encode()]
    paths = {b"".join(rng.choices(alphabet, k=rng.randint(1, 6))) for _ in range(20_000)}
    shown = {show_path(path) for path in paths}
    assert len(shown) == len(paths)
    assert all(text.isprintable() and text.encode() for text in shown)
    odd = os.path.join(os.fsencode(tmp_path), b"\xff")
    os.mkdir(odd)
    assert stream_name(Path(os.fsdecode(odd))) == f"files:{tmp_path}/%FF"


def test_which_folders_and_feeds_are_taken(clean_settings: Settings, feed_named: FeedNamed, tmp_path: Path) -> None:
    settings = replace(clean_settings, home=tmp_path / "a" / "home")
    inside = tmp_path / "a" / "home" / "in"
    inside.mkdir(parents=True)
    (tmp_path / "file").touch()
    feed = feed_named(PAYMENTS)
    assert require_folder(settings, feed, inside) == os.fsencode(inside)
    for folder in (tmp_path, tmp_path / "a", inside.parent):
        with pytest.raises(ConfigurationError, match="working folder"):
            require_folder(settings, feed, folder)
    for folder in (tmp_path / "file", tmp_path / "none"):
        with pytest.raises(ConfigurationError, match=f"{folder} is not a folder"):
            require_folder(settings, feed, folder)
    with pytest.raises(ConfigurationError, match="read from an API"):
        require_folder(settings, feed_named("raw_fx.daily_rates"), inside)


# --- their bytes ------------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_was_looked_at_or_not_at_all(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    path = tmp_path / "f"
    path.write_bytes(b"x" * 3_000_000)
    seen = folder.look_at(b"f")
    assert (seen.size, folder.read(seen)) == (3_000_000, path.read_bytes())
    for content in (b"x" * 2_999_999, b"x" * 3_000_001, b"x" * 2_999_999 + b"y", b""):
        path.write_bytes(content)
        with pytest.raises(TransientError, match="f changed while it was read"):
            folder.read(seen)
    path.unlink()
    for act in (lambda: folder.read(seen), lambda: folder.look_at(b"f")):
        with pytest.raises(TransientError, match="f cannot be read: No such file or directory"):
            act()


def test_twin_by_size_and_time_alone_a_change_is_not_seen(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    (tmp_path / "f").write_bytes(b"abc")
    seen = folder.look_at(b"f")
    (tmp_path / "f").write_bytes(b"abd")
    os.utime(tmp_path / "f", (0, seen.changed_ms / 1000))
    again = folder.look_at(b"f")
    assert (again.size, again.changed_ms // 1000) == (seen.size, seen.changed_ms // 1000)
    with pytest.raises(TransientError, match="changed"):
        folder.read(seen)


def test_a_file_larger_than_a_record_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1 << 20)
    (tmp_path / "f").write_bytes(bytes((1 << 20) + 1))
    (tmp_path / "g").write_bytes(bytes(1 << 20))
    assert open_folder(tmp_path).look_at(b"g").size == 1 << 20
    with pytest.raises(ConfigurationError, match=r"f is larger than a record can be \(1 MiB\)"):
        open_folder(tmp_path).look_at(b"f")


def test_a_pipe_put_in_a_files_place_does_not_hold_the_run_up(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    seen = open_folder(tmp_path).look_at(b"f")
    (tmp_path / "f").unlink()
    os.mkfifo(tmp_path / "f")
    with pytest.raises(TransientError, match="changed"):
        open_folder(tmp_path).read(seen)


@pytest.mark.parametrize(
    ("milliseconds", "claimed"),
    [
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        (-62_135_596_800_000, datetime(1, 1, 1, tzinfo=UTC)),
        (253_402_300_799_999, datetime(9999, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC)),
        (253_402_300_800_000, None),
        (-62_135_596_800_001, None),
        (2**80, None),
    ],
)
def test_a_file_may_claim_any_time(milliseconds: int, claimed: datetime | None) -> None:
    record = FileRecord(5, File(b"p", 2, to_milliseconds(milliseconds * 1_000_000 + 999_999), b""), b"{}")
    batch = MessageBatch([record])
    _, position, at, key, headers = batch.coordinates()
    assert (position.to_pylist(), at.to_pylist(), headers.to_pylist()) == ([5], [claimed], [None])
    assert len(key) == len(batch) == 1


# --- the corpus -------------------------------------------------------------------------------------------------------


def judge_together(decoder: BatchDecoder, values: Sequence[bytes]) -> list[Row | Rejection]:
    decoded = decoder.decode(values)
    (indices,) = decoded.select([pa.array(range(len(values)))])
    verdicts: dict[int, Row | Rejection] = dict(decoded.others)
    for index, cells in zip(
        indices.to_pylist(), zip(*(c.to_pylist() for c in decoded.cells), strict=True), strict=True
    ):
        assert index not in verdicts
        verdicts[index] = Row(list(cells), None)
    return [verdicts[index] for index in range(len(values))]


@pytest.fixture(scope="module")
def values() -> list[bytes]:
    contents = [case.content for case in corpus()]
    random.Random(5).shuffle(contents)
    return contents


def test_each_file_is_judged_as_it_must_be_and_alike_alone_and_in_a_batch(
    feed_named: FeedNamed, values: list[bytes]
) -> None:
    contract, decoder = Contract(feed_named(PAYMENTS)), BatchDecoder(Contract(feed_named(PAYMENTS)))
    singly = [contract.decode(value) for value in values]
    assert judge_together(decoder, values) == singly
    good = [payment(f"good {number}") for number in range(300)]
    mixed = [value for pair in zip(values, good * 5, strict=False) for value in pair]
    assert judge_together(decoder, mixed)[::2] == singly
    expected = {case.content: case.verdict for case in corpus()}
    for value, verdict in zip(values, singly, strict=True):
        assert isinstance(verdict, Row) == (expected[value] == "landed"), value[:300]


CARELESS = {
    "quotes are not counted": ("_find_surplus", lambda values, quotes: []),
    "decimals are not compared": ("_ExactCheck.__call__", lambda self, columns: None),
}


@pytest.mark.parametrize("fault", CARELESS)
def test_twin_a_careless_batch_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, feed_named: FeedNamed, values: list[bytes], fault: str
) -> None:
    name, careless = CARELESS[fault]
    monkeypatch.setattr(f"ingestion.batch.{name}", careless)
    contract, decoder = Contract(feed_named(PAYMENTS)), BatchDecoder(Contract(feed_named(PAYMENTS)))
    assert judge_together(decoder, values) != [contract.decode(value) for value in values]


def test_a_record_that_would_take_memory_out_of_proportion_is_set_aside(feed_named: FeedNamed) -> None:
    contract = Contract(feed_named(PAYMENTS))
    start = payment("tokens")[:-1]
    # The payment's own: 15 texts and numbers' commas; the unknown field's key, its comma and its bracket.
    room = MAX_TOKENS - sum(start.count(sign) for sign in (b",", b"{")) - start.count(b'"') // 2 - 3
    for text, fits in (
        (b"[" + b"1," * room + b"1]", True),
        (b"[" + b"1," * (room + 1) + b"1]", False),
        (b'"' + b"[,{" * MAX_TOKENS + b'"', True),
        (b'"' + b'\\",' * MAX_TOKENS + b'"', True),
        (b'"' + b"\\\\" * MAX_TOKENS + b'"', True),
        (b'["' + b'","' * (MAX_TOKENS // 2) + b'"]', False),
    ):
        verdict = contract.decode(start + b', "x": ' + text + b"}")
        assert isinstance(verdict, Row) == fits, text[:10]
        if isinstance(verdict, Rejection):
            assert "more than 1,000,000 texts, commas and brackets" in verdict.message

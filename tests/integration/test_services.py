"""The embedded services as a user meets them: real processes, real kills, real ports.

Every test has a home of its own; nothing outlives it, also under /var/tmp where root's data may lie.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from ingestion.errors import ConfigurationError, TransientError, WarehouseError
from ingestion.settings import Settings
from orchestration import services
from orchestration.services.postgres_place import choose_place, shared_base, system_account
from orchestration.services.state import FileLock, Paths, process_identity

ROOT = Path(__file__).resolve().parents[2]
TOPICS = {"payments": 6, "users": 3}

# A client that holds a lease until its standard input closes.
HOLDER = """
import sys
from pathlib import Path
from ingestion.settings import Settings
from orchestration import services
settings = Settings(project_dir=Path(sys.argv[1]), home=Path(sys.argv[2]), env={})
with services.running(settings, topics={"payments": 6}) as overlaid:
    print(services.status(settings).supervisor_pid, overlaid.dsn, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    home = tmp_path / "home"
    made = Settings(project_dir=ROOT, home=home, env={})
    yield made
    services.erase(made, force=True)
    assert not shared_base(home).exists()


@contextlib.contextmanager
def holder(settings: Settings) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """Another process with a lease: (process, supervisor's pid, DSN)."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(ROOT), str(settings.home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pid, dsn = process.stdout.readline().split()
        yield process, int(pid), dsn
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait(30)
        process.stdout.close()


def eventually(condition: Callable[[], bool], *, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def is_down(settings: Settings) -> bool:
    """Nothing runs: no supervisor holds the lock, no Postgres works in the data folder."""
    lock = FileLock(Paths(settings.home).lock)
    free = lock.try_acquire()
    lock.release()
    return free and not postgres_processes(settings)


def postgres_processes(settings: Settings) -> list[int]:
    data = os.path.realpath(data_folder(settings))
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(entry / "cwd") == data and process_identity(int(entry.name)) is not None:
                found.append(int(entry.name))
    return found


def data_folder(settings: Settings) -> Path:
    return choose_place(settings.home, system_account() if os.geteuid() == 0 else None).data


def query(dsn: str | None, sql: str) -> list[tuple[Any, ...]]:
    assert dsn is not None
    connection = psycopg2.connect(dsn)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def service(status: services.ServicesStatus, name: str) -> services.ServiceState:
    return next(s for s in status.services if s.name == name)


def test_start_stays_until_stop_and_data_survives(settings: Settings) -> None:
    began = services.start(settings, topics=TOPICS)
    assert [s.name for s in began.services] == ["postgres", "kafka", "rates"]
    assert began.running
    assert began.stays
    assert began.leases == ()
    dsn = began.environment["WAREHOUSE_DSN"]
    query(dsn, "create table kept as select 42 as answer")
    assert services.status(settings).services == began.services

    assert services.stop(settings)
    assert is_down(settings)
    assert not services.status(settings).running
    assert not services.stop(settings)

    again = services.start(settings, topics=TOPICS)
    assert again.environment["WAREHOUSE_DSN"] == dsn
    assert query(dsn, "select answer from kept") == [(42,)]
    incarnation = "KAFKA_CLUSTER_INCARNATION"
    assert again.environment[incarnation] != began.environment[incarnation]


def test_postgres_is_safe_for_money_and_ready_for_replication(settings: Settings) -> None:
    with services.running(settings, topics={}) as overlaid:
        expected = {
            "wal_level": "logical",
            "synchronous_commit": "on",
            "fsync": "on",
            "full_page_writes": "on",
            "timezone": "UTC",
            "unix_socket_directories": "",
            "listen_addresses": "127.0.0.1",
            "password_encryption": "scram-sha-256",
            "server_encoding": "UTF8",
            "data_checksums": "on",
        }
        names = ", ".join(f"'{name}'" for name in expected)
        rows = query(overlaid.dsn, f"select name, setting from pg_settings where lower(name) in ({names})")
        assert {name.lower(): value for name, value in rows} == expected
        assert query(overlaid.dsn, "select current_database(), current_user") == [("warehouse", "warehouse")]
        assert overlaid.dsn is not None
        wrong = overlaid.dsn.replace(overlaid.dsn.split(":")[2].split("@")[0], "guess")
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            query(wrong, "select 1")


def test_secrets_are_for_their_owner_only(settings: Settings) -> None:
    services.start(settings, topics={})
    for name in ("services.json", "postgres.json", "services.lock"):
        assert (settings.home / name).stat().st_mode & 0o077 == 0, name
    assert data_folder(settings).stat().st_mode & 0o077 == 0


def test_a_request_without_the_secret_is_refused(settings: Settings) -> None:
    services.start(settings, topics={})
    port = json.loads(Paths(settings.home).state.read_text())["port"]
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b'{"op": "stop", "force": true, "secret": "guess"}\n')
        assert connection.recv(1000) == b""
    assert services.status(settings).running


def test_running_ends_with_its_block(settings: Settings) -> None:
    with services.running(settings, topics=TOPICS) as overlaid:
        assert overlaid.embedded == {"postgres", "kafka", "rates"}
        assert overlaid.get("KAFKA_CLUSTER_INCARNATION", "").startswith("embedded-")  # type: ignore[union-attr]
        status = services.status(settings)
        assert [lease.pid for lease in status.leases] == [os.getpid()]
        assert not status.stays
        # The same command's inner steps need nothing of their own.
        with services.running(overlaid) as inner:
            assert inner.env == overlaid.env
    assert eventually(lambda: is_down(settings))


def test_the_last_lease_decides(settings: Settings) -> None:
    with holder(settings) as (_, supervisor, dsn):
        with services.running(settings, topics=TOPICS) as overlaid:
            assert overlaid.dsn == dsn
            assert services.status(settings).supervisor_pid == supervisor
        assert query(dsn, "select 1") == [(1,)]
    assert eventually(lambda: is_down(settings))


def test_a_killed_client_gives_its_lease_back(settings: Settings) -> None:
    with holder(settings) as (process, _, dsn):
        assert query(dsn, "select 1") == [(1,)]
        process.kill()
        assert eventually(lambda: is_down(settings))


def test_a_client_killed_while_the_services_start_leaves_nothing(settings: Settings) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(ROOT), str(settings.home)], stdin=subprocess.PIPE)
    assert eventually(lambda: Paths(settings.home).lock.exists())
    process.kill()
    process.communicate()
    assert eventually(lambda: is_down(settings))
    with services.running(settings, topics={}) as overlaid:
        assert query(overlaid.dsn, "select 1") == [(1,)]


def test_a_killed_supervisor_is_recognised_and_replaced(settings: Settings) -> None:
    began = services.start(settings, topics={})
    dsn = began.environment["WAREHOUSE_DSN"]
    query(dsn, "create table kept as select 42 as answer")
    assert began.supervisor_pid is not None
    os.kill(began.supervisor_pid, signal.SIGKILL)
    assert eventually(lambda: not services.status(settings).running)
    assert Paths(settings.home).state.exists()
    with services.running(settings, topics={}) as overlaid:
        assert services.status(settings).supervisor_pid != began.supervisor_pid
        assert overlaid.dsn == dsn
        assert query(dsn, "select answer from kept") == [(42,)]


def test_stop_clears_what_a_killed_supervisor_left(settings: Settings) -> None:
    began = services.start(settings, topics={})
    assert began.supervisor_pid is not None
    os.kill(began.supervisor_pid, signal.SIGKILL)
    assert eventually(lambda: not services.status(settings).running)
    assert services.stop(settings)
    assert is_down(settings)
    assert not Paths(settings.home).state.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_an_orphaned_postgres_is_taken_over(settings: Settings) -> None:
    # On Linux the server ends with its supervisor; here it must not, as on systems without that signal.
    orphan_maker = (
        "import os, sys; from pathlib import Path\n"
        "from orchestration.services import postgres\n"
        "from orchestration.services.state import Paths\n"
        "postgres._end_with_parent = lambda: None\n"
        "paths = Paths(Path(sys.argv[1])); paths.make()\n"
        "server = postgres.EmbeddedPostgres(paths); server.start()\n"
        "print(server.pid, server.dsn, flush=True); os._exit(0)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", orphan_maker, str(settings.home)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    pid, dsn = answer.stdout.split()
    assert process_identity(int(pid)) is not None
    query(dsn, "create table kept as select 42 as answer")
    with services.running(settings, topics={}) as overlaid:
        assert process_identity(int(pid)) is None
        assert overlaid.dsn == dsn
        assert query(dsn, "select answer from kept") == [(42,)]


def test_a_stale_pidfile_that_names_a_living_process_is_no_obstacle(settings: Settings) -> None:
    services.start(settings, topics={})
    services.stop(settings)
    data = data_folder(settings)
    owner = data.stat()
    drop: dict[str, Any] = {}
    if os.geteuid() == 0:
        # Postgres takes only processes of its own user for a rival.
        drop = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
    bystander = subprocess.Popen(["sleep", "60"], cwd="/", **drop)
    try:
        pidfile = data / "postmaster.pid"
        pidfile.write_text(f"{bystander.pid}\n{data}\n1700000000\n5432\n\n127.0.0.1\n  1 1\nready   \n")
        os.chown(pidfile, owner.st_uid, owner.st_gid)
        with services.running(settings, topics={}) as overlaid:
            assert query(overlaid.dsn, "select 1") == [(1,)]
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_taken_port_is_replaced_and_then_kept(settings: Settings) -> None:
    first = service(services.start(settings, topics={}), "postgres").address
    services.stop(settings)
    port = int(first.rpartition(":")[2])
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", port))
        squatter.listen(1)
        moved = service(services.start(settings, topics={}), "postgres").address
        assert moved != first
        services.stop(settings)
    assert service(services.start(settings, topics={}), "postgres").address == moved


def test_ten_clients_at_once_share_one_supervisor(settings: Settings) -> None:
    with contextlib.ExitStack() as stack:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", HOLDER, str(ROOT), str(settings.home)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(10)
        ]
        for process in processes:
            stack.enter_context(process)
        lines = {process.stdout.readline() for process in processes if process.stdout}
        assert len(lines) == 1
        assert len(services.status(settings).leases) == 10
        for process in processes:
            process.kill()
    assert eventually(lambda: is_down(settings))
    log = Paths(settings.home).log.read_text()
    assert log.count("postgres runs at") == 1


def test_stop_does_not_pull_the_rug_unless_forced(settings: Settings) -> None:
    with holder(settings) as (process, _, dsn):
        with pytest.raises(TransientError, match=f"in use by .*process {process.pid}"):
            services.stop(settings)
        assert query(dsn, "select 1") == [(1,)]
        assert services.stop(settings, force=True)
        assert is_down(settings)


def test_the_broker_has_the_declared_partitions_and_takes_more_topics_later(settings: Settings) -> None:
    from confluent_kafka import Consumer, Producer, TopicPartition
    from confluent_kafka.admin import AdminClient

    services.start(settings, topics=TOPICS)
    with services.running(settings, topics={"later": 2}) as overlaid:
        bootstrap = overlaid.kafka_bootstrap
        topics = AdminClient({"bootstrap.servers": bootstrap}).list_topics(timeout=10).topics
        assert {name: len(topic.partitions) for name, topic in topics.items()} == {**TOPICS, "later": 2}
        producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True})
        for number in range(100):
            producer.produce("payments", value=f"{number}".encode(), partition=number % 6, headers=[("n", b"1")])
        assert producer.flush(10) == 0
        consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "none", "enable.auto.commit": False})
        ends = [consumer.get_watermark_offsets(TopicPartition("payments", p), timeout=10)[1] for p in range(6)]
        consumer.close()
        assert sum(ends) == 100


def test_sample_rates_answer(settings: Settings) -> None:
    import urllib.request

    with services.running(settings, topics={}) as overlaid:
        url = f"{overlaid.fx_api_base}/v1/2026-01-05..2026-01-09?base=USD"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert json.load(answer)["base"] == "USD"


def test_what_settings_name_is_never_started(settings: Settings) -> None:
    own = settings.with_env(WAREHOUSE_DSN="postgresql://elsewhere/warehouse", KAFKA_BOOTSTRAP_SERVERS="elsewhere:9092")
    with services.running(own) as overlaid:
        assert overlaid.dsn == "postgresql://elsewhere/warehouse"
        assert overlaid.kafka_bootstrap == "elsewhere:9092"
        assert overlaid.fx_api_base == "https://api.frankfurter.dev"
        assert overlaid.embedded == frozenset()
    assert not services.start(own).running
    assert not settings.home.exists()

    with services.running(settings.with_env(KAFKA_BOOTSTRAP_SERVERS="elsewhere:9092")) as overlaid:
        assert [s.name for s in services.status(settings).services] == ["postgres"]
        assert overlaid.kafka_bootstrap == "elsewhere:9092"
        assert overlaid.embedded == {"postgres"}
        assert overlaid.get("KAFKA_CLUSTER_INCARNATION") is None
        # A later command with other needs shares the supervisor and adds to it.
        with services.running(settings, topics={}) as full:
            assert full.dsn == overlaid.dsn
            assert full.embedded == {"postgres", "kafka", "rates"}


def test_a_running_service_that_a_setting_replaces_is_not_used(settings: Settings) -> None:
    services.start(settings, topics={})
    with services.running(settings.with_env(WAREHOUSE_DSN="postgresql://elsewhere/warehouse")) as overlaid:
        assert overlaid.dsn == "postgresql://elsewhere/warehouse"
        assert overlaid.embedded == {"kafka"}
        assert overlaid.fx_api_base == "https://api.frankfurter.dev"


def test_data_of_another_major_version_is_refused(settings: Settings) -> None:
    services.start(settings, topics={})
    services.stop(settings)
    (data_folder(settings) / "PG_VERSION").write_text("12\n")
    with pytest.raises(ConfigurationError, match=r"made by Postgres 12; the programs here are \d+") as caught:
        services.start(settings, topics={})
    assert "WAREHOUSE_POSTGRES_BIN" in caught.value.hint
    assert eventually(lambda: is_down(settings))


def test_missing_programs_are_named(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="WAREHOUSE_POSTGRES_BIN is not usable: /nowhere"):
        services.start(settings.with_env(WAREHOUSE_POSTGRES_BIN="/nowhere"), topics={})
    assert eventually(lambda: is_down(settings))


def test_a_server_that_does_not_start_is_quoted(settings: Settings) -> None:
    services.start(settings, topics={})
    services.stop(settings)
    with (data_folder(settings) / "postgresql.conf").open("a") as file:
        file.write("no_such_setting = on\n")
    with pytest.raises(WarehouseError, match='unrecognized configuration parameter "no_such_setting"') as caught:
        services.start(settings, topics={})
    assert "Traceback" not in caught.value.message
    assert "postgres.log" in caught.value.hint
    assert eventually(lambda: is_down(settings))


def test_a_lost_password_is_explained(settings: Settings) -> None:
    services.start(settings, topics={})
    services.stop(settings)
    record = Paths(settings.home).postgres_record
    document = json.loads(record.read_text())
    record.write_text(json.dumps({**document, "password": "other"}))
    with pytest.raises(ConfigurationError, match=r"refused its own password"):
        services.start(settings, topics={})
    assert eventually(lambda: is_down(settings))


def test_a_missing_password_never_costs_the_data(settings: Settings) -> None:
    services.start(settings, topics={})
    services.stop(settings)
    data = data_folder(settings)
    Paths(settings.home).postgres_record.unlink()
    if data.is_relative_to(settings.home):
        with pytest.raises(ConfigurationError, match=r"postgres.json is missing or damaged"):
            services.start(settings, topics={})
        assert data.exists()
    else:
        # Elsewhere the data outlives its home: who made the home anew meant to begin anew.
        services.start(settings, topics={})
        assert (data.parent / "data.replaced" / "PG_VERSION").exists()


def test_a_topic_kafka_refuses_is_refused_by_name(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="Topic 'with blank'"):
        services.start(settings, topics={"with blank": 1})
    assert eventually(lambda: is_down(settings))


def test_ctrl_c_is_for_the_command_and_sigterm_for_us(settings: Settings) -> None:
    began = services.start(settings, topics={})
    assert began.supervisor_pid is not None
    assert os.getsid(began.supervisor_pid) != os.getsid(0)
    os.kill(began.supervisor_pid, signal.SIGINT)
    time.sleep(0.3)
    assert services.status(settings).running
    os.kill(began.supervisor_pid, signal.SIGTERM)
    assert eventually(lambda: is_down(settings))
    assert not Paths(settings.home).state.exists()
    # A clean end: the next start recovers nothing.
    services.start(settings, topics={})
    assert "was not properly shut down" not in Paths(settings.home).postgres_log.read_text()


def test_a_postgres_that_dies_is_started_again(settings: Settings) -> None:
    with services.running(settings, topics={}) as overlaid:
        before = service(services.status(settings), "postgres")
        query(overlaid.dsn, "create table kept as select 42 as answer")
        os.kill(before.pid, signal.SIGKILL)

        def restarted() -> bool:
            return service(services.status(settings), "postgres").pid != before.pid

        assert eventually(restarted)
        assert query(overlaid.dsn, "select answer from kept") == [(42,)]


def test_a_deleted_home_takes_its_services_along(settings: Settings) -> None:
    import shutil

    began = services.start(settings, topics={})
    pid, server = began.supervisor_pid, service(began, "postgres").pid
    assert pid is not None
    shutil.rmtree(settings.home)
    assert eventually(lambda: process_identity(pid) is None and process_identity(server) is None)
    # The database was the home's: a new home begins with an empty one.
    with services.running(settings, topics={}) as overlaid:
        assert query(overlaid.dsn, "select count(*) from pg_stat_user_tables") == [(0,)]


def test_status_answers_at_once_whatever_the_supervisor_does(settings: Settings) -> None:
    began = services.start(settings, topics={})
    assert began.supervisor_pid is not None
    os.kill(began.supervisor_pid, signal.SIGSTOP)
    try:
        asked = time.monotonic()
        status = services.status(settings)
        assert time.monotonic() - asked < 0.2
        assert status.services == began.services
    finally:
        os.kill(began.supervisor_pid, signal.SIGCONT)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users")
def test_root_runs_postgres_as_somebody_else(settings: Settings) -> None:
    began = services.start(settings, topics={})
    assert Path(f"/proc/{service(began, 'postgres').pid}").stat().st_uid == system_account().uid

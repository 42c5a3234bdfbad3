"""The stack of docker/ keeps its promises: healthy before used, pinned, on 127.0.0.1 only, every setting explained.

No Docker is needed: the compose file is read as data, `docker/up.sh` runs against a stand-in `docker` that writes
down what it was asked. Each rule has a twin that breaks the file and must be caught.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.harness.apache_kafka import kafka_version

PROJECT = Path(__file__).parents[2]
DOCKER = PROJECT / "docker"
COMPOSE = DOCKER / "compose.yml"
ENV_EXAMPLE = PROJECT / ".env.example"
UP = DOCKER / "up.sh"

# A version needs a digit: `latest`, `stable`, `alpine` and no tag at all move under our feet.
PINNED = re.compile(r"^[^@\s]+:[\w.-]*\d[\w.-]*$")
VARIABLE = re.compile(r"(?<!\$)\$\{([A-Z_][A-Z0-9_]*)")

# Settings that no person puts into .env: the embedded services set the first two for their clients, profiles.yml
# falls back to the last ones, and the others are read before .env is (the folder it lies in; the image's revision).
NOT_FOR_DOTENV = {
    "KAFKA_CLUSTER_INCARNATION",
    "WAREHOUSE_EMBEDDED",
    "WAREHOUSE_PROJECT_DIR",
    "WAREHOUSE_CODE_VERSION",
    "WAREHOUSE_DB_HOST",
    "WAREHOUSE_DB_PORT",
    "WAREHOUSE_DB_USER",
    "WAREHOUSE_DB_PASSWORD",
    "WAREHOUSE_DB_NAME",
}

Compose = dict[str, Any]


@pytest.fixture
def compose() -> Compose:
    loaded: Compose = yaml.safe_load(COMPOSE.read_text())
    return loaded


def problems_in(compose: Compose, declared: set[str]) -> list[str]:
    """Return what breaks the rules of the stack, one line each."""
    problems: list[str] = []
    for name, service in compose["services"].items():
        one_shot = service.get("restart") == "no"
        if not service.get("healthcheck", {}).get("test") and not one_shot:
            problems.append(f"{name}: no healthcheck")
        if not PINNED.match(service.get("image", "")):
            problems.append(f"{name}: image {service.get('image')} is not pinned")
        for port in service.get("ports", []):
            if not str(port).startswith("127.0.0.1:"):
                problems.append(f"{name}: port {port} is not bound to 127.0.0.1")
        if service.get("network_mode") == "host":
            problems.append(f"{name}: the host's network publishes every port")
        for dependency, how in service.get("depends_on", {}).items():
            if how.get("condition") == "service_started":
                problems.append(f"{name}: does not wait for the health of {dependency}")
    for variable in VARIABLE.findall(yaml.safe_dump(compose, width=100_000)):
        if variable not in declared:
            problems.append(f"${{{variable}}} is not in .env.example")
    return sorted(set(problems))


def example_settings() -> tuple[dict[str, str], dict[str, str]]:
    """Return the settings of .env.example: those that are set, and those that are commented out."""
    live: dict[str, str] = {}
    commented: dict[str, str] = {}
    for line in ENV_EXAMPLE.read_text().splitlines():
        match = re.match(r"^(# )?([A-Z][A-Z0-9_]*)=(.*)$", line)
        if match:
            (commented if match.group(1) else live)[match.group(2)] = match.group(3)
    return live, commented


def declared_settings() -> set[str]:
    live, commented = example_settings()
    return set(live) | set(commented)


def test_the_stack_follows_its_rules(compose: Compose) -> None:
    assert problems_in(compose, declared_settings()) == []


def without_healthcheck(compose: Compose) -> None:
    del compose["services"]["minio"]["healthcheck"]


def with_latest(compose: Compose) -> None:
    compose["services"]["kafka"]["image"] = "apache/kafka:latest"


def with_no_tag(compose: Compose) -> None:
    compose["services"]["kafka"]["image"] = "registry.example:5000/apache/kafka"


def with_open_port(compose: Compose) -> None:
    compose["services"]["postgres"]["ports"] = ["5432:5432"]


def with_hosts_network(compose: Compose) -> None:
    compose["services"]["postgres"]["network_mode"] = "host"


def with_unhealthy_dependency(compose: Compose) -> None:
    compose["services"]["dagster-daemon"]["depends_on"]["dagster-code"]["condition"] = "service_started"


def with_unknown_variable(compose: Compose) -> None:
    compose["services"]["postgres"]["environment"]["TZ"] = "${STACK_TIME_ZONE:-UTC}"


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (without_healthcheck, "minio: no healthcheck"),
        (with_latest, "kafka: image apache/kafka:latest is not pinned"),
        (with_no_tag, "kafka: image registry.example:5000/apache/kafka is not pinned"),
        (with_open_port, "postgres: port 5432:5432 is not bound to 127.0.0.1"),
        (with_hosts_network, "postgres: the host's network publishes every port"),
        (with_unhealthy_dependency, "dagster-daemon: does not wait for the health of dagster-code"),
        (with_unknown_variable, "${STACK_TIME_ZONE} is not in .env.example"),
    ],
)
def test_a_broken_rule_is_caught(compose: Compose, spoil: Callable[[Compose], None], problem: str) -> None:
    spoiled = copy.deepcopy(compose)
    spoil(spoiled)
    assert problems_in(spoiled, declared_settings()) == [problem]


def test_has_the_services_the_project_needs(compose: Compose) -> None:
    services = compose["services"]
    assert set(services) >= {
        "kafka",
        "schema-registry",
        "postgres",
        "minio",
        "dagster-code",
        "dagster-webserver",
        "dagster-daemon",
    }
    assert "wal_level=logical" in services["postgres"]["command"]
    assert services["kafka"]["environment"]["KAFKA_PROCESS_ROLES"] == "broker,controller"
    assert services["dagster-code"]["command"][-1] == "orchestration.definitions"


def test_kafka_is_the_version_that_the_tests_run(compose: Compose) -> None:
    assert compose["services"]["kafka"]["image"] == f"apache/kafka:{kafka_version()}"


def test_named_volumes_are_declared_and_used(compose: Compose) -> None:
    used = {
        mount.split(":")[0]
        for service in compose["services"].values()
        for mount in service.get("volumes", [])
        if not mount.startswith((".", "/"))
    }
    assert used == set(compose["volumes"])


def test_mounted_and_copied_files_exist(compose: Compose) -> None:
    mounted = [
        mount.split(":")[0]
        for service in compose["services"].values()
        for mount in service.get("volumes", [])
        if mount.startswith(".")
    ]
    assert mounted
    for path in mounted:
        assert (DOCKER / path).is_file()
    copied = re.findall(r"^COPY (.+) \S+$", (DOCKER / "dagster.Dockerfile").read_text(), re.M)
    assert copied
    for source in shlex.split(" ".join(copied)):
        assert (PROJECT / source).exists()


def test_the_image_we_build_stands_on_a_pinned_one_and_runs_as_no_root() -> None:
    text = (DOCKER / "dagster.Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.M)
    assert bases
    assert all(PINNED.match(base) for base in bases)
    assert re.findall(r"^USER (\S+)", text, re.M)[-1] == "warehouse"
    ignored = (DOCKER / "dagster.Dockerfile.dockerignore").read_text().split()
    assert {".env", "profiles.yml", ".git", ".warehouse"} <= set(ignored)


def test_the_image_has_the_dagster_of_the_project() -> None:
    project = dict(re.findall(r"^(dagster[a-z-]*)==([\d.]+)", (PROJECT / "requirements.txt").read_text(), re.M))
    image = dict(re.findall(r"^([a-z-]+)==([\d.]+)", (DOCKER / "dagster" / "requirements.txt").read_text(), re.M))
    # Dagster's libraries are released together: dagster-postgres pins dagster as dagster-dbt does.
    assert image == {"dagster-postgres": project["dagster-dbt"]}


def test_the_workspace_names_the_code_server(compose: Compose) -> None:
    workspace = yaml.safe_load((DOCKER / "dagster" / "workspace.yaml").read_text())
    server = workspace["load_from"][0]["grpc_server"]
    command = compose["services"][server["host"]]["command"]
    assert command[command.index("--port") + 1] == str(server["port"])
    instance = (DOCKER / "dagster" / "base.yaml").read_text()
    for variable in re.findall(r"env: (\S+)", instance):
        for service in ("dagster-code", "dagster-webserver", "dagster-daemon"):
            assert variable in compose["services"][service]["environment"]
    # Telemetry, limits and monitoring are of the code, and stand in no second place.
    assert not {"telemetry", "concurrency", "run_monitoring", "run_retries"} & set(yaml.safe_load(instance))
    image = (DOCKER / "dagster.Dockerfile").read_text()
    assert 'ENTRYPOINT ["/opt/warehouse/docker/dagster/start.sh"]' in image
    assert "orchestration.instance" in (DOCKER / "dagster" / "start.sh").read_text()


def test_a_new_version_waits_for_runs_that_are_going(compose: Compose) -> None:
    minutes = re.fullmatch(r"(\d+)m", compose["services"]["dagster-code"]["stop_grace_period"])
    assert minutes is not None
    assert int(minutes[1]) >= 5
    # Its address and its work stay: webserver and daemon are not started anew with it.
    for service in ("dagster-webserver", "dagster-daemon"):
        assert "restart" not in compose["services"][service]["depends_on"]["dagster-code"]


# ---- .env.example


def test_a_copied_env_example_changes_nothing_for_the_product() -> None:
    live, commented = example_settings()
    assert all(name.startswith("STACK_") for name in live), "a product setting is set: the demo would leave its servers"
    assert not any(name.startswith("STACK_") for name in commented)
    assert {
        "WAREHOUSE_DSN",
        "KAFKA_BOOTSTRAP_SERVERS",
        "KAFKA_SECURITY_PROTOCOL",
        "KAFKA_SASL_MECHANISM",
        "KAFKA_SASL_USERNAME",
        "KAFKA_SASL_PASSWORD",
        "KAFKA_SSL_CA_LOCATION",
        "FX_API_BASE",
        "WAREHOUSE_HOME",
    } <= set(commented)
    lines = ENV_EXAMPLE.read_text()
    assert lines.index("# WAREHOUSE_HOME=") < lines.index("STACK_POSTGRES_PASSWORD=")


def test_every_setting_the_code_reads_is_explained() -> None:
    read = {
        name
        for package in ("ingestion", "orchestration")
        for path in (PROJECT / package).rglob("*.py")
        for name in re.findall(r'"((?:WAREHOUSE|KAFKA|FX)_[A-Z_]+)"', path.read_text())
    }
    assert {"WAREHOUSE_DSN", "KAFKA_SASL_PASSWORD"} <= read
    assert read - declared_settings() - NOT_FOR_DOTENV == set()


def test_the_stack_uses_every_one_of_its_settings(compose: Compose) -> None:
    live, _ = example_settings()
    assert set(live) - set(VARIABLE.findall(COMPOSE.read_text())) == set()


def test_defaults_in_the_compose_file_are_those_of_the_example() -> None:
    live, _ = example_settings()
    for name, default in re.findall(r"\$\{(STACK_[A-Z_]+):-([^}]+)\}", COMPOSE.read_text()):
        assert live[name] == default
    assert len(set(live.values())) == len(live), "two services share a port or a password"


def test_passwords_are_placeholders_and_have_no_default(compose: Compose) -> None:
    live, commented = example_settings()
    secret = {name for name in live if name.endswith(("_PASSWORD", "_USER"))}
    assert len(secret) >= 4
    for name in secret:
        # They stand in connection addresses, so they need no escape.
        assert re.fullmatch(r"dev-only-[a-z-]+", live[name])
        assert f"${{{name}:?" in COMPOSE.read_text()
        assert f"${{{name}:-" not in COMPOSE.read_text()
    # MinIO refuses a shorter one at its start.
    assert len(live["STACK_MINIO_PASSWORD"]) >= 8
    address = f"warehouse:{live['STACK_WAREHOUSE_PASSWORD']}@127.0.0.1:{live['STACK_POSTGRES_PORT']}/warehouse"
    assert commented["WAREHOUSE_DSN"] == f"postgresql://{address}"
    assert commented["KAFKA_BOOTSTRAP_SERVERS"] == f"127.0.0.1:{live['STACK_KAFKA_PORT']}"


# ---- up.sh


STAND_IN = """#!/bin/sh
printf '%s\\n' "$*" >> "$CALLS"
case "$*" in
    *" port "*) echo 127.0.0.1:1234 ;;
    $FAILS_ON) exit 1 ;;
esac
"""


class Stack:
    """A copy of docker/ with a `docker` that writes down its calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_path = folder / "calls"
        shutil.copytree(DOCKER, folder / "docker")
        shutil.copy(ENV_EXAMPLE, folder / ".env")
        tools = folder / "bin"
        tools.mkdir()
        (tools / "docker").write_text(STAND_IN)
        (tools / "docker").chmod(0o755)

    def up(self, *arguments: str, fails_on: str = "never") -> subprocess.CompletedProcess[str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            [str(self.folder / "docker" / "up.sh"), *arguments],
            env=os.environ | {"PATH": path, "CALLS": str(self.calls_path), "FAILS_ON": fails_on},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def calls(self) -> list[str]:
        return self.calls_path.read_text().splitlines() if self.calls_path.exists() else []


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


def declared_topics(project: Path = PROJECT) -> set[str]:
    """Return the Kafka topics that the feeds declare in their dbt sources."""
    topics = set()
    for path in sorted((project / "models" / "staging").glob("*/_*__sources.yml")):
        for source in yaml.safe_load(path.read_text())["sources"]:
            for table in source["tables"]:
                feed = table["config"]["meta"]["feed"]
                if feed["kind"] == "kafka":
                    topics.add(feed["topic"])
    return topics


def topics_created(calls: list[str]) -> dict[str, int]:
    found = (re.search(r"kafka-topics\.sh .*--create .*--topic (\S+) --partitions (\d+)", call) for call in calls)
    return {match.group(1): int(match.group(2)) for match in found if match}


def test_up_creates_the_topics_that_the_feeds_declare(stack: Stack) -> None:
    done = stack.up()
    assert done.returncode == 0, done.stderr
    expected = declared_topics()
    assert expected >= {"payments_transaction_created", "user_events"}
    assert topics_created(stack.calls) == dict.fromkeys(expected, 6)


def test_up_waits_for_health_then_makes_topics_and_buckets_then_starts_dagster(stack: Stack) -> None:
    done = stack.up()
    assert done.returncode == 0, done.stderr

    def at(*words: str) -> int:
        return next(i for i, call in enumerate(stack.calls) if all(word in call.split() for word in words))

    servers = at("up", "--wait", "kafka", "schema-registry", "postgres", "minio")
    bucket_call = next(i for i, call in enumerate(stack.calls) if "create-buckets" in call)
    assert servers < at("--create", "user_events") < bucket_call < at("build", "dagster-code")
    assert at("build", "dagster-code") < at("up", "--wait", "dagster-webserver", "dagster-daemon")
    assert "create-buckets warehouse-landing warehouse-archive" in stack.calls[bucket_call]
    assert "http://127.0.0.1:1234" in done.stdout


def test_up_starts_every_service_of_the_compose_file(stack: Stack, compose: Compose) -> None:
    assert stack.up().returncode == 0
    started = {word for call in stack.calls if " up " in call for word in call.split()}
    assert set(compose["services"]) <= started


def test_up_can_leave_dagster_out(stack: Stack) -> None:
    done = stack.up("--without-dagster")
    assert done.returncode == 0, done.stderr
    assert topics_created(stack.calls)
    assert not [word for call in stack.calls for word in call.split() if word.startswith("dagster-")]


@pytest.mark.parametrize(
    ("fails_on", "message", "next_step"),
    [
        ("compose version", "no compose plugin", "install docker-compose-plugin"),
        ("info", "the Docker daemon does not answer", "start it"),
        ("*--wait*", "not every service became healthy", "logs SERVICE"),
    ],
)
def test_up_says_what_failed_and_what_to_do(stack: Stack, fails_on: str, message: str, next_step: str) -> None:
    done = stack.up(fails_on=fails_on)
    assert done.returncode == 1
    assert message in done.stderr
    assert next_step in done.stderr
    assert topics_created(stack.calls) == {}


def test_up_stops_when_a_topic_cannot_be_created(stack: Stack) -> None:
    done = stack.up(fails_on="*kafka-topics.sh*")
    assert done.returncode != 0
    assert not any("build" in call.split() for call in stack.calls)


def test_up_asks_for_the_settings_first(stack: Stack) -> None:
    (stack.folder / ".env").unlink()
    done = stack.up()
    assert done.returncode == 1
    assert "cp .env.example .env" in done.stderr
    assert not any(" up " in call for call in stack.calls)


def test_up_refuses_an_unknown_argument(stack: Stack) -> None:
    done = stack.up("--fast")
    assert done.returncode == 1
    assert "unknown argument --fast" in done.stderr
    assert stack.calls == []


@pytest.mark.parametrize("script", ["up.sh", "postgres/init.sh", "dagster/start.sh"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    path = DOCKER / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text()

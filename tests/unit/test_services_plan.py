"""Which services run embedded, and that asking costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from ingestion.errors import ConfigurationError
from ingestion.settings import Settings
from orchestration import services
from orchestration.services.broker import find_library, require_topics
from orchestration.services.plan import PUBLIC_RATES, plan_services

DSN = {"WAREHOUSE_DSN": "postgresql://somewhere/warehouse"}
KAFKA = {"KAFKA_BOOTSTRAP_SERVERS": "somewhere:9092"}
RATES = {"FX_API_BASE": "https://rates.example"}
PUBLIC = {"FX_API_BASE": PUBLIC_RATES}


@pytest.mark.parametrize(
    ("env", "embedded", "defaults"),
    [
        ({}, ("postgres", "kafka", "rates"), {}),
        # Compose files pass empty variables on.
        ({"WAREHOUSE_DSN": ""}, ("postgres", "kafka", "rates"), {}),
        (RATES, ("postgres", "kafka"), {}),
        (DSN, ("kafka",), PUBLIC),
        (KAFKA, ("postgres",), PUBLIC),
        (DSN | KAFKA, (), PUBLIC),
        (DSN | KAFKA | RATES, (), {}),
        (KAFKA | RATES, ("postgres",), {}),
    ],
)
def test_only_what_no_setting_names_is_embedded(
    env: dict[str, str], embedded: tuple[str, ...], defaults: dict[str, str]
) -> None:
    plan = plan_services(Settings(project_dir=Path(), home=Path(), env=env))
    assert plan.embedded == embedded
    assert plan.defaults == defaults


def test_with_servers_of_ones_own_nothing_is_touched(tmp_path: Path) -> None:
    home = tmp_path / "home"
    settings = Settings(project_dir=tmp_path, home=home, env=DSN | KAFKA | RATES)
    with services.running(settings) as overlaid:
        assert overlaid == settings
    status = services.start(settings)
    assert not status.running
    assert status.configured == ("postgres", "kafka", "rates")
    assert not services.stop(settings)
    assert not home.exists()


def test_asking_creates_nothing(tmp_path: Path) -> None:
    settings = Settings(project_dir=tmp_path, home=tmp_path / "home", env={})
    assert not services.status(settings).running
    assert not services.stop(settings)
    assert not settings.home.exists()


def test_the_import_is_light() -> None:
    heavy = ["confluent_kafka", "dlt", "dbt", "dagster", "psycopg2", "yaml", "http.server", "orchestration.sample"]
    code = f"import sys, orchestration.services; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_a_seed_that_is_no_number_is_refused(tmp_path: Path) -> None:
    settings = Settings(project_dir=tmp_path, home=tmp_path / "home", env={"WAREHOUSE_SAMPLE_SEED": "abc"})
    with pytest.raises(ConfigurationError, match="WAREHOUSE_SAMPLE_SEED must be a whole number, not 'abc'"):
        services.start(settings, topics={})


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ä", ".", "..", "a" * 250])
def test_topic_names_kafka_refuses_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError):
        require_topics({name: 1})


@pytest.mark.parametrize("partitions", [0, -1, 1001])
def test_partition_counts_have_bounds(partitions: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{partitions} partitions"):
        require_topics({"a": partitions})


def test_the_wheel_brings_the_broker() -> None:
    assert find_library().is_file()


def test_a_python_without_the_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="needs librdkafka") as caught:
        find_library()
    assert "KAFKA_BOOTSTRAP_SERVERS" in caught.value.hint

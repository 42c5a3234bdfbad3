"""Metrics of a database that does not answer, and how they are served. Figures are checked where there are some."""

import re
import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from ingestion.errors import ConfigurationError
from ingestion.settings import Settings
from orchestration.metrics import build_registry, serve_metrics

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def nobody_there(tmp_path: Path) -> Settings:
    """Settings of a database behind a port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return Settings(PROJECT, tmp_path, {"WAREHOUSE_DSN": f"postgresql://u:p@127.0.0.1:{port}/x"})


def samples(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_a_database_that_is_silent_is_down_and_no_figure_stands_still(nobody_there: Settings) -> None:
    problems: list[str] = []
    text = generate_latest(build_registry(nobody_there, problems.append)).decode()
    assert samples(text) == ["warehouse_up 0.0"]
    assert [problem for problem in problems if "does not answer" in problem] == problems != []


def test_metrics_are_served_on_this_machine_alone(nobody_there: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (nobody_there, "127.0.0.1", 0, lambda _: None)
    threading.Thread(target=serve_metrics, args=arguments, daemon=True).start()
    said, deadline = "", time.monotonic() + 30
    while "metrics" not in said and time.monotonic() < deadline:
        said += capsys.readouterr().out
    address = re.match(r"http://127\.0\.0\.1:(\d+)/metrics", said)
    assert address is not None
    with urllib.request.urlopen(address[0], timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        assert samples(answer.read().decode()) == ["warehouse_up 0.0"]

    with pytest.raises(ConfigurationError, match=rf"Port {address[1]} of 127.0.0.1 cannot be used"):
        serve_metrics(nobody_there, "127.0.0.1", int(address[1]), lambda _: None)

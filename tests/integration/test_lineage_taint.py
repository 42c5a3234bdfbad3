"""Canaries in every personal field are found where the graph says and nowhere else; its twins are caught."""

from pathlib import Path

from ingestion.settings import Settings
from tests.prove import taint


def test_canaries_are_where_the_graph_says(warehouse: Settings, tmp_path: Path) -> None:
    assert taint.judge(taint.make_site(warehouse, tmp_path)) == []

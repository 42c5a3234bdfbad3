"""Personal data stays where lineage says: canaries in every personal field, and everything searched for them."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

from ingestion.settings import load_settings
from orchestration.services import erase, running
from tests.harness.project_copy import OWN_SETTINGS, PROJECT
from tests.prove import taint
from tests.prove.outcome import Outcome, Plan


def follow_canaries(plan: Plan, outcome: Outcome) -> None:
    """Found where the graph of columns says and nowhere else; a missing edge and a missing barrier are caught."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)}
    with tempfile.TemporaryDirectory(prefix="warehouse-canaries-", dir=plan.stage.folder) as folder:
        Path(folder).chmod(0o755)
        home = replace(load_settings(PROJECT), home=Path(folder) / "services", env=own)
        try:
            with running(home) as settings:
                for problem in taint.judge(taint.make_site(settings, Path(folder))):
                    outcome.require(False, problem)
        finally:
            erase(home, force=True)
    outcome.runs += 1
    outcome.repeats += 1
    outcome.notes.append("its twins, a missing edge and a missing barrier, are part of it")

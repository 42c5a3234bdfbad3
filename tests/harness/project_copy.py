"""A copy of the project to break or to extend: what dbt and the loaders read, and nothing made by a run.

    project = copy_project(tmp_path / "project")
    result = run_warehouse(project, "status", "--json", WAREHOUSE_DSN=dsn)

The command is `warehouse` as a user calls it; only settings given here reach it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.harness.warm import run_warm

PROJECT = Path(__file__).resolve().parents[2]
READ_BY_DBT = ("dbt_project.yml", "profiles.yml.example", "models", "seeds", "macros", "tests/dbt")
OWN_SETTINGS = ("WAREHOUSE_", "KAFKA_", "FX_API_")
COMMAND = str(Path(sys.executable).with_name("warehouse"))


def copy_project(target: Path) -> Path:
    """A project of its own at `target`; returns it."""
    for name in READ_BY_DBT:
        source = PROJECT / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target / name)
        else:
            shutil.copy2(source, target / name)
    return target


def environment_of(project: Path, **settings: str) -> dict[str, str]:
    """This process's environment without its own settings, for a command in `project` with these settings."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)}
    return {
        **own,
        "WAREHOUSE_PROJECT_DIR": str(project),
        "WAREHOUSE_HOME": str(project / ".warehouse"),
        # What a message says must not depend on the width of a terminal.
        "COLUMNS": "200",
        **settings,
    }


def start_warehouse(
    project: Path, *arguments: str, folder: Path | None = None, **settings: str
) -> "subprocess.Popen[str]":
    """The command, running in `folder`; for those that wait for something."""
    return subprocess.Popen(
        [COMMAND, *arguments],
        cwd=folder,
        env=environment_of(project, **settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def finish(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    """Wait for a command that was started."""
    with process:
        try:
            out, err = process.communicate(timeout=180)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_warehouse(
    project: Path, *arguments: str, folder: Path | None = None, **settings: str
) -> "subprocess.CompletedProcess[str]":
    """The command, run to its end, in a process that need not import anything: see tests/harness/warm.py."""
    code, out, err = run_warm(arguments, folder, environment_of(project, **settings))
    return subprocess.CompletedProcess([COMMAND, *arguments], code, out, err)

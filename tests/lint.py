"""Everything that can be checked without running the product's tests: `make lint`.

ruff, format, types, dbt parse without deprecations, sqlfluff, lineage and its personal-data policy, Dagster's own
validation. sqlfluff's dbt templater compiles models, which ask the database for their high-water mark: it gets the
embedded Postgres, empty.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from ingestion.settings import load_settings
from orchestration.run import prepare
from orchestration.services import erase, running
from orchestration.transform import profile_environment

PROJECT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

CHECKS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "types": ["mypy"],
    "dbt parse": ["dbt", "parse", "--no-partial-parse", "--show-all-deprecations", "--warn-error"],
    "sqlfluff": ["sqlfluff", "lint", "--disable-progress-bar", "models", "macros", "tests/dbt"],
    "lineage": ["warehouse", "lineage", "check"],
    "dagster": ["dagster", "definitions", "validate"],
}


def main() -> None:
    wanted = sys.argv[1:] or list(CHECKS)
    failed = []
    with tempfile.TemporaryDirectory(prefix="warehouse-lint-") as folder:
        home = replace(load_settings(PROJECT), home=Path(folder) / "home", env=dict(os.environ))
        with running(home) as settings:
            prepare(settings)
            environment = {
                **os.environ,
                **profile_environment(settings),
                "DBT_PROFILES_DIR": str(PROJECT),
                "DBT_TARGET_PATH": f"{folder}/target",
                "DBT_LOG_PATH": f"{folder}/logs",
                "DAGSTER_HOME": "",
                "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            }
            for name in wanted:
                done = subprocess.run([BIN / CHECKS[name][0], *CHECKS[name][1:]], cwd=PROJECT, env=environment)
                print(f"{'ok  ' if done.returncode == 0 else 'FAIL'} {name}", flush=True)
                if done.returncode != 0:
                    failed.append(name)
        erase(home, force=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

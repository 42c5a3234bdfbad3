"""dbt in this process: one `dbtRunner`, the same project and profile as the plain `dbt` command.

Builds, checks freshness and writes the docs site; turns dbt's results into short reports and errors that name the
models and tests that failed. Adds nothing that plain dbt would not do.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2.extensions

from ingestion.errors import ConfigurationError, DataError, WarehouseError
from ingestion.settings import Settings

# (node name, its status, nodes finished, nodes in all or None)
OnNode = Callable[[str, str, int, int | None], None]

LINEAGE_PAGE = "static_index.html"


@dataclass(frozen=True)
class Failure:
    """A node that did not pass: its unique id, status and dbt's message."""

    node: str
    status: str
    message: str


@dataclass(frozen=True)
class NodeResult:
    """What became of one node: dbt's status (success, pass, warn, fail, error, skipped, ...) and message.

    `failures` are the rows a test found, `rows` those a model or seed wrote; None where the other is meant.
    """

    node: str
    status: str
    message: str
    seconds: float = 0.0
    rows: int | None = None
    failures: int | None = None


@dataclass(frozen=True)
class BuildReport:
    """What a dbt invocation did: nodes by kind (model, test, seed, ...), each one's result, and what failed.

    `stands_since`: nothing was done, because what this build counted stands since then.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failures: tuple[Failure, ...] = ()
    warnings: tuple[Failure, ...] = ()
    seconds: float = 0.0
    nodes: tuple[NodeResult, ...] = ()
    stands_since: datetime | None = None


def profile_environment(settings: Settings) -> dict[str, str]:
    """The variables `profiles.yml` reads, from WAREHOUSE_DSN."""
    try:
        parts = psycopg2.extensions.parse_dsn(settings.require("WAREHOUSE_DSN", "dbt needs a Postgres"))
    except psycopg2.ProgrammingError:
        raise ConfigurationError(
            "WAREHOUSE_DSN cannot be read as a Postgres connection string.",
            hint="Its form is postgresql://user:password@host:5432/database.",
        ) from None
    return {
        "WAREHOUSE_DB_HOST": parts.get("host", "127.0.0.1"),
        "WAREHOUSE_DB_PORT": parts.get("port", "5432"),
        "WAREHOUSE_DB_USER": parts.get("user", "warehouse"),
        "WAREHOUSE_DB_PASSWORD": parts.get("password", ""),
        "WAREHOUSE_DB_NAME": parts.get("dbname", "warehouse"),
    }


def database_name(settings: Settings) -> str | None:
    """The database WAREHOUSE_DSN names, for what needs no connection; None when it names none that can be read."""
    try:
        return profile_environment(settings)["WAREHOUSE_DB_NAME"]
    except ConfigurationError:
        return None


def ensure_profiles(settings: Settings) -> Path:
    """Make profiles.yml from profiles.yml.example where there is none, its defaults those of the server in use."""
    path = settings.project_dir / "profiles.yml"
    if path.exists():
        return path
    text = (settings.project_dir / "profiles.yml.example").read_text(encoding="utf-8")
    for name, value in profile_environment(settings).items():
        if "'" in value or '"' in value or "\\" in value:
            continue  # cannot stand in the file's quotes; the variable says it
        text = re.sub(rf"(env_var\('{name}', ')[^']*'", rf"\g<1>{value}'", text)
    # The embedded server's password is in it. Linked into place whole: another command may look at this very moment.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".profiles", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)
    return path


@contextlib.contextmanager
def _dbt_environment(settings: Settings, profiles_dir: Path, values: Mapping[str, str]) -> Iterator[None]:
    """The process environment dbt reads, put back afterwards."""
    wanted = {
        **values,
        "DBT_PROJECT_DIR": str(settings.project_dir),
        "DBT_PROFILES_DIR": str(profiles_dir),
        "DBT_SEND_ANONYMOUS_USAGE_STATS": "false",
    }
    for name in ("WAREHOUSE_SCHEMA",):
        if value := settings.get(name):
            wanted[name] = value
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_dbt(settings: Settings, arguments: Sequence[str], on_node: OnNode | None = None, project: Any = None) -> Any:
    """Run one dbt command in this process and return dbt's own result object.

    Args:
        project: as `parse_project` returned it; None parses.

    Raises:
        ConfigurationError: dbt could not run at all (the project does not parse, the profile is wrong).
    """
    ensure_profiles(settings)
    with _dbt_environment(settings, settings.project_dir, profile_environment(settings)):
        return _invoke([*arguments, "--log-level", "none"], on_node, project)


def parse_project(settings: Settings) -> Any:
    """dbt's manifest, for several commands: each that is given it need not parse, and adds what it compiled.

    Raises:
        ConfigurationError: the project does not parse.
    """
    return run_dbt(settings, ["parse"]).result


def parse(settings: Settings, target: Path) -> Path:
    """`dbt parse` into a folder of the caller's; the manifest's path. Needs no server and touches the project nowhere.

    Raises:
        ConfigurationError: the project does not parse.
    """
    with without_server(settings, target) as arguments:
        _invoke(["parse", *arguments])
    return target / "manifest.json"


@contextlib.contextmanager
def without_server(settings: Settings, target: Path) -> Iterator[list[str]]:
    """dbt's environment for commands that ask no server; gives the arguments that keep dbt's files in `target`.

    Where no profiles.yml was made yet, its example serves.
    """
    named = database_name(settings)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="profile-", dir=target) as folder:
        profiles_dir = settings.project_dir
        if not (profiles_dir / "profiles.yml").exists():
            profiles_dir = Path(folder)
            shutil.copyfile(settings.project_dir / "profiles.yml.example", profiles_dir / "profiles.yml")
        with _dbt_environment(settings, profiles_dir, {"WAREHOUSE_DB_NAME": named} if named else {}):
            yield ["--target-path", str(target), "--log-path", str(target), "--log-level", "none"]


def invoke(arguments: Sequence[str], project: Any = None) -> Any:
    """One dbt command in the environment that stands, for `without_server`.

    Raises:
        ConfigurationError: dbt could not run at all.
    """
    return _invoke(arguments, project=project)


def _invoke(arguments: Sequence[str], on_node: OnNode | None = None, project: Any = None) -> Any:
    # Imported here: dbt takes seconds to import.
    from dbt.cli.main import dbtRunner

    finished = 0
    total: int | None = None

    def on_event(event: Any) -> None:
        nonlocal finished, total
        if on_node is None:
            return
        info = event.data
        if event.info.name == "NodeFinished":
            finished += 1
            node = info.node_info
            on_node(node.node_name, node.node_status, finished, total)
        elif event.info.name == "ConcurrencyLine":
            total = info.node_count

    result = dbtRunner(manifest=project, callbacks=[on_event]).invoke([*arguments, "--quiet"])
    if result.exception is not None:
        if not isinstance(result.exception, Exception):
            # dbt hands on an interrupt as if it were a result.
            raise result.exception
        text = " ".join(str(result.exception).split())
        raise ConfigurationError(f"dbt {arguments[0]} could not run: {text[:1500]}", hint="`dbt parse` says more.")
    return result


def summarise(result: Any) -> BuildReport:
    """dbt's results -> counts by kind, failures and warnings."""
    counts: Counter[str] = Counter()
    nodes: list[NodeResult] = []
    failures: list[Failure] = []
    warnings: list[Failure] = []
    for one in getattr(result.result, "results", None) or []:
        kind = str(getattr(one.node, "resource_type", "source"))
        status = str(one.status)
        counts[kind] += 1
        entry = Failure(one.node.unique_id, status, " ".join((one.message or "").split()))
        rows = (one.adapter_response or {}).get("rows_affected")
        nodes.append(
            NodeResult(
                entry.node,
                status,
                entry.message,
                seconds=float(one.execution_time or 0),
                rows=rows if isinstance(rows, int) and kind != "test" else None,
                failures=getattr(one, "failures", None),
            )
        )
        if status in ("error", "fail", "runtime error"):
            failures.append(entry)
        elif status == "warn":
            warnings.append(entry)
        elif status in ("skipped", "partial success"):
            counts["skipped"] += 1
    seconds = float(getattr(result.result, "elapsed_time", 0) or 0)
    return BuildReport(counts, tuple(failures), tuple(warnings), seconds, tuple(nodes))


# Unit tests look at the SQL, which `dbt build` and `make test` do, and not at the data.
DATA_ONLY = ("--exclude-resource-type", "unit_test")


def build(
    settings: Settings, arguments: Sequence[str] = (), on_node: OnNode | None = None, project: Any = None
) -> BuildReport:
    """`dbt build`, but for unit tests.

    Raises:
        DataError: a model, test or seed failed; the message names each.
    """
    report = run_build(settings, arguments, on_node, project=project)
    require_built(report)
    return report


def run_build(
    settings: Settings,
    arguments: Sequence[str] = (),
    on_node: OnNode | None = None,
    command: str = "build",
    project: Any = None,
) -> BuildReport:
    """`build` (or `dbt test`), with what failed in the report: for a caller that has to tell what passed, too."""
    return summarise(run_dbt(settings, [command, *DATA_ONLY, *arguments], on_node, project))


def require_built(report: BuildReport, command: str = "build") -> None:
    """Nothing when every node passed.

    Raises:
        DataError: a model, test or seed failed; the message names each.
    """
    if report.failures:
        raise _failed(
            f"dbt {command}", report, "`dbt retry` runs only what failed; target/compiled has the tests' SQL."
        )


def check_freshness(settings: Settings, project: Any = None) -> BuildReport:
    """`dbt source freshness`.

    Raises:
        DataError: a source is older than its `error_after`.
    """
    report = summarise(run_dbt(settings, ["source", "freshness"], project=project))
    if report.failures:
        raise _failed("dbt source freshness", report, "`warehouse status` shows age and lag of every feed.")
    return report


def docs_page(settings: Settings) -> Path:
    """Where the lineage site stands."""
    return settings.project_dir / "target" / LINEAGE_PAGE


def write_docs(settings: Settings, built: Any = None) -> Path:
    """`dbt docs generate --static`: the lineage site as one offline page.

    Args:
        built: the project a build has just compiled; None compiles.
    """
    arguments = ["docs", "generate", "--static", *(["--no-compile"] if built else [])]
    result = run_dbt(settings, arguments, project=built)
    page = docs_page(settings)
    if not result.success or not page.is_file():
        raise WarehouseError("dbt docs generate did not write the lineage page.", hint="Run it plainly to see why.")
    return page


def _failed(command: str, report: BuildReport, hint: str) -> DataError:
    lines = [f"{command}: {len(report.failures)} failed"]
    for failure in report.failures[:10]:
        kind, _, name = failure.node.partition(".")
        lines.append(f"  {kind} {name.partition('.')[2] or name}: {failure.message[:300]}")
    if len(report.failures) > 10:
        lines.append(f"  and {len(report.failures) - 10} more")
    return DataError("\n".join(lines), hint=hint)


def quoted_file_url(path: Path) -> str:
    """file:// URL of a page, for a terminal to click."""
    return "file://" + quote(str(path.resolve()))

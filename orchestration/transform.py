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

from ingestion.database import classify_connect_error
from ingestion.errors import ConfigurationError, DataError, TransientError, WarehouseError
from ingestion.retry import policy_of, retrying
from ingestion.settings import Settings

# (node name, its status, nodes finished, nodes in all or None)
OnNode = Callable[[str, str, int, int | None], None]

LINEAGE_PAGE = "static_index.html"

FAILED = ("error", "fail", "runtime error")
SKIPPED = ("skipped", "partial success")
# What Postgres or libpq say when the server is at fault and not the statement: the same one can succeed later.
# dbt hands on texts only.
OUTAGE = re.compile(
    r"server closed the connection|connection to server .* failed|connection (already|has been|was) closed"
    r"|connection (refused|reset|timed out)|terminating connection|the database system is"
    r"|too many clients|remaining connection slots|could not (send|receive) data|SSL SYSCALL"
    r"|deadlock detected|could not serialize access|canceling statement due to lock timeout",
    re.IGNORECASE,
)


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
    `selector` is how dbt is asked for this node alone; None for what is no node of the graph, as a hook.
    """

    node: str
    status: str
    message: str
    seconds: float = 0.0
    rows: int | None = None
    failures: int | None = None
    selector: str | None = None


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

    @property
    def is_outage(self) -> bool:
        """Something failed, and all that did because the server went away: the same build can succeed later."""
        return bool(self.failures) and all(
            one.status != "fail" and OUTAGE.search(one.message) is not None for one in self.failures
        )


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
        return _invoke([*arguments, "--log-level", "none"], on_node, project, dsn=settings.dsn or "")


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


def load_runner() -> Any:
    """dbt's `dbtRunner`, for one command.

    Every command makes an adapter, which adds its flags to a list that lives as long as the process, and names the
    origin of each flag on it by a walk over the stack and all modules: the hundredth command would take seconds longer
    than the first. So the list is cut to one of each, and the walk, whose result only a warning shows, left out.
    """
    # Imported here: dbt takes seconds to import.
    from dbt.adapters.base import impl
    from dbt.cli.main import dbtRunner
    from dbt_common.behavior_flags import BehaviorFlagRendered

    flags: list[Any] = impl.DEFAULT_BASE_BEHAVIOR_FLAGS
    flags[:] = {flag["name"]: flag for flag in flags}.values()
    BehaviorFlagRendered._default_source = staticmethod(lambda: "dbt.adapters")  # type: ignore[method-assign]
    return dbtRunner


def _invoke(arguments: Sequence[str], on_node: OnNode | None = None, project: Any = None, *, dsn: str = "") -> Any:
    runner = load_runner()
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

    result = runner(manifest=project, callbacks=[on_event]).invoke([*arguments, "--quiet"])
    if result.exception is not None:
        if not isinstance(result.exception, Exception):
            # dbt hands on an interrupt as if it were a result.
            raise result.exception
        text = " ".join(str(result.exception).split())
        if OUTAGE.search(text):
            # No server to talk to, or one that refuses us.
            raise classify_connect_error(Exception(text), dsn)
        raise ConfigurationError(f"dbt {arguments[0]} could not run: {text[:1500]}", hint="`dbt parse` says more.")
    return result


def summarise(result: Any) -> BuildReport:
    """dbt's results -> counts by kind, failures and warnings."""
    nodes: list[tuple[str, NodeResult]] = []
    for one in getattr(result.result, "results", None) or []:
        kind = str(getattr(one.node, "resource_type", "source"))
        rows = (one.adapter_response or {}).get("rows_affected")
        fqn = getattr(one.node, "fqn", None)
        found = NodeResult(
            one.node.unique_id,
            str(one.status),
            " ".join((one.message or "").split()),
            seconds=float(one.execution_time or 0),
            rows=rows if isinstance(rows, int) and kind != "test" else None,
            failures=getattr(one, "failures", None),
            selector=f"fqn:{'.'.join(fqn)}" if fqn and kind in ("model", "test", "seed", "snapshot") else None,
        )
        nodes.append((kind, found))
    return _report(nodes, float(getattr(result.result, "elapsed_time", 0) or 0))


def _report(nodes: Sequence[tuple[str, NodeResult]], seconds: float) -> BuildReport:
    counts = Counter(kind for kind, _ in nodes)
    skipped = sum(one.status in SKIPPED for _, one in nodes)
    if skipped:
        counts["skipped"] = skipped
    entries = [Failure(one.node, one.status, one.message) for _, one in nodes]
    return BuildReport(
        counts,
        tuple(one for one in entries if one.status in FAILED),
        tuple(one for one in entries if one.status == "warn"),
        seconds,
        tuple(one for _, one in nodes),
    )


def merge(first: BuildReport, again: BuildReport) -> BuildReport:
    """Two tries of one build: each node as it ended, those in the second try as they ended there."""
    renewed = {one.node: one for one in again.nodes}
    known = {one.node for one in first.nodes}
    nodes = [renewed.get(one.node, one) for one in first.nodes if one.selector or one.node in renewed]
    nodes += [one for one in again.nodes if one.node not in known]
    return _report([(one.node.partition(".")[0], one) for one in nodes], first.seconds + again.seconds)


# Unit tests look at the SQL, which `dbt build` and `make test` do, and not at the data.
DATA_ONLY = ("--exclude-resource-type", "unit_test")


def run_build(
    settings: Settings,
    arguments: Sequence[str] = (),
    on_node: OnNode | None = None,
    command: str = "build",
    project: Any = None,
    *,
    select: Sequence[str] = (),
    before: BuildReport | None = None,
    on_retry: Callable[[TransientError, float], None] = lambda error, delay: None,
) -> BuildReport:
    """`dbt build` (or `dbt test`), but for unit tests; what failed is in the report, for `require_built` to raise.

    An outage is tried again within the retry policy: what failed for it or was skipped, and nothing else, as
    `dbt retry` does. A failed test or a model at fault is not tried again.

    Args:
        select: dbt's arguments that choose nodes; none for all.
        before: what an earlier try of this build left; only what failed or was skipped there is built.

    Raises:
        TransientError, AuthenticationError: the server could not be reached at all.
    """
    report = before

    def attempt() -> BuildReport:
        nonlocal report
        unfinished = select if report is None else _unfinished(report)
        found = summarise(
            run_dbt(settings, [command, *DATA_ONLY, *(unfinished or select), *arguments], on_node, project)
        )
        report = found if report is None else merge(report, found)
        if report.is_outage:
            require_built(report, command)
        return report

    try:
        return retrying(attempt, policy_of(settings), on_retry=on_retry)
    except TransientError:
        if report is None:
            raise
        return report


def _unfinished(report: BuildReport) -> list[str]:
    """dbt's arguments for what failed or was skipped; none where only a hook did."""
    chosen = [one.selector for one in report.nodes if one.selector and one.status in (*FAILED, *SKIPPED)]
    # Not the tests that passed on models that are built again, nor tests of anything else.
    return ["--indirect-selection", "empty", "--select", *chosen] if chosen else []


def require_built(report: BuildReport, command: str = "build") -> None:
    """Nothing when every node passed.

    Raises:
        DataError: a model, test or seed failed; the message names each.
        TransientError: the server went away, and that is all that failed.
    """
    if report.is_outage:
        raise TransientError(
            _describe_failed(f"dbt {command}", report), hint="`dbt retry` runs only what failed or was skipped."
        )
    if report.failures:
        raise DataError(
            _describe_failed(f"dbt {command}", report),
            hint="`dbt retry` runs only what failed; target/compiled has the tests' SQL.",
        )


def check_freshness(settings: Settings, project: Any = None) -> BuildReport:
    """`dbt source freshness`.

    Raises:
        DataError: a source is older than its `error_after`.
    """
    report = summarise(run_dbt(settings, ["source", "freshness"], project=project))
    if report.failures:
        raise DataError(
            _describe_failed("dbt source freshness", report), hint="`warehouse status` shows age and lag of every feed."
        )
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


def _describe_failed(command: str, report: BuildReport) -> str:
    lines = [f"{command}: {len(report.failures)} failed"]
    for failure in report.failures[:10]:
        kind, _, name = failure.node.partition(".")
        lines.append(f"  {kind} {name.partition('.')[2] or name}: {failure.message[:300]}")
    if len(report.failures) > 10:
        lines.append(f"  and {len(report.failures) - 10} more")
    return "\n".join(lines)


def quoted_file_url(path: Path) -> str:
    """file:// URL of a page, for a terminal to click."""
    return "file://" + quote(str(path.resolve()))

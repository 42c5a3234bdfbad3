"""What every command of `warehouse` shares: settings, services, a connection, how results are printed."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ingestion.errors import ConfigurationError

if TYPE_CHECKING:
    from ingestion.settings import Settings

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]

T = TypeVar("T")


def project_settings() -> "Settings":
    """Settings of the project in this folder."""
    from ingestion.settings import load_settings

    settings = load_settings()
    if not (settings.project_dir / "dbt_project.yml").is_file():
        raise ConfigurationError(
            f"No dbt_project.yml in {settings.project_dir}.", hint="WAREHOUSE_PROJECT_DIR names another folder."
        )
    return settings


@contextmanager
def services_running() -> Iterator["Settings"]:
    """Settings in which every service has an address, for the length of a command."""
    from orchestration.services import running

    with running(project_settings()) as settings:
        yield settings


def with_connection(ask: Callable[[Any], T], purpose: str) -> T:
    """What `ask` answers from the warehouse, with every table in place."""
    from ingestion.database import connect
    from orchestration.run import prepare

    with services_running() as settings:
        prepare(settings)
        connection = connect(settings, purpose=purpose)
        try:
            return ask(connection)
        finally:
            connection.close()


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def make_reporter(quiet: bool) -> Any:
    from orchestration.console import Reporter

    return Reporter(quiet=quiet)

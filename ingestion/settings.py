"""Settings: the environment over the project's `.env`. Nothing else configures a run.

A setting is a name in upper case with a text value; what has no value falls to the embedded default.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ingestion.errors import ConfigurationError


@dataclass(frozen=True)
class Settings:
    """Where the project is and what its environment says."""

    project_dir: Path
    home: Path
    env: Mapping[str, str]

    def get(self, name: str, default: str | None = None) -> str | None:
        """A setting's value; an empty one counts as absent (compose files pass empty variables on)."""
        return self.env.get(name) or default

    def require(self, name: str, why: str) -> str:
        """A setting's value, or `ConfigurationError` naming the setting and what needs it."""
        value = self.get(name)
        if value is None:
            raise ConfigurationError(
                f"{name} is not set: {why}",
                hint=f"Set {name} in the environment or in .env; see .env.example.",
            )
        return value

    def number(self, name: str, default: float) -> float:
        """A setting that is a number of 0 or more; `ConfigurationError` for anything else."""
        text = self.get(name)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise ConfigurationError(f"{name} must be a number of 0 or more, not {text!r}.", hint="See .env.example.")
        return value

    def with_env(self, **values: str) -> "Settings":
        """The same settings with these values on top."""
        return replace(self, env={**self.env, **values})

    @property
    def dsn(self) -> str | None:
        return self.get("WAREHOUSE_DSN")

    @property
    def kafka_bootstrap(self) -> str | None:
        return self.get("KAFKA_BOOTSTRAP_SERVERS")

    @property
    def fx_api_base(self) -> str | None:
        return self.get("FX_API_BASE")

    @property
    def embedded(self) -> frozenset[str]:
        """Names of the services that run embedded in this process's lease."""
        return frozenset(filter(None, (self.get("WAREHOUSE_EMBEDDED") or "").split(",")))


def find_project_dir(start: Path) -> Path:
    """The nearest folder upwards that holds `dbt_project.yml`."""
    for folder in (start, *start.parents):
        if (folder / "dbt_project.yml").is_file():
            return folder
    raise ConfigurationError(
        f"No dbt_project.yml in {start} or above it.",
        hint="Run the command inside the project, or set WAREHOUSE_PROJECT_DIR.",
    )


def load_settings(project_dir: Path | None = None) -> Settings:
    """Read `.env` and the environment; the environment wins."""
    named = os.environ.get("WAREHOUSE_PROJECT_DIR")
    root = project_dir or (Path(named) if named else find_project_dir(Path.cwd()))
    root = root.resolve()
    dotenv = root / ".env"
    env: dict[str, str] = {}
    if dotenv.is_file():
        # Imported here: most runs have no .env, and --help must stay quick.
        from dotenv import dotenv_values

        env.update({name: value for name, value in dotenv_values(dotenv).items() if value is not None})
    env.update(os.environ)
    home = Path(env.get("WAREHOUSE_HOME") or root / ".warehouse")
    return Settings(project_dir=root, home=home if home.is_absolute() else root / home, env=env)

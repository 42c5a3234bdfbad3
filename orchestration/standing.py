"""Whether the models stand as they would be built now: from the same files, the same loads, and touched by nobody.

    inputs = files dbt reads + where it builds + loads committed, taken before a build
    a build that passed is noted with its inputs and the relations it left -> same again: it stands
    any dbt command that builds forgets the note when it starts: macros/forget_standing.sql

What somebody writes into a model's rows by hand is not seen here; the nightly tests look at everything.
"""

import hashlib
import json
from collections import Counter
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg2.extensions
import yaml

from ingestion.settings import Settings
from orchestration.transform import BuildReport, profile_environment

Connection = psycopg2.extensions.connection

# Where dbt looks when dbt_project.yml does not say.
DEFAULT_PATHS = {
    "model-paths": "models",
    "seed-paths": "seeds",
    "test-paths": "tests",
    "macro-paths": "macros",
    "snapshot-paths": "snapshots",
    "analysis-paths": "analyses",
    "packages-install-path": "dbt_packages",
}

# Each relation by its identity: one that was dropped, or made again by somebody else, differs.
_RELATIONS = """
select coalesce(string_agg(c.oid::text, ' ' order by c.oid), '')
from pg_class as c
inner join pg_namespace as n on c.relnamespace = n.oid
where c.relkind in ('r', 'v', 'm', 'p') and n.nspname !~ '^(pg_|information_schema$|ops$|raw_)'
"""


def take_inputs(settings: Settings, connection: Connection) -> str:
    """What a build now would be made from, as a digest.

    Args:
        connection: in autocommit.
    """
    parts: list[Any] = [version("dbt-core"), version("dbt-postgres")]
    values = profile_environment(settings) | {"schema": settings.get("WAREHOUSE_SCHEMA") or ""}
    parts.append(sorted((name, value) for name, value in values.items() if name != "WAREHOUSE_DB_PASSWORD"))
    for path in _files(settings.project_dir):
        name = path.relative_to(settings.project_dir).as_posix()
        parts.append([name, hashlib.sha256(path.read_bytes()).hexdigest()])
    parts.append(_ask(connection, "select feed, count(*), max(load_id) from ops.loads group by feed order by feed"))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _files(project: Path) -> list[Path]:
    declared = yaml.safe_load((project / "dbt_project.yml").read_text(encoding="utf-8"))
    found = [path for path in (project / "dbt_project.yml", project / "profiles.yml") if path.is_file()]
    for key, usual in DEFAULT_PATHS.items():
        named = declared.get(key, usual)
        for folder in [named] if isinstance(named, str) else named:
            found += [path for path in sorted((project / folder).rglob("*")) if path.is_file()]
    return found


def find_standing(connection: Connection, inputs: str) -> BuildReport | None:
    """The last build with what it counted, when it was made from these inputs and all of it is still there."""
    rows = _ask(
        connection,
        f"select counts, built_at from ops.standing where inputs = %s and relations = ({_RELATIONS})",
        inputs,
    )
    for counts, built_at in rows:
        assert isinstance(built_at, datetime)
        return BuildReport(Counter(counts), stands_since=built_at)
    return None


def note_standing(connection: Connection, inputs: str, report: BuildReport) -> None:
    """A build from these inputs passed."""
    with connection.cursor() as cursor:
        cursor.execute("delete from ops.standing")
        cursor.execute(
            f"insert into ops.standing (inputs, relations, counts) select %s, ({_RELATIONS}), %s",
            (inputs, json.dumps(report.counts)),
        )


def _ask(connection: Connection, statement: str, *values: object) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(statement, values or None)
        return cursor.fetchall()

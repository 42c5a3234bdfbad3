"""dbt's manifest for readers of the graph: always of the files as they are now, parsed only when they changed.

    dbt_project.yml, models, macros, seeds, tests -> fingerprint -> <home>/dbt/manifest-<fingerprint>.json

`target/manifest.json` is written by every dbt command, in place and for whatever selection of the moment: whoever reads
it may see half a file or yesterday's graph. This one appears whole or not at all. A fresh clone has none; the first
reader parses (5 s, no server, nothing in the project is touched), the others find it.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ingestion.errors import ConfigurationError
from ingestion.settings import Settings
from orchestration import transform

Manifest = dict[str, Any]

# Where dbt looks when dbt_project.yml does not say.
DEFAULT_PATHS = {
    "model-paths": ["models"],
    "seed-paths": ["seeds"],
    "macro-paths": ["macros"],
    "test-paths": ["tests"],
    "snapshot-paths": ["snapshots"],
    "analysis-paths": ["analyses"],
    "function-paths": ["functions"],
}
# Settings change with the shell one works in; their manifests stay side by side.
KEPT = 4


def has_manifest(settings: Settings) -> bool:
    """Whether the manifest of the project as it stands is there without parsing."""
    return _path(settings).exists()


def load_manifest(settings: Settings) -> Manifest:
    """The manifest of the project as it stands.

    Raises:
        ConfigurationError: the project does not parse.
    """
    path = _path(settings)
    try:
        return _read(path)
    except FileNotFoundError:
        _parse_to(settings, path)
    return _read(path)


def keep_manifest(settings: Settings, project: Any) -> None:
    """Keep what `transform.parse_project` has just parsed for the next reader, who then need not."""
    path = _path(settings)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="parse-", dir=path.parent) as target:
            project.write(f"{target}/{path.name}")
            os.replace(f"{target}/{path.name}", path)
        _clear_old(path.parent)


def _path(settings: Settings) -> Path:
    return settings.home / "dbt" / f"manifest-{fingerprint(settings)}.json"


def fingerprint(settings: Settings) -> str:
    """Changes with every file dbt parses, the profile, and dbt's version. Contents count: a checkout changes times."""
    digest = hashlib.sha256(version("dbt-core").encode())
    # profiles.yml reads them, and the relation names in the manifest follow.
    for value in (
        transform.database_name(settings),
        settings.get("WAREHOUSE_DB_NAME"),
        settings.get("WAREHOUSE_SCHEMA"),
    ):
        digest.update(f"\0{value}".encode())
    for path in _parsed_files(settings.project_dir):
        content = path.read_bytes()
        digest.update(f"\0{path.relative_to(settings.project_dir)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _parsed_files(project: Path) -> Iterator[Path]:
    project_file = project / "dbt_project.yml"
    try:
        named = yaml.safe_load(project_file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{project_file} cannot be read: {' '.join(str(error).split())}") from None
    for name in ("dbt_project.yml", "profiles.yml", "profiles.yml.example"):
        if (project / name).is_file():
            yield project / name
    for key, default in DEFAULT_PATHS.items():
        for folder in (named or {}).get(key, default):
            yield from sorted(path for path in (project / folder).rglob("*") if path.is_file())


def _parse_to(settings: Settings, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="parse-", dir=path.parent) as target:
        # Two processes that find none both parse; the same bytes come out, and the last one stands.
        os.replace(transform.parse(settings, Path(target)), path)
    _clear_old(path.parent)


def _clear_old(folder: Path) -> None:
    for old in sorted(folder.glob("manifest-*.json"), key=_age)[KEPT:]:
        old.unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except FileNotFoundError:  # another process was quicker to clear it
        return math.inf


def _read(path: Path) -> Manifest:
    manifest: Manifest = json.loads(path.read_bytes())
    return manifest


def attach_tests(manifest: Manifest) -> Manifest:
    """The manifest with every data test attached to what it tests, as dbt itself does for a model's generic tests.

    dbt leaves two kinds unattached, and dagster-dbt makes no check of a test over several nodes that is: a generic test
    of a source belongs to the one source it reads, a singular test to the model or seed its name starts with (house
    rule: `<model>__<invariant>`).
    """
    attached = {}
    for unique_id, test in manifest["nodes"].items():
        if test["resource_type"] == "test" and not test.get("attached_node"):
            found = _tested_node(test, manifest)
            if found is not None:
                attached[unique_id] = {**test, "attached_node": found}
    return {**manifest, "nodes": {**manifest["nodes"], **attached}}


def _tested_node(test: Manifest, manifest: Manifest) -> str | None:
    parents = test["depends_on"]["nodes"]
    if test.get("test_metadata"):
        sources = [parent for parent in parents if parent in manifest["sources"]]
        return sources[0] if len(sources) == 1 else None
    names = {parent: manifest["nodes"][parent]["name"] for parent in parents if parent in manifest["nodes"]}
    named = [parent for parent, name in names.items() if test["name"].startswith(f"{name}__")]
    return max(named, key=lambda parent: len(names[parent]), default=None)

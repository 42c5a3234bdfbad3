"""The project's SQL as dbt compiles it, without a server: whole, and as an incremental run would have it.

    project files -> dbt parse -> dbt compile, twice -> <home>/lineage/compiled-<fingerprint>.json

Macros of this project ask the database while they compile: whether a table is there, its high-water mark, loads that
brought rows back. Lineage must not depend on the answers, or it would change with the data. So dbt compiles here with
its own macros for such questions put aside: a query finds nothing, no relation is there, and `is_incremental()` is
what is wanted. The text is all that is taken; nothing of it is ever run.
"""

import contextlib
import copy
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ingestion.errors import ConfigurationError
from ingestion.settings import Settings
from orchestration import manifest, transform

Manifest = dict[str, Any]

# Of dbt's macros, by their unique ids: what they say while lineage compiles.
_ANSWERS = {
    "macro.dbt.run_query": (
        "{% macro run_query(sql) %}{{ return({'rows': [], 'columns': [{}], 'column_names': []}) }}{% endmacro %}"
    ),
    "macro.dbt.statement": (
        "{% macro statement(name=None, fetch_result=False, auto_begin=True, language='sql') %}"
        "{%- if name is not none -%}{%- do store_result(name, response='') -%}{%- endif -%}{% endmacro %}"
    ),
    "macro.dbt_postgres.postgres__list_relations_without_caching": (
        "{% macro postgres__list_relations_without_caching(schema_relation) %}{{ return([]) }}{% endmacro %}"
    ),
}
_IS_INCREMENTAL = "macro.dbt.is_incremental"
_FORMS = {
    "compiled_code": "{% macro is_incremental() %}{{ return(false) }}{% endmacro %}",
    "incremental_code": (
        "{% macro is_incremental() %}"
        "{{ return(execute and model.config.materialized in ('incremental', 'microbatch')) }}{% endmacro %}"
    ),
}
# What is kept of a node; the rest of a manifest is several times as much.
_KEPT = (
    "unique_id", "name", "alias", "schema", "database", "resource_type", "fqn", "original_file_path", "description",
    "columns", "meta", "config", "checksum", "depends_on", "compiled_code", "language", "relation_name", "root_path",
    "column_name", "attached_node", "test_metadata", "contract", "constraints", "group", "source_name", "identifier",
    "owner", "type", "label", "url", "given", "expect", "model", "raw_code", "patch_path", "package_name",
)  # fmt: skip
_KEPT_FORMS = 4


def load_compiled(settings: Settings, project: Any = None) -> Manifest:
    """The manifest with both forms of every model: `compiled_code`, and `incremental_code` where it differs.

    Args:
        project: the project as dbt has parsed it already (`transform.parse_project`); it is left as it is.

    Raises:
        ConfigurationError: the project does not parse or compile.
    """
    folder = settings.home / "lineage"
    path = folder / f"compiled-{fingerprint(settings)}.json"
    with contextlib.suppress(FileNotFoundError):
        read: Manifest = json.loads(path.read_bytes())
        return read
    compiled = _compile(settings, folder, project)
    write_whole(path, json.dumps(compiled))
    for old in sorted(folder.glob("compiled-*.json"), key=_age)[_KEPT_FORMS:]:
        old.unlink(missing_ok=True)
    return compiled


def fingerprint(settings: Settings) -> str:
    """Changes with whatever dbt reads, and with how it is compiled here."""
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return hashlib.sha256(f"{manifest.fingerprint(settings)} {own}".encode()).hexdigest()[:16]


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader finds all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".new-", encoding="utf-8", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _compile(settings: Settings, folder: Path, project: Any) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    parsed = folder / "partial_parse.msgpack"
    with tempfile.TemporaryDirectory(prefix="compile-", dir=folder) as target:
        if parsed.exists():
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(parsed, Path(target) / parsed.name)
        with transform.without_server(settings, Path(target)) as arguments:
            if project is None:
                project = transform.invoke(["parse", *arguments]).result
                with contextlib.suppress(FileNotFoundError):
                    os.replace(Path(target) / parsed.name, parsed)
            else:
                project = copy.deepcopy(project)
            forms = {form: _compile_form(project, form, arguments, Path(target)) for form in _FORMS}
    whole = forms["compiled_code"]
    for unique_id, node in forms["incremental_code"]["nodes"].items():
        if node.get("compiled_code") != whole["nodes"][unique_id].get("compiled_code"):
            whole["nodes"][unique_id]["incremental_code"] = node["compiled_code"]
    return whole


def _compile_form(project: Any, form: str, arguments: list[str], target: Path) -> Manifest:
    for macro, text in {**_ANSWERS, _IS_INCREMENTAL: _FORMS[form]}.items():
        if macro not in project.macros:
            raise ConfigurationError(f"dbt has no {macro} any more, which lineage puts aside while it compiles.")
        project.macros[macro].macro_sql = text
    kinds = ["resource_type:model", "resource_type:snapshot"]
    # Tests have one form only.
    wanted = [*kinds, "resource_type:test"] if form == "compiled_code" else kinds
    result = transform.invoke(
        [
            "compile",
            "--no-populate-cache",
            "--no-introspect",
            "--indirect-selection",
            "empty",
            "--select",
            *wanted,
            *arguments,
        ],
        project,
    )
    for one in getattr(result.result, "results", None) or []:
        if str(one.status) not in ("success", "skipped") and one.node.resource_type != "test":
            message = " ".join(str(one.message or one.status).split())
            raise ConfigurationError(f"{one.node.name} does not compile: {message[:500]}")
    return trimmed(json.loads((target / "manifest.json").read_bytes()))


def trimmed(whole: Manifest) -> Manifest:
    """A manifest without what lineage does not read."""
    return {
        "metadata": whole.get("metadata", {}),
        **{
            kind: {
                unique_id: {key: node[key] for key in _KEPT if key in node}
                for unique_id, node in (whole.get(kind) or {}).items()
            }
            for kind in ("nodes", "sources", "exposures", "unit_tests", "functions")
        },
    }

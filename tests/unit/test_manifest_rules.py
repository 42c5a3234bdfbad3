"""The house rules of the dbt project, read off the manifest: `dbt parse -> manifest -> violations`.

No server is needed. A rule is a function from the manifest to what breaks it; each has a twin, a manifest broken on
purpose, that it must find. There are no exceptions today; the first one gets a baseline file with a reason.
"""

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from orchestration.ages import Lineage
from orchestration.transform import load_runner

PROJECT = Path(__file__).parents[2]
PACKAGE = "payments_warehouse"
MAX_NAME = 50
# What the folder of a model says about its name; staging also names the source.
NAMES = {
    "staging": r"stg_(?P<folder>[a-z0-9]+)__[a-z0-9_]+",
    "intermediate": r"int_(?P<folder>[a-z0-9]+)__[a-z0-9_]+",
    "marts": r"(dim|fct|bridge)_[a-z0-9_]+|rpt_[a-z0-9]+__[a-z0-9_]+",
    "audit": r"audit_[a-z0-9_]+",
}

Manifest = dict[str, Any]
Node = dict[str, Any]
Rule = Callable[[Manifest], Iterator[str]]


@dataclass(frozen=True)
class Parsed:
    """The manifest, and what dbt says is deprecated in the project."""

    manifest: Manifest
    deprecated: list[str]


def parse(project: Path, scratch: Path) -> Parsed:
    """`dbt parse` in this process, with nothing kept from an earlier one."""
    deprecated: list[str] = []

    def collect(event: Any) -> None:
        if "Deprecat" in event.info.name:
            deprecated.append(event.info.msg)

    shutil.copy(PROJECT / "profiles.yml.example", scratch / "profiles.yml")
    folders = {"project-dir": project, "profiles-dir": scratch, "target-path": scratch, "log-path": scratch / "logs"}
    flags = ["quiet", "no-version-check", "no-partial-parse", "show-all-deprecations"]
    outcome = load_runner()(callbacks=[collect]).invoke(
        ["parse", *(f"--{flag}" for flag in flags), *(f"--{name}={folder}" for name, folder in folders.items())]
    )
    assert outcome.success, outcome.exception
    return Parsed(json.loads((scratch / "manifest.json").read_text(encoding="utf-8")), deprecated)


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> Parsed:
    """The project as dbt parses it."""
    return parse(PROJECT, tmp_path_factory.mktemp("parse"))


@pytest.fixture(scope="module")
def manifest(parsed: Parsed) -> Manifest:
    return parsed.manifest


def nodes(manifest: Manifest, *types: str) -> Iterator[Node]:
    for node in manifest["nodes"].values():
        if node["resource_type"] in types:
            yield node


def models(manifest: Manifest, *layers: str) -> Iterator[Node]:
    for node in nodes(manifest, "model"):
        if not layers or layer(node) in layers:
            yield node


def layer(node: Node) -> str:
    """staging, intermediate, marts or audit."""
    return str(node["fqn"][1])


def feeds(manifest: Manifest) -> Iterator[Node]:
    for source in manifest["sources"].values():
        if "feed" in source["meta"]:
            yield source


def generic_tests(manifest: Manifest, node: Node) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """(test, column, arguments) of a node."""
    for test in nodes(manifest, "test"):
        if test.get("attached_node") == node["unique_id"]:
            yield test["test_metadata"]["name"], test.get("column_name"), test["test_metadata"]["kwargs"]


def says_its_grain(manifest: Manifest) -> Iterator[str]:
    """The first line of a model's or seed's description says what a row is."""
    for node in nodes(manifest, "model", "seed"):
        if not node["description"].startswith("One row per "):
            yield f"{node['name']}: the description begins with {node['description'][:20]!r}"


def keeps_a_primary_key(manifest: Manifest) -> Iterator[str]:
    """One column is unique and not null, or several are together."""
    for node in nodes(manifest, "model", "seed"):
        found = list(generic_tests(manifest, node))
        unique = {column for test, column, _ in found if test == "unique"}
        present = {column for test, column, _ in found if test == "not_null"}
        if not unique & present and not any(test == "unique_combination" for test, _, _ in found):
            yield f"{node['name']}: no test of a primary key"


def describes_every_column(manifest: Manifest) -> Iterator[str]:
    """Models, seeds and feeds. That the list is complete is checked against the database by the integration tests."""
    for node in [*nodes(manifest, "model", "seed"), *feeds(manifest)]:
        if not node["columns"]:
            yield f"{node['name']}: no columns"
        for column in node["columns"].values():
            if not column["description"].strip():
                yield f"{node['name']}.{column['name']}: no description"


def describes_every_source(manifest: Manifest) -> Iterator[str]:
    for source in manifest["sources"].values():
        if not source["description"].strip() or not source["source_description"].strip():
            yield f"{source['source_name']}.{source['name']}: no description"


def keeps_marts_under_contract(manifest: Manifest) -> Iterator[str]:
    """Enforced, public, with a primary key Postgres makes, which it cannot for a view."""
    for node in models(manifest, "marts"):
        if not node["contract"]["enforced"]:
            yield f"{node['name']}: no contract"
        if node["access"] != "public":
            yield f"{node['name']}: access is {node['access']}"
        constraints = [*node["constraints"], *(c for column in node["columns"].values() for c in column["constraints"])]
        has_key = any(constraint["type"] == "primary_key" for constraint in constraints)
        if not has_key and node["config"]["materialized"] != "view":
            yield f"{node['name']}: no primary key"


def keeps_sources_fresh(manifest: Manifest) -> Iterator[str]:
    """Every source table has limits and a clock to hold against them."""
    for source in manifest["sources"].values():
        name = f"{source['source_name']}.{source['name']}"
        limits = source.get("freshness") or {}
        for limit in ("warn_after", "error_after"):
            if not (limits.get(limit) or {}).get("count"):
                yield f"{name}: no {limit}"
        if not source.get("loaded_at_field") and not source.get("loaded_at_query"):
            yield f"{name}: neither loaded_at_field nor loaded_at_query"


def names_things_by_their_layer(manifest: Manifest) -> Iterator[str]:
    for node in [*nodes(manifest, "model", "seed"), *manifest["sources"].values()]:
        if len(node["name"]) > MAX_NAME:
            yield f"{node['name']}: longer than {MAX_NAME} characters"
    for node in models(manifest):
        match = re.fullmatch(NAMES.get(layer(node), "(?!)"), node["name"])
        if not match:
            yield f"{node['name']}: not a name of {layer(node)}"
        elif "folder" in match.groupdict() and match["folder"] != node["fqn"][2]:
            yield f"{node['name']}: lies in {node['fqn'][2]}"


def names_files_by_what_they_hold(manifest: Manifest) -> Iterator[str]:
    """YAML is `_<folder>__models.yml`, `__sources`, `__seeds`, `__exposures`; one macro a file, named as the file."""
    for node in [*nodes(manifest, "model", "seed"), *manifest["sources"].values(), *manifest["exposures"].values()]:
        path = PurePosixPath((node.get("patch_path") or node["original_file_path"]).split("://")[-1])
        kind = {"model": "models", "seed": "seeds", "source": "sources", "exposure": "exposures"}[node["resource_type"]]
        if path.name != f"_{path.parent.name}__{kind}.yml":
            yield f"{node['name']}: declared in {path}"
    for macro in manifest["macros"].values():
        if macro["package_name"] == PACKAGE:
            path = PurePosixPath(macro["original_file_path"])
            if path.stem != macro["name"].removeprefix("test_" if "generic" in path.parts else ""):
                yield f"{macro['name']}: stands in {path}"


def reads_sources_in_staging_only(manifest: Manifest) -> Iterator[str]:
    """Staging reads the source of its folder, audit what it reconciles, marts of ops the books; feeds go through
    `from_raw` alone."""
    for node in models(manifest):
        sources = [
            manifest["sources"][parent] for parent in node["depends_on"]["nodes"] if parent.startswith("source.")
        ]
        for source in sources:
            name = f"{source['source_name']}.{source['name']}"
            own = layer(node) == "staging" and source["source_name"] == f"raw_{node['fqn'][2]}"
            books = node["fqn"][1:3] == ["marts", "ops"] and source["source_name"] == "ops"
            if not own and not books and layer(node) != "audit":
                yield f"{node['name']}: reads {name}"
            if "feed" in source["meta"] and f"macro.{PACKAGE}.from_raw" not in node["depends_on"]["macros"]:
                yield f"{node['name']}: reads {name} past from_raw"
        if re.search(r"\bsource\(\s*['\"]raw_", node["raw_code"]) or "_dlt_loads" in node["raw_code"]:
            yield f"{node['name']}: reads a raw table past from_raw"


def takes_in_every_feed(manifest: Manifest) -> Iterator[str]:
    """Each feed has a staging model and stands in the reconciliation, with its amounts where it has any."""
    for feed in feeds(manifest):
        readers = {
            (layer(node), node["name"]) for node in models(manifest) if feed["unique_id"] in node["depends_on"]["nodes"]
        }
        name = f"{feed['source_name']}.{feed['name']}"
        if not any(reader == "staging" for reader, _ in readers):
            yield f"{name}: no staging model"
        if ("audit", "audit_loads") not in readers:
            yield f"{name}: not in macros/reconciled_feeds.sql"
        has_money = any(
            (test.get("test_metadata") or {}).get("name") == "exact_in_currency"
            and feed["unique_id"] in test["depends_on"]["nodes"]
            for test in nodes(manifest, "test")
        )
        if has_money and ("audit", "audit_amounts") not in readers:
            yield f"{name}: its amounts are not in macros/reconciled_feeds.sql"


def names_tests_by_what_they_check(manifest: Manifest) -> Iterator[str]:
    """`<model>__<invariant>` reads the model; `test_<model>__<behaviour>` is about it."""
    names = {node["name"]: node["unique_id"] for node in models(manifest)}
    for test in nodes(manifest, "test"):
        if test.get("test_metadata"):
            continue
        about = max((name for name in names if test["name"].startswith(f"{name}__")), key=len, default=None)
        if about is None or names[about] not in test["depends_on"]["nodes"]:
            yield f"{test['name']}: not named after a model it reads"
    for test in manifest["unit_tests"].values():
        if not test["name"].startswith(f"test_{test['model']}__"):
            yield f"{test['name']}: not named after {test['model']}"


def names_its_day(manifest: Manifest) -> Iterator[str]:
    """A model made of a feed says which column is the day of a row, or null: `warehouse replay --with-models`."""
    fed = {feed["unique_id"] for feed in feeds(manifest)}
    for _ in range(len(manifest["nodes"])):
        children = {node["unique_id"] for node in models(manifest) if fed & set(node["depends_on"]["nodes"])}
        if children <= fed:
            break
        fed |= children
    for node in models(manifest, "staging", "intermediate", "marts"):
        if node["unique_id"] in fed:
            day = node["config"]["meta"].get("day_column", "not said")
            if day is not None and day not in node["columns"]:
                yield f"{node['name']}: day_column is {day}"


def gives_served_tables_a_budget(manifest: Manifest) -> Iterator[str]:
    """How old a mart made of feeds may be, in a form that is understood: `warehouse ages` and the alerts."""
    lineage = Lineage(manifest)
    for unique_id in lineage.served:
        budget = lineage.budget(unique_id)
        if budget.warn_after is None or budget.error_after is None:
            yield f"{lineage.name(unique_id)}: no warn_after or no error_after"


def conserves_at_every_hop(manifest: Manifest) -> Iterator[str]:
    """Each staging model, and each of the line from it to the report, has a test that nothing got lost on the way."""
    tested = {test["name"] for test in nodes(manifest, "test") if not test.get("test_metadata")}
    for node in models(manifest, "staging", "intermediate", "marts"):
        derived = any(
            manifest["nodes"].get(parent, {}).get("resource_type") == "model" for parent in node["depends_on"]["nodes"]
        )
        if (derived or layer(node) == "staging") and not any(t.startswith(f"{node['name']}__") for t in tested):
            yield f"{node['name']}: no conservation test"


def fails_rather_than_warns(manifest: Manifest) -> Iterator[str]:
    for test in nodes(manifest, "test"):
        if test["config"]["severity"].lower() != "error" or not test["config"]["enabled"]:
            yield f"{test['name']}: severity is {test['config']['severity']}"


def deduplicates_with_the_macro(manifest: Manifest) -> Iterator[str]:
    for node in models(manifest):
        if re.search(r"row_number\s*\(|distinct\s+on\b", node["raw_code"], re.IGNORECASE):
            yield f"{node['name']}: deduplicates by itself"


def takes_exponents_from_the_seed(manifest: Manifest) -> Iterator[str]:
    """No currency is assumed to have cents."""
    for node in models(manifest):
        if re.search(r"[*/]\s*1?00?(\.0*)?\b", node["raw_code"]):
            yield f"{node['name']}: a literal factor between major and minor units"


def holds_personal_data_before_the_marts(manifest: Manifest) -> Iterator[str]:
    """Of what is marked personal only the subject key goes on; columns keep their mark from layer to layer."""
    personal = {c["name"] for feed in feeds(manifest) for c in feed["columns"].values() if c["meta"].get("pii")}
    for node in models(manifest):
        for column in node["columns"].values():
            marked = bool(column["meta"].get("pii"))
            if column["name"] in personal and not marked:
                yield f"{node['name']}.{column['name']}: personal and not marked so"
            if marked and not column["meta"].get("subject_key") and layer(node) in ("marts", "audit"):
                yield f"{node['name']}.{column['name']}: personal data in {layer(node)}"


def a_model(manifest: Manifest, name: str) -> Node:
    node: Node = manifest["nodes"][f"model.{PACKAGE}.{name}"]
    return node


def drop_tests(manifest: Manifest, prefix: str) -> None:
    manifest["nodes"] = {
        key: node
        for key, node in manifest["nodes"].items()
        if not (node["resource_type"] == "test" and node["name"].startswith(prefix))
    }


def feed_of(manifest: Manifest) -> Node:
    return next(feeds(manifest))


def break_macro_name(manifest: Manifest) -> None:
    manifest["macros"][f"macro.{PACKAGE}.from_raw"]["name"] = "from_somewhere"


def break_reader(manifest: Manifest) -> None:
    a_model(manifest, "fct_transactions")["depends_on"]["nodes"].append(feed_of(manifest)["unique_id"])


def break_severity(manifest: Manifest) -> None:
    next(nodes(manifest, "test"))["config"]["severity"] = "warn"


def break_test_name(manifest: Manifest) -> None:
    test = next(t for t in nodes(manifest, "test") if not t.get("test_metadata"))
    test["name"] = "adds_up"


def break_freshness(manifest: Manifest) -> None:
    feed_of(manifest)["loaded_at_query"] = None


def break_feed(manifest: Manifest) -> None:
    feed = copy.deepcopy(feed_of(manifest))
    feed["unique_id"] += "_more"
    manifest["sources"][feed["unique_id"]] = feed


def set_in(name: str, *path: Any) -> Callable[[Manifest], None]:
    """A change of a model: keys down to a value, the value last."""
    *keys, last, value = path

    def change(manifest: Manifest) -> None:
        place: Any = a_model(manifest, name)
        for key in keys:
            place = place[key]
        place[last] = value

    return change


REVENUE = "rpt_finance__daily_revenue"
RULES: dict[Rule, Callable[[Manifest], None]] = {
    says_its_grain: set_in(REVENUE, "description", "Revenue by day."),
    keeps_a_primary_key: lambda manifest: drop_tests(manifest, f"unique_combination_{REVENUE}"),
    describes_every_column: set_in(REVENUE, "columns", "revenue_minor", "description", " "),
    describes_every_source: lambda manifest: feed_of(manifest).update(description=""),
    keeps_marts_under_contract: set_in(REVENUE, "contract", "enforced", False),
    keeps_sources_fresh: break_freshness,
    names_things_by_their_layer: set_in(REVENUE, "name", "daily_revenue"),
    names_files_by_what_they_hold: break_macro_name,
    reads_sources_in_staging_only: break_reader,
    takes_in_every_feed: break_feed,
    names_tests_by_what_they_check: break_test_name,
    names_its_day: set_in(REVENUE, "config", "meta", {}),
    gives_served_tables_a_budget: set_in(REVENUE, "config", "meta", {"warn_after": {"count": 3, "period": "hour"}}),
    conserves_at_every_hop: lambda manifest: drop_tests(manifest, f"{REVENUE}__"),
    fails_rather_than_warns: break_severity,
    deduplicates_with_the_macro: set_in(REVENUE, "raw_code", "select row_number() over (order by a)"),
    takes_exponents_from_the_seed: set_in(REVENUE, "raw_code", "select amount / 100 as amount"),
    holds_personal_data_before_the_marts: set_in(
        "dim_users", "columns", "email", {"name": "email", "meta": {"pii": True}}
    ),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(manifest: Manifest, rule: Rule) -> None:
    assert list(rule(manifest)) == []


@pytest.mark.parametrize(("rule", "broken"), RULES.items(), ids=lambda value: value.__name__)
def test_the_rule_finds_what_breaks_it(manifest: Manifest, rule: Rule, broken: Callable[[Manifest], None]) -> None:
    changed = copy.deepcopy(manifest)
    broken(changed)
    assert list(rule(changed)) != []


def test_the_rule_finds_amounts_nobody_reconciles(manifest: Manifest) -> None:
    changed = copy.deepcopy(manifest)
    a_model(changed, "audit_amounts")["depends_on"]["nodes"] = []
    (found,) = takes_in_every_feed(changed)
    assert found.startswith("raw_payments.transaction_created: its amounts")


def test_parsing_meets_nothing_deprecated(parsed: Parsed) -> None:
    """A deprecated key works until the next version of dbt; the move to that one is to be cheap."""
    assert parsed.deprecated == []


def test_parsing_tells_what_is_deprecated(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for folder in ("models", "seeds", "macros", "tests/dbt"):
        shutil.copytree(PROJECT / folder, project / folder)
    shutil.copy(PROJECT / "dbt_project.yml", project)
    declaration = project / "models" / "staging" / "fx" / "_fx__models.yml"
    text = declaration.read_text(encoding="utf-8")
    text = text.replace("arguments: {columns: [rate_date, ", "columns: [rate_date, ").replace("_code]}", "_code]")
    declaration.write_text(text, encoding="utf-8")
    assert parse(project, tmp_path).deprecated != []

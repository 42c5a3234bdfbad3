"""The graph of a project: manifest with compiled SQL + feed declarations (+ catalog) -> `Graph`.

    load_graph(settings)              this project; SQL compiled without a server
    read_graph(folder)                any dbt project, by the manifest.json and catalog.json of its target/

Cached by content: a graph by everything it is made from, a model by its SQL and the columns it can see, so that a
changed model is the only one read again.
"""

import contextlib
import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingestion.errors import ConfigurationError
from ingestion.feeds import FeedSpec, load_feeds
from ingestion.settings import Settings
from orchestration.lineage import sources
from orchestration.lineage.compiled import Manifest, fingerprint, load_compiled, trimmed, write_whole
from orchestration.lineage.graph import (
    CARRYING,
    DIRECT,
    ROWS,
    Column,
    ColumnId,
    Dataset,
    Edge,
    Graph,
    graph_from_json,
)

if TYPE_CHECKING:
    from orchestration.lineage.sql import Flow, Output, Statement

# schema -> table -> column -> type
Tables = dict[str, dict[str, dict[str, str]]]
BUILT = ("model", "snapshot")
# dbt adds them to a snapshot: how each is made of what it is told.
SNAPSHOT_COLUMNS = ("dbt_scd_id", "dbt_updated_at", "dbt_valid_from", "dbt_valid_to")
_KEPT = 6


@dataclass
class Work:
    """What building a graph did: models read now, and those taken from the cache."""

    read: list[str] = field(default_factory=list)
    cached: int = 0


def load_graph(settings: Settings, project: Any = None, work: Work | None = None) -> Graph:
    """The graph of the project as its files stand.

    Args:
        project: the project as dbt has parsed it already.

    Raises:
        ConfigurationError: the project does not parse or compile, or a feed cannot be understood.
    """
    key = _digest(fingerprint(settings), _code_version())
    cached = _cached_graph(settings.home, key)
    if cached is not None:
        return cached
    manifest = load_compiled(settings, project)
    graph = build_graph(manifest, load_feeds(settings), {}, settings.project_dir, settings.home, work)
    _keep(settings.home, key, graph)
    return graph


def read_graph(folder: Path, home: Path, work: Work | None = None) -> Graph:
    """The graph of a dbt project given as the folder of its manifest.json, with its catalog.json where there is one.

    Raises:
        ConfigurationError: there is no manifest, or it is none, or nothing in it was compiled.
    """
    try:
        content = (folder / "manifest.json").read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"{folder}/manifest.json cannot be read: {error.strerror}.",
            hint="`dbt docs generate` writes it to target/.",
        ) from None
    catalog_path = folder / "catalog.json"
    catalog_bytes = catalog_path.read_bytes() if catalog_path.is_file() else b"{}"
    key = _digest(hashlib.sha256(content).hexdigest(), hashlib.sha256(catalog_bytes).hexdigest(), _code_version())
    cached = _cached_graph(home, key)
    if cached is not None:
        return cached
    try:
        manifest, catalog = json.loads(content), json.loads(catalog_bytes)
    except ValueError as error:
        raise ConfigurationError(f"{folder} holds JSON that cannot be read: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("nodes"), dict):
        raise ConfigurationError(f"{folder}/manifest.json is no dbt manifest.")
    graph = build_graph(trimmed(manifest), [], catalog, folder, home, work)
    _keep(home, key, graph)
    return graph


def _cached_graph(home: Path, key: str) -> Graph | None:
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        return graph_from_json((home / "lineage" / f"graph-{key}.json").read_bytes())
    return None


def _keep(home: Path, key: str, graph: Graph) -> None:
    folder = home / "lineage"
    write_whole(folder / f"graph-{key}.json", graph.to_json())
    for old in sorted(folder.glob("graph-*.json"), key=lambda path: -path.stat().st_mtime)[_KEPT:]:
        old.unlink(missing_ok=True)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@cache
def _code_version() -> str:
    """Changes with this package and with sqlglot: what they read once may be read otherwise now."""
    from importlib.metadata import version

    names = ("graph.py", "sql.py", "barriers.py", "build.py", "sources.py")
    contents = [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in names]
    return _digest(version("sqlglot"), *contents)


def build_graph(
    manifest: Manifest,
    feeds: Sequence[FeedSpec],
    catalog: Mapping[str, Any],
    folder: Path,
    home: Path | None = None,
    work: Work | None = None,
) -> Graph:
    """The graph of a manifest whose nodes carry `compiled_code` (and `incremental_code`).

    Args:
        catalog: dbt's, for columns nobody declares; {} without.
        folder: where seeds' files lie.
        home: where models once read are kept; None keeps nothing.
        work: told what was done.
    """
    builder = _Builder(manifest, feeds, catalog, folder, _ModelCache(home), work or Work())
    graph = builder.build()
    builder.kept.save()
    return graph


class _ModelCache:
    """Models read before, by what they were read from."""

    def __init__(self, home: Path | None) -> None:
        self.path = home / "lineage" / f"models-{_code_version()}.json" if home else None
        self.used: dict[str, Any] = {}
        self.known: dict[str, Any] = {}
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError, ValueError):
                self.known = json.loads(self.path.read_bytes())

    def save(self) -> None:
        if self.path is not None and self.used.keys() != self.known.keys():
            # What is used now, and as much of what was used before: another branch, another project.
            older = {key: value for key, value in self.known.items() if key not in self.used}
            kept = dict(list(older.items())[-2000:]) | self.used
            write_whole(self.path, json.dumps(kept))


@dataclass
class _Builder:
    manifest: Manifest
    feeds: Sequence[FeedSpec]
    catalog: Mapping[str, Any]
    folder: Path
    kept: _ModelCache
    work: Work
    datasets: dict[str, Dataset] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    tables: Tables = field(default_factory=dict)
    # (schema, table) -> dataset
    found_at: dict[tuple[str, str], str] = field(default_factory=dict)
    functions: dict[str, "Flow"] = field(default_factory=dict)

    def build(self) -> Graph:
        nodes = self.manifest["nodes"]
        if self.feeds:
            self._add(sources.loader_dataset())
            self.tables = sources.kept_tables(self.feeds)
        by_name = {feed.name: feed for feed in self.feeds}
        for unique_id, source in self.manifest["sources"].items():
            self._add_source(unique_id, source, by_name.get(f"{source['source_name']}.{source['name']}"))
        for dataset, edges in sources.dead_letter_tables(self.feeds, self.found_at):
            self._add(dataset)
            self.found_at[tuple(dataset.relation.split("."))] = dataset.id  # type: ignore[index]
            self.edges += edges
        for unique_id, node in nodes.items():
            if node["resource_type"] == "seed":
                self._add_seed(unique_id, node)
        self._read_functions()
        for unique_id in _in_order(nodes):
            self._add_model(unique_id, nodes[unique_id])
        self._add_tests()
        for unique_id, exposure in self.manifest["exposures"].items():
            self._add_exposure(unique_id, exposure)
        name = str(self.manifest["metadata"].get("project_name") or self.folder.name)
        return Graph(name, self.datasets, tuple(self.edges))

    # Where it begins

    def _add(self, dataset: Dataset) -> None:
        self.datasets[dataset.id] = dataset

    def _place(self, schema: str, table: str, unique_id: str, columns: Iterable[Column]) -> None:
        self.found_at[schema, table] = unique_id
        known = {column.name: column.type or "text" for column in columns if column.name != ROWS}
        if known:
            self.tables.setdefault(schema, {})[table] = known

    def _add_source(self, unique_id: str, source: Mapping[str, Any], feed: FeedSpec | None) -> None:
        schema, table = source["schema"], source.get("identifier") or source["name"]
        columns = self._declared(unique_id, source)
        kept = self.tables.get(schema, {}).get(table, {})
        for name, type_ in kept.items():
            columns.setdefault(name, Column(name, type_))
        dataset = Dataset(
            id=unique_id,
            name=f"{source['source_name']}.{source['name']}",
            kind="source",
            layer="raw",
            relation=f"{schema}.{table}",
            owner=_owner(source),
            description=source.get("description", ""),
            file=source.get("original_file_path", ""),
            columns={ROWS: Column(ROWS), **columns},
        )
        if feed is None:
            self._add(dataset)
        else:
            for one in sources.feed_datasets(feed, unique_id, dataset):
                self._add(one)
            self.edges += sources.feed_edges(feed, unique_id)
        self._place(schema, table, unique_id, self.datasets[unique_id].columns.values())

    def _add_seed(self, unique_id: str, node: Mapping[str, Any]) -> None:
        columns = self._declared(unique_id, node)
        path = self.folder / node["original_file_path"]
        with contextlib.suppress(OSError, StopIteration), path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file))
            columns = {name: columns.get(name, Column(name)) for name in header}
        self._add(self._of_node(unique_id, node, columns))
        self._place(node["schema"], node["alias"], unique_id, columns.values())

    def _declared(self, unique_id: str, node: Mapping[str, Any]) -> dict[str, Column]:
        """The columns a node declares, with those only the catalog knows."""
        columns = {}
        for name, column in (node.get("columns") or {}).items():
            meta = {**(column.get("meta") or {}), **((column.get("config") or {}).get("meta") or {})}
            columns[name] = Column(
                name,
                column.get("data_type") or "",
                column.get("description") or "",
                bool(meta.get("pii")),
                bool(meta.get("subject_key")),
                barrier_name(meta.get("barrier"), node, name),
            )
        for kind in ("nodes", "sources"):
            found = (self.catalog.get(kind) or {}).get(unique_id) or {}
            for name, column in (found.get("columns") or {}).items():
                columns.setdefault(name, Column(name))
                if not columns[name].type:
                    columns[name] = replace(columns[name], type=column.get("type") or "")
        return columns

    def _of_node(self, unique_id: str, node: Mapping[str, Any], columns: Mapping[str, Column]) -> Dataset:
        fqn = node.get("fqn") or []
        return Dataset(
            id=unique_id,
            name=node["name"],
            kind=node["resource_type"],
            layer=fqn[1] if len(fqn) > 2 else node["resource_type"],
            relation=f"{node['schema']}.{node['alias']}",
            owner=_owner(node),
            description=node.get("description", ""),
            file=node.get("original_file_path", ""),
            checksum=_digest(node.get("compiled_code") or "", node.get("incremental_code") or ""),
            columns={ROWS: Column(ROWS), **columns},
        )

    def _read_functions(self) -> None:
        """What functions of the project read beside what they are given."""
        for node in (self.manifest.get("functions") or {}).values():
            text = node.get("compiled_code") or node.get("raw_code") or ""
            if "select" in text.lower():
                from orchestration.lineage.sql import merged, read_statement

                body = read_statement(text, self.tables)
                self.functions[node["name"].lower()] = merged(output.flow for output in body.columns.values())

    # Models

    def _add_model(self, unique_id: str, node: Mapping[str, Any]) -> None:
        declared = self._declared(unique_id, node)
        reads = {parent for parent in node["depends_on"]["nodes"] if parent in self.datasets}
        whole = self._read(unique_id, node.get("compiled_code") or "", tuple(declared))
        outputs: dict[str, Any] = dict(whole["columns"])
        if node["resource_type"] == "snapshot":
            outputs |= _snapshot_columns(node, outputs)
        columns: dict[str, Column] = {}
        reason = whole["unknown"] or ("a model in Python" if node.get("language") == "python" else "")
        if reason and not outputs:
            outputs = {name: {"unknown": reason} for name in [*declared] or [ROWS]}
        for name, output in outputs.items():
            column = declared.get(name, Column(name))
            flow = output.get("flow", [])
            columns[name] = replace(
                column,
                expressions=tuple((where, text) for where, text in output.get("expressions", [])),
                unknown=output.get("unknown", ""),
                generated=not flow and not output.get("unknown"),
            )
            self._connect(unique_id, name, flow, reads)
        self._connect(unique_id, ROWS, whole["rows"].get("flow", []), reads)
        columns.setdefault(ROWS, Column(ROWS))
        columns[ROWS] = replace(columns[ROWS], unknown=columns[ROWS].unknown or whole["rows"].get("unknown", ""))
        self._add(replace(self._of_node(unique_id, node, {}), columns=columns, reads=tuple(sorted(reads))))
        self._place(node["schema"], node["alias"], unique_id, columns.values())
        self._add_incremental(unique_id, node, reads)

    def _add_incremental(self, unique_id: str, node: Mapping[str, Any], reads: set[str]) -> None:
        """What only an incremental run reads: the model's own rows, and others."""
        text = node.get("incremental_code")
        if not text:
            return
        before = {(edge.source, edge.target, edge.path, edge.direct): edge for edge in self.edges_of(unique_id)}
        read = self._read(unique_id, text, ())
        begun = len(self.edges)
        for name, output in read["columns"].items():
            self._connect(unique_id, name, output.get("flow", []), reads, again=True)
        self._connect(unique_id, ROWS, read["rows"].get("flow", []), reads, again=True)
        added = []
        for edge in self.edges[begun:]:
            known = before.get((edge.source, edge.target, edge.path, edge.direct))
            if known is None or (edge.carrying and not known.carrying) or _says_more(edge, known):
                added.append(edge)
        self.edges[begun:] = added
        dataset = self.datasets[unique_id]
        unknown = {
            name: output["unknown"]
            for name, output in {**read["columns"], ROWS: read["rows"]}.items()
            if output.get("unknown") and name in dataset.columns and not dataset.columns[name].unknown
        }
        if read["unknown"]:
            unknown[ROWS] = read["unknown"]
        columns = {
            name: replace(column, unknown=f"incremental form: {unknown[name]}") if name in unknown else column
            for name, column in dataset.columns.items()
        }
        # What is made of nothing in a full refresh may be made of the model's own rows later.
        fed = {edge.target.column for edge in added if edge.direct}
        columns = {
            name: replace(column, generated=column.generated and name not in fed) for name, column in columns.items()
        }
        self._add(replace(dataset, columns=columns, reads=tuple(sorted(reads))))

    def edges_of(self, unique_id: str) -> Iterator[Edge]:
        for edge in reversed(self.edges):
            if edge.target.dataset != unique_id:
                return
            yield edge

    def _read(self, unique_id: str, text: str, names: Sequence[str]) -> dict[str, Any]:
        """A statement's columns and rows as plain data, from the cache where it was read before."""
        if not text.strip():
            return {"columns": {}, "rows": {}, "unknown": "not compiled"}
        seen = self._visible(text)
        key = _digest(text, json.dumps(seen, sort_keys=True), json.dumps(names), repr(sorted(self.functions.items())))
        found = self.kept.known.get(key)
        if found is None:
            from orchestration.lineage.sql import read_statement

            self.work.read.append(unique_id)
            found = _plain(read_statement(text, seen, names, self.functions))
        else:
            self.work.cached += 1
        self.kept.used[key] = found
        return found

    def _visible(self, text: str) -> Tables:
        """The tables a text names; a schema of everything would make each model depend on all."""
        return {
            schema: found
            for schema, tables in self.tables.items()
            if schema in text and (found := {table: columns for table, columns in tables.items() if table in text})
        }

    def _connect(
        self, target_id: str, target_column: str, flow: Sequence[Any], reads: set[str], again: bool = False
    ) -> None:
        target = ColumnId(target_id, target_column)
        for schema, table, column, path, ways in flow:
            source_id = target_id if self._is(target_id, schema, table) else self._dataset_at(schema, table, column)
            reads.add(source_id)
            source = ColumnId(source_id, column)
            direct = [way for way in ways if way[0] in DIRECT]
            indirect = sorted({way[0] for way in ways if way[0] not in DIRECT})
            if direct:
                kind = min((way[0] for way in direct), key=DIRECT.index)
                carrying = [way for way in direct if way[0] in CARRYING] or direct
                crossed = tuple(sorted({tuple(sorted(way[1])) for way in carrying}))
                self.edges.append(Edge(source, target, (kind,), path, crossed, again))
            if indirect:
                self.edges.append(Edge(source, target, tuple(indirect), path, ((),), again))

    def _is(self, unique_id: str, schema: str, table: str) -> bool:
        node = self.manifest["nodes"].get(unique_id)
        return node is not None and (node["schema"], node["alias"]) == (schema, table)

    def _dataset_at(self, schema: str, table: str, column: str) -> str:
        """The dataset at a relation; one nobody declared is noted as external, with the columns read of it."""
        unique_id = self.found_at.get((schema, table))
        if unique_id is None:
            unique_id = self.found_at[schema, table] = f"external.{schema}.{table}"
            self._add(Dataset(unique_id, f"{schema}.{table}", "external", "raw", f"{schema}.{table}"))
        dataset = self.datasets[unique_id]
        if column not in dataset.columns:
            self._add(replace(dataset, columns={**dataset.columns, column: Column(column)}))
        return unique_id

    # What stands on it

    def _add_tests(self) -> None:
        reading: dict[str, dict[str, set[str]]] = {}
        for unique_id, test in self.manifest["nodes"].items():
            if test["resource_type"] == "test":
                for source, column in self._columns_read(unique_id, test):
                    reading.setdefault(source, {}).setdefault(unique_id, set()).add(column)
        for unique_id, unit in self.manifest["unit_tests"].items():
            model = next((parent for parent in unit["depends_on"]["nodes"] if parent in self.datasets), None)
            rows = (unit.get("expect") or {}).get("rows") or []
            if model is not None and isinstance(rows, list):
                expected = {name for row in rows if isinstance(row, dict) for name in row}
                reading.setdefault(model, {})[unique_id] = expected
        for dataset, tests in reading.items():
            if dataset in self.datasets:
                self._add(
                    replace(
                        self.datasets[dataset],
                        tests=tuple((test, tuple(sorted(columns))) for test, columns in sorted(tests.items())),
                    )
                )

    def _columns_read(self, unique_id: str, test: Mapping[str, Any]) -> set[tuple[str, str]]:
        found: set[tuple[str, str]] = set()
        text = test.get("compiled_code")
        if text:
            read = self._read(unique_id, text, ())
            for output in [*read["columns"].values(), read["rows"]]:
                for schema, table, column, _path, _ways in output.get("flow", []):
                    source = self.found_at.get((schema, table))
                    if source is not None:
                        found.add((source, column))
        if test.get("column_name") and test.get("attached_node"):
            found.add((test["attached_node"], test["column_name"]))
        if not found:
            found = {(parent, ROWS) for parent in test["depends_on"]["nodes"]}
        return found

    def _add_exposure(self, unique_id: str, exposure: Mapping[str, Any]) -> None:
        owner = exposure.get("owner") or {}
        self._add(
            Dataset(
                id=unique_id,
                name=exposure["name"],
                kind="exposure",
                layer="exposure",
                owner=owner.get("name") or owner.get("email") or "",
                description=exposure.get("description", ""),
                file=exposure.get("original_file_path", ""),
                columns={ROWS: Column(ROWS)},
                reads=tuple(parent for parent in exposure["depends_on"]["nodes"] if parent in self.datasets),
            )
        )
        for parent in self.datasets[unique_id].reads:
            self.edges.append(Edge(ColumnId(parent, ROWS), ColumnId(unique_id, ROWS), ("rows",)))


def barrier_name(declared: object, node: Mapping[str, Any], column: str) -> str:
    """A declared barrier as one word: `hash`, `mask`, `tokenise`, `aggregate:<k>`; '' for none.

    Raises:
        ConfigurationError: it is none of them.
    """
    if declared in (None, False, ""):
        return ""
    if declared in ("hash", "mask", "tokenise"):
        return str(declared)
    if isinstance(declared, dict) and set(declared) == {"aggregate"}:
        least = declared["aggregate"]
        if isinstance(least, int) and not isinstance(least, bool) and least >= 2:
            return f"aggregate:{least}"
    raise ConfigurationError(
        f"{node.get('patch_path') or node.get('original_file_path')}: {node['name']}.{column} declares the barrier "
        f"{declared!r}.",
        hint="A barrier is hash, mask, tokenise or {aggregate: <at least 2>}.",
    )


def _says_more(edge: Edge, known: Edge) -> bool:
    """Whether the incremental form reads the same column in a way the full one does not."""
    return edge.direct and not set(edge.barriers) <= set(known.barriers)


def _in_order(nodes: Mapping[str, Any]) -> list[str]:
    """Models and snapshots, each after what it reads."""
    order: dict[str, None] = {}
    for first in nodes:
        waiting = [(first, False)]
        while waiting:
            unique_id, done = waiting.pop()
            if done:
                order[unique_id] = None
            elif unique_id in nodes and nodes[unique_id]["resource_type"] in BUILT and unique_id not in order:
                waiting.append((unique_id, True))
                waiting += [
                    (parent, False) for parent in nodes[unique_id]["depends_on"]["nodes"] if parent not in order
                ]
    return list(order)


def _snapshot_columns(node: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, Any]:
    """What dbt adds to a snapshot, made of its key and of the column that says when a row changed."""
    config = node.get("config") or {}
    key = config.get("unique_key") or []
    key = [key] if isinstance(key, str) else list(key)
    changed = [config["updated_at"]] if config.get("updated_at") else []

    def made_of(names: Sequence[str], barriers: Sequence[str] = ()) -> dict[str, Any]:
        flow = [
            [schema, table, column, path, [["transformation", list(barriers)]]]
            for name in names
            for schema, table, column, path, ways in (outputs.get(name) or {}).get("flow", [])
            if any(way[0] in DIRECT for way in ways)
        ]
        return {"flow": flow, "expressions": [["snapshot", f"of {', '.join(names)}"]] if names else []}

    names = config.get("snapshot_meta_column_names") or {}
    made = dict.fromkeys(SNAPSHOT_COLUMNS[1:], made_of(changed)) | {
        SNAPSHOT_COLUMNS[0]: made_of([*key, *changed], ["hash"])
    }
    return {names.get(name) or name: made[name] for name in SNAPSHOT_COLUMNS}


def _plain(statement: "Statement") -> dict[str, Any]:
    def output(one: "Output") -> dict[str, Any]:
        plain: dict[str, Any] = {}
        if one.flow:
            plain["flow"] = [
                [*leaf, sorted([way.kind, sorted(way.barriers)] for way in ways)]
                for leaf, ways in sorted(one.flow.items())
            ]
        if one.expressions:
            plain["expressions"] = [list(step) for step in one.expressions]
        if one.unknown:
            plain["unknown"] = one.unknown
        return plain

    return {
        "columns": {name: output(one) for name, one in statement.columns.items()},
        "rows": output(statement.rows),
        "unknown": statement.unknown,
    }


def _owner(node: Mapping[str, Any]) -> str:
    meta = {**(node.get("meta") or {}), **((node.get("config") or {}).get("meta") or {})}
    return str(meta.get("owner") or node.get("group") or "")

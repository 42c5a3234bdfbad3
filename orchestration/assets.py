"""Dagster's view of the warehouse: one asset a feed, one a model and seed, every data test a check.

    declarations (dbt source YAML) -> feed assets [source, table]  \\
                                                                     joined by key, which dagster-dbt derives alike
    dbt manifest -> model and seed assets [schema, name], checks   /

The assets call what the command line calls: `orchestration.run.ingest` for a feed, `orchestration.transform` for dbt,
in this process. So `dbt retry`, `target/` and the run history are the same whoever ran. A failure carries the
warehouse's message and class; data and configuration errors may not be retried, and a failed test runs nothing again.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import dagster as dg
from dagster_dbt import DagsterDbtTranslator, DagsterDbtTranslatorSettings, DbtProject, dbt_assets

from ingestion.errors import WarehouseError
from ingestion.feeds import FeedSpec, KafkaOrigin
from ingestion.landing import Landing
from orchestration import transform
from orchestration.asset_lineage import COLUMN_LINEAGE, column_lineage
from orchestration.lineage.graph import Graph
from orchestration.manifest import Manifest
from orchestration.run import ingest
from orchestration.session import FULL_TESTS_TAG, RESOURCE_KEY, LogReporter, session_of, to_failure

RAW_GROUP = "raw"
# dagster-dbt writes dbt's unique id under this key on every asset and check it makes.
UNIQUE_ID = "dagster_dbt/unique_id"
# Kinds of nodes that are assets with columns.
WITH_COLUMNS = ("model", "seed", "snapshot", "source")

DbtEvent = dg.MaterializeResult[Any] | dg.AssetCheckResult


class LayerTranslator(DagsterDbtTranslator):
    """dagster-dbt's own keys, grouped by layer: the first folder below models or seeds; with the lineage of columns."""

    def __init__(self, lineage: Graph | None = None) -> None:
        super().__init__(DagsterDbtTranslatorSettings(enable_source_tests_as_checks=True))
        self.lineage = lineage

    def get_asset_spec(self, manifest: Mapping[str, Any], unique_id: str, project: DbtProject | None) -> dg.AssetSpec:
        spec = super().get_asset_spec(manifest, unique_id, project)
        node = self.get_resource_props(manifest, unique_id)
        if self.lineage is not None:
            read = [one for one in node.get("depends_on", {}).get("nodes", []) if one.partition(".")[0] in WITH_COLUMNS]
            keys = {one: self.get_asset_key(self.get_resource_props(manifest, one)) for one in read}
            found = column_lineage(self.lineage, unique_id, keys)
            if found is not None:
                spec = spec.merge_attributes(metadata={COLUMN_LINEAGE: found})
        if spec.group_name is None and node["resource_type"] in ("model", "seed") and len(node["fqn"]) > 2:
            return spec.replace_attributes(group_name=node["fqn"][1])
        return spec


def build_feed_assets(feeds: Sequence[FeedSpec], manifest: Manifest) -> list[dg.AssetsDefinition]:
    """One asset a declared feed: materialising it lands what its source offers now."""
    descriptions = {
        (source["source_name"], source["name"]): source["description"].strip()
        for source in manifest["sources"].values()
    }
    return [_build_feed_asset(feed, descriptions.get((feed.source, feed.table))) for feed in feeds]


def _build_feed_asset(feed: FeedSpec, description: str | None) -> dg.AssetsDefinition:
    origin = feed.origin

    @dg.asset(
        key=dg.AssetKey([feed.source, feed.table]),
        description=description,
        group_name=RAW_GROUP,
        kinds={origin.kind, "dlt", "postgres"},
        owners=[feed.owner if "@" in feed.owner else f"team:{feed.owner}"] if feed.owner else None,
        code_version=feed.contract_version,
        required_resource_keys={RESOURCE_KEY},
        # One writer a feed: an instance that limits its pools lets a second run wait instead of being refused.
        pool=feed.pipeline_name,
        metadata={
            "origin": origin.topic if isinstance(origin, KafkaOrigin) else origin.path,
            "declared in": f"{feed.file}:{feed.line}",
            "dagster/column_schema": dg.TableSchema(
                [
                    dg.TableColumn(
                        column.name,
                        column.type.sql,
                        constraints=dg.TableColumnConstraints(nullable=not column.required),
                        tags={"pii": ""} if column.pii else None,
                    )
                    for column in feed.columns
                ]
            ),
        },
    )
    def land(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
        try:
            with session_of(context).attempt(feed.name) as (settings, run):
                (landing,) = ingest(settings, [feed], run, LogReporter(context))
        except WarehouseError as error:
            raise to_failure(error) from None
        return dg.MaterializeResult(metadata={**describe_landing(landing), "run": run.run_id})

    return land


def describe_landing(landing: Landing) -> dict[str, Any]:
    """A landing as metadata: offered = landed + dead + tombstones + unchanged, and why records were set aside."""
    return {
        "offered": landing.offered,
        "landed": landing.landed,
        "dead": landing.dead,
        "tombstones": landing.tombstones,
        "unchanged": landing.unchanged,
        "lost": landing.lost,
        "drifted": landing.drifted,
        "seconds": round(landing.seconds, 3),
        "loads": dg.MetadataValue.json(landing.loads),
        "swept": dg.MetadataValue.json(landing.swept),
        "reasons": dg.MetadataValue.json(dict(landing.reasons)),
    }


def build_dbt_assets(manifest: Manifest, lineage: Graph | None = None) -> dg.AssetsDefinition:
    """All models and seeds as one step, every data test as a check of the model, seed or feed it tests.

    With a graph of columns, assets and materialisations say what each column is made of.

    A part of it can be selected; dbt is then given exactly the chosen models, seeds and tests.
    """

    @dbt_assets(
        manifest=manifest,
        dagster_dbt_translator=LayerTranslator(lineage),
        name="dbt",
        required_resource_keys={RESOURCE_KEY},
        # dbt commands share target/.
        pool="dbt",
    )
    def dbt(context: dg.AssetExecutionContext) -> Iterator[DbtEvent]:
        report = transform.BuildReport()
        failure: WarehouseError | None = None
        reporter = LogReporter(context)
        arguments = _selection(definition, manifest, context.selected_asset_keys, context.selected_asset_check_keys)
        command = "build"
        if FULL_TESTS_TAG in context.run.tags:
            # A build would skip what stands on a table that failed.
            command, arguments = "test", [*arguments, "--vars", "full_tests: true"]
        try:
            with (
                session_of(context).attempt(command) as (settings, run),
                run.step(command),
                reporter.task(f"dbt {command}") as task,
            ):
                report = transform.run_build(
                    settings, arguments, lambda _n, _s, done, due: task.update(done, due), command
                )
                transform.require_built(report, command)
        except WarehouseError as error:
            failure = error
        yield from _events(definition, report)
        if failure is not None:
            raise to_failure(failure)

    definition: dg.AssetsDefinition = dbt
    return definition


def _nodes(definition: dg.AssetsDefinition) -> tuple[dict[str, dg.AssetKey], dict[str, dg.AssetCheckKey]]:
    """dbt's unique ids -> keys of the assets and of the checks."""
    return (
        {spec.metadata[UNIQUE_ID]: spec.key for spec in definition.specs},
        {str((spec.metadata or {})[UNIQUE_ID]): spec.key for spec in definition.check_specs},
    )


def _selection(
    definition: dg.AssetsDefinition,
    manifest: Manifest,
    chosen: Set[dg.AssetKey],
    chosen_checks: Set[dg.AssetCheckKey],
) -> list[str]:
    """dbt's arguments for what Dagster selected; none for everything."""
    assets, checks = _nodes(definition)
    if set(assets.values()) <= chosen and set(checks.values()) <= chosen_checks:
        return []
    unique_ids = [unique_id for unique_id, key in assets.items() if key in chosen]
    unique_ids += [unique_id for unique_id, key in checks.items() if key in chosen_checks]
    # Tests only where they were chosen, not along with the models they stand on.
    return [
        "--indirect-selection",
        "empty",
        "--select",
        *(f"fqn:{'.'.join(manifest['nodes'][unique_id]['fqn'])}" for unique_id in unique_ids),
    ]


def _events(definition: dg.AssetsDefinition, report: transform.BuildReport) -> Iterator[DbtEvent]:
    """dbt's results as Dagster's. What was skipped yields nothing: it was neither built nor checked."""
    assets, checks = _nodes(definition)
    for node in report.nodes:
        if node.node in assets and node.status == "success":
            key_of = assets[node.node]
            written: dict[str, Any] = {"rows_written": node.rows} if node.rows is not None and node.rows >= 0 else {}
            if COLUMN_LINEAGE in definition.metadata_by_key[key_of]:
                written[COLUMN_LINEAGE] = definition.metadata_by_key[key_of][COLUMN_LINEAGE]
            yield dg.MaterializeResult(asset_key=key_of, metadata={"seconds": round(node.seconds, 3), **written})
        elif node.node in checks and node.status != "skipped":
            key = checks[node.node]
            yield dg.AssetCheckResult(
                asset_key=key.asset_key,
                check_name=key.name,
                passed=node.status == "pass",
                severity=dg.AssetCheckSeverity.WARN if node.status == "warn" else dg.AssetCheckSeverity.ERROR,
                description=node.message or None,
                metadata={
                    "status": node.status,
                    "seconds": round(node.seconds, 3),
                    **({"failing_rows": node.failures} if node.failures is not None else {}),
                },
            )

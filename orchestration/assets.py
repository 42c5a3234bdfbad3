"""Dagster's view of the warehouse: one asset a feed, one a model and seed, every data test a check.

    topics and endpoints (external) -> feed assets [source, table]  \\
                                                                      joined by key, which dagster-dbt derives alike
    dbt manifest -> model and seed assets [schema, name], checks    / -> lineage page

The assets call what the command line calls: `orchestration.run.ingest` for a feed, `orchestration.transform` for dbt,
in this process. So `dbt retry`, `target/` and the run history are the same whoever ran. A failure carries the
warehouse's message and class: an outage is tried again, and then only what failed or was skipped; data and
configuration errors are not, and a failed test runs nothing again. Beside the data tests each feed has two checks:
its ledger, as soon as it landed, and its reconciliation from the source to the marts, once the models are built.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import closing
from functools import partial
from typing import Any

import dagster as dg
from dagster_dbt import DagsterDbtTranslator, DagsterDbtTranslatorSettings, DbtProject, dbt_assets

from ingestion.database import connect
from ingestion.errors import SourceLossError, WarehouseError
from ingestion.feeds import FeedSpec, KafkaOrigin
from ingestion.landing import Landing
from ingestion.settings import Settings
from orchestration import transform
from orchestration.accounts import Account, Verdict, fetch_books
from orchestration.asset_lineage import COLUMN_LINEAGE, column_lineage
from orchestration.console import Reporter
from orchestration.instance import pool_of
from orchestration.lineage.graph import Graph
from orchestration.manifest import Manifest
from orchestration.run import announce_retry, ingest, write_pages
from orchestration.session import FULL_TESTS_TAG, RESOURCE_KEY, LogReporter, session_of, to_retry_or_failure
from orchestration.standing import find_standing, note_standing, take_inputs
from orchestration.triggers import feed_key, follow

SOURCE_GROUP = "sources"
RAW_GROUP = "raw"
LINEAGE_KEY = dg.AssetKey(["docs", "lineage"])
# The books answer in milliseconds; a database that is slow is no reason to fail a landing that stands.
BOOKS_TIMEOUT_S = 30.0
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
        if node["resource_type"] not in ("model", "seed"):
            return spec
        spec = spec.replace_attributes(automation_condition=follow())
        if spec.group_name is None and len(node["fqn"]) > 2:
            return spec.replace_attributes(group_name=node["fqn"][1])
        return spec

    def get_asset_check_spec(
        self, asset_spec: dg.AssetSpec, manifest: Mapping[str, Any], unique_id: str, project: DbtProject | None
    ) -> dg.AssetCheckSpec | None:
        spec = super().get_asset_check_spec(asset_spec, manifest, unique_id, project)
        # Where one check has a condition the others are not asked for without: tests of a feed, which gate its models,
        # are due when it landed.
        return spec and spec._replace(automation_condition=follow())


def build_source_specs(feeds: Sequence[FeedSpec]) -> list[dg.AssetSpec]:
    """Topics and endpoints as external assets, so that the graph begins where the records do."""
    specs = {}
    for feed in feeds:
        key, origin = source_key(feed), feed.origin
        where = {"topic": origin.topic} if isinstance(origin, KafkaOrigin) else {"path": origin.path}
        description = f"The topic {origin.topic}." if isinstance(origin, KafkaOrigin) else f"The API's {origin.path}."
        specs[key] = dg.AssetSpec(
            key, group_name=SOURCE_GROUP, kinds={origin.kind}, description=description, metadata=where
        )
    return list(specs.values())


def source_key(feed: FeedSpec) -> dg.AssetKey:
    """[kafka, topic], or [rest, system, table] for an endpoint, whose path is no name."""
    if isinstance(feed.origin, KafkaOrigin):
        return dg.AssetKey([feed.origin.kind, feed.origin.topic])
    return dg.AssetKey([feed.origin.kind, feed.source.removeprefix("raw_"), feed.table])


def build_feed_assets(feeds: Sequence[FeedSpec], manifest: Manifest) -> list[dg.AssetsDefinition]:
    """One asset a declared feed: materialising it lands what its source offers now."""
    descriptions = {
        (source["source_name"], source["name"]): source["description"].strip()
        for source in manifest["sources"].values()
    }
    return [_build_feed_asset(feed, descriptions.get((feed.source, feed.table))) for feed in feeds]


def _build_feed_asset(feed: FeedSpec, description: str | None) -> dg.AssetsDefinition:
    origin = feed.origin
    key = feed_key(feed)

    @dg.asset(
        key=key,
        deps=[source_key(feed)],
        description=description,
        group_name=RAW_GROUP,
        kinds={"dlt", "postgres"},
        owners=[feed.owner if "@" in feed.owner else f"team:{feed.owner}"] if feed.owner else None,
        code_version=feed.contract_version,
        required_resource_keys={RESOURCE_KEY},
        # A second run waits in the queue instead of being told that the feed is held.
        pool=pool_of(feed),
        check_specs=[
            dg.AssetCheckSpec(
                "ledger",
                asset=key,
                description="offered = landed + dead + tombstones + unchanged, and no loss nobody accepted.",
            )
        ],
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
    def land(context: dg.AssetExecutionContext) -> Iterator[DbtEvent]:
        try:
            with session_of(context).attempt(feed.name) as (settings, run):
                try:
                    (landing,) = ingest(settings, [feed], run, LogReporter(context))
                except SourceLossError:
                    # What there was has landed; the books say what is gone.
                    yield check_ledger(feed, fetch_account(settings, feed))
                    raise
                account = fetch_account(settings, feed)
        except WarehouseError as error:
            raise to_retry_or_failure(context, error) from None
        yield dg.MaterializeResult(metadata={**describe_landing(landing), "run": run.run_id})
        yield check_ledger(feed, account)

    return land


def fetch_account(settings: Settings, feed: FeedSpec) -> Account:
    return fetch_books(settings, [feed], BOOKS_TIMEOUT_S).accounts[feed.name]


def check_ledger(feed: FeedSpec, account: Account) -> dg.AssetCheckResult:
    """Whether every record the feed was ever offered is accounted for."""
    ends = account.landed + account.dead + account.tombstones + account.unchanged
    problems = list(account.open_losses)
    if account.offered != ends:
        problems.insert(0, f"{account.offered:,} were offered, {ends:,} are accounted for")
    return dg.AssetCheckResult(
        asset_key=feed_key(feed),
        check_name="ledger",
        passed=not problems,
        description="; ".join(problems) or None,
        metadata={
            name: getattr(account, name)
            for name in ("offered", "landed", "dead", "tombstones", "unchanged", "lost", "open_dead_letters")
        },
    )


def build_reconciliation_checks(feeds: Sequence[FeedSpec], manifest: Manifest) -> dg.AssetChecksDefinition:
    """A check a feed: whether every day adds up from the source to the marts, as the last build counted it."""
    audits = [
        dg.AssetKey(["audit", node["name"]])
        for node in manifest["nodes"].values()
        if node["resource_type"] == "model" and node["name"].startswith("audit_reconciliation")
    ]

    @dg.multi_asset_check(
        name="reconciliation",
        specs=[
            dg.AssetCheckSpec(
                "reconciliation",
                asset=feed_key(feed),
                additional_deps=audits,
                description="Every day adds up, record by record, from the source to the marts.",
                automation_condition=follow(),
            )
            for feed in feeds
        ],
        required_resource_keys={RESOURCE_KEY},
        can_subset=True,
    )
    def reconcile(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        try:
            with session_of(context).attempt("reconciliation") as (settings, _):
                books = fetch_books(settings, feeds, BOOKS_TIMEOUT_S)
        except WarehouseError as error:
            raise to_retry_or_failure(context.op_execution_context, error) from None
        for feed in feeds:
            if dg.AssetCheckKey(feed_key(feed), "reconciliation") in context.selected_asset_check_keys:
                yield check_reconciliation(feed, books.verdicts.get(feed.name) if books.verdicts else None)

    return reconcile


def check_reconciliation(feed: FeedSpec, verdict: Verdict | None) -> dg.AssetCheckResult:
    if verdict is None:
        return dg.AssetCheckResult(
            asset_key=feed_key(feed),
            check_name="reconciliation",
            passed=False,
            description="audit_reconciliation was never built: `dbt build --select audit_reconciliation`.",
        )
    return dg.AssetCheckResult(
        asset_key=feed_key(feed),
        check_name="reconciliation",
        passed=verdict.adds_up,
        description=None
        if verdict.adds_up
        else f"{verdict.broken_days:,} days do not add up, the first is {verdict.first_broken_day}: "
        "select * from audit.audit_reconciliation where not adds_up",
        metadata={
            "through": str(verdict.last_day),
            "broken_days": verdict.broken_days,
            "landed_and_not_in_the_models_yet": verdict.behind,
        },
    )


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

    A part of it can be selected; dbt is then given exactly the chosen models, seeds and tests. Where nothing is left to
    do, because all of it stands as it would be built now, dbt is not called and nothing is materialised.
    """

    @dbt_assets(
        manifest=manifest,
        dagster_dbt_translator=LayerTranslator(lineage),
        name="dbt",
        required_resource_keys={RESOURCE_KEY},
        # dbt commands share target/, and two builds of one model would wait for each other in Postgres.
        pool="dbt",
    )
    def dbt(context: dg.AssetExecutionContext) -> Iterator[DbtEvent]:
        failure: WarehouseError | None = None
        reporter = LogReporter(context)
        session = session_of(context)
        selection = _selection(definition, manifest, context.selected_asset_keys, context.selected_asset_check_keys)
        # A build would skip what stands on a table that failed.
        command = "test" if FULL_TESTS_TAG in context.run.tags else "build"
        before, session.report = session.report, None
        report = before or transform.BuildReport()
        try:
            with session.attempt(command) as (settings, run), run.step(command):
                report = _run_dbt(settings, reporter, command, selection, before)
                if report.stands_since is None:
                    run.record_nodes(report.nodes, whole=not selection)
                transform.require_built(report, command)
        except WarehouseError as error:
            failure = error
        outcome = failure and to_retry_or_failure(context, failure)
        if isinstance(outcome, dg.RetryRequested):
            # What passed is told with the try that ends it: a step that is tried again may yield nothing twice.
            session.report = report if report.nodes else None
            raise outcome
        yield from _events(definition, report)
        if outcome is not None:
            raise outcome

    definition: dg.AssetsDefinition = dbt
    return definition


def _run_dbt(
    settings: Settings,
    reporter: Reporter,
    command: str,
    selection: Sequence[str],
    before: transform.BuildReport | None,
) -> transform.BuildReport:
    """A build of the selection, or of what an earlier try left of it; of everything only where it does not stand."""
    whole = command == "build" and not selection
    inputs = ""
    # A connection of its own: that of the run's history may be one an outage has cut.
    if whole:
        with closing(connect(settings, purpose="build")) as connection:
            connection.autocommit = True
            inputs = take_inputs(settings, connection)
            standing = find_standing(connection, inputs) if before is None else None
        if standing is not None:
            reporter.line(f"Nothing new since {standing.stands_since:%Y-%m-%d %H:%M} UTC: everything stands as built.")
            return standing
    with reporter.task(f"dbt {command}") as task:
        report = transform.run_build(
            settings,
            ["--vars", "full_tests: true"] if command == "test" else [],
            lambda _n, _s, done, due: task.update(done, due),
            command,
            select=selection,
            before=before,
            on_retry=partial(announce_retry, reporter),
        )
    if whole and not report.failures:
        with closing(connect(settings, purpose="build")) as connection:
            connection.autocommit = True
            note_standing(connection, inputs, report)
    return report


def build_lineage_asset(manifest: Manifest) -> dg.AssetsDefinition:
    """The lineage page as an asset behind the marts that nothing else reads."""
    read = {
        parent
        for node in manifest["nodes"].values()
        for parent in node["depends_on"].get("nodes", ())
        if node["resource_type"] == "model"
    }
    ends = [
        dg.AssetKey([node["fqn"][1], node["name"]])
        for unique_id, node in manifest["nodes"].items()
        if node["resource_type"] == "model" and node["fqn"][1] == "marts" and unique_id not in read
    ]

    @dg.asset(
        key=LINEAGE_KEY,
        deps=ends,
        group_name="docs",
        kinds={"dbt", "html"},
        description="The dbt docs site as one offline page: every model, column and test, and what it is made from.",
        required_resource_keys={RESOURCE_KEY},
        pool="dbt",
    )
    def lineage(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
        # Where everything stands nothing comes from the marts, and Dagster leaves this step out.
        try:
            with session_of(context).attempt("docs") as (settings, run), run.step("docs"):
                page = write_pages(settings)
        except WarehouseError as error:
            raise to_retry_or_failure(context, error) from None
        return dg.MaterializeResult(metadata={"page": dg.MetadataValue.path(page)})

    return lineage


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

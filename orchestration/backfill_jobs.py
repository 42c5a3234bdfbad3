"""Backfills in Dagster: a job a feed, whose first step shows the plan and whose second lands it when told to.

    backfill__<feed>, config {from_day, to_day, apply} -> plan (always) -> land (`apply: true`)

The models are not built here: what landed is told as a materialisation of the feed, and they follow it like any other
landing, or with the next hourly run. One backfill runs at a time, by the pool; ingestion of the feed goes on between
its stretches.
"""

from datetime import date
from typing import Any

import dagster as dg

from ingestion.errors import ConfigurationError, WarehouseError
from ingestion.feeds import FeedSpec
from orchestration.backfill import DayRange, Plan, plan_backfill, run_backfill
from orchestration.console import render_table
from orchestration.session import RESOURCE_KEY, LogReporter, session_of, to_retry_or_failure
from orchestration.triggers import feed_key

POOL = "backfill"
# The plan goes from step to step inside the run's process.
IN_MEMORY = "in_memory"


class BackfillConfig(dg.Config):
    """Days in UTC by the source's clock, both included."""

    from_day: str
    to_day: str
    apply: bool = False

    def days(self) -> DayRange:
        try:
            return DayRange(date.fromisoformat(self.from_day), date.fromisoformat(self.to_day))
        except ValueError as error:
            raise ConfigurationError(f"A day is not one: {error}.", hint="Days look like 2026-01-05.") from None


def backfill_job_name(feed: FeedSpec) -> str:
    return f"backfill__{feed.pipeline_name}"


def build_backfill_job(feed: FeedSpec, executor: dg.ExecutorDefinition) -> dg.JobDefinition:
    """The backfill of one feed."""

    @dg.op(
        name=f"plan__{feed.pipeline_name}",
        required_resource_keys={RESOURCE_KEY},
        pool=POOL,
        out=dg.Out(io_manager_key=IN_MEMORY),
        description="What each day is missing, and which days of which models would change. Changes nothing.",
    )
    def plan(context: dg.OpExecutionContext, config: BackfillConfig) -> dg.Output[Any]:
        try:
            with session_of(context).attempt("plan") as (settings, _):
                found = plan_backfill(settings, feed, config.days(), LogReporter(context))
        except WarehouseError as error:
            raise to_retry_or_failure(context, error) from None
        text = describe_plan(found)
        context.log.info(f"{text}\n\n{'Landing it.' if config.apply else 'Nothing is changed; `apply: true` does it.'}")
        return dg.Output(found if config.apply else None, metadata={"plan": dg.MetadataValue.md(f"```\n{text}\n```")})

    @dg.op(
        name=f"land__{feed.pipeline_name}",
        required_resource_keys={RESOURCE_KEY},
        pool=POOL,
        description="Lands what the plan found missing, a stretch of days at a time.",
        out=dg.Out(dg.Nothing),
    )
    def land(context: dg.OpExecutionContext, plan: Any) -> None:
        if plan is None:
            return
        try:
            with session_of(context).attempt("land") as (settings, run):
                done = run_backfill(settings, feed, plan, run, LogReporter(context))
        except WarehouseError as error:
            raise to_retry_or_failure(context, error) from None
        figures = {name: sum(getattr(one, name) for one in done) for name in ("landed", "restored", "dead")}
        context.add_output_metadata(figures)
        if any(figures.values()):
            context.log_event(dg.AssetMaterialization(feed_key(feed), metadata={**figures, "backfill": str(plan.days)}))

    @dg.job(
        name=backfill_job_name(feed),
        executor_def=executor,
        tags={"dagster/retry_on_asset_or_op_failure": "false"},
        description=f"Read days of {feed.name} again and land what is missing; the plan alone unless `apply` is set.",
    )
    def backfill() -> None:
        land(plan())

    return backfill


def describe_plan(plan: Plan) -> str:
    """The plan as text: days with something missing, stretches, models."""
    figures = ("read", "unchanged", "landed", "restored", "dead", "failed")
    names = ("day", "read", "landed before", "to land", "to restore", "to set aside", "fails again")
    rows = [(day, *(plan.found.days[day][figure] for figure in figures)) for day in sorted(plan.found.days)]
    parts = [f"{plan.feed}, {plan.days}: {len(plan.stretches)} stretches to land"]
    if rows:
        parts.append(render_table(names, rows))
    if plan.found.waiting:
        parts.append(f"{plan.found.waiting:,} are new: the normal run reads them")
    if plan.found.gone:
        parts.append(f"up to {plan.found.gone:,} are no longer at the source")
    models = [(one.model.name, len(one.days)) for one in plan.models if one.days is not None]
    if models:
        parts.append(render_table(("model", "days that may change"), models))
    return "\n".join(parts)

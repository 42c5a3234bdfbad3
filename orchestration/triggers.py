"""What starts runs by itself: schedules, the sensor that asks what waits at the broker, models that follow landings.

    hourly     everything            daily   rates and reports      nightly   every data test over everything
    backlog    a feed whose topic holds more than its declaration lets wait, or an API never read
    models     models, checks and the reconciliation, as soon as what they stand on landed (declarative automation)
    watch      no run: measures ages and queues every minute and tells who has to know (orchestration/watch.py)

All of them together do no work twice: nothing is asked for that is queued or running, a landing takes what is there
and leaves nothing for the next one, and models that were built in the run of their feed do not follow it again.
Which of them are on is said by orchestration/unattended.py.
"""

import json
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime

import dagster as dg
import psycopg2

from ingestion.database import classify_error, connect
from ingestion.ddl import ensure_schema
from ingestion.errors import ErrorClass, WarehouseError
from ingestion.feeds import FeedSpec, IngestWhen, KafkaOrigin, load_feeds
from ingestion.settings import Settings
from orchestration.session import TRIGGER_TAG
from orchestration.status import WAIT_SETTING, FeedStatus, answering_services, fetch_status
from orchestration.unattended import Backlog, Memory, Trigger, decide, is_allowed
from orchestration.watch import describe, tick

# How often the broker is asked and the graph is looked at, in seconds.
EVERY_SETTING, EVERY_S = "WAREHOUSE_SENSOR_SECONDS", 15.0
# Nobody watches a tick: servers get longer to answer it than a person at a terminal gives them.
PATIENCE_S = 10
FEED_TAG = "warehouse/feed"
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def follow() -> dg.AutomationCondition[dg.AssetKey | dg.AssetCheckKey]:
    """When something it stands on has landed or was built, by a run that did not build this as well; or at first.

    As `eager()`, but: what was never built is built once without waiting for a change of what it stands on, and a feed
    that is being read again does not hold its models back, since they read committed loads only.
    """
    condition = dg.AutomationCondition
    due = condition.any_deps_updated() | condition.missing().newly_true()
    handled = condition.newly_requested() | condition.newly_updated()
    return (
        due.since(handled).with_label("something new below it")
        & ~condition.any_deps_missing()
        & ~condition.in_progress()
    ).with_label("follow")


def build_schedule(settings: Settings, trigger: Trigger, job: str, cron: str) -> dg.ScheduleDefinition:
    """A schedule of a job in UTC, which leaves out a tick while the run of an earlier one is queued or running."""

    def evaluate(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        unfinished = context.instance.get_runs(dg.RunsFilter(job_name=job, statuses=UNFINISHED), limit=1)
        if unfinished:
            return dg.SkipReason(f"run {unfinished[0].run_id[:8]} of {job} has not ended yet")
        return dg.RunRequest(tags={TRIGGER_TAG: "schedule"})

    return dg.ScheduleDefinition(
        name=trigger.value,
        job_name=job,
        cron_schedule=cron,
        execution_timezone="UTC",
        execution_fn=evaluate,
        default_status=dg.DefaultScheduleStatus.RUNNING
        if is_allowed(settings, trigger)
        else dg.DefaultScheduleStatus.STOPPED,
    )


def build_follow_sensor(settings: Settings, models: dg.AssetSelection) -> dg.AutomationConditionSensorDefinition:
    """Evaluates `follow` of everything dbt builds or tests, and of the checks behind it."""
    return dg.AutomationConditionSensorDefinition(
        Trigger.MODELS.value,
        target=models,
        run_tags={TRIGGER_TAG: "automation", "dagster/retry_on_asset_or_op_failure": "false"},
        minimum_interval_seconds=_interval(settings),
        default_status=_sensor_status(settings, Trigger.MODELS),
        description="Models and their checks, as soon as what they stand on landed.",
    )


def build_backlog_sensor(
    settings: Settings, feeds: Sequence[FeedSpec], job: str, readers: Mapping[str, Sequence[FeedSpec]]
) -> dg.SensorDefinition:
    """Asks the broker what waits for each feed, and starts ingestion by the feed's `ingest_when`.

    Args:
        readers: job -> the feeds a whole run of it reads.
    """

    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        try:
            backlogs, errors = fetch_backlogs(settings, feeds)
        except WarehouseError as error:
            return dg.SkipReason(error.message)
        busy = find_busy(context.instance, feeds, readers)
        known = {name: Memory(**memory) for name, memory in json.loads(context.cursor or "{}").items()}
        memories: dict[str, Memory] = {}
        requests, reasons, landed = [], [], []
        now = time.time()
        for feed in feeds:
            backlog = backlogs[feed.name]
            if isinstance(backlog, str):
                memories |= {feed.name: known[feed.name]} if feed.name in known else {}
                reasons.append(f"{feed.name}: {backlog}")
                continue
            decision = decide(
                backlog,
                feed.ingest_when if isinstance(feed.origin, KafkaOrigin) else IngestWhen(1, 0),
                known.get(feed.name),
                now,
                is_busy=feed.name in busy,
                last_error=errors.get(feed.name),
                draw=random.random(),
            )
            memories[feed.name] = decision.memory
            if feed.name not in busy and _landed_elsewhere(context.instance, feed, backlog, known.get(feed.name)):
                landed.append(dg.AssetMaterialization(feed_key(feed), metadata={"landed by": "the command line"}))
            reasons.append(f"{feed.name}: {decision.reason}")
            if decision.start:
                requests.append(
                    dg.RunRequest(
                        # The same question twice, by a daemon that died before it noted the first, is one run.
                        run_key=f"{feed.name}@{backlog.position}#{decision.memory.asked}",
                        job_name=job,
                        asset_selection=[feed_key(feed)],
                        asset_check_keys=[dg.AssetCheckKey(feed_key(feed), "ledger")],
                        tags={TRIGGER_TAG: "sensor", FEED_TAG: feed.name},
                    )
                )
        return dg.SensorResult(
            run_requests=requests,
            skip_reason=None if requests else "; ".join(reasons),
            asset_events=landed,
            cursor=json.dumps({name: asdict(memory) for name, memory in memories.items()}),
        )

    return dg.SensorDefinition(
        name=Trigger.BACKLOG.value,
        job_name=job,
        evaluation_fn=evaluate,
        minimum_interval_seconds=_interval(settings),
        default_status=_sensor_status(settings, Trigger.BACKLOG),
        description="Starts ingestion of a feed when enough waits at the broker, or for long enough.",
    )


def build_watch_sensor(settings: Settings) -> dg.SensorDefinition:
    """Looks at everything every minute, also while nothing runs: ages, queues, runs that hang; sends what is due."""

    is_prepared = False

    def evaluate(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        nonlocal is_prepared
        with answering_services(settings) as served:
            if served.dsn is None:
                return dg.SkipReason("no database runs")
            try:
                with closing(connect(served, purpose="watch")) as connection:
                    if not is_prepared:
                        ensure_schema(connection, load_feeds(served))
                        is_prepared = True
                    seen = tick(served, connection, datetime.now(UTC), may_parse=False)
            except (WarehouseError, psycopg2.Error) as error:
                named = error if isinstance(error, WarehouseError) else classify_error(error)
                return dg.SkipReason(f"could not look: {named.message if named else type(error).__name__}")
        lines = describe(seen)
        for line in lines:
            context.log.info(line)
        return dg.SkipReason("; ".join(lines) or "nothing new")

    return dg.SensorDefinition(
        name=Trigger.WATCH.value,
        evaluation_fn=evaluate,
        minimum_interval_seconds=60,
        default_status=_sensor_status(settings, Trigger.WATCH),
        description="Measures ages and queues every minute; opens, tells and resolves alerts. Starts no run.",
    )


def _interval(settings: Settings) -> int:
    return max(int(settings.number(EVERY_SETTING, EVERY_S)), 1)


def _sensor_status(settings: Settings, trigger: Trigger) -> dg.DefaultSensorStatus:
    return dg.DefaultSensorStatus.RUNNING if is_allowed(settings, trigger) else dg.DefaultSensorStatus.STOPPED


def feed_key(feed: FeedSpec) -> dg.AssetKey:
    return dg.AssetKey([feed.source, feed.table])


def _landed_elsewhere(instance: dg.DagsterInstance, feed: FeedSpec, backlog: Backlog, memory: Memory | None) -> bool:
    """Whether something landed that no run of Dagster's told of: models follow that as well."""
    if backlog.read_at is None or (memory is not None and memory.position == backlog.position):
        return False
    told = instance.get_latest_materialization_event(feed_key(feed))
    return told is None or told.timestamp < backlog.read_at


def find_busy(
    instance: dg.DagsterInstance, feeds: Sequence[FeedSpec], readers: Mapping[str, Sequence[FeedSpec]]
) -> frozenset[str]:
    """Feeds some run is reading, or is going to read."""
    busy: set[str] = set()
    for run in instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)):
        if run.asset_selection is None:
            busy |= {feed.name for feed in readers.get(run.job_name, ())}
        else:
            busy |= {feed.name for feed in feeds if feed_key(feed) in run.asset_selection}
    return frozenset(busy)


def fetch_backlogs(
    settings: Settings, feeds: Sequence[FeedSpec]
) -> tuple[dict[str, Backlog | str], dict[str, ErrorClass]]:
    """For each feed what waits, or why that is not known; and the error class of the last run, where it failed.

    Starts no service: an embedded broker that does not run holds nothing.

    Raises:
        WarehouseError: the database does not say what was read.
    """
    patient = settings.with_env(**{WAIT_SETTING: settings.get(WAIT_SETTING) or f"{PATIENCE_S}"})
    with answering_services(patient) as served:
        status = fetch_status(served, feeds)
        if status.problem is not None:
            raise status.problem
        errors = _fetch_last_errors(served) if served.dsn else {}
    return {one.feed: _to_backlog(one) for one in status.feeds}, errors


def _to_backlog(one: FeedStatus) -> Backlog | str:
    account = one.account
    assert account is not None, "a status without a problem has its accounts"
    read = account.offered + sum(sum(positions.values()) for positions in account.positions.values())
    read_at = account.last_success.timestamp() if account.last_success else None
    if one.kind != "kafka":
        # Whether an API has something new only a request can tell: the schedules make it. Never read, it has.
        return Backlog(0 if account.last_success else 1, read, read_at)
    if one.lag is None:
        return one.problem or "no broker runs"
    return Backlog(one.lag, read, read_at)


def _fetch_last_errors(settings: Settings) -> dict[str, ErrorClass]:
    connection = connect(settings, purpose="sensor")
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute("select to_regclass('ops.run_steps') is not null")
            if not (cursor.fetchone() or (False,))[0]:
                return {}
            cursor.execute(
                "select distinct on (feed) feed, outcome, error_class from ops.run_steps "
                "where feed <> '' and finished_at > now() - interval '7 days' order by feed, finished_at desc"
            )
            found = cursor.fetchall()
    finally:
        connection.close()
    known = {one.value: one for one in ErrorClass}
    return {feed: known[error] for feed, outcome, error in found if outcome == "failed" and error in known}

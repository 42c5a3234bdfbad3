"""Where every feed stands: what was offered and became of it, what is lost, set aside or waiting, and how old it is.

    the books (orchestration/accounts.py) and the broker (orchestration/backlog.py), asked at once -> one answer

Each has a time limit, so that the command answers when one of them does not: what is not known is said, and the rest is
shown. Changes nothing, and counts nothing in a raw table.
"""

import queue
import shutil
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ingestion import ledger
from ingestion.database import where
from ingestion.errors import ErrorClass, TransientError, WarehouseError
from ingestion.feeds import FeedSpec, KafkaOrigin
from ingestion.settings import Settings
from orchestration.accounts import Account, Books, Verdict, fetch_books
from orchestration.console import render_age

if TYPE_CHECKING:
    from ingestion.kafka import Topic

# How long each server is waited for; with the default the whole command stays under a second.
WAIT_SETTING = "WAREHOUSE_STATUS_SECONDS"
WAIT_S = 0.4
# Losses told of one feed.
DETAILS = 3


@dataclass(frozen=True)
class FeedStatus:
    """One feed. `account` is None when the database does not answer, and then there is no lag either.

    `lag`: offsets waiting at the broker; None for an API. `at_broker`: all it holds of the topic. `unrecorded`: what
    the next run will find lost, in words. `problem`: why the broker says nothing.
    """

    feed: str
    kind: str
    account: Account | None
    lag: int | None = None
    at_broker: int | None = None
    unrecorded: tuple[str, ...] = ()
    problem: str | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Status:
    """All feeds; `problem` is why the database says nothing, `is_reconciled` whether the reconciliation was built."""

    feeds: tuple[FeedStatus, ...]
    at: datetime
    problem: WarehouseError | None = None
    is_reconciled: bool = False

    def as_dict(self) -> dict[str, Any]:
        verdicts = [one.verdict for one in self.feeds if one.verdict]
        broken = [verdict.first_broken_day for verdict in verdicts if verdict.first_broken_day]
        return {
            "at": self.at.isoformat(),
            "problem": self.problem.message if self.problem else None,
            "reconciliation": {
                "built": self.is_reconciled,
                "adds_up": not broken if self.is_reconciled else None,
                "first_broken_day": min(broken).isoformat() if broken else None,
            },
            "feeds": [_feed_dict(one, self.at) for one in self.feeds],
        }


@contextmanager
def answering_services(settings: Settings) -> Iterator[Settings]:
    """Settings with the address of every service that can have something to say.

    An embedded broker that is not running holds nothing, and a Postgres that never ran neither: they are not started.
    """
    from orchestration.services import KAFKA, POSTGRES, running
    from orchestration.services import status as services_status
    from orchestration.services.plan import SETTING_OF, plan_services
    from orchestration.services.state import Paths

    embedded = plan_services(settings).embedded
    if not embedded or services_status(settings).running:
        with running(settings) as served:
            yield served
    elif POSTGRES in embedded and Paths(settings.home.absolute()).postgres_record.exists():
        # What is named is not started.
        others = {SETTING_OF[name]: "not running" for name in embedded if name != POSTGRES}
        with running(settings.with_env(**others)) as served:
            yield served.with_env(**dict.fromkeys(others, ""))
    else:
        yield settings.with_env(WAREHOUSE_EMBEDDED=KAFKA if KAFKA in embedded else "")


def fetch_status(settings: Settings, feeds: Sequence[FeedSpec]) -> Status:
    """Ask the database and the broker at once. Each has WAREHOUSE_STATUS_SECONDS to answer; a database that has
    answered has as long again to say what it knows.

    Raises:
        ConfigurationError, AuthenticationError: what the database refuses us for has to change first.
    """
    wait_s = settings.number(WAIT_SETTING, WAIT_S)
    books = Books({feed.name: Account() for feed in feeds}, None)
    problem: WarehouseError | None = None
    dsn, started = settings.dsn, time.monotonic()
    asked = _Asked(lambda connected: fetch_books(settings, feeds, wait_s, connected)) if dsn else None
    topics = _fetch_topics(settings, feeds, wait_s)
    if asked is not None and dsn:
        try:
            books = asked.answer(started, wait_s, where(dsn))
        except WarehouseError as error:
            if error.error_class is not ErrorClass.TRANSIENT:
                raise
            problem = error
    return Status(
        tuple(_combine(settings, feed, None if problem else books, topics.get(feed.name)) for feed in feeds),
        datetime.now(UTC),
        problem,
        books.verdicts is not None,
    )


class _Asked:
    """A question to the database whose end nobody has to wait for."""

    def __init__(self, ask: Callable[[Callable[[], None]], Books]) -> None:
        self._connected = threading.Event()
        self._answer: queue.SimpleQueue[Books | Exception] = queue.SimpleQueue()
        # A daemon: the process does not stay for a server that keeps silent.
        threading.Thread(target=self._run, args=(ask,), daemon=True, name="books").start()

    def _run(self, ask: Callable[[Callable[[], None]], Books]) -> None:
        try:
            self._answer.put(ask(self._connected.set))
        except Exception as error:
            self._connected.set()
            self._answer.put(error)

    def answer(self, started: float, wait_s: float, place: str) -> Books:
        """What the database said; `TransientError` when it took too long."""
        left = wait_s - (time.monotonic() - started)
        try:
            if not self._connected.wait(max(left, 0.0)):
                raise queue.Empty
            outcome = self._answer.get(timeout=max(left, 0.0) + wait_s)
        except queue.Empty:
            raise TransientError(
                f"Postgres at {place} does not answer within {wait_s:g} s.",
                hint=f"{WAIT_SETTING} gives it longer; `warehouse doctor` checks.",
            ) from None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def _fetch_topics(settings: Settings, feeds: Sequence[FeedSpec], wait_s: float) -> "Mapping[str, Topic | str]":
    kafka_feeds = [feed for feed in feeds if isinstance(feed.origin, KafkaOrigin)]
    if settings.kafka_bootstrap is None or not kafka_feeds:
        return {}
    from orchestration.backlog import fetch_topics

    return fetch_topics(settings, kafka_feeds, wait_s)


def _combine(settings: Settings, feed: FeedSpec, books: Books | None, topic: "Topic | str | None") -> FeedStatus:
    account = books.accounts[feed.name] if books else None
    verdict = books.verdicts.get(feed.name) if books and books.verdicts else None
    kind = feed.origin.kind
    if topic is None or isinstance(topic, str):
        return FeedStatus(feed.name, kind, account, problem=topic, verdict=verdict)
    at_broker = sum(end - start for start, end in topic.bounds.values())
    if account is None:
        return FeedStatus(feed.name, kind, None, at_broker=at_broker)
    lag, unrecorded = _compare(settings, feed, account, topic)
    return FeedStatus(feed.name, kind, account, lag, at_broker, unrecorded, verdict=verdict)


def _compare(settings: Settings, feed: FeedSpec, account: Account, topic: "Topic") -> tuple[int, tuple[str, ...]]:
    """Offsets that wait, and what of the topic is lost or another's without a run having said so yet."""
    from ingestion.kafka import TopicReader

    assert isinstance(feed.origin, KafkaOrigin)
    stream = ledger.match_stream(account.streams, topic.cluster, feed.origin.topic, topic.incarnation)
    positions: dict[int, int] = {}
    found: list[str] = []
    if stream is not None:
        positions = {**stream.begins_at, **account.positions.get(stream.stream_id, {})}
        found = [loss.detail for loss in TopicReader(settings, feed).find_losses(topic, positions)]
    elif any(not known.origin.startswith("embedded-") for known in account.streams):
        found = [f"topic {feed.origin.topic} is not the one read before: re-created, or of another cluster"]
    # A loss that was recorded stays in the log's bounds until the next load is behind it.
    unrecorded = tuple(detail for detail in found if not account.open_losses)
    lag = sum(max(end - max(positions.get(p, start), start), 0) for p, (start, end) in topic.bounds.items())
    return lag, unrecorded


# --- what a script reads ----------------------------------------------------------------------------------------------


def _feed_dict(one: FeedStatus, at: datetime) -> dict[str, Any]:
    account = one.account or Account()
    known: dict[str, Any] = {
        "offered": account.offered,
        "landed": account.landed,
        "dead": account.dead,
        "tombstones": account.tombstones,
        "unchanged": account.unchanged,
        "lost": account.lost,
        "open_losses": account.open_losses,
        "open_dead_letters": account.open_dead_letters,
        "oldest_dead_letter_seconds": _age(account.oldest_dead_letter, at),
        "last_success": account.last_success.isoformat() if account.last_success else None,
        "age_seconds": _age(account.last_success, at),
        "newest_record": account.newest_record.isoformat() if account.newest_record else None,
        "holder": account.holder,
        "held_since": account.held_since.isoformat() if account.held_since else None,
    }
    verdict = one.verdict
    return {
        "feed": one.feed,
        "kind": one.kind,
        **(known if one.account else dict.fromkeys(known)),
        "unrecorded_losses": list(one.unrecorded),
        "lag": one.lag,
        "at_broker": one.at_broker,
        "problem": one.problem,
        "reconciliation": verdict
        and {
            "adds_up": verdict.adds_up,
            "through": verdict.last_day.isoformat() if verdict.last_day else None,
            "broken_days": verdict.broken_days,
            "first_broken_day": verdict.first_broken_day.isoformat() if verdict.first_broken_day else None,
            "rows_not_in_models": verdict.behind,
        },
    }


def _age(moment: datetime | None, at: datetime) -> float | None:
    return (at - moment).total_seconds() if moment else None


# --- what a person reads ----------------------------------------------------------------------------------------------


def render_status(status: Status, width: int | None = None) -> str:
    """Each feed in sentences, what to do about it beside it, and at the end what needs somebody."""
    width = max(width or shutil.get_terminal_size((100, 24)).columns, 40)
    lines: list[str] = []
    for one in status.feeds:
        lines.append(one.feed)
        for sentence, command in _sentences(one, status.at):
            lines.extend(textwrap.wrap(sentence, width, initial_indent="  ", subsequent_indent="    "))
            if command:
                lines.append(f"    {command}")
    lines.append("")
    # The broker that does not answer one feed does not answer the others either.
    for problem in dict.fromkeys(one.problem for one in status.feeds if one.problem):
        lines.extend(textwrap.wrap(f"! {problem}", width, subsequent_indent="  "))
    lines.extend(textwrap.wrap(_reconciliation(status), width, subsequent_indent="  "))
    if any(one.verdict and not one.verdict.adds_up for one in status.feeds):
        lines.append("  select * from audit.audit_reconciliation where not adds_up")
    for one in status.feeds:
        if reasons := _find_trouble(one):
            lines.append(f"! {one.feed}: {', '.join(reasons)}")
    return "\n".join(lines)


def _sentences(one: FeedStatus, at: datetime) -> Iterator[tuple[str, str | None]]:
    """What there is to say of a feed, each with the command that follows from it."""
    account = one.account
    if account is not None:
        yield _equation(account), None
        if account.lost or account.open_losses:
            state = "nobody has accepted it" if account.open_losses else "accepted"
            yield f"{account.lost:,} lost by the source before they were read, {state}", None
            for detail in _shortened(account.open_losses):
                yield f"! {detail}", None
            if account.open_losses:
                yield "when it is known why:", f'warehouse feeds accept-loss {one.feed} --reason "..."'
    for detail in _shortened(one.unrecorded):
        yield f"! {detail}", None
    if one.unrecorded:
        yield "the next run records it:", "warehouse run"
    if account is not None:
        if account.open_dead_letters:
            oldest = render_age(_age(account.oldest_dead_letter, at))
            yield (
                f"{_count(account.open_dead_letters, 'dead letter')} open, the oldest for {oldest}",
                f"warehouse dead-letters list --feed {one.feed}",
            )
        yield _age_and_lag(one, account, at), None
        if account.holder:
            yield f"being written by {account.holder} for {render_age(_age(account.held_since, at))}", None
    elif one.at_broker is not None:
        yield f"{one.at_broker:,} at the broker; how many of them were read the database knows", None
    if one.verdict and one.verdict.behind:
        yield f"{_count(one.verdict.behind, 'landed row')} not in the models yet", "warehouse run"


def _shortened(details: Sequence[str]) -> list[str]:
    """The first few; a topic can lose records of each of its partitions."""
    more = len(details) - DETAILS
    return [*details[:DETAILS], *([f"and {more:,} more; --json has all"] if more > 0 else [])]


def _equation(account: Account) -> str:
    if not account.offered:
        return "nothing offered yet"
    parts = [f"{account.landed:,} landed"]
    if account.dead:
        parts.append(_count(account.dead, "dead letter"))
    if account.tombstones:
        parts.append(_count(account.tombstones, "tombstone"))
    if account.unchanged:
        parts.append(f"{account.unchanged:,} unchanged since they landed")
    return f"{account.offered:,} offered = {' + '.join(parts)}"


def _age_and_lag(one: FeedStatus, account: Account, at: datetime) -> str:
    parts = [f"read {render_age(_age(account.last_success, at))} ago" if account.last_success else "never read"]
    if account.newest_record:
        parts.append(f"the newest record is {render_age(_age(account.newest_record, at))} old")
    if one.lag is not None:
        parts.append(f"{one.lag:,} waiting at the broker" if one.lag else "nothing waits at the broker")
    elif one.problem:
        parts.append("what waits at the broker is not known")
    return "; ".join(parts)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _reconciliation(status: Status) -> str:
    if status.problem:
        return "Reconciliation: not known."
    if not status.is_reconciled:
        return "Reconciliation: not built yet; `warehouse run` or `dbt build` does it."
    days = [one.verdict.last_day for one in status.feeds if one.verdict and one.verdict.last_day]
    if not days:
        return "Reconciliation: nothing had landed when it was built."
    broken = [one for one in status.feeds if one.verdict and not one.verdict.adds_up]
    if not broken:
        return f"Reconciliation, from the sources to the marts: every day adds up, through {max(days)}."
    found = "; ".join(
        f"{one.feed} does not add up on {_count(verdict.broken_days, 'day')}, first on {verdict.first_broken_day}"
        for one in broken
        if (verdict := one.verdict)
    )
    return f"Reconciliation, from the sources to the marts: {found}."


def _find_trouble(one: FeedStatus) -> list[str]:
    """What somebody has to look into; dead letters and a backlog are part of a day."""
    reasons = []
    if one.unrecorded or (one.account and one.account.open_losses):
        reasons.append("records were lost")
    if one.verdict and not one.verdict.adds_up:
        reasons.append("does not add up")
    return reasons

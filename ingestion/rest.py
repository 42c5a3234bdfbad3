"""Reading a REST endpoint through dlt's `rest_api`: windows of days, page by page, each record as exact JSON bytes.

Numbers keep their digits (never a float). An API that is down, overloaded (429, 5xx) or cuts its answers is asked
again within the retry policy, and an empty answer is asked for once more; what is no answer of this API is one clear
error. "Not found" is an empty window where the same question about more days is answered, and an error where it is not.
Refuses to guess at a page of another shape.
"""

import contextlib
import datetime as dt
import itertools
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import requests
from dlt.sources.helpers.requests import Session
from dlt.sources.rest_api import rest_api_resources
from requests.adapters import HTTPAdapter

from ingestion.errors import AuthenticationError, ConfigurationError, TransientError, WarehouseError
from ingestion.feeds import FeedSpec, RecordsSpec, RestOrigin
from ingestion.load import DLT_DEFAULTS
from ingestion.retry import parse_retry_after, policy_of, retrying
from ingestion.settings import Settings

REQUEST_TIMEOUT_S = 30
MAX_ATTEMPTS = 6
BACKOFF_FACTOR_S = 0.5
MAX_DELAY_S = 30
MAX_REDIRECTS = 5
# What OpenSSL says where another try says the same; a handshake that was cut is an outage.
NOT_TRUSTED = re.compile(r"CERTIFICATE_VERIFY_FAILED|WRONG_VERSION_NUMBER|UNSUPPORTED_PROTOCOL|doesn't match")
# Where a parsed page stands in what dlt gets to see.
PAGE = "page"
# A window may hold nothing, and an API that is not well may say so of one that holds something.
EMPTY_PAGE_ATTEMPTS = 2


@dataclass(frozen=True)
class Page:
    """One answer: its window [from, to), its number in the run, and its records as JSON bytes."""

    window_from: dt.datetime
    window_to: dt.datetime
    number: int
    records: list[bytes]
    size: int


def plan_windows(
    origin: RestOrigin, read_until: dt.datetime | None, today: dt.date
) -> list[tuple[dt.datetime, dt.datetime]]:
    """The windows [from, to) of a run, oldest first: what is new, and `reread_days` behind it for corrections.

    Args:
        read_until: end of the last committed window; None on the first run.
        today: UTC; the last day asked for.
    """
    start = dt.datetime.combine(origin.window.start, dt.time(), dt.UTC)
    if read_until is not None:
        start = max(start, read_until - dt.timedelta(days=origin.window.reread_days))
    end = dt.datetime.combine(today, dt.time(), dt.UTC) + dt.timedelta(days=1)
    windows = []
    while start < end:
        stop = min(start + dt.timedelta(days=origin.window.days), end)
        windows.append((start, stop))
        start = stop
    return windows


class Pace:
    """When an API may be asked next, by all who ask it at once.

    Args:
        per_minute: requests; None for as many as there are.
    """

    def __init__(self, per_minute: int | None) -> None:
        self._gap_s = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def wait(self) -> None:
        """Until it is this request's turn."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap_s
        self.sleep(turn - now)

    def hold(self, seconds: float) -> None:
        """Nobody asks for so long: the API said so (Retry-After)."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def stop(self) -> None:
        """Who waits, waits no longer."""
        self._stopped.set()

    def sleep(self, seconds: float) -> None:
        """
        Raises:
            InterruptedError: it was stopped.
        """
        if self._stopped.wait(max(seconds, 0.0)):
            raise InterruptedError


class _NotFoundError(ConfigurationError):
    """Status 404: there is no such path, or nothing of these days."""


class EndpointReader:
    """One endpoint, read window by window, several at once where its declaration allows."""

    def __init__(self, settings: Settings, feed: FeedSpec) -> None:
        assert isinstance(feed.origin, RestOrigin)
        # dlt reads its log level and its telemetry switch once, when anything of it is first used.
        for name, value in DLT_DEFAULTS.items():
            os.environ.setdefault(name, value)
        self.feed = feed
        self.origin = feed.origin
        self.base_url = settings.require(feed.origin.base_url, f"{feed.name} is read from there").rstrip("/")
        # dlt's own retries know neither jitter nor a total.
        self._policy = replace(policy_of(settings), base_s=BACKOFF_FACTOR_S, cap_s=MAX_DELAY_S, tries=MAX_ATTEMPTS)
        # dlt's REST client raises for a status by itself.
        self._session = Session(timeout=REQUEST_TIMEOUT_S, raise_for_status=False)
        self._session.max_redirects = MAX_REDIRECTS
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, _ExactAdapter())
        self._pace = Pace(feed.origin.requests.per_minute)

    def read(self, windows: Sequence[tuple[dt.datetime, dt.datetime]]) -> Iterator[Page]:
        """The pages of the windows, in order.

        Raises:
            TransientError, AuthenticationError, ConfigurationError: by what the API answered; nothing half-read is
                yielded.
        """
        most = self.origin.requests.concurrent
        due = iter(enumerate(windows, start=1))
        under_way: deque[Future[Page]] = deque()
        failures: list[BaseException] = []
        self._pace = Pace(self.origin.requests.per_minute)

        def fetch(number: int, start: dt.datetime, stop: dt.datetime) -> Page:
            try:
                return self._fetch_page(number, start, stop)
            except BaseException as error:
                # The first to fail is what happened; the others are not to wait for an API that is down.
                failures.append(error)
                self._pace.stop()
                raise

        with ThreadPoolExecutor(most, "fetch") as threads:
            try:
                while True:
                    for number, (start, stop) in itertools.islice(due, most - len(under_way)):
                        under_way.append(threads.submit(fetch, number, start, stop))
                    if not under_way:
                        return
                    try:
                        page = under_way.popleft().result()
                    except Exception:
                        raise failures[0] from failures[0].__cause__
                    yield page
            finally:
                self._pace.stop()
                threads.shutdown(cancel_futures=True)

    def _fetch_page(self, number: int, start: dt.datetime, stop: dt.datetime) -> Page:
        records: list[bytes] = []
        for attempt in range(EMPTY_PAGE_ATTEMPTS):
            if attempt:
                self._pace.sleep(BACKOFF_FACTOR_S)
            records = self._fetch_records(start, stop)
            if records:
                break
        return Page(start, stop, number, records, sum(map(len, records)))

    def _fetch_records(self, start: dt.datetime, stop: dt.datetime) -> list[bytes]:
        """The window's records as JSON bytes; none where the API finds nothing of these days, but of earlier ones."""
        try:
            body = self._fetch(start, stop)
        except _NotFoundError as error:
            window = self.origin.window
            first = dt.datetime.combine(window.start, dt.time(), dt.UTC)
            earlier = max(start - dt.timedelta(days=window.days), first)
            with contextlib.suppress(_NotFoundError):
                if earlier < start and any(self._split(self._fetch(earlier, stop))):
                    return []
            raise ConfigurationError(error.message, hint=error.hint) from error
        return [encode_record(record) for record in self._split(body)]

    def _split(self, body: Any) -> Iterator[Any]:
        return split_page(body, self.origin.records, self.feed)

    def _fetch(self, start: dt.datetime, stop: dt.datetime) -> Any:
        """The page of a window, parsed; an outage is tried again."""
        tries = itertools.count(1)
        return retrying(lambda: self._ask(start, stop, next(tries)), self._policy, sleep=self._pace.sleep)

    def _ask(self, start: dt.datetime, stop: dt.datetime, attempt: int) -> Any:
        placeholders = {"{from}": f"{start:%Y-%m-%d}", "{to}": f"{stop - dt.timedelta(days=1):%Y-%m-%d}"}
        resource = rest_api_resources(
            {
                "client": {
                    "base_url": self.base_url,
                    "session": self._session,
                    "paginator": "single_page",
                },
                "resources": [
                    {
                        "name": self.feed.table,
                        "endpoint": {
                            "path": _fill(self.origin.path, placeholders).lstrip("/"),
                            "params": {k: _fill(v, placeholders) for k, v in self.origin.params.items()},
                            "data_selector": "$",
                        },
                    }
                ],
            }
        )[0]
        self._pace.wait()
        try:
            (body,) = resource
        except Exception as error:
            named = self._classify(error, attempt)
            if isinstance(named, TransientError) and named.retry_after_s:
                self._pace.hold(named.retry_after_s)
            raise named from error
        return body[PAGE]

    def _classify(self, error: BaseException, attempt: int) -> WarehouseError:
        link: BaseException | None = error
        while link is not None:
            if isinstance(link, WarehouseError):
                return link
            if isinstance(
                link,
                requests.exceptions.InvalidURL | requests.exceptions.MissingSchema | requests.exceptions.InvalidSchema,
            ):
                return ConfigurationError(
                    f"{self.feed.name}: {self.origin.base_url} is not the address of an HTTP API.",
                    hint="Its form is https://host or http://host:port.",
                )
            if isinstance(link, json.JSONDecodeError | UnicodeDecodeError | RecursionError):
                return TransientError(
                    f"{self.feed.name}: {self.base_url} answered with something that is not JSON.",
                    hint=f"Is {self.origin.base_url} the API's address? A proxy's page or a cut answer looks so too.",
                )
            if isinstance(link, requests.HTTPError) and link.response is not None:
                return self._classify_status(link.response, attempt)
            if isinstance(link, requests.TooManyRedirects):
                return ConfigurationError(
                    f"{self.feed.name}: {self.base_url} redirects again and again.",
                    hint=f"Is {self.origin.base_url} the API's address, and the path in {self.feed.file} right?",
                )
            if isinstance(link, requests.exceptions.SSLError) and NOT_TRUSTED.search(str(link)):
                return ConfigurationError(
                    f"{self.feed.name}: {self.base_url} has no certificate this machine trusts, or speaks no TLS.",
                    hint=f"Check {self.origin.base_url}; REQUESTS_CA_BUNDLE names a file with a CA of your own.",
                )
            if isinstance(link, requests.RequestException):
                return TransientError(
                    f"{self.feed.name}: {self.base_url} does not answer ({type(link).__name__}).",
                    hint=f"Is it reachable? {self.origin.base_url} names it; `warehouse doctor` checks.",
                )
            link = link.__cause__ or link.__context__
        # Not its text, which may quote the page.
        return WarehouseError(f"{self.feed.name}: reading {self.base_url} failed ({type(error).__name__}).")

    def _classify_status(self, response: requests.Response, attempt: int) -> WarehouseError:
        status = response.status_code
        text = f"{self.feed.name}: {self.base_url} answered with status {status}"
        if status in (401, 403):
            return AuthenticationError(f"{text}: it refused us.", hint="Check the API's key.")
        if status == 429 or status >= 500:
            wait = parse_retry_after(response.headers.get("Retry-After"))
            return TransientError(
                text
                + (f" {attempt} times" if attempt > 1 else "")
                + (f" and asks to come back in {wait:.0f} s" if wait else "")
                + ".",
                hint="It is overloaded or down; run again later.",
                retry_after_s=wait,
            )
        kind = _NotFoundError if status == 404 else ConfigurationError
        return kind(
            f"{text}.", hint=f"Check {self.origin.base_url}, and path and params in {self.feed.file}:{self.feed.line}."
        )


def _fill(text: str, placeholders: Mapping[str, str]) -> str:
    for name, value in placeholders.items():
        text = text.replace(name, value)
    return text


class _ExactAdapter(HTTPAdapter):
    """Answers whose `.json()` is {PAGE: the parsed page}.

    As an adapter, because dlt's own response hooks take the place of the session's. Wrapped, because dlt would take a
    page that is a list for its records.
    """

    def build_response(self, req: requests.PreparedRequest, resp: Any) -> requests.Response:
        response = super().build_response(req, resp)
        pages: list[Any] = []

        def parse(**_: Any) -> Any:
            if not pages:
                pages.append(parse_page(response.content))
            return {PAGE: pages[0]}

        response.json = parse  # type: ignore[method-assign]
        return response


def parse_page(content: bytes) -> Any:
    """An answer's JSON with every number as the token it was sent as, and no repeated name dropped.

    An object that holds a name twice stays JSON text (`msgspec.Raw`): as a dict it would lose one of them.

    Raises:
        ValueError, RecursionError: it is not JSON, or nested beyond what Python parses.
    """
    return json.loads(
        content,
        parse_float=_to_token,
        parse_int=_to_token,
        parse_constant=_to_token,  # NaN is no JSON; the contract says so of the one record that holds it
        object_pairs_hook=_to_object,
    )


def _to_token(token: str) -> msgspec.Raw:
    return msgspec.Raw(token.encode())


def _to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | msgspec.Raw:
    members = dict(pairs)
    if len(members) == len(pairs):
        return members
    return msgspec.Raw(b"{" + b",".join(encode_record(k) + b":" + encode_record(v) for k, v in pairs) + b"}")


_encoder = msgspec.json.Encoder()


def encode_record(record: Any) -> bytes:
    """A parsed record as JSON bytes, digit for digit."""
    try:
        return _encoder.encode(record)
    except UnicodeEncodeError:
        return _encode_escaped(record).encode("ascii")


def _encode_escaped(node: Any) -> str:
    """JSON in ASCII: half of a surrogate pair has no UTF-8, and the contract is to see it."""
    if isinstance(node, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{_encode_escaped(child)}" for key, child in node.items()) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(_encode_escaped, node)) + "]"
    return bytes(node).decode() if isinstance(node, msgspec.Raw) else json.dumps(node)


def split_page(body: Any, records: RecordsSpec, feed: FeedSpec) -> Iterator[Any]:
    """The records of a page. Whatever stands where a record is due is yielded, so that the contract can name it.

    Raises:
        ConfigurationError: the page has another shape than declared.
    """
    found: Any = body
    for name in filter(None, records.path.split(".")):
        found = found.get(name) if isinstance(found, dict) else None
    if not (isinstance(found, dict) if records.keys else isinstance(found, list)):
        raise ConfigurationError(
            f"{feed.name}: the API's answer has no {'object' if records.keys else 'list'} at `{records.path}`.",
            hint=f"Check the address and `records` in {feed.file}:{feed.line}.",
        )
    page = body if isinstance(body, dict) else {}
    copied = {column: page[name] for column, name in records.page_fields.items() if name in page}
    if not records.keys:
        for record in found:
            yield {**copied, **record} if isinstance(record, dict) else record
        return
    yield from _unnest(found, records, copied, 0)


def _unnest(node: Any, records: RecordsSpec, so_far: dict[str, Any], level: int) -> Iterator[dict[str, Any]]:
    if level == len(records.keys):
        yield {**so_far, str(records.value): node}
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from _unnest(child, records, {**so_far, records.keys[level]: key}, level + 1)
    else:
        yield {**so_far, str(records.value): node}

"""A small HTTP server that gives the sample rates as the Frankfurter API (v1) gives the real ones.

    GET /v1/latest                      GET /v1/2026-01-02..2026-01-31?base=USD&symbols=EUR,GBP
    GET /v1/2026-01-02                  GET /v1/2026-01-02..              (up to today)
    GET /v1/currencies

`{"amount":1.0,"base":"USD","start_date":"2026-01-02","end_date":"2026-01-30","rates":{"2026-01-02":{"EUR":0.92}}}`

What the real one does and this one repeats: days without rates are absent, `start_date` and `end_date` name the days
that are there, and a period that begins on a weekend or a holiday begins with the publishing day before it. The base
is EUR unless named; `from` and `to` are other names of `base` and `symbols`; unknown symbols are left out. Nothing to
show is 404, a query that makes no sense is 422, both with `{"message": ...}`. Never shows a day after today (UTC).

    python -m orchestration.sample.rates_api --port 8080 --seed 1
"""

import argparse
import json
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from ingestion.errors import ConfigurationError
from orchestration.sample.rates import CURRENCIES, RateBook

_DAY = r"\d{4}-\d{2}-\d{2}"
_ONE_DAY = re.compile(rf"/v1/({_DAY})")
_PERIOD = re.compile(rf"/v1/({_DAY})\.\.({_DAY})?")


@dataclass(frozen=True)
class Fault:
    """A misbehaviour for one request: what the server does instead of giving the answer.

    `status`: that status, with a JSON message or `body`. `body`: this text with status 200 (a proxy's HTML page,
    nothing at all). `cut_connection`: the right answer's first half, then the end of the connection. `cut_body`: its
    first half as if that were all. `headers` come on top (Retry-After).
    """

    kind: Literal["status", "body", "cut_connection", "cut_body"] = "status"
    status: int = 500
    body: str = ""
    content_type: str = "application/json; charset=utf-8"
    headers: dict[str, str] = dataclass_field(default_factory=dict)


class RatesServer(ThreadingHTTPServer):
    """Serves one `RateBook`. `faults` are used up one a request; `requests` holds the paths asked for."""

    daemon_threads = True
    # A kill and a restart on the same port must not wait for old connections.
    allow_reuse_address = True

    def __init__(self, host: str, port: int, seed: int, today: Callable[[], date]) -> None:
        self.book = RateBook(seed)
        self.today = today
        self.faults: deque[Fault] = deque()
        self.requests: deque[str] = deque(maxlen=1000)
        # The book walks on when a later day is asked for; threads must not do that at once.
        self.lock = threading.Lock()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own looks the host's name up, which hangs where no name server answers.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that hangs up is not an error of ours; anything else is printed as usual.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{self.server_name}:{self.server_port}"


def serve(host: str, port: int, seed: int, today: Callable[[], date] | None = None) -> RatesServer:
    """A server that is bound (port 0: a free one) and not yet serving: run its `serve_forever`, later `shutdown`.

    `today` is the last day with rates, for tests. `ConfigurationError` when the address cannot be used.
    """
    try:
        return RatesServer(host, port, seed, today or _utc_today)
    except OSError as error:
        raise ConfigurationError(
            f"The sample rates server cannot listen on {host}:{port}: {error.strerror}.", hint="Choose another port."
        ) from None


@contextmanager
def serving(seed: int, today: Callable[[], date] | None = None) -> Iterator[RatesServer]:
    """A server that runs in a thread on a free port of 127.0.0.1 until the block ends."""
    server = serve("127.0.0.1", 0, seed, today)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def respond(book: RateBook, today: date, target: str) -> tuple[int, str]:
    """The answer to a request target (`/v1/latest?base=USD`): status and JSON body."""
    url = urlsplit(target)
    if url.path == "/v1/currencies":
        return 200, _compact({code: name for code, (name, _) in CURRENCIES.items()})
    try:
        if url.path in ("/v1/latest", "/v1/current"):
            first = last = today
            single = True
        elif match := _ONE_DAY.fullmatch(url.path):
            first = last = date.fromisoformat(match[1])
            single = True
        elif match := _PERIOD.fullmatch(url.path):
            first = date.fromisoformat(match[1])
            last = date.fromisoformat(match[2]) if match[2] else today
            single = False
        else:
            return _error(404, "not found")
    except ValueError:
        return _error(422, "invalid date")

    query = parse_qs(url.query)

    def parameter(*names: str) -> str | None:
        return next((query[name][0].upper() for name in names if name in query), None)

    base = parameter("from", "base") or "EUR"
    named = parameter("to", "symbols")
    symbols = named.split(",") if named is not None else None
    if symbols == [base]:
        return _error(422, "bad currency pair")
    try:
        amount = Decimal(parameter("amount") or "1")
        in_range = 0 < amount < 10**12
    except InvalidOperation:
        in_range = False
    if not in_range:
        return _error(422, "invalid amount")
    if first > today:
        return _error(404, "not found")

    rates = book.between(first, min(last, today), base, symbols, str(amount))
    if not rates:
        return _error(404, "not found")
    days = list(rates)
    # Written by hand: a float would change the digits of a rate.
    shown = ",".join(f'"{day}":{_render(values)}' for day, values in rates.items())
    head = f'{{"amount":{float(amount)},"base":"{base}"'
    if single:
        return 200, f'{head},"date":"{days[0]}","rates":{_render(rates[days[0]])}}}'
    return 200, f'{head},"start_date":"{days[0]}","end_date":"{days[-1]}","rates":{{{shown}}}}}'


def _render(values: dict[str, str]) -> str:
    return "{" + ",".join(f'"{code}":{rate}' for code, rate in values.items()) + "}"


def _error(status: int, message: str) -> tuple[int, str]:
    return status, _compact({"message": message})


def _compact(value: dict[str, str]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _utc_today() -> date:
    return datetime.now(UTC).date()


class _Handler(BaseHTTPRequestHandler):
    server: RatesServer
    protocol_version = "HTTP/1.1"
    server_version = "sample-rates"
    # An idle connection must not hold a thread for ever.
    timeout = 60

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(self.path)
        fault = server.faults.popleft() if server.faults else None
        kind = fault.kind if fault is not None else None
        with server.lock:
            status, body = respond(server.book, server.today(), self.path)
        content_type = "application/json; charset=utf-8"
        if fault is not None and kind == "status":
            status, body = _error(fault.status, HTTPStatus(fault.status).phrase.lower())
            if fault.body:
                body, content_type = fault.body, fault.content_type
        elif fault is not None and kind == "body":
            status, body, content_type = 200, fault.body, fault.content_type
        data = body.encode()
        half = data[: len(data) // 2]
        if kind == "cut_body":
            data = half
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (fault.headers if fault is not None else {}).items():
            self.send_header(name, value)
        if kind == "cut_connection":
            data = half
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged: the supervisor's log is for what goes wrong."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve sample exchange rates in the format of the Frankfurter API.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with serve(options.host, options.port, options.seed) as server:
        print(f"{server.url}/v1/latest", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()

"""A receiver of alerts on 127.0.0.1: writes down what it is sent, answers as the test wants.

with AlertReceiver() as receiver:
    receiver.answers = [(503, {}, b"")]     # the first request; then 200 again
    ...
    assert receiver.documents("/hook")[0]["event"] == "opened"
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]


@dataclass(frozen=True)
class Received:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)


class AlertReceiver:
    """The server; its threads end with the block."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.answers: list[Answer] = []
        self.default: Answer = (200, {}, b"ok")
        self.on_request: Callable[[Received], None] = lambda one: None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                one = Received(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                outer.received.append(one)
                outer.on_request(one)
                status, headers, said = outer.answers.pop(0) if outer.answers else outer.default
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(said))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "AlertReceiver":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def documents(self, path: str) -> list[Any]:
        """What was posted to a path, in order."""
        return [one.document for one in self.received if one.path == path]

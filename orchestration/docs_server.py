"""Serves the lineage page and the report on 127.0.0.1, for a machine whose browser cannot open files of this one.

target/static_index.html -> http://127.0.0.1:<port>/static_index.html. Refuses a port that is taken.
"""

import contextlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer

from ingestion.errors import ConfigurationError


class PageServer(ThreadingHTTPServer):
    """A server of pages that are made or read on request."""

    def server_bind(self) -> None:
        # HTTPServer's own looks the host's name up, which hangs where no name server answers.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


def serve_page(page: Path, port: int) -> None:
    """Serve the folder of `page` until interrupted, which is how it ends; prints the address first.

    Raises:
        ConfigurationError: the port cannot be used.
    """
    handler = partial(SimpleHTTPRequestHandler, directory=str(page.parent))
    try:
        server = PageServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise ConfigurationError(
            f"Port {port} of 127.0.0.1 cannot be used: {error.strerror}.", hint="`--port 0` takes a free one."
        ) from None
    with server, contextlib.suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}/{page.name} (Ctrl-C ends)", flush=True)
        server.serve_forever()

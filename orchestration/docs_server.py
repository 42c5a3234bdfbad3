"""Serves the lineage page on 127.0.0.1, for a machine whose browser cannot open files of this one."""

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def serve_page(page: Path, port: int) -> None:
    """Serve the folder of `page` until interrupted; prints the address first."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(page.parent))
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/{page.name} (Ctrl-C ends)", flush=True)
        server.serve_forever()

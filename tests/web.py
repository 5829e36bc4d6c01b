"""A web server on this machine that counts, cuts off and refuses requests as it is told."""

from __future__ import annotations

import collections
import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path


class Web:
    """`url` serves `folder`. `cut[name] = n`: the next n answers for that file end half way.

    `silent` names a file of which half is sent, and then nothing, as long as anybody waits.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.requests: collections.Counter[str] = collections.Counter()
        self.cut: collections.Counter[str] = collections.Counter()
        self.silent = ""
        self.over = threading.Event()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Web]:
    """Serve `folder` on a free loopback port."""
    web = Web(folder)
    handler = functools.partial(_Handler, web)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    web.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, args=(0.01,), daemon=True
    )  # poll interval
    thread.start()
    try:
        yield web
    finally:
        web.over.set()
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, web: Web, *arguments: object) -> None:
        self.web = web
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.web.requests[name] += 1
        file = self.web.folder / name
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        self.send_response(200)
        if self.web.cut[name]:  # no Content-Length: the client cannot know that there was more
            self.web.cut[name] -= 1
            content = content[: len(content) // 2]
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if name == self.web.silent:
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.web.over.wait()
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

"""A web server on this machine that counts, cuts off and refuses requests as it is told."""

from __future__ import annotations

import base64
import collections
import contextlib
import functools
import gzip
import http.server
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

LOGIN = b"<!DOCTYPE html><html><body>Please log in</body></html>"


class Web:
    """`url` serves `folder`, with byte ranges. All switches may be changed at any time.

    `requests[name]` and `bytes[name]` count the requests and the bytes that were sent.
    `ranges`: False ignores the header Range, as many servers do.
    `refuse[status] = n`: the next n requests are answered with that status; `retry_after` is the
    value of that header. `cut[name] = n`: the next n answers for that file end half way, without
    Content-Length; `fault` is called with the number of the request and the name, and returns
    "" or "cut" (with Content-Length), "corrupt", "login" (a web page with status 200), "close"
    (no answer), "hang" (half of the answer, then nothing as long as anybody waits) or a status.
    `silent` names a file whose requests hang in the same way. `delay_seconds` precedes answers.
    `encoding` "gzip" or "chunked" changes the transfers. `user` ("name:password") and `query` are
    required of each request. What is below "moved/" redirects to the folder itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.requests: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.ranges = True
        self.refuse: collections.Counter[int] = collections.Counter()
        self.retry_after = ""
        self.cut: collections.Counter[str] = collections.Counter()
        self.fault: Callable[[int, str], str] = lambda number, name: ""
        self.silent = ""
        self.delay_seconds = 0.0
        self.encoding = ""
        self.user = ""
        self.query = ""
        self.paths: list[str] = []  # as they were sent
        self.over = threading.Event()
        self.lock = threading.Lock()


@contextlib.contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[Web]:
    """Serve `folder` on a loopback port, by default a free one."""
    web = Web(folder)
    with served(web, port):
        yield web


@contextlib.contextmanager
def served(web: Web, port: int = 0) -> Iterator[None]:
    """Start the server of `web`; its state may be of an earlier server."""
    web.over.clear()
    server = _Server(("127.0.0.1", port), functools.partial(_Handler, web))
    web.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, args=(0.01,), daemon=True
    )  # poll interval
    thread.start()
    try:
        yield
    finally:
        web.over.set()
        server.shutdown()
        server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:
        """Say nothing about clients that went away."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, web: Web, *arguments: object) -> None:
        self.web = web
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        web = self.web
        if web.over.is_set():
            self.close_connection = True
            return
        path, _, query = self.path.partition("?")
        name = unquote(path.lstrip("/"))
        with web.lock:
            web.requests[name] += 1
            web.paths.append(self.path)
            number = web.requests.total()
            refused = next((status for status, n in web.refuse.items() if n > 0), 0)
            web.refuse[refused] -= 1
            fault = str(refused or "") or web.fault(number, name)
            if name == web.silent:
                fault = "hang"
            elif web.cut[name]:
                web.cut[name] -= 1
                fault = "half"
        time.sleep(web.delay_seconds)
        if fault == "close":
            self.close_connection = True
        elif fault.isdigit():
            self._send(int(fault), b"refused", {"Retry-After": web.retry_after})
        elif not self._is_allowed(query):
            self._send(
                401 if web.user else 403, b"<Code>AccessDenied</Code>Request has expired", {}
            )
        elif fault == "login":
            self._send(200, LOGIN, {"Content-Type": "text/html"})
        elif name.startswith("moved/"):
            self._send(302, b"", {"Location": self.path.replace("/moved/", "/", 1)})
        elif not (web.folder / name).is_file():
            self._send(404, b"not found", {})
        else:
            self._send_file(name, fault)

    def _is_allowed(self, query: str) -> bool:
        expected = f"Basic {base64.b64encode(self.web.user.encode()).decode()}"
        user = not self.web.user or self.headers.get("Authorization") == expected
        return user and query == (self.web.query or query)

    def _send_file(self, name: str, fault: str) -> None:
        content = (self.web.folder / name).read_bytes()
        status, headers = 200, {"ETag": '"1"', "Last-Modified": self.date_time_string(0)}  # as S3
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.web.ranges:
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            if first >= len(content):
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            total = len(content)
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{total}"
        elif self.web.encoding == "gzip":
            content = gzip.compress(content)
            headers["Content-Encoding"] = "gzip"
        if fault == "corrupt":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self._send(status, content, headers, fault, name)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], fault: str = "", name: str = ""
    ) -> None:
        self.send_response(status)
        chunked = self.web.encoding == "chunked" and status == 200
        headers["Transfer-Encoding" if chunked else "Content-Length"] = (
            "chunked" if chunked else str(len(content))
        )
        if fault == "half":  # the client cannot know that there was more
            del headers["Transfer-Encoding" if chunked else "Content-Length"]
            headers["Connection"] = "close"
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        if fault in ("half", "cut", "hang"):
            content = content[: len(content) // 2]
            self.close_connection = True
        with contextlib.suppress(OSError):
            for start in range(0, len(content), 2**16):
                part = content[start : start + 2**16]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
                with self.web.lock:
                    self.web.bytes[name] += len(part)
            if chunked and not self.close_connection:
                self.wfile.write(b"0\r\n\r\n")
            self.wfile.flush()
            if fault == "hang":
                self.web.over.wait()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

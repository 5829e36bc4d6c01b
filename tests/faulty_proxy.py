"""A proxy in front of a server on this machine, which injects faults as it is told."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import itertools
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

# (number of the request, path) -> "503", "cut", "corrupt", or "" to forward it unchanged
Fault = Callable[[int, str], str]


class Proxy:
    """Forwards to `target` on a port of its own; `fault` decides about each request for a tar.

    `served` counts the bytes of tars that were sent. `down(seconds)` closes the port for that time.
    """

    def __init__(self, target: str, fault: Fault) -> None:
        self.target = urlsplit(target).netloc
        self.fault = fault
        self.served = 0
        self.numbers = itertools.count(1)
        self.injected: dict[str, int] = {"503": 0, "cut": 0, "corrupt": 0}
        self.num_outages = 0
        self._server = self._listen(0)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def _listen(self, port: int) -> socketserver.BaseServer:
        handler = type("Handler", (_Handler,), {"proxy": self})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def down(self, seconds: float) -> None:
        """Refuse connections for a time, from another thread."""

        def restart() -> None:
            self.close()
            time.sleep(seconds)
            self._server = self._listen(self.port)
            self.num_outages += 1

        threading.Thread(target=restart, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def faulty(target: str, fault: Fault) -> Iterator[Proxy]:
    """A proxy for `target`."""
    proxy = Proxy(target, fault)
    try:
        yield proxy
    finally:
        proxy.close()


class _Handler(http.server.BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def _forward(self) -> None:
        proxy, is_tar = self.proxy, ".tar" in self.path
        fault = proxy.fault(next(proxy.numbers), self.path) if is_tar else ""
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if fault:
            proxy.injected[fault] += 1
        if fault == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection(proxy.target, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        content = bytearray(answer.read())
        upstream.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        size = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(size or 0))
        self.end_headers()
        if fault == "corrupt":
            content[-1] ^= 1
        if fault == "cut":
            content = content[: len(content) // 2]
            self.close_connection = True
        if is_tar:
            proxy.served += len(content)
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""

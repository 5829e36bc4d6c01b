"""A file server on loopback that counts what it sends, for the benchmarks of remote data.

    python benchmarks/counting_server.py FOLDER     prints its port; ends when stdin is closed

It answers GET and HEAD with byte ranges, enough for reading over HTTP
and from an S3 bucket in path style: `http://127.0.0.1:PORT/bucket/key` and
`s3://bucket/key` with that endpoint are the same file. Signatures are not checked.
`GET /-/counts` returns {"bytes", "requests"} since the last such call. Counted are the bytes of
bodies; the send buffer is small, so that an aborted transfer counts little more than what arrived.
Only the standard library is used.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import re
import socket
import sys
import threading
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote, urlsplit

SEND_BUFFER = 128 * 1024
CHUNK = 64 * 1024


class Counts:
    """Bytes and requests since the last `take`; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = {"bytes": 0, "requests": 0}

    def add(self, name: str, amount: int) -> None:
        with self._lock:
            self._values[name] += amount

    def take(self) -> dict[str, int]:
        with self._lock:
            values, self._values = self._values, {"bytes": 0, "requests": 0}
        return values


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the files of `folder` with ranges."""

    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, counts: Counts, *arguments: object) -> None:
        self.folder, self.counts = folder, counts
        super().__init__(*arguments)  # type: ignore[arg-type]

    def setup(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        if self.path == "/-/counts":
            self._send_json(self.counts.take())
        else:
            self._answer(body=True)

    def _send_json(self, values: dict[str, int]) -> None:
        data = json.dumps(values).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, *, body: bool) -> None:
        self.counts.add("requests", 1)
        file = self.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if not file.is_file() or self.folder not in file.resolve().parents:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        with file.open("rb") as opened:
            stat = os.fstat(opened.fileno())
            start, stop = _range(self.headers.get("Range"), stat.st_size)
            if start >= stop and stat.st_size:
                self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                return
            partial = stop - start < stat.st_size
            self.send_response(HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK)
            if partial:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{stat.st_size}")
            self.send_header("Content-Length", str(stop - start))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Last-Modified", formatdate(stat.st_mtime, usegmt=True))
            self.send_header("ETag", f'"{hashlib.sha256(str(file).encode()).hexdigest()[:32]}"')
            self.end_headers()
            if body:
                self._send(opened.fileno(), start, stop)

    def _refuse(self, status: HTTPStatus) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, source: int, start: int, stop: int) -> None:
        self.wfile.flush()
        try:
            while start < stop:
                sent = os.sendfile(self.request.fileno(), source, start, min(CHUNK, stop - start))
                self.counts.add("bytes", sent)
                start += sent
        except OSError:  # the client has closed the connection
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


def _range(header: str | None, size: int) -> tuple[int, int]:
    """[start, stop) of a Range header, the whole file without one."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if not found or not any(found.groups()):
        return 0, size
    first, last = found.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(int(last) + 1 if last else size, size)


class Server(http.server.ThreadingHTTPServer):
    """Clients may close connections at any time, which is no error."""

    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def make_server(folder: Path) -> Server:
    """A server of `folder` on a free loopback port; call `serve_forever`."""
    handler = functools.partial(Handler, folder.resolve(), Counts())
    return Server(("127.0.0.1", 0), handler)


def main() -> None:
    server = make_server(Path(sys.argv[1]))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

"""An S3 server on this machine (moto, in a process), and the environment in which it is used."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

SERVER = """
import sys
from moto.server import main
main(["--host", "127.0.0.1", "--port", sys.argv[1]])
"""


@dataclass(frozen=True)
class S3:
    """The server at `url`; `environment` has what S3 clients need, with dummy credentials."""

    url: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def bucket(self, name: str) -> str:
        """Create a bucket (at least 3 letters); returns its URL, s3://name."""
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/x")
        with urllib.request.urlopen(request, timeout=30):
            return f"s3://{name}"


@contextlib.contextmanager
def s3_server() -> Iterator[S3]:
    """Run a server until the end of the context; it keeps its objects in memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "AWS_EC2_METADATA_DISABLED": "true"},
    )
    server = S3(f"http://127.0.0.1:{port}")
    try:
        for _ in range(600):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{server.url}/moto-api/", timeout=10).close()
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()

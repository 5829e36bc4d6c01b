"""An S3 server (moto) in this process, which counts requests and can refuse them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any


class S3:
    """The server at `url`.

    `environment` has the variables that its clients need, with credentials that are valid nowhere
    else. `requests` lists (method, path) of each request; the method of a conditional PUT, which
    does not replace an object, is CREATE. A request is refused with the status that
    `refuses(method, path)` returns, unless that is 0.
    """

    def __init__(self, url: str = "") -> None:
        self.url = url
        self.requests: list[tuple[str, str]] = []
        self.refuses: Callable[[str, str], int] = lambda method, path: 0
        self._numbers = itertools.count()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def bucket(self, name: str = "") -> str:
        """Create a bucket (default: with a new name); returns its URL."""
        import boto3

        name = name or f"bucket-{next(self._numbers)}"
        client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="test-key",
            aws_secret_access_key="test-secret",
        )
        client.create_bucket(Bucket=name)
        return f"s3://{name}"


@contextlib.contextmanager
def s3_server() -> Iterator[S3]:
    """Serve S3 on a free loopback port until the end of the context; objects are in memory."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    s3, moto = S3(), DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        create = "HTTP_IF_NONE_MATCH" in environ
        request = "CREATE" if create else environ["REQUEST_METHOD"], environ["PATH_INFO"]
        s3.requests.append(request)
        if status := s3.refuses(*request):
            start_response(f"{status} Refused", [("Content-Length", "0")])
            return []
        return moto(environ, start_response)

    server = make_server("127.0.0.1", 0, application, threaded=True)
    s3.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield s3
    finally:
        server.shutdown()
        server.server_close()

"""An S3 server (moto) in this process, which counts requests and refuses those that it is told to.

While it runs, the environment has its address and credentials that are valid nowhere else.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest


class S3:
    """`url`: address of the server. `requests`: (method, path) of each request.

    The method of a conditional PUT, which does not replace an object, is CREATE.

    `refuses(method, path)` may be set: a request for which it is a status is answered with it.
    """

    def __init__(self, url: str = "") -> None:
        self.url = url
        self.requests: list[tuple[str, str]] = []
        self.refuses: Callable[[str, str], int] = lambda method, path: 0
        self._numbers = itertools.count()

    def bucket(self, name: str = "") -> str:
        """Create a bucket (by default with a new name); returns its name."""
        import boto3

        name = name or f"bucket-{next(self._numbers)}"
        boto3.client("s3", endpoint_url=self.url).create_bucket(Bucket=name)
        return name


@contextlib.contextmanager
def counted_s3() -> Iterator[S3]:
    """Serve S3 on a free loopback port."""
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
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    variables = {
        "AWS_ENDPOINT_URL": s3.url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        try:
            yield s3
        finally:
            server.shutdown()
            server.server_close()

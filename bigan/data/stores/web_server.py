"""Files of a web server, through `aiohttp`.

The HTTP store of `obstore` 0.12 refuses answers without Content-Length (chunked ones, as
compressing proxies send) and hides the header Retry-After.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from bigan.data import DataError
from bigan.data.stores import urls
from bigan.data.stores.answers import (
    CHUNK_BYTES,
    TIMEOUT_SECONDS,
    Range,
    RangesIgnoredError,
    decoder,
    is_html,
    not_a_page,
    refuse,
    retry_after,
)
from bigan.data.stores.outages import TransientError, WrongContentError
from bigan.urls import redacted, scheme


class WebServer:
    """Files of a web server, or of a Hugging Face data set."""

    def __init__(self, base: str) -> None:
        self._shown = redacted(base)
        self._headers = {"Accept-Encoding": "identity"}
        if scheme(base) == "hf":
            base = urls.of_hugging_face(base)
            if token := _hugging_face_token():
                self._headers["Authorization"] = f"Bearer {token}"
        self._base, self._user = urls.without_user(base)
        self._session: Any = None

    async def get(
        self, name: str, part: Range | None = None, size: int | None = None
    ) -> AsyncIterator[bytes]:
        headers = {"Range": f"bytes={part[0]}-{part[1] - 1}"} if part else {}
        async with self._request(name, headers) as answer:
            encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
            if answer.status == 416:
                raise WrongContentError("it ends before the range that was asked for")
            if part and (answer.status != 206 or encoding not in ("identity", "")):
                await self._refuse_html(answer, name)
                raise RangesIgnoredError(name)
            decode = decoder(encoding, name, self._where(name))
            length, num = answer.headers.get("Content-Length"), 0
            async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
                num += len(chunk)
                if data := decode(chunk):
                    yield data
            ends = length is not None or answer.headers.get("Transfer-Encoding")
            expected = part[1] - part[0] if part else size or 0
            if not ends and num < expected:  # it ended with the connection
                raise TransientError(f"the transfer was cut: {num:,} bytes arrived")

    async def size(self, name: str) -> int | None:
        # Not HEAD: a signature is often valid for GET only.
        try:
            async with self._request(name, {"Range": "bytes=0-0"}) as answer:
                total = answer.headers.get("Content-Range", "").rpartition("/")[2]
                if answer.status in (206, 416) and total.isdigit():
                    return int(total)
                length = answer.headers.get("Content-Length", "")
                if "Content-Encoding" not in answer.headers and length.isdigit():
                    return int(length)
        except FileNotFoundError:
            return None
        return sum([len(chunk) async for chunk in self.get(name)])

    async def names(self, prefix: str) -> list[tuple[str, int]]:
        raise DataError(
            f"{self._shown}: a web server has no list of files; use s3://, gs:// or az://"
        )

    async def put(self, name: str, data: bytes, create: bool) -> bool:
        raise DataError(f"{self._shown}: cannot be written; use s3://, gs:// or az://")

    async def delete(self, name: str) -> None:
        raise DataError(f"{self._shown}: cannot be written; use s3://, gs:// or az://")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    @contextlib.asynccontextmanager
    async def _request(self, name: str, headers: dict[str, str]) -> AsyncIterator[Any]:
        """The answer to a request, after redirects; raises for an error status other than 416."""
        import aiohttp
        import yarl

        url = yarl.URL(
            urls.encoded(urls.join(self._base, name) if name else self._base), encoded=True
        )
        try:
            async with self._opened().get(url, headers=headers, auth=self._auth()) as answer:
                if answer.status >= 300 and answer.status != 416:
                    body = (await answer.content.read(4096)).decode(errors="replace")
                    after = retry_after(answer.headers.get("Retry-After"))
                    refuse(answer.status, body, f"{self._where(name)}", after)
                yield answer
        except aiohttp.ClientError as error:
            raise _failure(error, self._where(name)) from None
        except TimeoutError:
            raise TransientError(f"no answer for {TIMEOUT_SECONDS} s") from None
        except ValueError:
            raise DataError(_not_valid(self._where(name))) from None
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise TransientError(f"the connection failed: {error.strerror or error}") from None

    async def _refuse_html(self, answer: Any, name: str) -> None:
        if is_html(await answer.content.read(1024)):
            raise DataError(not_a_page(self._where(name)))

    def _where(self, name: str) -> str:
        return urls.join(self._shown, name) if name else self._shown

    def _auth(self) -> Any:
        """For each request: that of a session also follows redirects to other servers."""
        import aiohttp

        return aiohttp.BasicAuth(*self._user, encoding="utf-8") if self._user else None

    def _opened(self) -> Any:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                auto_decompress=False,
                trust_env=True,  # HTTP_PROXY, HTTPS_PROXY, NO_PROXY, ~/.netrc
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=TIMEOUT_SECONDS, sock_read=TIMEOUT_SECONDS
                ),
            )
            weakref.finalize(self, _close, self._session, asyncio.get_running_loop())
        return self._session


def _close(session: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Close a session that nobody uses any more; also at the end of the process."""
    if not session.closed and loop.is_running():
        asyncio.run_coroutine_threadsafe(session.close(), loop)


def _failure(error: Exception, where: str) -> Exception:
    """The meaning of an error of `aiohttp`."""
    import aiohttp

    invalid = (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, aiohttp.TooManyRedirects)
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return DataError(f"{where}: the certificate of the server is not accepted")
    if isinstance(error, invalid):
        return DataError(_not_valid(where))
    if isinstance(error, aiohttp.ClientHttpProxyError):
        if error.status in (401, 403, 407):
            return DataError(f"{where}: the proxy refuses the request (status {error.status})")
        return TransientError(f"the proxy answers with status {error.status}")
    if isinstance(error, TimeoutError):
        return TransientError(f"no answer for {TIMEOUT_SECONDS} s")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return TransientError("the name of the server cannot be resolved")
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return TransientError("the proxy cannot be reached")
    if isinstance(error, aiohttp.ClientConnectorError):
        return TransientError(f"the connection failed: {error.strerror or 'refused'}")
    return TransientError("the transfer was cut")


def _not_valid(where: str) -> str:
    return f"{where}: the URL, one that it redirects to, or that of the proxy is not valid"


def _hugging_face_token() -> str | None:
    if token := os.environ.get("HF_TOKEN"):
        return token
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    file = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")
    return (file.read_text().strip() or None) if file.is_file() else None

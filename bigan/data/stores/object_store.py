"""Files of a bucket on S3, Google Cloud Storage or Azure, through `obstore`."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote, urlsplit

from bigan.data import DataError
from bigan.data.stores import urls
from bigan.data.stores.answers import (
    CHUNK_BYTES,
    TIMEOUT_SECONDS,
    Range,
    RangesIgnoredError,
    decoder,
    refuse,
)
from bigan.data.stores.credentials import client_options, store_options
from bigan.data.stores.outages import TransientError
from bigan.urls import redacted, scheme

# Large files are uploaded in parts. obstore's time-out without an answer includes the time of
# sending a part, and one part is repeated by obstore, since all would be repeated here.
PART_BYTES = 2**23
PARTS = 4  # in progress at a time
UPLOAD_SECONDS = 120  # of all parts in progress; 32 MiB need at least 2.2 Mbit/s
PART_RETRIES = 8


class ObjectStore:
    """Files of a bucket on S3, Google Cloud Storage or Azure, through `obstore`."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._shown = redacted(base)
        self._store: Any = self._open(TIMEOUT_SECONDS, 0)
        self._uploads: Any = None  # the same, with other limits

    def _open(self, timeout_seconds: int, num_retries: int) -> Any:
        from obstore.store import AzureStore, GCSStore, S3Store

        base, kind = self._base, scheme(self._base)
        limit = datetime.timedelta(seconds=timeout_seconds if num_retries else 1)
        retries = {"max_retries": num_retries, "retry_timeout": limit}
        common: Any = {"retry_config": retries, "client_options": client_options(timeout_seconds)}
        parts = urlsplit(base)
        options = store_options(kind, base)
        path = base.partition("://")[2].partition("/")[2]
        prefix = path.strip("/") or None
        try:
            if kind in ("s3", "s3a"):
                return S3Store(parts.netloc, prefix=prefix, **options, **common)
            if kind == "gs":
                return GCSStore(parts.netloc, prefix=prefix, **options, **common)
            folder = quote(path.partition("?")[0])  # from_url decodes it
            return AzureStore.from_url(f"{kind}://{parts.netloc}/{folder}", **options, **common)
        except Exception as error:
            raise DataError(f"{self._shown}: {_first_line(str(error))}") from None

    async def get(
        self, name: str, part: Range | None = None, size: int | None = None
    ) -> AsyncIterator[bytes]:
        import obstore

        with self._errors(name):
            options: Any = {"range": part} if part else {}
            result = await obstore.get_async(self._store, name, options=options)
            encoding = str(result.attributes.get("Content-Encoding", "identity")).lower()
            if part and encoding not in ("identity", ""):
                raise RangesIgnoredError(name)
            decode = decoder(encoding, name, urls.join(self._shown, name))
            async for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
                if data := decode(bytes(chunk)):
                    yield data

    async def size(self, name: str) -> int | None:
        import obstore

        try:
            with self._errors(name):
                return int((await obstore.head_async(self._store, name))["size"])
        except FileNotFoundError:
            return None

    async def names(self, prefix: str) -> list[tuple[str, int]]:
        import obstore

        # A prefix of obstore ends at a "/"; ours may end anywhere.
        folder, slash, _ = prefix.rpartition("/")
        with self._errors(prefix):
            found = await obstore.list(self._store, folder + slash or None).collect_async()
        return [(item["path"], item["size"]) for item in found if item["path"].startswith(prefix)]

    async def put(self, name: str, data: bytes, create: bool) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            with self._errors(name, create):
                if create:
                    await obstore.put_async(self._store, name, data, mode="create")
                    return True
                if self._uploads is None:
                    self._uploads = self._open(UPLOAD_SECONDS, PART_RETRIES)
                limits: Any = {"chunk_size": PART_BYTES, "max_concurrency": PARTS}
                await obstore.put_async(self._uploads, name, data, **limits)
        except (AlreadyExistsError, PreconditionError):
            return False
        except DataError as error:
            if not create or "status 501" not in str(error):
                raise
            # The store has no conditional writes: two requests, between which another may write.
            return await self.size(name) is None and await self.put(name, data, False)
        return True

    async def delete(self, name: str) -> None:
        import obstore

        with contextlib.suppress(FileNotFoundError), self._errors(name):
            await obstore.delete_async(self._store, name)

    async def close(self) -> None:
        pass

    @contextlib.contextmanager
    def _errors(self, name: str, create: bool = False) -> Any:
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(name) from None
        except BaseError as error:
            exists = create and isinstance(error, AlreadyExistsError | PreconditionError)
            # Other conflicts are of two writers at once, of which none may have written.
            if exists and not re.search("RequestConflict|OperationAborted", str(error)):
                raise
            if "non-partial response" in str(error):  # to a request for a range
                raise RangesIgnoredError(name) from None
            _refuse_object(str(error), urls.join(self._shown, name))


def _refuse_object(text: str, where: str) -> None:
    """Raise for an error of `obstore`, whose text contains the complete URL."""
    status = re.search(r"status code: (\d{3})|status: (\d{3})", text)
    if status:
        body = re.search(r"<\?xml.*?>.*|<Error>.*", text.partition("Debug source")[0], re.DOTALL)
        refuse(int(status[1] or status[2]), body[0] if body else "", where, 0.0)
    if "Received redirect" in text:
        refuse(301, "", where, 0.0)
    for pattern, reason in _CONNECTION_ERRORS.items():
        if re.search(pattern, text):
            raise TransientError(reason)
    if "Generic" in text and re.search(r"HTTP error|reqwest|hyper|body", text):
        raise TransientError("the connection failed")
    raise DataError(f"{where}: cannot be read: {_first_line(text)}")


_CONNECTION_ERRORS = {
    r"dns error|failed to lookup": "the name of the server cannot be resolved",
    r"ConnectionRefused|Connection refused": "the connection was refused",
    r"TimedOut|timed out|kind: Timeout": f"no answer for {TIMEOUT_SECONDS} s",
    r"ConnectionReset|Connection reset|IncompleteMessage|UnexpectedEof|kind: (Decode|Body)|"
    r"error decoding response body|request or response body error": "the transfer was cut",
}


def _first_line(text: str) -> str:
    """The beginning of an error of `obstore`, up to a URL."""
    return re.split(r"\S*https?://", text.splitlines()[0])[0].strip()[:200]

"""A folder at a URL: whole files and byte ranges, verified; outages are waited for."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent import futures
from typing import IO, Any, TypeVar

from bigan import hashes
from bigan.data import DataError
from bigan.data.settings import Fetch
from bigan.data.stores import outages, transports, urls
from bigan.data.stores.answers import CHUNK_BYTES, Range, RangesIgnoredError, is_html, not_a_page
from bigan.data.stores.outages import TransientError, WrongContentError
from bigan.data.stores.urls import check_url, join
from bigan.urls import redacted, scheme

T = TypeVar("T")


class MissingFileError(DataError):
    """A file that does not exist in a store."""


def store_of(base: str, fetch: Fetch) -> Store:
    """The store at a URL, with the settings of `data`; raises `DataError` like `check_url`."""
    return Store(
        base,
        allow_pipe=fetch.allow_pipe,
        patience_seconds=fetch.patience_seconds,
        connections=fetch.connections,
    )


class Store:
    """A folder at a URL. Safe to use from several threads; each process needs its own.

    A request with a transient failure (an outage, too many requests, a cut transfer) is repeated
    for up to `patience_seconds` per call; a permanent failure raises `DataError`, one line, at
    once. Up to `connections` requests are in progress at a time. After `close`, calls in progress
    and later ones raise `InterruptedError`.
    """

    def __init__(
        self,
        base: str,
        *,
        allow_pipe: bool = False,
        patience_seconds: float = 300.0,
        connections: int = 4,
    ) -> None:
        check_url(base, allow_pipe)
        self.shown = redacted(base)
        self._transport = transports.transport(base)
        self._connections = connections
        self._slots: asyncio.Semaphore | None = None  # created on the event loop
        kind = scheme(base)
        web = kind in (*urls.WEB, "hf")  # known after the first request
        self._ranges: bool | None = None if web else kind in urls.OBJECT_STORES
        self._known = "manifest.json"  # a file to find out whether ranges are supported
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._running: set[futures.Future[Any]] = set()
        self._patience = outages.Patience(self.shown, patience_seconds, self._stopped)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def has_ranges(self) -> bool:
        """Whether byte ranges can be read; asks a web server once, with patience."""
        if self._ranges is None:
            name = self._known

            def attempt() -> bool:
                try:
                    self._wait(self._collect(name, (0, 1)))
                except (RangesIgnoredError, WrongContentError):
                    return False
                return True

            self._ranges = self._repeat(name, attempt)
        return self._ranges

    def read(self, name: str, *, size: int | None = None, sha256: str | None = None) -> bytes:
        """A whole file, with the size in bytes and the sha256 of the manifest, where given."""

        def attempt() -> bytes:
            data = self._wait(self._collect(name, None, limit=size))
            try:
                _verify(data, size, sha256)
            except WrongContentError:
                if is_html(data):
                    raise DataError(not_a_page(self._where(name))) from None
                raise
            if size is None and sha256 is None and is_html(data):
                raise DataError(not_a_page(self._where(name)))
            return data

        data = self._repeat(name, attempt)
        self._known = name
        return data

    def read_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each [start, stop) of a file.

        Each range is one request; several are in progress at a time. From a server that ignores
        ranges the whole file is read once.
        """
        found: dict[Range, bytes] = {part: b"" for part in ranges if part[0] >= part[1]}

        def attempt() -> None:
            missing = [part for part in dict.fromkeys(ranges) if part not in found]
            if missing and self._ranges is not False:
                try:
                    self._wait(self._collect_all(name, missing, found))
                    self._ranges = True
                    return
                except RangesIgnoredError:
                    self._ranges = False
            if missing:
                data = self._wait(self._collect(name, None))
                if is_html(data):
                    raise DataError(not_a_page(self._where(name)))
                for start, stop in missing:
                    if stop > len(data):
                        raise _wrong_size(len(data), stop)
                    found[start, stop] = data[start:stop]

        self._repeat(name, attempt)
        return [found[part] for part in ranges]

    @contextlib.contextmanager
    def open(self, name: str = "") -> Iterator[IO[bytes]]:
        """The bytes of a file in sequence; "" is the file at the URL of the store itself."""
        reader = _Sequential(self, name)
        try:
            yield io.BufferedReader(reader, CHUNK_BYTES)
        finally:
            reader.end()

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None if it does not exist."""
        return self._repeat(name, lambda: self._wait(self._transport.size(name)))

    def names(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(name, size) of each file whose name begins with `prefix`; not of web servers."""
        yield from self._repeat(prefix, lambda: self._wait(self._transport.names(prefix)))

    def write(self, name: str, data: bytes) -> None:
        """Write a file, completely or not at all; not on web servers."""
        self._repeat(name, lambda: self._wait(self._transport.put(name, data, False)))

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; returns whether this call has written it."""
        num = 0

        def attempt() -> bool:
            nonlocal num
            num += 1
            return self._wait(self._transport.put(name, data, True))

        created = self._repeat(name, attempt)
        # The answer to an attempt that succeeded may have been lost.
        return created or (num > 1 and self.read(name) == data)

    def delete(self, name: str) -> None:
        """Delete a file if it exists; not on web servers."""
        self._repeat(name, lambda: self._wait(self._transport.delete(name)))

    def close(self) -> None:
        """Cancel the requests in progress; every call raises `InterruptedError` from now on."""
        with self._lock:
            if self._stopped.is_set():
                return
            self._stopped.set()
            running = list(self._running)
        for future in running:
            future.cancel()
        asyncio.run_coroutine_threadsafe(self._transport.close(), transports.event_loop())

    def _where(self, name: str) -> str:
        return join(self.shown, name) if name else self.shown

    def _repeat(self, name: str, attempt: Callable[[], T]) -> T:
        try:
            return self._patience.repeat(self._where(name), attempt)
        except FileNotFoundError:
            raise MissingFileError(
                f"{self._where(name)}: cannot be read (status 404, it does not exist); check that "
                "the URL is right and is that of the packed files"
            ) from None

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine on the event loop; `InterruptedError` once closed."""
        with self._lock:
            if self._stopped.is_set():
                coroutine.close()
                raise InterruptedError(f"{self.shown}: the stream was closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, transports.event_loop())
            self._running.add(future)
        try:
            while self._patience.is_down() and not future.done():
                futures.wait([future], outages.POLL_SECONDS)
                self._patience.report()
            return future.result()
        except futures.CancelledError:
            raise InterruptedError(f"{self.shown}: the stream was closed") from None
        finally:
            future.cancel()  # after KeyboardInterrupt
            with self._lock:
                self._running.discard(future)

    async def _collect(self, name: str, part: Range | None, limit: int | None = None) -> bytes:
        if self._slots is None:
            self._slots = asyncio.Semaphore(self._connections)
        chunks, num = [], 0
        transfer: Any = self._transport.get(name, part, limit)
        async with self._slots, contextlib.aclosing(transfer):
            if self._stopped.is_set():  # before this task, of a group, could be cancelled
                raise asyncio.CancelledError
            async for chunk in transfer:
                chunks.append(chunk)
                num += len(chunk)
                if limit is not None and num > limit:
                    break
        if part is not None and num != part[1] - part[0]:
            raise _wrong_size(num, part[1] - part[0])
        return b"".join(chunks)

    async def _collect_all(
        self, name: str, parts: Sequence[Range], found: dict[Range, bytes]
    ) -> None:
        """Add each part to `found`; raises the first failure after the others have arrived.

        A permanent failure cancels the others.
        """
        failures: list[TransientError | WrongContentError] = []
        num = len(found)

        async def collect(part: Range) -> None:
            try:
                found[part] = await self._collect(name, part)
            except (TransientError, WrongContentError) as error:
                failures.append(error)

        try:
            async with asyncio.TaskGroup() as group:
                for part in parts:
                    group.create_task(collect(part))
        except BaseExceptionGroup as error:
            raise error.exceptions[0] from None
        if self._stopped.is_set():  # a group hides that its tasks were cancelled
            raise asyncio.CancelledError
        if failures:
            failures[0].progress = len(found) > num
            raise failures[0]


class _Sequential(io.RawIOBase):
    """A file that is read in sequence, and opened again where a transfer has failed."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._stream: AsyncIterator[bytes] | None = None
        self._skip = 0  # bytes of this transfer that an earlier one has delivered
        self._num = 0  # bytes delivered
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(self._store._repeat(self._name, self._next))
        num = min(len(buffer), len(self._rest))
        buffer[:num] = self._rest[:num]
        self._rest = self._rest[num:]
        return num

    def end(self) -> None:
        """Abort the transfer."""
        if self._stream is not None:
            with contextlib.suppress(InterruptedError):
                self._store._wait(_closed(self._stream))
            self._stream = None

    def _next(self) -> bytes:
        """The next chunk, b"" at the end."""
        if self._stream is None:
            self._stream, self._skip = self._store._transport.get(self._name), self._num
        while True:
            try:
                chunk = self._store._wait(_chunk(self._stream))
            except BaseException:
                self.end()
                raise
            if len(chunk) > self._skip or not chunk:
                chunk = chunk[self._skip :]
                self._skip = 0
                self._num += len(chunk)
                return chunk
            self._skip -= len(chunk)


async def _chunk(stream: AsyncIterator[bytes]) -> bytes:
    return await anext(stream, b"")


async def _closed(stream: Any) -> None:
    await stream.aclose()


def _verify(data: bytes, size: int | None, sha256: str | None) -> None:
    if size is not None and len(data) != size:
        raise _wrong_size(len(data), size)
    if sha256 is not None and hashes.sha256(data) != sha256:
        raise WrongContentError("its sha256 differs from the manifest")


def _wrong_size(num: int, expected: int) -> WrongContentError:
    return WrongContentError(f"{num:,} bytes arrived, expected {expected:,}")

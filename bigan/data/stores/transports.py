"""Asynchronous access to files below a URL, on one event loop in a thread of the process.

A transport makes one attempt of one request, which can be cancelled at once.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from typing import Protocol

from bigan.data.stores import urls
from bigan.data.stores.answers import Range
from bigan.data.stores.object_store import ObjectStore
from bigan.data.stores.program import Program
from bigan.data.stores.web_server import WebServer
from bigan.urls import scheme


class Transport(Protocol):
    """One attempt of each request; `name` is relative to the folder."""

    def get(
        self, name: str, part: Range | None = None, size: int | None = None
    ) -> AsyncIterator[bytes]:
        """The bytes of a file, of `size` bytes if that is known, or of [start, stop) of it.

        Raises `FileNotFoundError`, `TransientError`, `RangesIgnoredError` or `DataError`.
        """

    async def size(self, name: str) -> int | None: ...

    async def names(self, prefix: str) -> list[tuple[str, int]]: ...

    async def put(self, name: str, data: bytes, create: bool) -> bool: ...

    async def delete(self, name: str) -> None: ...

    async def close(self) -> None: ...


class _Loop:
    """The event loop of this process, in a thread that ends with the process."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.loop = asyncio.new_event_loop()
        threading.Thread(
            target=self.loop.run_forever, name="transfers of bigan", daemon=True
        ).start()


_lock = threading.Lock()
_current: list[_Loop] = []
os.register_at_fork(after_in_child=_current.clear)  # the thread does not exist there


def event_loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process; starts its thread at the first call."""
    with _lock:
        if not _current:
            _current.append(_Loop())
        return _current[0].loop


def transport(base: str) -> Transport:
    """The transport for files below `base`, a URL that `urls.check_url` accepts."""
    kind = scheme(base)
    if kind in urls.OBJECT_STORES:
        return ObjectStore(base)
    if kind in (*urls.WEB, "hf"):
        return WebServer(base)
    return Program(base)

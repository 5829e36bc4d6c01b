"""Files that a program writes to its output: `pipe:` and what else WebDataset's gopen reads."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

from bigan.data import DataError
from bigan.data.stores import urls
from bigan.data.stores.answers import CHUNK_BYTES, Range, RangesIgnoredError
from bigan.data.stores.outages import TransientError
from bigan.urls import redacted


class Program:
    """The output of a command for each file; nothing can be written or listed."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._shown = redacted(base)

    async def get(
        self, name: str, part: Range | None = None, size: int | None = None
    ) -> AsyncIterator[bytes]:
        if part:
            raise RangesIgnoredError(name)
        url = urls.join(self._base, name) if name else self._base
        loop = asyncio.get_running_loop()
        try:
            stream = await loop.run_in_executor(None, _gopen, url)
        except OSError as error:
            raise _failure(error) from None
        process = getattr(stream, "proc", None)
        try:
            while chunk := await loop.run_in_executor(None, stream.read, CHUNK_BYTES):
                yield chunk
            if hasattr(stream, "wait_for_child"):  # raises if the command failed
                await loop.run_in_executor(None, stream.wait_for_child)
        except OSError as error:
            raise _failure(error) from None
        finally:
            if process is not None and process.poll() is None:
                process.kill()  # the reader has stopped early
            loop.run_in_executor(None, _close, stream)  # may wait for the process

    async def size(self, name: str) -> int | None:
        num = 0
        async for chunk in self.get(name):
            num += len(chunk)
        return num

    async def names(self, prefix: str) -> list[tuple[str, int]]:
        raise DataError(f"{self._shown}: a command has no list of files")

    async def put(self, name: str, data: bytes, create: bool) -> bool:
        raise DataError(f"{self._shown}: cannot be written; use s3://, gs:// or az://")

    async def delete(self, name: str) -> None:
        raise DataError(f"{self._shown}: cannot be written; use s3://, gs:// or az://")

    async def close(self) -> None:
        pass


def _close(stream: Any) -> None:
    with contextlib.suppress(OSError):
        stream.close()


def _gopen(url: str) -> Any:
    import webdataset  # slow to import, and needed only here

    return webdataset.gopen(url, "rb", bufsize=CHUNK_BYTES)


def _failure(error: OSError) -> Exception:
    """The meaning of an error of `gopen`."""
    if isinstance(error, FileNotFoundError):
        return error
    text = " ".join(str(error).split())
    code = re.search(r"exit (-?\d+)", text)
    return TransientError(f"the command ended with code {code[1]}" if code else text[:200])

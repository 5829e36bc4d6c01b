"""Shards behind a URL, read front to back through WebDataset's `gopen`, and always verified.

A transfer that breaks off, or a command that fails with exit code 0, looks like a short file; so
every download is compared with the size and sha256 of the manifest before anyone sees it, and
tried again if it differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from bigan import atomic_files
from bigan.data import DataError

T = TypeVar("T")

CHUNK_BYTES = 2**20
WAITS_SECONDS = (0.5, 2.0, 8.0, 20.0)  # between the tries of a download
_PROGRAMS = {"http": "curl", "https": "curl", "ftps": "curl", "sftp": "curl", "scp": "curl",
             "s3": "aws", "gs": "gsutil"}  # fmt: skip

# gopen knows no s3://, and its curl waits for ever for a server that has fallen silent.
_CURL = ["curl", "--fail", "--silent", "--show-error", "--location", "--globoff",
         "--connect-timeout", "20", "--speed-limit", "1", "--speed-time", "20"]  # fmt: skip
_COMMANDS = {
    "http": _CURL,
    "https": _CURL,
    "s3": ["aws", "s3", "cp", "--only-show-errors"],
}


class Transfers:
    """The downloads of one stream, so that they end with it, also when a server says nothing."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()

    def stop(self) -> None:
        """End what is under way; whatever begins afterwards ends at once."""
        with self._lock:
            self.stopped.set()
            for process in self._processes:
                process.kill()

    @contextlib.contextmanager
    def running(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        with self._lock:
            self._processes.add(process)
            if self.stopped.is_set():
                process.kill()
        try:
            yield
        finally:
            with self._lock:
                self._processes.discard(process)


def is_remote(path: str) -> bool:
    """Whether `path` is a URL and not a place in the file system."""
    return "://" in path or path.startswith("pipe:")


def join(base: str, name: str) -> str:
    """The URL of file `name` in the folder `base`."""
    return f"{base.rstrip('/')}/{name}"


def check_url(url: str, allow_pipe: bool) -> None:
    """Raise `DataError` for a URL that cannot be read here, or that would run a command."""
    if url.startswith("pipe:"):
        if not allow_pipe:
            raise DataError(
                f"{url}: runs a shell command; if you trust it, set data.allow_pipe=true"
            )
        return
    if os.environ.get("GOPEN_REWRITE") and not allow_pipe:
        raise DataError(
            f"{url}: the variable GOPEN_REWRITE could turn it into a shell command; unset it, or "
            "set data.allow_pipe=true"
        )
    scheme = url.partition("://")[0]
    if scheme not in {*_PROGRAMS, "hf", "ais", "file"}:
        raise DataError(f"{url}: unknown kind of URL; use https://, s3:// or a folder")
    program = _PROGRAMS.get(scheme)
    if program and not shutil.which(program):
        raise DataError(f"{url}: reading {scheme}:// needs the program {program!r}; install it")


@contextlib.contextmanager
def open_url(url: str, allow_pipe: bool, transfers: Transfers | None = None) -> Iterator[IO[bytes]]:
    """The bytes behind `url`, front to back; raises OSError if the transfer fails."""
    import webdataset  # takes seconds to import; local runs never need it
    from webdataset.gopen import Pipe  # the module's name is shadowed by its function

    check_url(url, allow_pipe)
    command = _COMMANDS.get(url.partition("://")[0])
    stream: Any
    if command is not None:
        whole = [*command, url, *(["-"] if command[0] == "aws" else [])]
        stream = Pipe(whole, mode="rb", stderr=subprocess.PIPE)
    else:
        stream = webdataset.gopen(url, "rb", bufsize=CHUNK_BYTES)
    process = getattr(stream, "proc", None)
    try:
        with (transfers or Transfers()).running(process) if process else contextlib.nullcontext():
            yield stream
    except OSError as error:
        said = process.stderr.read() if process and process.stderr else b""
        lines = said.decode(errors="replace").strip().splitlines()
        raise OSError(lines[-1] if lines else _in_few_words(error)) from error
    finally:
        if process is not None and process.poll() is None:
            process.kill()  # the reader has seen enough, or is being stopped
        with contextlib.suppress(OSError):
            stream.close()
        if process is not None and process.stderr:
            process.stderr.close()


def read(
    url: str,
    *,
    size: int | None,
    sha256: str | None,
    allow_pipe: bool,
    transfers: Transfers | None = None,
) -> bytes:
    """All bytes behind `url`, verified; raises `DataError` after several tries, or once stopped."""
    transfers = transfers or Transfers()

    def attempt() -> bytes:
        with open_url(url, allow_pipe, transfers) as stream:
            data = b"".join(_pieces(stream, size))
        _compare(len(data), size, hashlib.sha256(data).hexdigest(), sha256)
        return data

    return _persistently(url, attempt, transfers)


def download(
    url: str,
    file: Path,
    *,
    size: int,
    sha256: str,
    allow_pipe: bool,
    transfers: Transfers | None = None,
) -> None:
    """Bring what is behind `url` to `file`, whole and verified or not at all."""
    transfers = transfers or Transfers()
    temporary = atomic_files.temporary_name(file)

    def attempt() -> None:
        digest, num = hashlib.sha256(), 0
        with open_url(url, allow_pipe, transfers) as stream, temporary.open("wb") as out:
            for piece in _pieces(stream, size):
                digest.update(piece)
                num += len(piece)
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        _compare(num, size, digest.hexdigest(), sha256)
        temporary.replace(file)

    try:
        _persistently(url, attempt, transfers)
    finally:
        temporary.unlink(missing_ok=True)


def _pieces(stream: Any, size: int | None) -> Iterator[bytes]:
    """The stream in pieces; one byte more than `size` is enough to know that it is too long."""
    num = 0
    while size is None or num <= size:
        piece = stream.read(CHUNK_BYTES)
        if not piece:
            if hasattr(stream, "wait_for_child"):  # a short file may be a command that failed
                stream.wait_for_child()
            return
        num += len(piece)
        yield piece


def _compare(num: int, size: int | None, digest: str, sha256: str | None) -> None:
    if size is not None and num != size:
        raise OSError(f"{num:,} bytes arrived, the manifest says {size:,}")
    if sha256 is not None and digest != sha256:
        raise OSError("its sha256 is not that of the manifest")


def _persistently(url: str, attempt: Callable[[], T], transfers: Transfers) -> T:
    """`attempt`, several times if it fails: networks do."""
    began = time.monotonic()
    for wait in (*WAITS_SECONDS, None):
        try:
            return attempt()
        except OSError as error:
            permanent = re.search(r"error: 4(?!08|29)\d\d", str(error))  # a 404 does not go away
            if wait is None or permanent or transfers.stopped.is_set():
                tried = "" if permanent else f", tried for {time.monotonic() - began:.0f} s"
                raise DataError(
                    f"{url}: cannot be read ({_in_few_words(error)}{tried}); see that the address "
                    "is right and serves what was packed; the same command then goes on"
                ) from None
        transfers.stopped.wait(wait)
    raise AssertionError("unreachable")


def _in_few_words(error: OSError) -> str:
    """What the system or a command said; WebDataset's Pipe would quote the whole command."""
    text = " ".join(str(error).split())
    code = re.search(r"exit (-?\d+)", text)
    return f"the command ended with code {code[1]}" if code else text[:200]

"""Verified downloads of files at a URL, through WebDataset's `gopen` and external programs.

An interrupted transfer, or a command that fails with exit code 0, looks like a short file.
Therefore every download is compared with the size and sha256 in the manifest before it is used, and
repeated if it differs.
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

from bigan import atomic_files, hashes
from bigan.data import DataError

T = TypeVar("T")

CHUNK_BYTES = 2**20
WAITS_SECONDS = (0.5, 2.0, 8.0, 20.0)  # between the attempts of a download
_PROGRAMS = {"http": "curl", "https": "curl", "ftps": "curl", "sftp": "curl", "scp": "curl",
             "s3": "aws", "gs": "gsutil"}  # fmt: skip

# gopen does not support s3://, and its curl has no timeout for a server that sends nothing.
_CURL = ["curl", "--fail", "--silent", "--show-error", "--location", "--globoff",
         "--connect-timeout", "20", "--speed-limit", "1", "--speed-time", "20"]  # fmt: skip
_COMMANDS = {
    "http": _CURL,
    "https": _CURL,
    "s3": ["aws", "s3", "cp", "--only-show-errors"],
}


class Transfers:
    """The running downloads of one stream, to abort them when it is closed."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()

    def stop(self) -> None:
        """Abort running downloads, and every later one as soon as it starts."""
        with self._lock:
            self.stopped.set()
            for process in self._processes:
                process.kill()

    @contextlib.contextmanager
    def running(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Register the process of a download for the time of the context."""
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
    """Whether `path` is a URL, not a path in the file system."""
    return "://" in path or path.startswith("pipe:")


def join(base: str, name: str) -> str:
    """The URL of file `name` in the folder `base`."""
    return f"{base.rstrip('/')}/{name}"


def check_url(url: str, allow_pipe: bool) -> None:
    """Raise `DataError` for a URL that cannot be read, or that would run a disallowed command."""
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
        raise DataError(f"{url}: unsupported URL scheme; use https://, s3:// or a folder")
    program = _PROGRAMS.get(scheme)
    if program and not shutil.which(program):
        raise DataError(f"{url}: reading {scheme}:// needs the program {program!r}; install it")


@contextlib.contextmanager
def open_url(url: str, allow_pipe: bool, transfers: Transfers | None = None) -> Iterator[IO[bytes]]:
    """A stream of the bytes at `url`; raises `OSError` if the transfer fails."""
    import webdataset  # slow to import, and not needed for local data
    from webdataset.gopen import Pipe  # a function shadows the name of the module

    check_url(url, allow_pipe)
    command = _COMMANDS.get(url.partition("://")[0])
    stream: Any
    if command is not None:
        arguments = [*command, url, *(["-"] if command[0] == "aws" else [])]
        stream = Pipe(arguments, mode="rb", stderr=subprocess.PIPE)
    else:
        stream = webdataset.gopen(url, "rb", bufsize=CHUNK_BYTES)
    process = getattr(stream, "proc", None)
    try:
        with (transfers or Transfers()).running(process) if process else contextlib.nullcontext():
            yield stream
    except OSError as error:
        output = process.stderr.read() if process and process.stderr else b""
        lines = output.decode(errors="replace").strip().splitlines()
        raise OSError(lines[-1] if lines else _short(error)) from error
    finally:
        if process is not None and process.poll() is None:
            process.kill()  # the reader has stopped early
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
    """All bytes at `url`, verified; raises `DataError` after several attempts, or once stopped."""
    transfers = transfers or Transfers()

    def attempt() -> bytes:
        with open_url(url, allow_pipe, transfers) as stream:
            data = b"".join(_chunks(stream, size))
        _compare(len(data), size, hashes.sha256(data), sha256)
        return data

    return _with_retries(url, attempt, transfers)


def download(
    url: str,
    file: Path,
    *,
    size: int,
    sha256: str,
    allow_pipe: bool,
    transfers: Transfers | None = None,
) -> None:
    """Download `url` to `file`, verified and atomically; raises `DataError` like `read`."""
    transfers = transfers or Transfers()
    temporary = atomic_files.temporary_name(file)

    def attempt() -> None:
        digest, num = hashlib.sha256(), 0
        with open_url(url, allow_pipe, transfers) as stream, temporary.open("wb") as out:
            for chunk in _chunks(stream, size):
                digest.update(chunk)
                num += len(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        _compare(num, size, digest.hexdigest(), sha256)
        temporary.replace(file)

    try:
        _with_retries(url, attempt, transfers)
    finally:
        temporary.unlink(missing_ok=True)


def _chunks(stream: Any, size: int | None) -> Iterator[bytes]:
    """The stream in chunks, up to the first one that exceeds `size`."""
    num = 0
    while size is None or num <= size:
        chunk = stream.read(CHUNK_BYTES)
        if not chunk:
            if hasattr(stream, "wait_for_child"):  # raises if the command failed
                stream.wait_for_child()
            return
        num += len(chunk)
        yield chunk


def _compare(num: int, size: int | None, digest: str, sha256: str | None) -> None:
    if size is not None and num != size:
        raise OSError(f"{num:,} bytes arrived, expected {size:,} as in the manifest")
    if sha256 is not None and digest != sha256:
        raise OSError("its sha256 differs from the manifest")


def _with_retries(url: str, attempt: Callable[[], T], transfers: Transfers) -> T:
    """The result of `attempt`, which is repeated after transient errors."""
    began = time.monotonic()
    for wait in (*WAITS_SECONDS, None):
        try:
            return attempt()
        except OSError as error:
            permanent = re.search(r"error: 4(?!08|29)\d\d", str(error))  # such as 404
            if wait is None or permanent or transfers.stopped.is_set():
                tried = "" if permanent else f", repeated for {time.monotonic() - began:.0f} s"
                raise DataError(
                    f"{url}: cannot be read ({_short(error)}{tried}); check that the "
                    "address is right and serves the packed files, then run the same command again"
                ) from None
        transfers.stopped.wait(wait)
    raise AssertionError("unreachable")


def _short(error: OSError) -> str:
    """A short message; that of WebDataset's Pipe contains the whole command."""
    text = " ".join(str(error).split())
    code = re.search(r"exit (-?\d+)", text)
    return f"the command ended with code {code[1]}" if code else text[:200]

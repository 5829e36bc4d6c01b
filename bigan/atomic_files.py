"""Files and folders that are either whole or absent, whatever kills the writer.

A file is written under a temporary name in the same folder and renamed. A folder gets the marker
`COMPLETE` last and is renamed into place; readers ignore any folder without the marker. Several
processes, also of several hosts, may write the same name at once: the last one to finish wins.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

COMPLETE = "COMPLETE"
ABANDONED_SECONDS = 3600  # without a change, after which a temporary of another host is nobody's


def temporary_name(path: Path) -> Path:
    """A new hidden name beside `path`: .<name>.<token>-<place>-<process>.tmp."""
    token = secrets.token_hex(4)
    return path.with_name(f".{path.name}.{token}-{_place()}-{os.getpid()}.tmp")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` at once: a reader sees the old file or the new one."""
    with _written(path, content) as temporary:
        temporary.replace(path)


def create_atomic(path: Path, content: bytes | str) -> None:
    """Like `write_atomic`, but leave `path` as it is if it is there: of several, one wins."""
    with _written(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links: nearly as good
            if not path.exists():
                temporary.replace(path)


@contextlib.contextmanager
def _written(path: Path, content: bytes | str) -> Iterator[Path]:
    """`content` in a temporary file beside `path`, safely on disk."""
    data = content.encode() if isinstance(content, str) else content
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes `folder`, marked `COMPLETE`.

    An existing `folder` is replaced. On an exception nothing of the new folder remains.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, former = temporary_name(folder), temporary_name(folder)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                sync(path)
        (temporary / COMPLETE).write_text("")
        sync(temporary)
        if folder.exists():  # an incomplete one, or the same state saved again
            folder.replace(former)  # at once: a folder being deleted must not look complete
        temporary.replace(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether `folder` carries its completion marker."""
    return (folder / COMPLETE).is_file()


def numbered_folders(parent: Path) -> list[Path]:
    """Complete folders below `parent` whose names are counts of images, smallest first."""
    if not parent.is_dir():
        return []
    found = [p for p in parent.iterdir() if p.name.isdigit() and is_complete(p)]
    return sorted(found, key=lambda p: int(p.name))


def remove_leftovers(parent: Path, name: str = "*", *, shared: bool = False) -> None:
    """Delete temporary folders and files of `name` that a killed writer left in `parent`.

    With `shared`, other processes may be writing there: only what nobody can still be at work on
    is deleted, because its process is gone or, on another host, after `ABANDONED_SECONDS`.
    """
    for path in parent.glob(f".{name}.*.tmp"):
        if not shared or _is_abandoned(path):
            # Another process may be deleting the same, or one that is dying still writing to it.
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    _, _, writer = path.name.removesuffix(".tmp").rpartition(".")
    _, _, writer = writer.partition("-")
    place, _, process = writer.partition("-")
    if place == _place() and process.isdecimal():
        return not _is_alive(int(process))
    try:
        return time.time() - path.stat().st_mtime > ABANDONED_SECONDS
    except OSError:  # it is gone by now
        return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


@functools.cache
def _place() -> str:
    """Where a process number means something: this host and, in a container, its own numbers."""
    try:
        numbers = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # no Linux
        numbers = ""
    return hashlib.blake2b(f"{socket.gethostname()} {numbers}".encode(), digest_size=4).hexdigest()


def sync(path: Path) -> None:
    """Have a file, or the entries of a folder, on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Atomic writes: files and folders are complete or absent, even if the writer is killed.

A file is written under a temporary name in the same folder and renamed. A folder gets the marker
`COMPLETE` last and is renamed; readers ignore folders without the marker. Several processes, also
on several hosts, may write the same name at once: the last one to finish wins.
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
ABANDONED_SECONDS = (
    3600  # without modification, after which a temporary file of another host is deleted
)


def temporary_name(path: Path) -> Path:
    """A new hidden name beside `path`: .<name>.<token>-<PID scope>-<process>.tmp."""
    token = secrets.token_hex(4)
    return path.with_name(f".{path.name}.{token}-{pid_scope()}-{os.getpid()}.tmp")


def write_atomic(path: Path, content: bytes | str, sync: bool = True) -> None:
    """Replace `path` by `content`; a reader sees either the old file or the new one.

    Without `sync` that is not true after a power failure.
    """
    with _written(path, content, sync) as temporary:
        temporary.replace(path)


def create_atomic(path: Path, content: bytes | str) -> None:
    """Like `write_atomic`, but keep an existing `path`: the first of several writers wins."""
    with _written(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # no hard links: check and rename, with a small race
            if not path.exists():
                temporary.replace(path)


@contextlib.contextmanager
def _written(path: Path, content: bytes | str, sync: bool = True) -> Iterator[Path]:
    """A temporary file beside `path` with `content`, synced to disk unless told otherwise."""
    data = content.encode() if isinstance(content, str) else content
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yield a staging folder to fill; on success it becomes `folder`, marked `COMPLETE`.

    An existing `folder` is replaced. On an exception the staging folder is deleted.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, previous = temporary_name(folder), temporary_name(folder)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                sync(path)
        (temporary / COMPLETE).write_text("")
        sync(temporary)
        if folder.exists():  # incomplete, or the same state saved again
            folder.replace(previous)  # rename: a folder in deletion must not look complete
        temporary.replace(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether `folder` has the marker `COMPLETE`."""
    return (folder / COMPLETE).is_file()


def numbered_folders(parent: Path) -> list[Path]:
    """Complete folders in `parent` whose names are numbers of images, smallest first."""
    if not parent.is_dir():
        return []
    found = [p for p in parent.iterdir() if p.name.isdigit() and is_complete(p)]
    return sorted(found, key=lambda p: int(p.name))


def remove_leftovers(parent: Path, name: str = "*", *, shared: bool = False) -> None:
    """Delete temporary folders and files of `name` that killed writers left in `parent`.

    With `shared`, other processes may be writing there: an entry is deleted only if its process has
    ended or, for a process on another host, after `ABANDONED_SECONDS` without modification.
    """
    for path in parent.glob(f".{name}.*.tmp"):
        if not shared or _is_abandoned(path):
            # Another process may be deleting it too, or a process that is ending may write to it.
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    _, _, writer = path.name.removesuffix(".tmp").rpartition(".")
    _, _, writer = writer.partition("-")
    scope, _, process = writer.partition("-")
    if scope == pid_scope() and process.isdecimal():
        return not _is_alive(int(process))
    try:
        return time.time() - path.stat().st_mtime > ABANDONED_SECONDS
    except OSError:  # deleted meanwhile
        return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # a process of another user
        return True
    return True


@functools.cache
def pid_scope() -> str:
    """The scope of process numbers: this host and, in a container, its PID namespace."""
    try:
        numbers = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        numbers = ""
    return hashlib.blake2b(f"{socket.gethostname()} {numbers}".encode(), digest_size=4).hexdigest()


def sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

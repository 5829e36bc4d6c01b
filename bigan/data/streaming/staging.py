"""Shards of a data folder copied to a disk of the node, and read from there.

    <cache>/staged/lock                     held by the process that copies
                   <shards>/train-0000.tar  the shards of one split
                            COMPLETE        written last

<shards> is a hash of the names, sizes and sha256 of the shards, so data sets cannot be confused.
Manifest and index are read from the data folder itself. A copy changes neither the images nor their
order.
"""

from __future__ import annotations

import datetime
import hashlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from bigan import atomic_files, hashes
from bigan.atomic_files import COMPLETE
from bigan.data import DataError
from bigan.data.format.manifest import Manifest, Shard
from bigan.data.settings import Fetch
from bigan.errors import writing
from bigan.file_lock import locked, try_lock

CHUNK_BYTES = 2**22
LINE_SECONDS = 5.0  # between two lines about the progress

Echo = Callable[[str], None]


def is_staged(manifest: Manifest, split: str, fetch: Fetch) -> bool:
    """Whether this node has a complete copy of the shards of a split."""
    folder = _folder(manifest, split, fetch)
    return folder is not None and _is_complete(folder, manifest.shards(split))


def with_staged_shards(manifest: Manifest, split: str, fetch: Fetch) -> Manifest:
    """`manifest`, for reading `split` from a complete copy on this node if there is one.

    Raises `DataError` for a `data.cache` that cannot be used.
    """
    if not is_staged(manifest, split, fetch):
        return manifest
    shards = manifest.shards(split)
    update = {"shard_folder": _folder(manifest, split, fetch), "shardlist": shards}
    return manifest.model_copy(update=update)


def stage(manifest: Manifest, split: str, fetch: Fetch, echo: Echo) -> None:
    """Copy the shards of `split` to `data.cache` unless they are there; verified by their sha256.

    The first process of a node copies while the others wait. After an interruption the next call
    continues. Raises `DataError` before it copies anything if `data.cache_bytes` or the free space
    of the disk is too small, and for a shard that differs from the manifest; `UserError` if a file
    cannot be written.
    """
    folder, shards = _folder(manifest, split, fetch), manifest.shards(split)
    if folder is None:
        return
    what = f"{socket.gethostname()}: {manifest.folder} ({split})"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / "lock").open("w")
    with lock:
        if try_lock(lock.fileno()) is False:
            echo(f"{what}: waiting for another process of this node, which copies shards")
        with locked(lock.fileno()):
            if _is_complete(folder, shards):
                echo(f"{what}: its {len(shards)} shards are in {folder}")
                return
            atomic_files.remove_leftovers(folder, shared=True)  # of killed processes
            missing = [shard for shard in shards if not _has(folder, shard)]
            _require_space(manifest, shards, missing, folder, fetch)
            with writing(folder):
                (folder / COMPLETE).unlink(missing_ok=True)
            _copy_all(manifest, missing, folder, fetch.connections, _Progress(what, missing, echo))
            with writing(folder):
                atomic_files.write_atomic(folder / COMPLETE, f"{manifest.folder}\n")
    echo(f"{what}: copied {len(missing)} of {len(shards)} shards to {folder}")


def _folder(manifest: Manifest, split: str, fetch: Fetch) -> Path | None:
    """The folder for the copy of a split; None for a URL, or without `data.cache`."""
    cache = fetch.cache_folder() if manifest.remote is None else None
    if cache is None:
        return None
    content = [[shard.url, shard.filesize, shard.sha256] for shard in manifest.shards(split)]
    return cache / "staged" / hashes.fingerprint(content)


def _is_complete(folder: Path, shards: Sequence[Shard]) -> bool:
    return (folder / COMPLETE).is_file() and all(_has(folder, shard) for shard in shards)


def _has(folder: Path, shard: Shard) -> bool:
    try:
        return (folder / shard.url).stat().st_size == shard.filesize
    except OSError:
        return False


def _require_space(
    manifest: Manifest,
    shards: Sequence[Shard],
    missing: Sequence[Shard],
    folder: Path,
    fetch: Fetch,
) -> None:
    """Raises `DataError` if the copy would exceed `data.cache_bytes` or the free space."""
    total = sum(shard.filesize for shard in shards)
    if fetch.cache_bytes is not None and total > fetch.cache_bytes:
        raise DataError(
            f"{manifest.folder}: its shards have {total:,} bytes, more than data.cache_bytes = "
            f"{fetch.cache_bytes:,}; raise it, or leave data.cache out to read them from there"
        )
    needed, free = sum(shard.filesize for shard in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder}: has {free:,} bytes of free space, but the shards of {manifest.folder} need "
            f"{needed:,}; delete other copies in {folder.parent}, use another data.cache, or leave "
            "it out to read the shards from their folder"
        )


def _copy_all(
    manifest: Manifest, shards: Sequence[Shard], folder: Path, threads: int, progress: _Progress
) -> None:
    """Copy shards in several threads; the first error ends all of them."""
    stop = threading.Event()

    def copy(shard: Shard) -> None:
        if not stop.is_set():
            _copy(Path(manifest.location(shard)), folder, shard, stop, progress)

    with ThreadPoolExecutor(threads, thread_name_prefix="bigan-stage") as executor:
        try:
            for done in as_completed([executor.submit(copy, shard) for shard in shards]):
                done.result()
        finally:
            stop.set()


def _copy(
    source: Path, folder: Path, shard: Shard, stop: threading.Event, progress: _Progress
) -> None:
    """Copy a shard unless `stop` is set meanwhile; it has its name once its hash is right."""
    target, digest = folder / shard.url, hashlib.sha256()
    temporary = atomic_files.temporary_name(folder / target.name)
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as out:
                for chunk in _chunks(source):
                    if stop.is_set():
                        return
                    out.write(chunk)
                    digest.update(chunk)
                    progress.add(len(chunk))
            atomic_files.sync(temporary)
            if digest.hexdigest() != shard.sha256:
                raise DataError(f"{source}: differs from the manifest; run `bigan verify`")
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _chunks(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error


class _Progress:
    """Counts copied bytes, from several threads, and prints a line every few seconds."""

    def __init__(self, what: str, shards: Sequence[Shard], echo: Echo) -> None:
        self._what, self._echo = what, echo
        self._total = sum(shard.filesize for shard in shards)
        self._done = 0
        self._lock = threading.Lock()
        self._began = self._printed = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Count bytes; prints a line if one is due."""
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if now - self._printed < LINE_SECONDS:
                return
            self._printed = now
            rate = self._done / (now - self._began)
            left = datetime.timedelta(seconds=round(max(0, self._total - self._done) / rate))
            self._echo(
                f"{self._what}: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB, "
                f"{rate / 1e6:.0f} MB/s, {left} left"
            )

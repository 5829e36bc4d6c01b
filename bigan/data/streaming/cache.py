"""Shards of a remote data set on a disk of the node: downloaded once, verified, shared, bounded.

A cached shard is named by its sha256, so two data sets cannot be mixed up, and it is there under
that name only when size and hash are right. The processes of a node share the folder: a lock file
per shard lets one download it while the others wait. A shard may be evicted at any time; whoever
has it open goes on reading, and whoever comes next downloads it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bigan import atomic_files
from bigan.data import DataError
from bigan.data.format.manifest import Shard
from bigan.data.streaming import remote

POLL_SECONDS = 0.05  # between two tries for a lock


class NodeCache:
    """Cached copies of the shards below the URL `base`, in `folder`.

    `limit_bytes` bounds what the finished shards take together; shards being downloaded come on
    top, one per connection, and evicted ones that a process still has open (`LocalShards` keeps no
    more than fit half of the limit). None means no bound. Safe to use from several threads and
    processes.
    """

    def __init__(
        self, folder: Path, base: str, limit_bytes: int | None = None, allow_pipe: bool = False
    ) -> None:
        self.folder = folder
        self.base = base
        self.limit_bytes = limit_bytes
        self.allow_pipe = allow_pipe
        self.num_downloads = 0
        self.transfers = remote.Transfers()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_files.remove_leftovers(folder, shared=True)  # half downloads of killed processes
        except OSError as error:
            raise DataError(f"{folder}: cannot be the data.cache: {error.strerror}") from None

    def open(self, shard: Shard) -> int:
        """A descriptor of the shard's copy, to be closed by the caller; downloads it if needed.

        Raises `DataError` if the shard cannot be had.
        """
        while True:
            self.fetch(shard)
            with contextlib.suppress(FileNotFoundError):  # evicted in between
                descriptor = os.open(self._file(shard), os.O_RDONLY)
                os.utime(descriptor)  # evicted last
                return descriptor

    def fetch(self, shard: Shard) -> None:
        """Make sure that a verified copy of the shard is here, at least at this moment."""
        file = self._file(shard)
        if file.exists():
            return
        try:
            lock = self.folder / f"{shard.sha256}.lock"
            with _locked(lock, self.transfers.stopped, remove=True):
                if not file.exists():  # else another process was faster
                    self._make_room(shard.filesize)
                    remote.download(
                        remote.join(self.base, shard.url),
                        file,
                        size=shard.filesize,
                        sha256=shard.sha256,
                        allow_pipe=self.allow_pipe,
                        transfers=self.transfers,
                    )
                    self.num_downloads += 1
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written: {error.strerror}") from None

    def _file(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _make_room(self, needed: int) -> None:
        """Delete the shards used longest ago until `needed` more bytes are below the limit."""
        if self.limit_bytes is None:
            return
        # Two evictors at a time would delete too much.
        with _locked(self.folder / "eviction.lock", self.transfers.stopped):
            found = []
            for path in self.folder.glob("*.tar"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if total + needed <= self.limit_bytes:
                    return
                path.unlink(missing_ok=True)
                total -= size


class ReadAhead:
    """Brings the shards of the next block into a cache while the present one is read.

    `blocks` yields the (positions, samples) of one block after the other, `shard_of` is the index
    column. Failures are left to whoever needs the shard.
    """

    def __init__(
        self,
        cache: NodeCache,
        shards: Sequence[Shard],
        shard_of: NDArray[np.int32],
        blocks: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]],
        connections: int,
    ) -> None:
        self._cache = cache
        self._shards = shards
        self._shard_of = shard_of
        self._blocks = blocks
        self._connections = connections
        self._position = -1
        self._moved = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = False

    def reached(self, position: int) -> None:
        """Say that samples from `position` on are being read."""
        if position > self._position:
            with self._moved:
                if not self._started:  # only now: a stream that is never read costs nothing
                    self._started = True
                    self._thread.start()
                self._position = max(position, self._position)
                self._moved.notify_all()

    def close(self) -> None:
        with self._moved:
            self._closed = True
            self._moved.notify_all()
            started = self._started
        if started:
            self._thread.join()

    def _run(self) -> None:
        def fetch(number: int) -> None:
            if not self._closed:
                with contextlib.suppress(DataError):
                    self._cache.fetch(self._shards[number])

        begun = -1  # go on once somebody has read as far as this
        with ThreadPoolExecutor(self._connections, "bigan-cache") as executor:
            for positions, samples in self._blocks:
                if not len(positions):
                    continue
                with self._moved:
                    while not self._closed and self._position < begun:
                        self._moved.wait()
                if self._closed:
                    return
                list(executor.map(fetch, np.unique(self._shard_of[samples]).tolist()))
                begun = int(positions[0])


@contextlib.contextmanager
def _locked(path: Path, stopped: threading.Event, remove: bool = False) -> Iterator[None]:
    """Hold the file lock `path`; it is released with the process, whatever ends it.

    With `remove` the file is deleted afterwards. Somebody who waits for it then locks a file
    without a name, and somebody else a new one: at worst a shard is downloaded twice, to the same
    bytes.
    """
    with path.open("w") as file:
        while True:  # not one long wait: who holds it may be waiting for a silent server
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if stopped.wait(POLL_SECONDS):
                raise DataError(f"{path}: given up, the stream was closed")
        try:
            yield
        finally:
            if remove:
                path.unlink(missing_ok=True)

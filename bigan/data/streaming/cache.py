"""A bounded cache of remote shards on a disk of the node, shared by its processes.

A cached shard is named by its sha256, so data sets cannot be confused, and it has that name only
after its size and hash have been verified. A lock file per shard lets one process download it while
the others wait. A shard may be evicted at any time: processes that have it open continue to read
it, later ones download it again.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bigan import atomic_files
from bigan.data import DataError
from bigan.data.format.manifest import Shard
from bigan.data.streaming.stores import Store
from bigan.file_lock import locked


class NodeCache:
    """Cached copies of the shards of `store`, in `folder`.

    `limit_bytes` (None: no limit) bounds the shards, including those in download by this process.
    Downloads of other processes and evicted shards that a process has open are extra
    (`LocalShards` keeps at most half of the limit open). Safe to use from several threads and
    processes.
    """

    def __init__(self, folder: Path, store: Store, limit_bytes: int | None = None) -> None:
        self.folder = folder
        self.store = store
        self.limit_bytes = limit_bytes
        self.num_downloads = 0
        self._downloading = 0  # bytes of this process's downloads in progress
        self._counting = threading.Lock()
        self.stopped = threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_files.remove_leftovers(folder, shared=True)  # of killed processes
        except OSError as error:
            raise DataError(f"{folder}: cannot be used as data.cache: {error.strerror}") from None

    def open(self, shard: Shard) -> int:
        """A descriptor of the cached shard, to be closed by the caller; downloads it if needed.

        Raises `DataError` if the download fails.
        """
        while True:
            self.fetch(shard)
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                descriptor = os.open(self._file(shard), os.O_RDONLY)
                os.utime(descriptor)  # least recently used shards are evicted first
                return descriptor

    def fetch(self, shard: Shard) -> None:
        """Download and verify the shard unless it is cached; it may be evicted at any time."""
        file = self._file(shard)
        if file.exists():
            return
        try:
            with self._locked(f"{shard.sha256}.lock", remove=True):
                if not file.exists():  # otherwise another process has downloaded it
                    with self._reserved(shard.filesize):
                        data = self.store.read(shard.url, size=shard.filesize, sha256=shard.sha256)
                        atomic_files.write_atomic(file, data)
                    self.num_downloads += 1
        except InterruptedError:
            raise DataError(f"{self.folder}: the stream was closed") from None
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Abort downloads and waiting for other processes."""
        self.stopped.set()
        self.store.close()

    @contextlib.contextmanager
    def _locked(self, name: str, remove: bool = False) -> Iterator[None]:
        """Hold the lock file `name`; raises `InterruptedError` if the stream is closed meanwhile.

        With `remove` the file is deleted afterwards. A process that waits for it then locks a
        deleted file while another one locks a new file: at worst a shard is downloaded twice, with
        the same bytes.
        """
        path = self.folder / name
        with path.open("w") as file, locked(file.fileno(), self.stopped):
            try:
                yield
            finally:
                if remove:
                    path.unlink(missing_ok=True)

    def _file(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    @contextlib.contextmanager
    def _reserved(self, needed: int) -> Iterator[None]:
        """Evict, then keep `needed` bytes for a download: several of them run at a time."""
        if self.limit_bytes is None:
            yield
            return
        self._evict(needed, self.limit_bytes)
        try:
            yield
        finally:
            with self._counting:
                self._downloading -= needed

    def _evict(self, needed: int, limit: int) -> None:
        """Delete the least recently used shards until `needed` more bytes are below the limit."""
        # Two processes that evict at once would delete too much.
        with self._locked("eviction.lock"):
            found = []
            for path in self.folder.glob("*.tar"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
            with self._counting:
                self._downloading += needed
                total = sum(size for _, size, _ in found) + self._downloading
            for _, size, path in sorted(found):
                if total <= limit:
                    return
                path.unlink(missing_ok=True)
                total -= size


class ReadAhead:
    """Downloads the shards of the next block into a cache while the current one is read.

    `blocks` yields the (positions, samples) of one block after the other, `shards_of` is that
    of the index. A failed download raises in the thread that needs the shard.
    """

    def __init__(
        self,
        cache: NodeCache,
        shards: Sequence[Shard],
        shards_of: Callable[[NDArray[np.int64]], NDArray[np.int64]],
        blocks: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]],
        connections: int,
    ) -> None:
        self._cache = cache
        self._shards = shards
        self._shards_of = shards_of
        self._blocks = blocks
        self._connections = connections
        self._position = -1
        self._moved = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = False

    def reached(self, position: int) -> None:
        """Report that samples from `position` on are being read."""
        if position > self._position:
            with self._moved:
                if not self._started:  # not earlier: an unused stream costs nothing
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

        needed = -1  # position that reading must reach before the next block is downloaded
        with ThreadPoolExecutor(self._connections, "bigan-cache") as executor:
            for positions, samples in self._blocks:
                if not len(positions):
                    continue
                with self._moved:
                    while not self._closed and self._position < needed:
                        self._moved.wait()
                if self._closed:
                    return
                list(executor.map(fetch, np.unique(self._shards_of(samples)).tolist()))
                needed = int(positions[0])

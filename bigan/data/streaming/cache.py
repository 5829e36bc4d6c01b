"""A bounded cache of remote shards on a disk of the node, shared by its processes.

A file of the cache holds a chunk: consecutive samples of one shard. Its name begins with the sha256
of the shard, so data sets cannot be confused. It has that name only after its images have been
verified, and every image is verified again when it is read. A lock file per shard lets one process
download a chunk while the others wait. A chunk may be evicted at any time: processes that have it
open continue to read it, later ones download it again.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bigan import atomic_files
from bigan.data import DataError
from bigan.data.format import tar
from bigan.data.streaming.ranges import MAX_BYTES, READ_SHARE, ShardRanges, Span, span
from bigan.file_lock import locked

Indices = NDArray[np.int64]

CHUNK_BYTES = 2**20  # of a chunk, at most, about
CHUNKS = 2**14  # of a small data set, about: the parts of lanes do not begin at borders of chunks
SPARE = 16  # an eviction frees this part (1/16) of the limit
NAME = re.compile(r"[0-9a-f]{64}\.\d+-\d{6,}")  # of the file of a chunk, see `Chunks.name`


def local_ranks() -> int:
    """The processes of this launch on this node, which share the cache."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


class Chunks:
    """The division of the shards of a split into chunks of `each` samples, with running numbers.

    It depends on the data set only, so runs with other settings share the cache.
    """

    def __init__(self, ranges: ShardRanges) -> None:
        self.index = ranges.index
        self.shards = ranges.shards
        sizes = np.asarray([shard.nsamples for shard in ranges.shards])
        total = sum(shard.filesize for shard in ranges.shards)
        sample_bytes = -(-total // int(sizes.sum()))
        self.each = max(1, min(CHUNK_BYTES, total // CHUNKS) // sample_bytes)
        self.bytes = self.each * sample_bytes  # of a chunk, about
        self._counts = -(-sizes // self.each)
        self._first = np.cumsum(self._counts) - self._counts

    def of(self, samples: Indices) -> Indices:
        """The chunk of each sample."""
        shards = self.index.shards_of(samples)
        return self._first[shards] + (samples - self.index.first[shards]) // self.each

    def shard(self, chunk: int) -> int:
        """The number of the shard that contains a chunk."""
        return int(self._shards(np.asarray(chunk)))

    def of_shard(self, shard: int) -> list[int]:
        """All chunks of a shard."""
        return list(range(self._first[shard], self._first[shard] + self._counts[shard]))

    def by_shard(self, chunks: Indices) -> list[Indices]:
        """Increasing `chunks`, those of each shard."""
        return np.split(chunks, np.flatnonzero(np.diff(self._shards(chunks))) + 1)

    def runs(self, chunks: list[int]) -> list[list[int]]:
        """Increasing `chunks` of one shard in runs without gaps, each for one request."""
        numbers = np.asarray(chunks)
        part = (numbers - numbers[:1]) // max(1, MAX_BYTES // self.bytes)
        borders = np.flatnonzero((np.diff(numbers) > 1) | (np.diff(part) > 0)) + 1
        return [run.tolist() for run in np.split(numbers, borders) if len(run)]

    def starts(self, chunks: Indices) -> Indices:
        """The offset in its shard of the first byte of each chunk."""
        return self.index.offset[self._first_samples(chunks)].astype(np.int64) - tar.BLOCK

    def span(self, chunk: int) -> Span:
        """The samples and bytes of a chunk."""
        shard = self.shard(chunk)
        first = int(self._first_samples(np.asarray(chunk)))
        end = int(self.index.first[shard]) + self.shards[shard].nsamples
        return span(self.index, first, min(first + self.each, end))

    def _shards(self, chunks: Indices) -> Indices:
        return np.searchsorted(self._first, chunks, side="right") - 1

    def _first_samples(self, chunks: Indices) -> Indices:
        shards = self._shards(chunks)
        return self.index.first[shards] + (chunks - self._first[shards]) * self.each

    def name(self, chunk: int) -> str:
        """The name of the file of a chunk in the cache."""
        shard = self.shard(chunk)
        number = chunk - int(self._first[shard])
        return f"{self.shards[shard].sha256}.{self.each}-{number:06d}"


def _joined(first: Span, last: Span) -> Span:
    return Span(first.first, last.last, first.start, last.stop)


class NodeCache:
    """Cached chunks of the shards of `ranges`, in `folder`.

    `limit_bytes` (None: no limit) bounds the chunks, including those in download by this process.
    Downloads of other processes and evicted chunks that a process has open are extra
    (`LocalShards` keeps at most half of the limit open). `local_ranks`: processes that share the
    folder. Safe to use from several threads and processes.
    """

    def __init__(
        self,
        folder: Path,
        ranges: ShardRanges,
        limit_bytes: int | None = None,
        local_ranks: int = 1,
    ) -> None:
        self.folder = folder
        self.ranges = ranges
        self.chunks = Chunks(ranges)
        self.limit_bytes = limit_bytes
        self.num_downloads = 0  # of chunks
        self._local_ranks = local_ranks
        self._free = 0  # bytes that may be written before the folder is listed again
        self._downloading = 0  # bytes of this process's downloads in progress
        self._counting = threading.Lock()
        self._closed = threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_files.remove_leftovers(folder, shared=True)  # of killed processes
        except OSError as error:
            raise DataError(f"{folder}: cannot be used as data.cache: {error.strerror}") from None

    def open(self, chunk: int) -> int:
        """A descriptor of the cached chunk, to be closed by the caller; downloads it if needed.

        Raises `DataError` if the download fails.
        """
        while True:
            self.fetch([chunk])
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                descriptor = os.open(self._file(chunk), os.O_RDONLY)
                with contextlib.suppress(OSError):  # a read-only disk
                    os.utime(descriptor)  # least recently used chunks are evicted first
                return descriptor

    def fetch(self, chunks: Iterable[int]) -> None:
        """Download those of `chunks`, of one shard, that are not cached; any may be evicted."""
        missing = [chunk for chunk in chunks if not self._file(chunk).exists()]
        if not missing:
            return
        shard = self.chunks.shard(missing[0])
        try:
            with self._locked(f"{self.chunks.shards[shard].sha256}.lock", remove=True):
                missing = [chunk for chunk in missing if not self._file(chunk).exists()]
                if missing:  # otherwise another process has downloaded them
                    self._download(shard, missing)
        except InterruptedError:
            raise DataError(f"{self.folder}: the stream was closed") from None
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written: {error.strerror}") from None

    def drop(self, chunk: int) -> None:
        """Delete the file of a chunk, which is damaged."""
        self._file(chunk).unlink(missing_ok=True)

    def close(self) -> None:
        self._closed.set()
        self.ranges.close()

    def _download(self, shard: int, missing: list[int]) -> None:
        if not self.ranges.has_ranges:  # all chunks cost as much as one
            missing = [c for c in self.chunks.of_shard(shard) if not self._file(c).exists()]
        parts = {chunk: self.chunks.span(chunk) for chunk in missing}
        runs = self.chunks.runs(missing)
        joined = [_joined(parts[run[0]], parts[run[-1]]) for run in runs]
        with self._reserved(sum(each.stop - each.start for each in parts.values())):
            for run, whole, data in zip(runs, joined, self.ranges.read(shard, joined), strict=True):
                for chunk in run:
                    start, stop = parts[chunk].start - whole.start, parts[chunk].stop - whole.start
                    # Not synced: its images are verified when they are read.
                    atomic_files.write_atomic(self._file(chunk), data[start:stop], sync=False)
                    self.num_downloads += 1

    @contextlib.contextmanager
    def _locked(self, name: str, remove: bool = False) -> Iterator[None]:
        """Hold the lock file `name`; raises `InterruptedError` if the stream is closed meanwhile.

        With `remove` the file is deleted afterwards. A process that waits for it then locks a
        deleted file while another one locks a new file: at worst a chunk is downloaded twice, with
        the same bytes.
        """
        path = self.folder / name
        with path.open("w") as file, locked(file.fileno(), self._closed):
            try:
                yield
            finally:
                if remove:
                    path.unlink(missing_ok=True)

    def _file(self, chunk: int) -> Path:
        return self.folder / self.chunks.name(chunk)

    @contextlib.contextmanager
    def _reserved(self, needed: int) -> Iterator[None]:
        """Evict, then keep `needed` bytes for a download: several of them run at a time."""
        if self.limit_bytes is None:
            yield
            return
        with self._counting:
            self._free -= needed * self._local_ranks
            self._downloading += needed
        try:
            while self._free < 0 and self._evict(self.limit_bytes):
                pass  # another thread may have reserved more meanwhile
            yield
        finally:
            with self._counting:
                self._downloading -= needed

    def _evict(self, limit: int) -> bool:
        """Delete the least recently used chunks until all, and the downloads, are below the limit.

        Then some more, so that the folder is not listed for every chunk. Returns whether any was
        deleted.
        """
        # Two processes that evict at once would delete too much.
        with self._locked("eviction.lock"):
            with self._counting:  # before the listing: a download may end during it
                downloading = self._downloading
                self._free = limit - downloading
            found = []
            for path in self.folder.iterdir():
                if not NAME.fullmatch(path.name):  # another file, or a download in progress
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
            found.sort()
            held, deleted = sum(size for _, size, _ in found), 0
            if held + downloading > limit:
                limit_now = limit - limit // SPARE - downloading
                while deleted < len(found) and held > limit_now:
                    _, size, path = found[deleted]
                    path.unlink(missing_ok=True)
                    held -= size
                    deleted += 1
            with self._counting:
                self._free -= held
            return deleted > 0


class ReadAhead:
    """Downloads the chunks of the next block into a cache while the current one is read.

    `blocks` yields the (positions, samples) of one block after the other. A failed download raises
    in the thread that needs the chunk.
    """

    def __init__(
        self, cache: NodeCache, blocks: Iterable[tuple[Indices, Indices]], connections: int
    ) -> None:
        self._cache = cache
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
        def fetch(chunks: Indices) -> None:
            if not self._closed:
                with contextlib.suppress(DataError):
                    self._cache.fetch(chunks.tolist())

        needed = -1  # position that reading must reach before the next block is downloaded
        with ThreadPoolExecutor(self._connections, "bigan-cache") as executor:
            for positions, samples in self._blocks:
                with self._moved:
                    while not self._closed and self._position < needed:
                        self._moved.wait()
                if self._closed:
                    return
                chunks = np.unique(self._cache.chunks.of(samples))
                list(executor.map(fetch, self._cache.chunks.by_shard(chunks)))
                needed = int(np.sort(positions)[len(positions) // READ_SHARE])

"""Random access (pread) to encoded samples in shards on a local disk or in the node's cache."""

from __future__ import annotations

import collections
import os
import resource
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from bigan.data import DataError
from bigan.data.format import tar
from bigan.data.format.codec import Pixels, npy_header
from bigan.data.format.manifest import Manifest

if TYPE_CHECKING:
    from bigan.data.streaming.cache import NodeCache, ReadAhead

Indices = NDArray[np.int64]

MAX_OPEN_SHARDS = 256  # file descriptors of each stream, at most


class _OpenFile:
    """A reference-counted descriptor: it may be dropped here while another thread reads it.

    Closing a descriptor during a read could make the reader read a new file with the same number.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def read_into(self, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        return os.preadv(self._descriptor, buffers, offset)

    def __del__(self) -> None:
        os.close(self._descriptor)


class LocalShards:
    """The encoded samples of a split; thread-safe.

    With a `cache` the shards are those of a remote data set; `ahead` downloads the shards of the
    next block while the current one is read. The instances of a process share a quarter of the
    descriptors that the process may have (`ulimit -n`).
    """

    _instances: ClassVar[weakref.WeakSet[LocalShards]] = weakref.WeakSet()

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        cache: NodeCache | None = None,
        ahead: ReadAhead | None = None,
    ) -> None:
        self.manifest = manifest
        self.shards = manifest.shards(split)
        self.index = manifest.load_index(split)
        self._cache = cache
        self._ahead = ahead
        self._open: collections.OrderedDict[int, _OpenFile] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._max_open = MAX_OPEN_SHARDS
        if cache is not None and cache.limit_bytes is not None:
            # An evicted shard occupies space while it is open here.
            largest = max(shard.filesize for shard in self.shards)
            self._max_open = max(1, min(MAX_OPEN_SHARDS, cache.limit_bytes // largest // 2))
        self._instances.add(self)

    def images(self, positions: Indices, samples: Indices) -> Iterator[bytes]:
        """The encoded bytes of each of `samples`, which are read at `positions` of the order."""
        self._report_position(positions)
        for shard, size, offset in self._places(samples):
            yield self._read(shard, size, offset)

    def read_raw(
        self, positions: Indices, samples: Indices, out: Pixels, stopped: Callable[[], bool]
    ) -> list[int]:
        """Read raw pixels directly into `out`; returns the rows that need decoding.

        For .npy members in bigan's own format: a fixed header followed by the pixels. Returns early
        once `stopped()`.
        """
        self._report_position(positions)
        header = npy_header(out.shape[1:])
        found = bytearray(len(header))
        each = out[0].nbytes
        pixels = memoryview(out.reshape(-1))  # type: ignore[arg-type]
        others = []
        for row, (shard, size, offset) in enumerate(self._places(samples)):
            if stopped():
                return []
            if size == len(header) + each:
                file = self._open.get(shard) or self._file(shard)
                buffers = (found, pixels[row * each : (row + 1) * each])
                try:
                    if file.read_into(buffers, offset) == size and found == header:
                        continue
                except OSError as error:
                    raise self._unreadable(shard, offset, error) from error
            others.append(row)
        return others

    def member(self, sample: int) -> tuple[bytes, str, str]:
        """(encoded bytes, shard, member name) of one sample."""
        shard, offset = int(self.index.shards_of(sample)), int(self.index.offset[sample])
        data = self._read(shard, int(self.index.size[sample]), offset)
        header = self._read(shard, tar.BLOCK, offset - tar.BLOCK)
        return data, self._name(shard), tar.member_name(header)

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()
        if self._ahead is not None:
            self._ahead.close()
        with self._lock:
            self._open.clear()

    def _report_position(self, positions: Indices) -> None:
        if self._ahead is not None and len(positions):
            self._ahead.reached(int(positions[0]))

    def _places(self, samples: Indices) -> Iterator[tuple[int, int, int]]:
        """(shard, size, offset) of each sample."""
        index = self.index
        columns = (index.shards_of(samples), index.size[samples], index.offset[samples])
        return zip(*(column.tolist() for column in columns), strict=True)

    def _read(self, shard: int, size: int, offset: int) -> bytes:
        file = self._open.get(shard) or self._file(shard)
        try:
            data = file.read(size, offset)
        except OSError as error:
            raise self._unreadable(shard, offset, error) from error
        if len(data) != size:
            raise DataError(
                f"{self._name(shard)}: is shorter than {offset + size} bytes and was changed; run "
                "`bigan verify`"
            )
        return data

    def _unreadable(self, shard: int, offset: int, error: OSError) -> DataError:
        return DataError(f"{self._name(shard)}: cannot be read at byte {offset}: {error.strerror}")

    def _file(self, shard: int) -> _OpenFile:
        with self._lock:
            if shard not in self._open:
                while len(self._open) >= max(1, min(self._max_open, self._share())):
                    self._open.popitem(last=False)
                self._open[shard] = _OpenFile(self._descriptor(shard))
            return self._open[shard]

    def _share(self) -> int:
        """The descriptors that this instance may keep open."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY:
            return MAX_OPEN_SHARDS
        return limit // 4 // len(self._instances)

    def _descriptor(self, shard: int) -> int:
        if self._cache is not None:
            return self._cache.open(self.shards[shard])
        try:
            return os.open(self._name(shard), os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self._name(shard)}: cannot be opened: {error.strerror}") from error

    def _name(self, shard: int) -> str:
        return self.manifest.location(self.shards[shard])

"""Random access (pread) to encoded samples in shards on a local disk or in the node's cache."""

from __future__ import annotations

import collections
import itertools
import os
import resource
import threading
import weakref
import zlib
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

    Each file is a shard. With a `cache` it is a chunk of a shard of a remote data set, and every
    image is compared with its crc32; `ahead` downloads the chunks of the next block while the
    current one is read. The instances of a process share a quarter of the descriptors that the
    process may have (`ulimit -n`).
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
        self.index = cache.ranges.index if cache else manifest.load_index(split)
        self._cache = cache
        self._ahead = ahead
        self._open: collections.OrderedDict[int, _OpenFile] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._max_open = MAX_OPEN_SHARDS
        if cache is not None and cache.limit_bytes is not None:
            # An evicted chunk occupies space while it is open here.
            at_most = cache.limit_bytes // cache.chunks.bytes // 2
            self._max_open = max(1, min(MAX_OPEN_SHARDS, at_most))
        self._instances.add(self)

    def images(self, positions: Indices, samples: Indices) -> Iterator[bytes]:
        """The encoded bytes of each of `samples`, which are read at `positions` of the order."""
        self._prepare(positions, samples)
        for place in self._places(samples):
            yield self._read(*place)

    def read_raw(
        self, positions: Indices, samples: Indices, out: Pixels, stopped: Callable[[], bool]
    ) -> list[int]:
        """Read raw pixels directly into `out`; returns the rows that need decoding.

        For .npy members in bigan's own format: a fixed header followed by the pixels. Returns early
        once `stopped()`.
        """
        self._prepare(positions, samples)
        header = npy_header(out.shape[1:])
        found = bytearray(len(header))
        each = out[0].nbytes
        pixels = memoryview(out.reshape(-1))  # type: ignore[arg-type]
        others = []
        for row, (key, size, offset, crc32) in enumerate(self._places(samples)):
            if stopped():
                return []
            if size == len(header) + each:
                file = self._open.get(key) or self._file(key)
                buffers = (found, pixels[row * each : (row + 1) * each])
                try:
                    num = file.read_into(buffers, offset)
                except OSError as error:
                    raise self._unreadable(key, offset, error) from error
                sound = crc32 is None or crc32 == zlib.crc32(buffers[1], zlib.crc32(found))
                if num == size and found == header and sound:
                    continue
            others.append(row)
        return others

    def member(self, sample: int) -> tuple[bytes, str, str]:
        """(encoded bytes, shard, member name) of one sample."""
        ((key, size, offset, crc32),) = self._places(np.asarray([sample]))
        data = self._read(key, size, offset, crc32)
        header = self._read(key, tar.BLOCK, offset - tar.BLOCK)
        return data, self._name(key), tar.member_name(header)

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()
        if self._ahead is not None:
            self._ahead.close()
        with self._lock:
            self._open.clear()

    def _prepare(self, positions: Indices, samples: Indices) -> None:
        """Download the chunks of `samples` that are not cached, and those of the next block."""
        if self._ahead is not None and len(positions):
            self._ahead.reached(int(positions.max()))
        if self._cache is not None:
            chunks = np.unique(self._cache.chunks.of(samples))
            for part in self._cache.chunks.by_shard(chunks) if len(chunks) else ():
                self._cache.fetch(part.tolist())

    def _places(self, samples: Indices) -> Iterator[tuple[int, int, int, int | None]]:
        """(file, size, offset in it, crc32 if it is to be compared) of each sample."""
        index, cache = self.index, self._cache
        sizes, offsets = index.size[samples].tolist(), index.offset[samples]
        if cache is None:
            shards = index.shards_of(samples).tolist()
            return zip(shards, sizes, offsets.tolist(), itertools.repeat(None))
        chunks = cache.chunks.of(samples)
        inside = (offsets.astype(np.int64) - cache.chunks.starts(chunks)).tolist()
        return zip(chunks.tolist(), sizes, inside, index.crc32[samples].tolist(), strict=True)

    def _read(self, key: int, size: int, offset: int, crc32: int | None = None) -> bytes:
        """The bytes at `offset` of a file. A damaged chunk is downloaded again, once."""
        for attempt in range(2):
            file = self._open.get(key) or self._file(key)
            try:
                data = file.read(size, offset)
            except OSError as error:
                raise self._unreadable(key, offset, error) from error
            if len(data) == size and crc32 in (None, zlib.crc32(data)):
                return data
            if self._cache is None or attempt:
                break
            with self._lock:
                self._open.pop(key, None)
                self._cache.drop(key)
        raise DataError(
            f"{self._name(key)}: is shorter than {offset + size} bytes and was changed; run "
            "`bigan verify`"
        )

    def _unreadable(self, key: int, offset: int, error: OSError) -> DataError:
        return DataError(f"{self._name(key)}: cannot be read at byte {offset}: {error.strerror}")

    def _file(self, key: int) -> _OpenFile:
        with self._lock:
            if key not in self._open:
                while len(self._open) >= max(1, min(self._max_open, self._share())):
                    self._open.popitem(last=False)
                self._open[key] = _OpenFile(self._descriptor(key))
            return self._open[key]

    def _share(self) -> int:
        """The descriptors that this instance may keep open."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY:
            return MAX_OPEN_SHARDS
        return limit // 4 // len(self._instances)

    def _descriptor(self, key: int) -> int:
        if self._cache is not None:
            return self._cache.open(key)
        try:
            return os.open(self._name(key), os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self._name(key)}: cannot be opened: {error.strerror}") from error

    def _name(self, key: int) -> str:
        """The path or URL of the shard that a file is, or is a chunk of."""
        shard = key if self._cache is None else self._cache.chunks.shard(key)
        return self.manifest.location(self.shards[shard])

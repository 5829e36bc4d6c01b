"""Reads of consecutive samples of a shard: one byte range each, every image verified by its crc32.

A span is the samples first, ..., last - 1 of one shard, numbered through the split. Its bytes begin
with the tar header of its first image and end with its last image.
"""

from __future__ import annotations

import collections
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from bigan.data import DataError
from bigan.data.format import tar
from bigan.data.format.manifest import Index, Manifest
from bigan.data.stores.store import Store

Indices = NDArray[np.int64]
Data = TypeVar("Data", bytes, memoryview)

MAX_BYTES = 2**24  # of a request, about: what is lost when a transfer is cut
CALL_BYTES = 2**26  # of the spans that are held at a time
MERGED_BYTES = 2**19  # a gap between two samples that is read because it costs less than a request
READ_SHARE = 4  # the next block is read once this part (1/4) of the current one was requested
ATTEMPTS = 3  # of a range whose images do not have their crc32
WHOLE_BYTES = 2**30  # of whole shards kept in memory, if a server does not answer range requests


class Span(NamedTuple):
    """Samples first, ..., last - 1 of a shard, and the bytes [start, stop) that contain them."""

    first: int
    last: int
    start: int
    stop: int


def span(index: Index, first: int, last: int) -> Span:
    """The span of samples first, ..., last - 1, which are in one shard."""
    start = int(index.offset[first]) - tar.BLOCK
    return Span(first, last, start, int(index.offset[last - 1]) + int(index.size[last - 1]))


def spans(index: Index, samples: Indices, max_gap: int = 0) -> list[Span]:
    """The spans of increasing `samples` of one shard, each of about `MAX_BYTES` at most.

    Samples that are at most `max_gap` bytes apart are in one span, neighbors always.
    """
    starts = index.offset[samples].astype(np.int64)
    stops = starts + index.size[samples]
    apart = (np.diff(samples) > 1) & (starts[1:] - stops[:-1] > max_gap)
    part = (starts - starts[0]) // MAX_BYTES
    borders = np.flatnonzero(apart | (np.diff(part) > 0)) + 1
    groups = np.split(samples, borders)
    return [span(index, int(group[0]), int(group[-1]) + 1) for group in groups]


class ShardRanges:
    """The bytes of spans of the shards of a split, at a URL or on a local disk; thread-safe.

    If the server of a URL does not answer range requests, whole shards are read, and with
    `keep_whole` the latest ones are kept in memory, up to `WHOLE_BYTES`.
    """

    def __init__(
        self, manifest: Manifest, split: str, index: Index, store: Store | None, keep_whole: bool
    ) -> None:
        self.manifest = manifest
        self.shards = manifest.shards(split)
        self.index = index
        self.store = store
        self._keep_whole = keep_whole
        self._whole: collections.OrderedDict[int, bytes] = collections.OrderedDict()
        self._reading = threading.Lock()

    def read(self, shard: int, spans: Sequence[Span]) -> Iterator[bytes]:
        """The verified bytes of each of `spans` of a shard, read about `CALL_BYTES` at a time.

        Raises `DataError`, one line, if they cannot be read or are damaged, and InterruptedError
        once the store is closed.
        """
        ends = np.cumsum([each.stop - each.start for each in spans])
        borders = np.flatnonzero(np.diff(ends // CALL_BYTES)) + 1
        if not self.has_ranges:  # every call would read the whole shard
            borders = borders[:0]
        for part in np.split(np.arange(len(spans)), borders):
            yield from self._verified(shard, [spans[n] for n in part.tolist()])

    def _verified(self, shard: int, spans: Sequence[Span]) -> list[bytes]:
        found: dict[Span, bytes] = {}
        missing = list(spans)
        for _ in range(ATTEMPTS if self.store else 1):
            found |= zip(missing, self._bytes(shard, missing), strict=True)
            damaged = {each: self._damaged(each, found[each]) for each in missing}
            missing = [each for each in missing if damaged[each] is not None]
            if not missing:
                return [found[each] for each in spans]
        number = (damaged[missing[0]] or 0) - int(self.index.first[shard])
        raise DataError(
            f"{self.location(shard)}: image {number} of the shard is damaged (its crc32 differs); "
            "`bigan verify` lists the damage"
        )

    @property
    def has_ranges(self) -> bool:
        """Whether parts of a shard can be read; known after the first read."""
        return self.store is None or self.store.has_ranges

    def location(self, shard: int) -> str:
        """The path or URL of a shard, without secrets."""
        return self.manifest.location(self.shards[shard])

    def images(self, each: Span, data: Data, samples: Indices) -> Iterator[Data]:
        """The encoded images of `samples`, all in the span `each`, whose bytes are `data`."""
        offsets = (self.index.offset[samples].astype(np.int64) - each.start).tolist()
        for offset, size in zip(offsets, self.index.size[samples].tolist(), strict=True):
            yield data[offset : offset + size]

    def close(self) -> None:
        """Cancel the requests in progress."""
        if self.store is not None:
            self.store.close()

    def _damaged(self, each: Span, data: bytes) -> int | None:
        """The first sample of a span whose image does not have its crc32."""
        samples = np.arange(each.first, each.last)
        if len(data) != each.stop - each.start:
            return each.first
        images = self.images(each, memoryview(data), samples)  # without a copy
        for sample, image, crc32 in zip(
            range(each.first, each.last), images, self.index.crc32[samples].tolist(), strict=True
        ):
            if zlib.crc32(image) != crc32:
                return sample
        return None

    def _bytes(self, shard: int, spans: Sequence[Span]) -> list[bytes]:
        name = self.shards[shard].url
        if self.store is None:
            return _read_local(Path(self.location(shard)), spans)
        if self.has_ranges:
            return self.store.read_ranges(name, [(each.start, each.stop) for each in spans])
        whole = self._read_whole(shard)
        return [whole[each.start : each.stop] for each in spans]

    def _read_whole(self, shard: int) -> bytes:
        """All bytes of a shard; of several threads that need it one reads it."""
        assert self.store is not None
        entry = self.shards[shard]
        with self._reading:
            data = self._whole.pop(shard, None)
            if data is None:
                data = self.store.read(entry.url, size=entry.filesize, sha256=entry.sha256)
            if self._keep_whole:
                self._whole[shard] = data
                while sum(map(len, self._whole.values())) > WHOLE_BYTES:
                    self._whole.popitem(last=False)
            return data


def _read_local(path: Path, spans: Sequence[Span]) -> list[bytes]:
    found = []
    try:
        with path.open("rb", buffering=0) as file:
            for each in spans:
                file.seek(each.start)
                found.append(file.read(each.stop - each.start))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return found

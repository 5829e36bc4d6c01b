"""Fetchers: three ways to read the pixels of sample numbers, all in the same order.

    random_access  index + pread on shards of a local disk or of the node's cache (local_shards.py)
    stream         shards read sequentially, the encoded samples of two blocks in memory
                   (streamed_shards.py)
    resident       the whole split decoded once, then copied row by row

`read(positions, samples, out)` fills `out` and returns the replaced samples. Only an image that
does not decode is replaced, by the next decodable sample, which does not depend on the reader. A
read error is never skipped, otherwise a faulty disk would change the data.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bigan.data import DataError
from bigan.data.format.codec import BadImageError, Pixels, decode_into
from bigan.data.format.manifest import Index, Manifest
from bigan.data.settings import Fetch
from bigan.data.stores.store import store_of
from bigan.data.streaming.cache import NodeCache, ReadAhead, local_ranks
from bigan.data.streaming.local_shards import LocalShards
from bigan.data.streaming.ranges import MERGED_BYTES, ShardRanges
from bigan.data.streaming.staging import with_staged_shards
from bigan.data.streaming.streamed_shards import StreamedShards
from bigan.urls import redacted

Indices = NDArray[np.int64]
Blocks = Callable[[], Iterator[tuple[Indices, Indices]]]

CHECKSUM_BYTES = 2**30  # local data sets up to this size are verified before use
MAX_REPLACEMENTS = 100  # consecutive bad samples that are accepted
RESIDENT_CHUNK = 256  # samples decoded at a time


@dataclass(frozen=True)
class BadSample:
    """An image that did not decode, at `position` of the order, and its replacement.

    `replacement` is a sample number within the split, None for shards without an index.
    """

    position: int
    shard: str
    member: str
    reason: str
    replacement: int | None = None

    def __str__(self) -> str:
        return f"{self.shard}: bad sample {self.member}: {self.reason}"


class Fetcher(Protocol):
    """Source of the stream: manifest, index, and the pixels of sample numbers."""

    manifest: Manifest
    index: Index
    stop: threading.Event

    def read(self, positions: Indices, samples: Indices, out: Pixels) -> list[BadSample]:
        """Decode `samples` into `out`, uint8 [len(samples), H, W, C]; thread-safe.

        Returns the replaced samples, early once `stop` is set. Raises `DataError` that names shard
        and member.
        """
        ...

    def close(self) -> None: ...


class EncodedSource(Protocol):
    """Source of encoded samples for a `Decoder`."""

    manifest: Manifest
    index: Index

    def images(self, positions: Indices, samples: Indices) -> Iterator[bytes]:
        """The encoded bytes of each of `samples`."""
        ...

    def member(self, sample: int) -> tuple[bytes, str, str]:
        """(encoded bytes, shard, member name) of one sample; may be slow."""
        ...

    def close(self) -> None: ...


class Decoder:
    """A fetcher that decodes the samples of an `EncodedSource`."""

    def __init__(self, source: EncodedSource, stop: threading.Event, on_bad: str) -> None:
        self.manifest = source.manifest
        self.index = source.index
        self.stop = stop
        self._source = source
        self._on_bad = on_bad

    def read(self, positions: Indices, samples: Indices, out: Pixels) -> list[BadSample]:
        encoder, stopped = self.manifest.encoder, self.stop.is_set
        rows: Sequence[int] = range(len(samples))
        if encoder == "npy" and isinstance(self._source, LocalShards):
            rows = self._source.read_raw(positions, samples, out, stopped)
        replaced = []
        images = self._source.images(positions[rows], samples[rows])
        for row, data in zip(rows, images, strict=False):  # fewer images once stopped
            if stopped():
                break
            try:
                decode_into(out[row], data, encoder)
            except BadImageError as error:
                bad = self._bad(int(positions[row]), int(samples[row]), error)
                next_good = self._replace(int(samples[row]), out[row])
                replaced.append(dataclasses.replace(bad, replacement=next_good))
        return replaced

    def close(self) -> None:
        self._source.close()

    def _bad(self, position: int, sample: int, error: BadImageError) -> BadSample:
        _, shard, member = self._source.member(sample)
        bad = BadSample(position, shard, member, str(error))
        if self._on_bad == "stop":
            raise DataError(
                f"{bad}; `bigan verify` lists all of them; pack the data again, or skip them with "
                "data.on_bad=skip"
            ) from error
        return bad

    def _replace(self, sample: int, out: Pixels) -> int:
        """Decode the next usable sample into `out`; returns its number."""
        num = len(self.index.label)
        for step in range(1, min(MAX_REPLACEMENTS, num)):
            other = (sample + step) % num
            with suppress(BadImageError):
                data, _, _ = self._source.member(other)
                decode_into(out, data, self.manifest.encoder)
                return other
        _, shard, member = self._source.member(sample)
        raise DataError(f"{shard}: no image from {member} on decodes; pack the data again")


class Resident:
    """A split decoded once into memory, uint8 [num_samples, H, W, C].

    Closes `decoder`. Raises `DataError` for more than `limit_bytes`, and the errors of `decoder`.
    """

    def __init__(self, decoder: Decoder, threads: int, limit_bytes: int) -> None:
        self.manifest = decoder.manifest
        self.index = decoder.index
        self.stop = threading.Event()
        num = len(self.index.label)
        with closing(decoder):
            needed = num * int(np.prod(self.manifest.image_shape))
            if needed > limit_bytes:
                place = redacted(self.manifest.remote or str(self.manifest.folder))
                raise DataError(
                    f"{place}: {needed:,} bytes of pixels "
                    f"are more than data.resident_bytes = {limit_bytes:,}; raise it, or use "
                    "data.mode=random_access"
                )
            self._pixels = np.empty((num, *self.manifest.image_shape), np.uint8)
            self._bad: dict[int, BadSample] = {}

            def load(chunk: Indices) -> list[BadSample]:
                return decoder.read(chunk, chunk, self._pixels[chunk[0] : chunk[-1] + 1])

            # Closed first: threads may wait for a store.
            with ThreadPoolExecutor(threads) as executor, closing(decoder):
                for replaced in executor.map(load, consecutive(0, num, RESIDENT_CHUNK)):
                    self._bad |= {bad.position: bad for bad in replaced}

    def read(self, positions: Indices, samples: Indices, out: Pixels) -> list[BadSample]:
        np.take(self._pixels, samples, axis=0, out=out, mode="clip")  # mode "raise" would buffer
        if not self._bad:
            return []
        places = zip(positions.tolist(), samples.tolist(), strict=True)
        found = ((position, self._bad.get(sample)) for position, sample in places)
        return [dataclasses.replace(bad, position=p) for p, bad in found if bad is not None]

    def close(self) -> None:
        self._bad.clear()


def fill_labels(
    out: NDArray[np.int64],
    index: Index,
    positions: Indices,
    samples: Indices,
    bad: Sequence[BadSample],
) -> None:
    """Write the labels of `samples` into `out`, those of the replacements for bad samples."""
    out[:] = index.label[samples]
    for each in bad:
        out[positions == each.position] = index.label[each.replacement]


def resolve_mode(manifest: Manifest, fetch: Fetch) -> str:
    """The fetcher for `fetch.mode`; `auto` is random_access if shards can be on disk."""
    if fetch.mode != "auto":
        return fetch.mode
    return "random_access" if manifest.remote is None or fetch.cache else "stream"


def make_fetcher(
    manifest: Manifest, split: str, blocks: Blocks, fetch: Fetch, lanes: int = 1
) -> Fetcher:
    """The fetcher of `split` for samples that will be requested in the order of `blocks()`.

    Raises `DataError` if index or shards are damaged: local data sets of up to `CHECKSUM_BYTES` are
    compared with their checksums now, remote shards when they arrive.
    """
    mode, stop = resolve_mode(manifest, fetch), threading.Event()
    manifest = with_staged_shards(manifest, split, fetch)
    on_disk = manifest.remote is None or fetch.cache is not None
    if mode == "random_access" and not on_disk:
        raise DataError(
            f"{redacted(manifest.remote or '')}: data.mode=random_access needs shards on a disk; "
            "set data.cache=FOLDER, or use data.mode=stream"
        )
    if manifest.remote is None and mode != "stream":
        manifest.verify_checksums(CHECKSUM_BYTES)
    if mode == "resident":
        num = manifest.num_samples(split)
        blocks = partial(_split_in_chunks, num)
    source: LocalShards | StreamedShards
    if mode == "stream" or not on_disk:
        ranges = _ranges(manifest, split, fetch, keep_whole=lanes > 1)
        max_gap = MERGED_BYTES if lanes == 1 else 0  # with lanes, another block reads the gap
        source = StreamedShards(ranges, blocks(), stop, fetch.connections, max_gap)
    elif manifest.remote is None:
        source = LocalShards(manifest, split)
    else:
        source = _cached(manifest, split, blocks, fetch, lanes)
    decoder = Decoder(source, stop, fetch.on_bad)
    if mode == "resident":
        return Resident(decoder, fetch.num_threads(manifest.resolution), fetch.resident_bytes)
    return decoder


def consecutive(start: int, stop: int, step: int) -> Iterator[Indices]:
    """start, ..., stop - 1 in arrays of `step` numbers, the last one shorter."""
    return (np.arange(i, min(i + step, stop)) for i in range(start, stop, step))


def _ranges(manifest: Manifest, split: str, fetch: Fetch, keep_whole: bool) -> ShardRanges:
    store = store_of(manifest.remote, fetch) if manifest.remote else None
    return ShardRanges(manifest, split, manifest.load_index(split), store, keep_whole)


def _cached(
    manifest: Manifest, split: str, blocks: Blocks, fetch: Fetch, lanes: int
) -> LocalShards:
    folder = fetch.cache_folder()
    assert folder is not None
    ranges = _ranges(manifest, split, fetch, keep_whole=lanes > 1)
    cache = NodeCache(folder, ranges, fetch.cache_bytes, local_ranks())
    ahead = ReadAhead(cache, blocks(), fetch.connections)
    return LocalShards(manifest, split, cache, ahead)


def _split_in_chunks(num: int) -> Iterator[tuple[Indices, Indices]]:
    return ((chunk, chunk) for chunk in consecutive(0, num, 64 * RESIDENT_CHUNK))

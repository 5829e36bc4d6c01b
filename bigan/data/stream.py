"""The input pipeline: shards on local disk -> uint8 micro-batches, exact on any number of ranks.

`ShardStream` is the endless training stream; `sequential` shows every sample of a split once, for
evaluation. Both find samples through the index and read them with `pread`: any order costs the
same, and any position of the run is reached at once. Threads decode whole micro-batches ahead of
the consumer; image decoders and reads release Python's lock, and there are no worker processes,
no shared memory and no fork beside CUDA.

Pixels stay uint8 HWC until the device: `real.permute(0, 3, 1, 2)` is channels-last without a copy.
The stream is rank-aware: never hand it to `accelerator.prepare`, which would divide it once more.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import os
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigan.data import DataError, tario
from bigan.data.decode import BadImageError, decode_into
from bigan.data.plan import ORDER_VERSION, Order, rank_positions, rank_range
from bigan.data.shards import Index, Manifest
from bigan.world import World

Indices = NDArray[np.int64]

MAX_OPEN_SHARDS = 256  # file descriptors per process
CHECKSUM_BYTES = 2**30  # a data set up to here is hashed before it is used


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch of m images.

    real: uint8 [m, H, W, C], pinned when the run is on CUDA. labels: int64 [m].
    positions: int64 [m], each image's place in the endless order; in `sequential` the place within
    the split.
    """

    real: Tensor
    labels: Tensor
    positions: Indices


class _OpenFile:
    """A file that is closed with its last user: a cache may drop it while a thread still reads.

    Closing a descriptor under a reader could let it read another file that got the same number.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class ShardReader:
    """Random access to the samples of one split; safe to use from several threads.

    Raises `DataError` on construction if the folder, the manifest or the index is damaged; a data
    set of up to `CHECKSUM_BYTES` is also compared with its checksums.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.manifest = Manifest.load(folder)
        self.shards = self.manifest.shards(split)
        self.index: Index = self.manifest.load_index(split)
        self.manifest.verify_checksums(CHECKSUM_BYTES)
        self.stop = threading.Event()
        self._open = functools.lru_cache(MAX_OPEN_SHARDS)(
            lambda shard: _OpenFile(self._path(shard))
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """[H, W, C] of every image."""
        manifest = self.manifest
        return manifest.resolution, manifest.resolution, manifest.channels

    def read(self, samples: Indices, out: NDArray[np.uint8]) -> None:
        """Decode `samples` into `out`, uint8 [len(samples), H, W, C].

        Raises `DataError` naming shard and member if one cannot be read or is not an image of
        this data set. Returns early once `stop` is set.
        """
        encoder = self.manifest.encoder
        places = zip(
            self.index.shard[samples].tolist(),
            self.index.offset[samples].tolist(),
            self.index.size[samples].tolist(),
            strict=True,
        )
        for row, (shard, offset, size) in enumerate(places):
            if self.stop.is_set():
                return
            try:
                data = self._open(shard).read(size, offset)
                decode_into(out[row], data, encoder)
            except BadImageError as error:
                name = self._member(shard, offset)
                raise DataError(
                    f"{self._path(shard)}: bad sample {name}: {error}; pack the data again"
                ) from error
            except OSError as error:
                raise DataError(
                    f"{self._path(shard)}: cannot be read at byte {offset}: {error.strerror}"
                ) from error

    def close(self) -> None:
        """Stop reads under way and close the shards."""
        self.stop.set()
        self._open.cache_clear()

    def _path(self, shard: int) -> Path:
        return self.manifest.folder / self.shards[shard].url

    def _member(self, shard: int, offset: int) -> str:
        """The member's name, from the tar header before its data."""
        try:
            header = self._open(shard).read(tario.BLOCK, offset - tario.BLOCK)
            return tario.member_name(header)
        except (OSError, ValueError):
            return f"at byte {offset}"


class ShardStream:
    """This rank's endless stream of training micro-batches, from `images_seen` on.

    Every optimiser step reads `batch` consecutive positions of the global order, cut into
    `accumulation` joined micro-batches of which each rank gets its slice (`plan.rank_positions`);
    iteration yields this rank's `Batch` of m = batch / accumulation / world.size images,
    `accumulation` times a step. The order depends on the data, `seed` and `block` only.

    `threads` decode up to `prefetch` micro-batches ahead. There is no state to save: make a new
    stream with another `images_seen`. Use it as a context manager, or `close()` it.

    Raises `DataError` on construction for a missing, incomplete or damaged folder, an unknown
    split or sizes that do not divide; while iterating, for a sample that cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        split: str = "train",
        *,
        seed: int,
        world: World,
        batch: int,
        accumulation: int = 1,
        images_seen: int = 0,
        threads: int = 2,
        prefetch: int = 3,
        block: int = 65_536,
    ) -> None:
        if batch <= 0 or batch % (accumulation * world.size):
            raise DataError(
                f"batch {batch}: cannot be divided evenly into {accumulation} micro-batch(es) "
                f"for {world.size} process(es)"
            )
        if min(threads, prefetch, block) < 1 or images_seen < 0:
            raise DataError(
                f"data: threads {threads}, prefetch {prefetch} and block {block} must be positive, "
                f"images_seen {images_seen} not negative"
            )
        self._reader = ShardReader(Path(folder), split)
        self.manifest = self._reader.manifest
        order = Order([shard.nsamples for shard in self._reader.shards], seed, block)
        inputs = (
            f"{ORDER_VERSION}/{self.manifest.fingerprint}/{split}/{seed}/{block}/{batch}/"
            f"{accumulation}/{images_seen}/{world.size}"
        )
        self._fingerprint = hashlib.sha256(inputs.encode()).hexdigest()[:32]

        def micro_batches() -> Iterator[tuple[Indices, Indices]]:
            for start in itertools.count(images_seen, batch):
                for positions in rank_positions(start, batch, accumulation, world):
                    yield positions, order.at(positions)

        pinned = world.device.type == "cuda"
        self._batches = _ahead(self._reader, micro_batches(), threads, prefetch, pinned)

    @property
    def fingerprint(self) -> str:
        """Hash of all inputs of the order: ranks whose fingerprints differ must not train."""
        return self._fingerprint

    def __iter__(self) -> ShardStream:
        return self

    def __next__(self) -> Batch:
        try:
            return next(self._batches)
        except StopIteration:
            raise RuntimeError("the stream is closed or has failed before") from None

    def close(self) -> None:
        """Stop the threads and close the shards; may be called twice."""
        self._reader.stop.set()
        self._batches.close()
        self._reader.close()

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sequential(
    folder: Path,
    split: str,
    world: World,
    batch: int,
    *,
    threads: int = 2,
    prefetch: int = 3,
) -> Iterator[Batch]:
    """Every sample of `split` once over all ranks, in order: nothing padded, nothing dropped.

    Rank r gets the r-th consecutive part (`plan.rank_range`), in batches of `batch` images, the
    last one smaller; parts may differ by a sample, so ranks may get different numbers of batches.
    Raises `DataError` at once for a damaged folder, later for a bad sample.
    """
    if batch <= 0:
        raise DataError(f"batch {batch}: must be positive")
    reader = ShardReader(Path(folder), split)
    mine = rank_range(len(reader.index.label), world)
    parts = (np.arange(i, min(i + batch, mine.stop)) for i in range(mine.start, mine.stop, batch))
    pinned = world.device.type == "cuda"
    return _ahead(reader, ((part, part) for part in parts), threads, prefetch, pinned)


def _ahead(
    reader: ShardReader,
    micro_batches: Iterator[tuple[Indices, Indices]],
    threads: int,
    prefetch: int,
    pinned: bool,
) -> Generator[Batch, None, None]:
    """Read (positions, samples) micro-batches in order, `prefetch` of them ahead in threads.

    An error in a thread is raised here, at the batch it belongs to. Closing the generator, also
    by dropping it, stops the threads.
    """
    executor = ThreadPoolExecutor(threads, thread_name_prefix="bigan-data")
    waiting: collections.deque[tuple[Batch, Future[None]]] = collections.deque()

    def submit(positions: Indices, samples: Indices) -> None:
        # Memory is taken here, on the consumer's thread and so on its CUDA device. A fresh buffer
        # for each batch: PyTorch's pinned allocator recycles it, once its copies are complete.
        real = torch.empty((len(samples), *reader.shape), dtype=torch.uint8, pin_memory=pinned)
        labels = torch.empty(len(samples), dtype=torch.int64, pin_memory=pinned)
        labels.copy_(torch.from_numpy(reader.index.label[samples].astype(np.int64)))
        future = executor.submit(reader.read, samples, real.numpy())
        waiting.append((Batch(real, labels, positions), future))

    try:
        for positions, samples in itertools.islice(micro_batches, prefetch):
            submit(positions, samples)
        while waiting:
            batch, future = waiting.popleft()
            future.result()
            if reader.stop.is_set():
                return  # the batch may be half filled
            for positions, samples in itertools.islice(micro_batches, 1):
                submit(positions, samples)
            yield batch
    finally:
        reader.stop.set()
        executor.shutdown(wait=True, cancel_futures=True)
        reader.close()

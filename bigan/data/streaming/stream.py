"""The input pipeline: shards to uint8 micro-batches on the device, exact for any world size.

`ShardStream` is the endless training stream; `sequential` returns every sample of a split once, for
evaluation. Both know the order in advance (order.py) and read samples through a fetcher
(fetchers.py). Threads decode micro-batches ahead of the consumer; image decoders and reads release
Python's lock, so no worker processes are needed.

Pixels stay uint8 HWC on the way to the device, where `pixels.permute(0, 3, 1, 2)` is channels-last
without a copy. The stream is rank-aware: do not pass it to `accelerator.prepare`, which would
divide it again.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bigan.data import DataError
from bigan.data.format.manifest import Manifest
from bigan.data.settings import Fetch
from bigan.data.streaming.cache import local_ranks
from bigan.data.streaming.dataset import open_manifest
from bigan.data.streaming.device import HostBatch, Reading, Sent, Transfer, transfer_to
from bigan.data.streaming.fetchers import BadSample, Fetcher, consecutive, fill_labels, make_fetcher
from bigan.data.streaming.order import (
    ORDER_VERSION,
    Order,
    default_lanes,
    grouped,
    rank_positions,
    rank_range,
)
from bigan.distributed.world import World
from bigan.hashes import sha256

Indices = NDArray[np.int64]

EVALUATION_BLOCK = 8_192  # encoded samples held by `sequential` in stream mode


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch of m images.

    pixels: uint8 [m, H, W, C] and labels: int64 [m], on the device of the run.
    positions: int64 [m] on the host, of each image in the endless order; by lane, then increasing.
        In `sequential`, the sample numbers within the split.
    bad: those of these images that did not decode and were replaced (`data.on_bad=skip`).
    """

    pixels: Tensor
    labels: Tensor
    positions: Indices
    bad: tuple[BadSample, ...] = ()


class Endless:
    """Base of the training streams: an endless iterator over batches, and a context manager.

    `fingerprint` is a hash of everything the order depends on; it must be equal on all ranks.
    """

    fingerprint: str
    _batches: Generator[Batch, None, None]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        try:
            return next(self._batches)
        except StopIteration:
            raise RuntimeError("the stream is closed or has failed") from None

    def close(self) -> None:
        """Stop the threads and close the shards; may be called repeatedly."""
        self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShardStream(Endless):
    """This rank's endless stream of training micro-batches, starting at `images_seen`.

    Every optimizer step reads `batch` consecutive positions of the global order, divided into
    `accumulation` global micro-batches of which each rank reads its slice
    (`order.rank_positions`). Iteration yields this rank's `Batch` of m = batch / accumulation /
    world.size images, `accumulation` times per step. The order depends on the data, `seed`, `block`
    and `lanes` only, not on `fetch`. `lanes` None: 1 for a folder, `order.default_lanes` of the
    batch for a URL.

    There is no state to save: construct a stream with another `images_seen`. Use it as a context
    manager, or call `close()`.

    Raises `DataError` on construction for a missing, incomplete or damaged folder, an unknown
    split or an indivisible batch; during iteration for an unusable sample.
    """

    def __init__(
        self,
        data: str | Path | Manifest,
        split: str = "train",
        *,
        seed: int,
        world: World,
        batch: int,
        accumulation: int = 1,
        images_seen: int = 0,
        block: int = 65_536,
        lanes: int | None = None,
        fetch: Fetch | None = None,
    ) -> None:
        fetch = fetch or Fetch()
        if batch <= 0 or batch % (accumulation * world.size):
            raise DataError(
                f"batch {batch}: cannot be divided evenly into {accumulation} micro-batch(es) "
                f"for {world.size} process(es)"
            )
        if block < 1 or (lanes is not None and lanes < 1) or images_seen < 0:
            raise DataError(
                f"data: block {block} and lanes {lanes} must be positive, images_seen "
                f"{images_seen} not negative"
            )
        self.manifest = open_manifest(data, fetch)
        sizes = np.asarray([shard.nsamples for shard in self.manifest.shards(split)])
        # Not an attribute: a thread that refers to the stream would keep it alive.
        lanes = lanes or lanes_of(self.manifest, split, [batch])
        if fetch.cache_bytes is not None and self.manifest.remote is not None:
            here = block
            if lanes % world.size == 0:  # this node reads the part of its ranks
                here = -(-block * min(local_ranks(), world.size) // world.size)
            _check_cache(self.manifest, split, here, fetch.cache_bytes)
        inputs = (
            f"{ORDER_VERSION}/{self.manifest.fingerprint}/{split}/{seed}/{block}/{lanes}/"
            f"{batch}/{accumulation}/{images_seen}/{world.size}"
        )
        self.fingerprint = sha256(inputs.encode())[:32]

        def micro_batches(order: Order) -> Iterator[tuple[Indices, Indices]]:
            for start in itertools.count(images_seen, batch):
                for positions in rank_positions(start, batch, accumulation, world, lanes):
                    yield positions, order.at(positions)

        def order() -> Order:  # one for each thread: its cache is not thread-safe
            return Order(sizes, seed, block, lanes)

        def blocks() -> Iterator[tuple[Indices, Indices]]:
            return grouped(micro_batches(order()), order())

        self._fetcher = make_fetcher(self.manifest, split, blocks, fetch, lanes)
        self._transfer = transfer_to(world.device, self.manifest.image_shape, fetch.prefetch)
        self._batches = _ahead(self._fetcher, micro_batches(order()), fetch, self._transfer)

    def close(self) -> None:
        self._fetcher.stop.set()
        super().close()
        self._fetcher.close()


def sequential(
    data: str | Path | Manifest,
    split: str,
    world: World,
    batch: int,
    fetch: Fetch | None = None,
) -> Iterator[Batch]:
    """Every sample of `split` exactly once over all ranks, in order, without padding.

    Rank r reads the r-th consecutive part (`order.rank_range`) in batches of `batch` images, the
    last one smaller. Parts may differ by one sample, so ranks may get different numbers of batches.
    Raises `DataError` at once for a damaged folder, during iteration for an unusable sample.
    """
    fetch = fetch or Fetch()
    if batch <= 0:
        raise DataError(f"batch {batch}: must be positive")
    manifest = open_manifest(data, fetch)
    mine = rank_range(manifest.num_samples(split), world)

    def parts(step: int) -> Iterator[tuple[Indices, Indices]]:
        return ((part, part) for part in consecutive(mine.start, mine.stop, step))

    fetcher = make_fetcher(manifest, split, lambda: parts(EVALUATION_BLOCK), fetch)
    transfer = transfer_to(world.device, manifest.image_shape, fetch.prefetch)
    return _ahead(fetcher, parts(batch), fetch, transfer)


def lanes_of(manifest: Manifest, split: str, batches: Iterable[int]) -> int:
    """The default of `data.lanes` for a run with these batches (a growing model has several)."""
    if manifest.remote is None or manifest.remote.startswith("pipe:"):
        return 1
    return default_lanes(batches, manifest.num_samples(split))


def _check_cache(manifest: Manifest, split: str, block: int, cache_bytes: int) -> None:
    """Raise `DataError` for a cache that cannot hold two blocks: it would download them repeatedly.

    `block` is the number of samples of a block that this node reads.
    """
    shards = manifest.shards(split)
    total = sum(shard.filesize for shard in shards)
    needed = min(total, 2 * total * block // manifest.num_samples(split))
    if cache_bytes < needed:
        raise DataError(
            f"data.cache_bytes = {cache_bytes:,} cannot hold two blocks, of which this node reads "
            f"{block:,} images each, about {needed:,} bytes; increase it, or start a new run "
            "with a smaller data.block"
        )


def _ahead(
    fetcher: Fetcher,
    micro_batches: Iterator[tuple[Indices, Indices]],
    fetch: Fetch,
    transfer: Transfer,
) -> Generator[Batch, None, None]:
    """Read (positions, samples) micro-batches in order, `fetch.prefetch` of them ahead.

    An error in a thread is raised at its batch. Closing or deleting the generator stops the
    threads.
    """
    return delivered(_in_threads(fetcher, micro_batches, fetch, transfer), transfer)


def delivered(reading: Reading, transfer: Transfer) -> Generator[Batch, None, None]:
    """The batches of `reading` on the device, `transfer.depth` of them at a time.

    An error is raised after all batches before it.
    """
    sent: collections.deque[tuple[Indices, Sequence[BadSample], Sent]] = collections.deque()
    failure: Exception | None = None
    try:
        while True:
            while failure is None and len(sent) < transfer.depth:
                try:
                    positions, host, bad = next(reading)
                except StopIteration:
                    break
                except Exception as error:
                    failure = error
                else:
                    sent.append((positions, bad, transfer.send(host)))
            if not sent:
                break
            positions, bad, copy = sent.popleft()
            pixels, labels = copy.arrive()
            yield Batch(pixels, labels, positions, tuple(bad))
        if failure is not None:
            raise failure
    finally:
        reading.close()


def _in_threads(
    fetcher: Fetcher,
    micro_batches: Iterator[tuple[Indices, Indices]],
    fetch: Fetch,
    transfer: Transfer,
) -> Reading:
    """Fill host buffers in order in `fetch.num_threads` threads, `fetch.prefetch` at a time."""
    threads = fetch.num_threads(fetcher.manifest.resolution)
    executor = ThreadPoolExecutor(threads, thread_name_prefix="bigan-data")
    waiting: collections.deque[tuple[Indices, HostBatch, Future[list[BadSample]]]]
    waiting = collections.deque()

    def read(positions: Indices, samples: Indices, host: HostBatch) -> list[BadSample]:
        bad = fetcher.read(positions, samples, host.pixels.numpy())
        fill_labels(host.labels.numpy(), fetcher.index, positions, samples, bad)
        return bad

    def submit(positions: Indices, samples: Indices) -> None:
        # Allocate on the consumer's thread, and therefore on its CUDA device.
        host = transfer.take(len(samples))
        waiting.append((positions, host, executor.submit(read, positions, samples, host)))

    def submit_until(num: int) -> None:
        for positions, samples in itertools.islice(micro_batches, num - len(waiting)):
            submit(positions, samples)

    try:
        submit_until(1)  # others would share the connections with the first batch
        ahead = 0
        while waiting:
            positions, host, future = waiting.popleft()
            bad = future.result()
            if fetcher.stop.is_set():
                return  # the batch may be incomplete
            submit_until(ahead)
            yield positions, host, bad
            ahead = fetch.prefetch
            submit_until(ahead)
    finally:
        fetcher.stop.set()
        fetcher.close()  # aborts downloads that threads wait for
        executor.shutdown(wait=True, cancel_futures=True)
        fetcher.close()  # again, for files opened meanwhile

"""The order of samples, and the positions each rank reads. Pure functions.

The order is an endless sequence of samples, a function of (shard sizes, seed, block) alone. In
every epoch the shards are permuted, consecutive permuted shards form blocks of about `block`
samples, and the samples of each block are permuted, so reads are local and the order is well mixed.
It does not depend on the number of processes, the batch size or the number of threads. The state of
the input pipeline is therefore one integer, the position (= `images_seen`), and a run can resume
with another number of ranks without losing or repeating a sample.

`ORDER_VERSION` changes with the order; the tests compare golden values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bigan.data.permutation import permutation
from bigan.distributed.world import World

ORDER_VERSION = 1

Indices = NDArray[np.int64]


class Order:
    """The endless order of samples: position -> sample index.

    `shard_sizes` is the number of samples of each shard; sample indices are counted through the
    shards in that order. `block` is the approximate number of samples that are shuffled together:
    a block consists of entire shards, at least one. A lookup of consecutive positions costs one
    permutation per block. The shard order of the latest epoch and the latest block are cached:
    memory is O(shards + block).
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, block: int) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        if sizes.sum() <= 0 or sizes.min() < 0 or block <= 0:
            raise ValueError("an order needs at least one sample, sizes >= 0 and block > 0")
        self.num_samples = int(sizes.sum())
        self.seed = seed
        self.block = block
        self._sizes = sizes
        self._first = np.cumsum(sizes) - sizes  # index of each shard's first sample
        self._epoch: tuple[int, Indices, Indices] | None = None
        self._block: tuple[int, int, Indices] | None = None

    def samples(self, start: int, stop: int) -> Indices:
        """Sample indices at positions start, ..., stop - 1, across any number of epochs."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.num_samples)
            low, order = self._block_at(epoch, offset)
            part = order[offset - low : offset - low + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def at(self, positions: Indices) -> Indices:
        """Sample indices at `positions`, which must be consecutive and increasing."""
        return self.samples(int(positions[0]), int(positions[-1]) + 1)

    def block_ends(self, start: int) -> Iterator[int]:
        """The positions at which blocks end, endlessly, from the first one after `start`."""
        epoch, offset = divmod(start, self.num_samples)
        while True:
            shards, edges = self._shards_of(epoch)
            ends = np.cumsum(self._sizes[shards])[edges[1:] - 1]
            yield from (ends[ends > offset] + epoch * self.num_samples).tolist()
            epoch, offset = epoch + 1, 0

    def _shards_of(self, epoch: int) -> tuple[Indices, Indices]:
        """(permuted shard numbers, block boundaries as numbers of shards) of one epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = permutation(len(self._sizes), self.seed, f"order-{ORDER_VERSION}", epoch)
            ends = np.cumsum(self._sizes[shards])
            # A shard belongs to the block in which it starts.
            block_of = (ends - self._sizes[shards]) // self.block
            changes = np.flatnonzero(np.diff(block_of)) + 1
            edges = np.concatenate([[0], changes, [len(shards)]]).astype(np.int64)
            self._epoch = (epoch, shards, edges)
        return self._epoch[1:]

    def _block_at(self, epoch: int, offset: int) -> tuple[int, Indices]:
        """(offset of the first sample, samples in order) of the block that contains `offset`."""
        if self._block is not None:
            known_epoch, low, order = self._block
            if known_epoch == epoch and low <= offset < low + len(order):
                return low, order
        shards, edges = self._shards_of(epoch)
        ends = np.cumsum(self._sizes[shards])[edges[1:] - 1]
        number = int(np.searchsorted(ends, offset, side="right"))
        members = shards[edges[number] : edges[number + 1]]
        samples = np.concatenate(
            [np.arange(self._first[s], self._first[s] + self._sizes[s]) for s in members]
        )
        stream = f"order-{ORDER_VERSION}/block-{number}"
        order = samples[permutation(len(samples), self.seed, stream, epoch)]
        low = int(ends[number]) - len(samples)
        self._block = (epoch, low, order)
        return low, order


def grouped(
    parts: Iterable[tuple[Indices, Indices]], ends: Iterator[int]
) -> Iterator[tuple[Indices, Indices]]:
    """Regroup consecutive (positions, samples) parts into groups that end at `ends`."""
    end = next(ends)
    held: list[tuple[Indices, Indices]] = []
    for positions, samples in parts:
        while len(positions) and positions[-1] >= end:
            cut = int(np.searchsorted(positions, end))
            held.append((positions[:cut], samples[:cut]))
            yield _joined(held)
            held, positions, samples = [], positions[cut:], samples[cut:]
            end = next(ends)
        held.append((positions, samples))
    yield _joined(held)


def _joined(parts: list[tuple[Indices, Indices]]) -> tuple[Indices, Indices]:
    none = np.empty(0, np.int64)
    positions, samples = zip(*parts, strict=True) if parts else ((none,), (none,))
    return np.concatenate(positions), np.concatenate(samples)


def rank_positions(images_seen: int, batch: int, accumulation: int, world: World) -> list[Indices]:
    """The positions this rank reads in the optimizer step that starts at `images_seen`.

    The step reads positions [images_seen, images_seen + batch), divided into `accumulation` global
    micro-batches of consecutive positions, of which each rank reads its slice. The images that
    cross-replica BatchNorm reduces over in one forward pass are therefore the same for every number
    of ranks with the same `accumulation`. Returns `accumulation` arrays of batch / accumulation /
    world.size consecutive positions; raises ValueError if that is not an integer.
    """
    if batch % accumulation:
        raise ValueError(
            f"{batch} images cannot be divided evenly into {accumulation} micro-batches"
        )
    micro_batch = batch // accumulation  # over all ranks
    mine = world.share(micro_batch)
    firsts = range(images_seen, images_seen + batch, micro_batch)
    return [np.arange(first + mine.start, first + mine.stop) for first in firsts]


def rank_range(num: int, world: World) -> range:
    """This rank's consecutive part of `num` samples, without padding.

    The sizes of the parts differ by at most one; with fewer samples than ranks some are empty.
    """
    return range(num * world.rank // world.size, num * (world.rank + 1) // world.size)

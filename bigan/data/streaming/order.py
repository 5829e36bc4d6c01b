"""The order of samples: a pure function of (shards, seed, block, lanes) and a position.

The samples of all epochs form one endless sequence. A position (0, 1, 2, ...) is the number of an
image in it, counted over the whole training: position p is in epoch p // N of a data set of N
samples. Every epoch is a permutation of the samples. The number of processes, threads or images per
step does not matter, therefore the position is the whole state of the input pipeline.

Shuffling has two levels, so that nearby positions read few shards:
1. The shards are permuted in every epoch: one sequence of N samples.
2. Parts of this sequence of about `block` samples are permuted.

With L lanes, position p is in lane p % L, and lane l has its own part of the sequence of an epoch.
The parts are consecutive, cover the sequence and differ by at most one sample. Ranks read
different lanes (`rank_positions`), hence different shards: the bytes that all of them fetch do not
grow with their number. With one lane, consecutive positions are in the same block, which every rank
reads.

Random numbers are raw Philox words, which NumPy guarantees to be the same in all versions.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bigan.data.permutation import permutation
from bigan.distributed.world import World

ORDER_VERSION = 1
MAX_LANES = 512  # of the default: more lanes need more and shorter requests

Indices = NDArray[np.int64]
Epoch = tuple[Indices, Indices, Indices]


class Order:
    """The endless order of samples: position -> sample number.

    `shard_sizes` is the number of samples of each shard; samples are numbered through the shards in
    that order. `block` is the approximate number of samples, over all lanes, that are shuffled
    together. With one lane a block consists of entire shards, at least one; else every lane reads
    at most `block // lanes` samples of it, at least one. The shards of the latest epochs and the
    blocks in use are cached: memory is O(shards + block). Not thread-safe.

    Raises ValueError without a sample, and for settings that are not positive.
    """

    def __init__(
        self, shard_sizes: Sequence[int] | Indices, seed: int, block: int, lanes: int = 1
    ) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        if sizes.sum() <= 0 or sizes.min() < 0 or block <= 0 or lanes <= 0:
            raise ValueError(
                "an order needs at least one sample, sizes >= 0, block > 0 and lanes > 0"
            )
        self.num_samples = int(sizes.sum())
        self.seed = seed
        self.block = block
        self.lanes = lanes
        longest = -(-self.num_samples // lanes)  # part of a lane in an epoch
        self._num_blocks = -(-longest // max(1, block // lanes))  # of each lane in each epoch
        self._sizes = sizes
        self._first = np.cumsum(sizes) - sizes  # number of each shard's first sample
        self._epochs: collections.OrderedDict[int, Epoch] = collections.OrderedDict()
        self._blocks: collections.OrderedDict[tuple[int, int, int], Indices]
        self._blocks = collections.OrderedDict()

    def at(self, positions: Indices) -> Indices:
        """Sample numbers at `positions`, any increasing or unordered int64 [m]."""
        epochs, lanes, places, numbers = self._locate(positions)
        samples = np.empty(len(positions), np.int64)
        keys = (epochs * self.lanes + lanes, numbers)
        order = np.lexsort(keys[::-1])
        changed = (np.diff(keys[0][order]) != 0) | (np.diff(keys[1][order]) != 0)
        for rows in np.split(order, np.flatnonzero(changed) + 1) if len(order) else ():
            row = rows[0]
            block = int(epochs[row]), int(lanes[row]), int(numbers[row])
            low, _ = self._bounds(*block)
            samples[rows] = self._permuted(*block)[places[rows] - low]
        return samples

    def samples(self, start: int, stop: int) -> Indices:
        """Sample numbers at positions start, ..., stop - 1, across any number of epochs."""
        return self.at(np.arange(start, stop))

    def blocks(self, positions: Indices) -> Indices:
        """The block of each position; blocks are numbered through the epochs, not contiguously."""
        epochs, _, _, numbers = self._locate(positions)
        return epochs * len(self._sizes) * self._num_blocks + numbers

    def block_end(self, block: int) -> int:
        """The position before which all samples of `block` and of those before it are read."""
        epoch, number = divmod(block, len(self._sizes) * self._num_blocks)
        lanes = np.arange(self.lanes)
        if self.lanes == 1:
            return epoch * self.num_samples + self._bounds(epoch, 0, number)[1]
        first, num = self._part(epoch, lanes)
        last = first + (number + 1) * num // self._num_blocks - 1  # row of its last sample
        return max(int((last * self.lanes + lanes).max()) + 1, 0)

    def _locate(self, positions: Indices) -> tuple[Indices, Indices, Indices, Indices]:
        """(epoch, lane, place in the lane's part of the epoch, block of the lane) of positions."""
        epochs, lanes = positions // self.num_samples, positions % self.lanes
        if self.lanes == 1:
            places = positions - epochs * self.num_samples
            numbers = np.empty(len(positions), np.int64)
            for epoch in np.unique(epochs).tolist():
                rows = epochs == epoch
                ends = self._epoch(epoch)[2]
                numbers[rows] = np.searchsorted(ends, places[rows], side="right")
            return epochs, lanes, places, numbers
        first, num = self._part(epochs, lanes)
        places = positions // self.lanes - first
        # The inverse of the lower bound number * num // num_blocks.
        numbers = ((places + 1) * self._num_blocks - 1) // num
        return epochs, lanes, places, numbers

    def _part(self, epoch: Indices | int, lane: Indices) -> tuple[Indices, Indices]:
        """(first row, number of rows) of the positions of lanes in epochs.

        Position = row * lanes + lane.
        """
        start = epoch * self.num_samples
        first = -((lane - start) // self.lanes)  # ceil((start - lane) / lanes)
        after = -((lane - start - self.num_samples) // self.lanes)
        return first, after - first

    def _bounds(self, epoch: int, lane: int, number: int) -> tuple[int, int]:
        """The places, in the lane's part of the epoch, at which a block begins and ends."""
        if self.lanes == 1:
            ends = self._epoch(epoch)[2]
            return int(ends[number - 1]) if number else 0, int(ends[number])
        num = int(self._part(epoch, np.asarray(lane))[1])
        return number * num // self._num_blocks, (number + 1) * num // self._num_blocks

    def _permuted(self, epoch: int, lane: int, number: int) -> Indices:
        """The samples of a block in order."""
        key = (epoch, lane, number)
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        low, high = self._bounds(epoch, lane, number)
        begin = self._part_begin(epoch, lane)
        samples = self._sequence(epoch, begin + low, begin + high)
        stream = f"order-{ORDER_VERSION}/"
        stream += f"lane-{lane}-{self.lanes}/" if self.lanes > 1 else ""
        stream += f"block-{number}"
        order = samples[permutation(len(samples), self.seed, stream, epoch)]
        self._blocks[key] = order
        if len(self._blocks) > 2 * self.lanes:
            self._blocks.popitem(last=False)
        return order

    def _part_begin(self, epoch: int, lane: int) -> int:
        """The place in the sequence of `epoch` at which the part of a lane begins."""

        def below(position: int) -> int:
            """Number of positions before this one that are in a lower lane."""
            rows, rest = divmod(position, self.lanes)
            return rows * lane + min(rest, lane)

        start = epoch * self.num_samples
        return below(start + self.num_samples) - below(start)

    def _sequence(self, epoch: int, low: int, high: int) -> Indices:
        """Samples low, ..., high - 1 of the permuted shards of `epoch`."""
        shards, ends, _ = self._epoch(epoch)
        start, stop = np.searchsorted(ends, [low, high - 1], side="right")
        parts = [np.empty(0, np.int64)]
        for shard, end in zip(shards[start : stop + 1], ends[start : stop + 1], strict=True):
            shift = self._first[shard] + self._sizes[shard] - end
            begin = max(low, int(end - self._sizes[shard]))
            parts.append(np.arange(begin + shift, min(high, int(end)) + shift))
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> Epoch:
        """(permuted shards, their ends in the sequence, ends of the blocks of a single lane)."""
        if epoch not in self._epochs:
            shards = permutation(len(self._sizes), self.seed, f"order-{ORDER_VERSION}", epoch)
            ends = np.cumsum(self._sizes[shards])
            blocks = ends[:0]
            if self.lanes == 1:  # a shard belongs to the block in which it starts
                borders = np.arange(self.block, self.num_samples, self.block)
                after = np.append(ends[np.searchsorted(ends, borders)], self.num_samples)
                blocks = after[np.diff(after, prepend=0) > 0]
            self._epochs[epoch] = (shards, ends, blocks)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]


def grouped(
    parts: Iterable[tuple[Indices, Indices]], order: Order
) -> Iterator[tuple[Indices, Indices]]:
    """Regroup the (positions, samples) of a rank's micro-batches into those of one block each.

    In order of the blocks; samples that the rank does not read are left out.
    """
    held: dict[int, list[tuple[Indices, Indices]]] = {}
    for positions, samples in parts:
        for block in [b for b in sorted(held) if order.block_end(b) <= positions.min()]:
            yield _joined(held.pop(block))
        blocks = order.blocks(positions)
        for block in np.unique(blocks).tolist():
            rows = blocks == block
            held.setdefault(block, []).append((positions[rows], samples[rows]))
    for block in sorted(held):
        yield _joined(held[block])


def _joined(parts: list[tuple[Indices, Indices]]) -> tuple[Indices, Indices]:
    positions, samples = zip(*parts, strict=True)
    return np.concatenate(positions), np.concatenate(samples)


def rank_positions(
    images_seen: int, batch: int, accumulation: int, world: World, lanes: int = 1
) -> list[Indices]:
    """The positions this rank reads in the optimizer step that starts at `images_seen`.

    The step reads positions [images_seen, images_seen + batch), divided into `accumulation` global
    micro-batches of consecutive positions. Each rank reads its slice of the positions of a
    micro-batch in order of their lanes. The images that cross-replica BatchNorm reduces over in one
    forward pass are therefore the same for every number of ranks with the same `accumulation`.
    Returns `accumulation` arrays of batch / accumulation / world.size positions; raises ValueError
    if that is not an integer.
    """
    if batch % accumulation:
        raise ValueError(
            f"{batch} images cannot be divided evenly into {accumulation} micro-batches"
        )
    micro_batch = batch // accumulation  # over all ranks
    mine = world.share(micro_batch)
    found = []
    for first in range(images_seen, images_seen + batch, micro_batch):
        positions = np.arange(first, first + micro_batch)
        in_lanes = positions[np.argsort(positions % lanes, kind="stable")]
        found.append(in_lanes[mine])
    return found


def default_lanes(batches: Iterable[int], num_samples: int) -> int:
    """The lanes of a remote data set, from the batches of a run.

    Ranks read different lanes if their number divides the lanes. The default is therefore the
    common divisor of the batches, up to `MAX_LANES` and `num_samples`, that has most divisors
    itself; of several, the one that contains the largest power of two, then the largest.
    """
    common = int(np.gcd.reduce(list(batches)))
    divisors = [n for n in range(1, min(common, MAX_LANES, num_samples) + 1) if common % n == 0]
    return max(divisors, key=lambda n: (num_divisors(n), n & -n, n))


def num_divisors(n: int) -> int:
    """The number of divisors of n >= 1, 1 and n included."""
    return sum(n % d == 0 for d in range(1, n + 1))


def rank_range(num: int, world: World) -> range:
    """This rank's consecutive part of `num` samples, without padding.

    The sizes of the parts differ by at most one; with fewer samples than ranks some are empty.
    """
    return range(num * world.rank // world.size, num * (world.rank + 1) // world.size)

"""What the ranks of a run read from a store in an epoch, computed from manifest and index.

Nothing is read. The blocks of the order are divided among the ranks, and the requests of each block
are counted as the readers make them:
    stream      one request for each span of consecutive samples of a rank (ranges.py)
    cache       one request for each run of chunks that a node does not have (cache.py)
    files       one read for each image of a local folder
From a server that does not answer range requests, whole shards are read.

What a rank reads ahead of the next epoch is not counted. A cache is empty at the beginning of the
epoch; a later epoch reads as much if the cache is smaller than what its node reads. Manifest and
index, which each node reads once, are extra.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bigan.data.format import tar
from bigan.data.format.manifest import Index
from bigan.data.streaming.cache import Chunks
from bigan.data.streaming.fetchers import consecutive
from bigan.data.streaming.order import MAX_LANES, Order, grouped, num_divisors, rank_positions
from bigan.data.streaming.ranges import MAX_BYTES, MERGED_BYTES, WHOLE_BYTES, ShardRanges
from bigan.distributed.world import World

Indices = NDArray[np.int64]
Block = tuple[Indices, Indices]  # (positions, samples)
Requests = tuple[Indices, Indices]  # (number of the reader, bytes) of each request
Kind = Literal["stream", "cache", "files"]

MAX_SAMPLES = 2**21  # counted; the rest of a longer epoch is extrapolated
SAMPLES_AT_A_TIME = 2**16
BATCHES = 8  # whose shards are counted


@dataclass(frozen=True)
class Readers:
    """The processes of a run, and how they read.

    `batch` and `accumulation`: see `order.rank_positions`. `cache_bytes` (None: no limit) is the
    limit of the cache of a node, of `ranks_per_node` consecutive ranks.
    """

    world_size: int
    batch: int
    accumulation: int = 1
    ranks_per_node: int = 8
    kind: Kind = "stream"
    has_ranges: bool = True
    cache_bytes: int | None = None

    @property
    def micro_batch(self) -> int:
        """Over all ranks."""
        return self.batch // self.accumulation


@dataclass(frozen=True)
class Traffic:
    """Reads of one epoch.

    num_bytes, requests: of all ranks. node_bytes: of the node that reads most.
    set_bytes: size of the shards. memory_bytes: encoded samples of two blocks, and kept shards, of
    the rank that has most. first_batch_bytes: what the rank that reads most requests before it has
    its first batch, at most. shards_per_batch: distinct shards in a global batch, mean.
    ranks_per_lane: ranks that read the same part of the shards, at most.
    counted: the part of the epoch that was counted, in (0, 1]; the rest is extrapolated.
    """

    set_bytes: int
    num_bytes: int
    node_bytes: int
    requests: int
    memory_bytes: int
    first_batch_bytes: int
    shards_per_batch: float
    ranks_per_lane: int
    counted: float

    @property
    def ratio(self) -> float:
        """Bytes read per byte of the set."""
        return self.num_bytes / self.set_bytes


def owners(readers: Readers, lanes: int) -> Indices:
    """The rank that reads position p is `owners[p % len(owners)]`."""
    micro_batch = readers.micro_batch
    period = math.lcm(micro_batch, lanes)
    share = micro_batch // readers.world_size
    found = np.empty(period, np.int64)
    for positions in rank_positions(0, period, period // micro_batch, World(), lanes):
        found[positions] = np.arange(micro_batch) // share
    return found


def ranks_per_lane(readers: Readers, lanes: int) -> int:
    """The largest number of ranks that read positions of the same lane.

    1: all ranks read disjoint parts of the shards.
    """
    ranks = owners(readers, lanes)
    pairs = np.unique(np.arange(len(ranks)) % lanes * readers.world_size + ranks)
    return int(np.bincount(pairs // readers.world_size).max())


def fitting_lanes(micro_batches: Iterable[int], world_size: int) -> int:
    """A number of lanes of which each is read by one rank; micro-batches are those of all ranks.

    It is a multiple of `world_size` that divides all micro-batches, up to `MAX_LANES` if there is
    one: world_size * n for the n that has most divisors, of several the largest.
    """
    common = int(np.gcd.reduce(list(micro_batches))) // world_size
    limit = max(1, MAX_LANES // world_size)
    factors = [n for n in range(1, min(common, limit) + 1) if common % n == 0]
    return world_size * max(factors, key=lambda n: (num_divisors(n), n))


def blocks_of_epoch(order: Order, epoch: int = 0, max_samples: int = MAX_SAMPLES) -> list[Block]:
    """The first blocks of an epoch, over all ranks, that have `max_samples` samples or all."""
    found: list[Block] = []
    start, num = epoch * order.num_samples, 0
    parts = consecutive(start, start + order.num_samples, SAMPLES_AT_A_TIME)
    for block in grouped(((part, order.at(part)) for part in parts), order):
        found.append(block)
        num += len(block[0])
        if num >= max_samples:
            break
    return found


def simulate(data: ShardRanges, order: Order, blocks: list[Block], readers: Readers) -> Traffic:
    """The traffic of the epoch of which `blocks_of_epoch` returned `blocks`."""
    ranks, size = owners(readers, order.lanes), readers.world_size
    request = _counter(data, order.lanes, readers)
    nodes = -(-size // readers.ranks_per_node)
    in_nodes = np.zeros(nodes, np.int64)
    num_requests, first, encoded = 0, np.zeros(size, np.int64), []
    for positions, samples in blocks:
        by_rank = ranks[positions % len(ranks)]
        who, num = request(by_rank, samples)
        first = np.where(first, first, _sums(who, num, size))  # of a rank's first block
        in_nodes += _sums(who // readers.ranks_per_node, num, nodes)
        num_requests += len(num)
        encoded.append(_sums(by_rank, data.index.size[samples], size))
    if readers.kind != "stream":
        start = int(min(positions.min() for positions, _ in blocks))
        batch = np.arange(start, start + readers.micro_batch)
        one_each = _counter(data, order.lanes, readers, shared=False)
        first = _sums(*one_each(ranks[batch % len(ranks)], order.at(batch)), size)
    counted = sum(len(samples) for _, samples in blocks) / order.num_samples
    return Traffic(
        set_bytes=sum(shard.filesize for shard in data.shards),
        num_bytes=round(int(in_nodes.sum()) / counted),
        node_bytes=round(int(in_nodes.max()) / counted),
        requests=round(num_requests / counted),
        memory_bytes=_memory(data, order.lanes, readers, encoded),
        first_batch_bytes=int(first.max()),
        shards_per_batch=_shards_per_batch(data, order, blocks, readers.batch),
        ranks_per_lane=ranks_per_lane(readers, order.lanes),
        counted=counted,
    )


def _memory(data: ShardRanges, lanes: int, readers: Readers, encoded: list[Indices]) -> int:
    if readers.kind != "stream":
        return 0
    pairs = [this + after for this, after in zip(encoded, [*encoded[1:], encoded[0]], strict=True)]
    kept = 0
    if not readers.has_ranges:
        largest = max(shard.filesize for shard in data.shards)
        whole = min(WHOLE_BYTES, sum(shard.filesize for shard in data.shards))
        kept = largest + (whole if lanes > 1 else 0)
    return int(max(each.max() for each in pairs)) + kept


def _shards_per_batch(data: ShardRanges, order: Order, blocks: list[Block], batch: int) -> float:
    start = int(min(positions.min() for positions, _ in blocks))
    num = sum(len(samples) for _, samples in blocks)
    places = np.unique(np.linspace(0, max(0, num - batch), BATCHES).astype(np.int64))
    found = []
    for place in (start + places).tolist():
        samples = order.samples(place, place + batch)
        found.append(len(np.unique(data.index.shards_of(samples))))
    return float(np.mean(found))


def _counter(
    data: ShardRanges, lanes: int, readers: Readers, shared: bool = True
) -> Callable[[Indices, Indices], Requests]:
    """A function of (ranks, samples) of a block that returns their requests, in order of the ranks.

    Unless `shared`, each rank has its own cache.
    """
    index = data.index
    if readers.kind == "files":
        return lambda ranks, samples: (ranks, index.size[samples].astype(np.int64))
    if readers.kind == "stream" and readers.has_ranges:
        max_gap = MERGED_BYTES if lanes == 1 else 0
        return lambda ranks, samples: span_requests(index, ranks, samples, max_gap)
    limit: float = WHOLE_BYTES if lanes > 1 else 0  # of whole shards in the memory of a rank
    ranks_per_reader = 1
    if readers.kind == "cache":
        limit = math.inf if readers.cache_bytes is None else readers.cache_bytes
        ranks_per_reader = readers.ranks_per_node if shared else 1
    kept = collections.defaultdict[int, _Kept](lambda: _Kept(limit))

    def missing(ranks: Indices, items: Indices, num: Indices) -> NDArray[np.bool_]:
        """Which of the items, of these bytes, their readers do not have; they have them now."""
        who = (ranks // ranks_per_reader).tolist()
        rows = zip(who, items.tolist(), num.tolist(), strict=True)
        return np.asarray([kept[reader].read(item, size) for reader, item, size in rows])

    if readers.kind == "cache" and readers.has_ranges:
        chunks = Chunks(data)
        return lambda ranks, samples: _chunk_requests(data, chunks, ranks, samples, missing)
    files = np.asarray([shard.filesize for shard in data.shards])

    def whole_shards(ranks: Indices, samples: Indices) -> Requests:
        pairs = np.unique(ranks * len(files) + index.shards_of(samples))
        who, shards = pairs // len(files), pairs % len(files)
        fetched = missing(who, shards, files[shards])
        return who[fetched], files[shards][fetched]

    return whole_shards


class _Kept:
    """The items that a reader used last, up to `limit` bytes."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._items: collections.OrderedDict[int, int] = collections.OrderedDict()
        self._total = 0

    def read(self, item: int, num_bytes: int) -> bool:
        """Use an item; returns whether it has to be fetched."""
        if item in self._items:
            self._items.move_to_end(item)
            return False
        self._items[item] = num_bytes
        self._total += num_bytes
        while self._total > self._limit:
            self._total -= self._items.popitem(last=False)[1]
        return True


def span_requests(index: Index, ranks: Indices, samples: Indices, max_gap: int) -> Requests:
    """The requests of each rank for its samples of a block: its `ranges.spans` of every shard."""
    in_order = np.argsort(ranks * len(index.size) + samples)
    ranks, samples = ranks[in_order], samples[in_order]
    starts = index.offset[samples].astype(np.int64)
    stops = starts + index.size[samples]
    apart = (np.diff(samples) > 1) & (starts[1:] - stops[:-1] > max_gap)
    shards = index.shards_of(samples)
    return _joined(ranks, shards, starts, MAX_BYTES, apart, starts - tar.BLOCK, stops)


def _chunk_requests(
    data: ShardRanges,
    chunks: Chunks,
    ranks: Indices,
    samples: Indices,
    missing: Callable[[Indices, Indices, Indices], NDArray[np.bool_]],
) -> Requests:
    """The requests of each rank for the chunks of its samples: its `Chunks.runs` of every shard."""
    index = data.index
    sizes = np.asarray([shard.nsamples for shard in data.shards])
    total = int(sizes.sum())  # not less than the chunks
    pairs, rows = np.unique(ranks * total + chunks.of(samples), return_index=True)
    ranks, numbers = pairs // total, pairs % total
    shards = index.shards_of(samples[rows])
    begins = index.first[shards]
    first = begins + (samples[rows] - begins) // chunks.each * chunks.each
    last = np.minimum(first + chunks.each, begins + sizes[shards]) - 1
    starts = index.offset[first].astype(np.int64) - tar.BLOCK
    stops = index.offset[last].astype(np.int64) + index.size[last]
    rows = np.flatnonzero(missing(ranks, numbers, stops - starts))
    ranks, numbers, shards = ranks[rows], numbers[rows], shards[rows]
    run = max(1, MAX_BYTES // chunks.bytes)
    return _joined(ranks, shards, numbers, run, np.diff(numbers) > 1, starts[rows], stops[rows])


def _joined(
    ranks: Indices,
    shards: Indices,
    places: Indices,
    limit: int,
    apart: NDArray[np.bool_],
    starts: Indices,
    stops: Indices,
) -> Requests:
    """Bytes [start, stop) of shards, each joined with the one after it unless they are `apart`.

    Those of a rank and shard are cut at every `limit` places after the first one.
    """
    if not len(ranks):
        return ranks, starts
    new = np.append(True, (np.diff(ranks) != 0) | (np.diff(shards) != 0))
    first = places[np.flatnonzero(new)][np.cumsum(new) - 1]
    cut = np.diff((places - first) // limit) > 0
    begins = np.flatnonzero(new | np.append(True, apart | cut))
    ends = np.append(begins[1:], len(ranks)) - 1
    return ranks[begins], stops[ends] - starts[begins]


def _sums(groups: Indices, values: NDArray[np.integer], num: int) -> Indices:
    """The sum of the values of each of `num` groups."""
    return np.bincount(groups, values, num).astype(np.int64)

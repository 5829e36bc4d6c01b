"""The order of samples: exact for every world size, equal on every platform."""

from __future__ import annotations

import numpy as np
import pytest

from bigan.data.permutation import permutation
from bigan.data.streaming.order import (
    ORDER_VERSION,
    Order,
    default_lanes,
    grouped,
    rank_positions,
    rank_range,
)
from bigan.distributed.world import World

UNEVEN = [7, 1, 13, 5, 0, 9, 2, 11]  # 48 samples
GOLDEN = {
    0: [6, 5, 7, 3, 4, 1, 2, 0, 4, 1, 3, 2, 0, 5, 6, 7, 4, 3, 7, 5],
    1: [7, 5, 0, 1, 2, 6, 4, 3, 4, 6, 5, 3, 7, 1, 0, 2, 6, 7, 0, 2],
    7: [7, 2, 1, 6, 0, 5, 3, 4, 5, 7, 6, 4, 3, 1, 2, 0, 5, 1, 6, 7],
}


def test_golden_order() -> None:
    """A change of the order breaks running jobs: increase ORDER_VERSION with these values."""
    assert ORDER_VERSION == 1
    found = {seed: Order([3, 2, 3], seed, block=4).samples(0, 20).tolist() for seed in (0, 1, 7)}
    assert found == GOLDEN


def test_golden_permutation() -> None:
    assert permutation(10, 3, "stream", 5).tolist() == [0, 3, 9, 8, 1, 2, 4, 6, 7, 5]


@pytest.mark.parametrize("block", [1, 10, 24, 10_000])
@pytest.mark.parametrize("sizes", [UNEVEN, [1], [100], [4] * 12])
def test_every_epoch_is_a_permutation(sizes: list[int], block: int) -> None:
    num = sum(sizes)
    epochs = Order(sizes, 3, block).samples(0, 5 * num).reshape(5, num)
    assert (np.sort(epochs, axis=1) == np.arange(num)).all()
    if num > 40:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5


def test_order_depends_on_seed_and_block() -> None:
    orders = [Order(UNEVEN, s, b).samples(0, 48).tolist() for s, b in [(0, 9), (1, 9), (0, 48)]]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("block", [1, 10, 48])
def test_order_does_not_depend_on_the_lookups(block: int) -> None:
    full = Order(UNEVEN, 0, block).samples(0, 200)
    pieces = Order(UNEVEN, 0, block)
    random = np.random.default_rng(0)
    for _ in range(200):  # forwards, backwards, across blocks and epochs
        start, stop = sorted(random.integers(0, 201, 2))
        assert np.array_equal(pieces.samples(start, stop), full[start:stop])


def test_blocks_are_local_and_shuffled_inside() -> None:
    """A block of 10 shards reads 10 shards only; its samples are not in shard order."""
    samples = Order([10] * 100, 0, block=100).samples(0, 1000).reshape(10, 100)
    assert all(len(set(block // 10)) == 10 for block in samples)
    assert all(len(set(block[:10] // 10)) > 3 for block in samples)
    full = Order([10] * 100, 0, block=1000).samples(0, 100)
    assert len(set((full // 10).tolist())) > 40


def test_far_seek_needs_one_block() -> None:
    order = Order([1000] * 1281, 0, block=65_536)
    position = 10**12 + 12_345
    there = order.samples(position, position + 10)
    came_from_before = Order([1000] * 1281, 0, block=65_536).samples(
        position - 70_000, position + 10
    )
    assert np.array_equal(there, came_from_before[-10:])
    assert sum(len(block) for block in order._blocks.values()) <= 67_000


@pytest.mark.parametrize("size", range(1, 65))
def test_ranks_cover_every_epoch_once_in_order(size: int) -> None:
    """All positions of a step are read, each by one rank; concatenated they are in global order."""
    accumulation, each = 2, 3
    batch = size * accumulation * each
    order = Order(UNEVEN, 5, 20)
    seen: list[int] = []
    images_seen = 0
    while images_seen < 2 * 48 + batch:
        ranks = [
            rank_positions(images_seen, batch, accumulation, World(r, size)) for r in range(size)
        ]
        for micro in range(accumulation):
            joined = np.concatenate([rank[micro] for rank in ranks])
            assert all(len(rank[micro]) == each for rank in ranks)
            seen += order.at(joined).tolist()
        images_seen += batch
    reference = Order(UNEVEN, 5, 20).samples(0, len(seen)).tolist()
    assert seen == reference
    assert sorted(seen[:48]) == sorted(seen[48:96]) == list(range(48))


def test_global_micro_batches_do_not_depend_on_the_world_size() -> None:
    def joined(size: int) -> list[list[int]]:
        ranks = [rank_positions(96, 48, 2, World(r, size)) for r in range(size)]
        return [np.concatenate([rank[m] for rank in ranks]).tolist() for m in range(2)]

    worlds = [size for size in range(1, 65) if 24 % size == 0]
    assert all(joined(size) == joined(1) for size in worlds)
    assert joined(1) == [list(range(96, 120)), list(range(120, 144))]


def test_elastic_resume_loses_and_repeats_no_sample() -> None:
    """A run that changes its world size at every step reads the same samples as one process."""
    order = Order(UNEVEN, 1, 16)
    seen: list[int] = []
    images_seen = 0
    for size in [*range(1, 65), 7, 3, 1]:
        batch = 2 * size
        ranks = [rank_positions(images_seen, batch, 1, World(r, size)) for r in range(size)]
        seen += [int(i) for rank in ranks for i in order.at(rank[0])]
        images_seen += batch
    assert seen == Order(UNEVEN, 1, 16).samples(0, images_seen).tolist()
    assert all(
        sorted(seen[e * 48 : e * 48 + 48]) == list(range(48)) for e in range(images_seen // 48)
    )


def test_uneven_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="evenly"):
        rank_positions(0, 10, 3, World())
    with pytest.raises(ValueError, match="evenly"):
        rank_positions(0, 10, 1, World(0, 4))
    with pytest.raises(ValueError, match="at least one sample"):
        Order([0, 0], 0, 10)


@pytest.mark.parametrize("num", [0, 1, 5, 48, 500])
def test_rank_ranges_are_one_pass_in_order(num: int) -> None:
    for size in range(1, 65):
        parts = [rank_range(num, World(r, size)) for r in range(size)]
        assert [i for part in parts for i in part] == list(range(num))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("lanes", [1, 2, 5, 48, 100])
@pytest.mark.parametrize("block", [1, 10, 48, 1000])
def test_blocks_and_their_ends(block: int, lanes: int) -> None:
    """Blocks are local, and `block_end` is where all of a block has been read."""
    order = Order(UNEVEN, 0, block, lanes)
    positions = np.arange(4 * 48)
    blocks = order.blocks(positions)
    for each in np.unique(blocks).tolist():
        assert order.block_end(each) == positions[blocks <= each].max() + 1
        for lane in range(lanes if lanes > 1 else 0):
            num = ((blocks == each) & (positions % lanes == lane)).sum()
            assert num <= max(1, block // lanes)


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_groups_are_the_blocks(lanes: int) -> None:
    """`grouped` holds every position once, those of one block together."""
    order = Order(UNEVEN, 0, 16, lanes)
    parts = [(p, order.at(p)) for p in np.arange(192).reshape(-1, 6)]
    groups = list(grouped(iter(parts), Order(UNEVEN, 0, 16, lanes)))
    assert sorted(np.concatenate([p for p, _ in groups]).tolist()) == list(range(192))
    for positions, samples in groups:
        assert len(np.unique(order.blocks(positions))) == 1
        assert np.array_equal(samples, order.at(positions))


# --- lanes ---------------------------------------------------------------------------------------

GOLDEN_LANES = {
    2: [4, 7, 3, 0, 5, 1, 6, 2, 3, 5, 4, 2, 0, 6, 1, 7, 3, 7, 4, 0],
    3: [3, 6, 1, 4, 7, 2, 5, 0, 5, 3, 1, 6, 4, 2, 7, 0, 5, 0, 3, 6],
}


def test_golden_order_of_lanes() -> None:
    """See `test_golden_order`."""
    found = {n: Order([3, 2, 3], 0, 4, n).samples(0, 20).tolist() for n in GOLDEN_LANES}
    assert found == GOLDEN_LANES


@pytest.mark.parametrize("case", range(60))
def test_lanes_of_random_settings(case: int) -> None:
    """Random shards, lanes, blocks, batches, stages, ranks and accumulations.

    Every epoch is a permutation, ranks read the positions of a step once, micro-batches do not
    depend on their number, and every lane reads its own part of the sequence of an epoch.
    """
    draw = np.random.default_rng(case)
    sizes = draw.integers(0, 20, draw.integers(1, 12))
    sizes[0] += 1
    num, lanes, block = int(sizes.sum()), int(draw.integers(1, 20)), int(draw.integers(1, 80))
    reference = Order(sizes, case, block, lanes).samples(0, 6 * num)
    assert (np.sort(reference.reshape(6, num), axis=1) == np.arange(num)).all()
    order, seen, images_seen = Order(sizes, case, block, lanes), [], 0
    while images_seen < 4 * num:  # another batch, world size and accumulation in every step
        size, accumulation = (int(n) for n in draw.integers(1, 5, 2))
        batch = size * accumulation * int(draw.integers(1, 6))
        ranks = [
            rank_positions(images_seen, batch, accumulation, World(r, size), lanes)
            for r in range(size)
        ]
        one = rank_positions(images_seen, batch, accumulation, World(), lanes)
        for micro in range(accumulation):
            joined = np.concatenate([rank[micro] for rank in ranks])
            assert joined.tolist() == one[micro].tolist()
            seen += sorted(joined.tolist())
            assert np.array_equal(order.at(joined), reference[joined % (6 * num)]) or (
                joined.max() >= 6 * num
            )
        images_seen += batch
    assert seen == list(range(images_seen))


def test_lanes_read_consecutive_parts_of_the_shards() -> None:
    """With 8 lanes over 100 shards, a lane reads at most 14 shards, and ranks share few of them."""
    sizes, num = [10] * 100, 1000
    samples = Order(sizes, 0, 400, 8).samples(0, num)
    shards = [set((samples[lane::8] // 10).tolist()) for lane in range(8)]
    assert max(map(len, shards)) <= 14
    assert sum(map(len, shards)) <= 100 + 7
    for size in (2, 4, 8):
        pairs = 0
        for rank in range(size):
            mine = [
                p
                for start in range(0, num - 40, 40)
                for p in rank_positions(start, 40, 1, World(rank, size), 8)
            ]
            pairs += len(set((samples[np.concatenate(mine)] // 10).tolist()))
        assert pairs <= 100 + size - 1


@pytest.mark.parametrize(
    ("batches", "lanes"),
    [
        ([2048], 256), ([1536], 192), ([48], 48), ([1000], 200), ([7], 7), ([1], 1), ([257], 1),
        ([128, 64, 48], 16),
    ],
)  # fmt: skip
def test_default_lanes(batches: list[int], lanes: int) -> None:
    """Most world sizes that divide the batches divide the lanes, too."""
    assert default_lanes(batches, 10**6) == lanes
    assert default_lanes(batches, 3) <= 3


def test_far_positions_are_found_at_once() -> None:
    """1e10 samples: the order is not enumerated."""
    order = Order(np.full(1_000_000, 10_000), 0, 65_536, 256)
    positions = np.arange(10**15, 10**15 + 2048)
    assert len(set(order.at(positions).tolist())) == 2048
    assert sum(len(block) for block in order._blocks.values()) <= 65_536

"""The counted traffic is that of the readers: by brute force, and of real streams over HTTP."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from streams import num_bytes
from web import Web, serving

from bigan.data.format.manifest import Index, Manifest, Shard
from bigan.data.packing.pack import pack
from bigan.data.settings import Fetch
from bigan.data.streaming import ranges, traffic
from bigan.data.streaming.order import Order, default_lanes, grouped, rank_positions
from bigan.data.streaming.ranges import ShardRanges
from bigan.data.streaming.stream import ShardStream
from bigan.data.streaming.traffic import Readers, blocks_of_epoch, simulate
from bigan.distributed.world import World

NUM, BATCH, BLOCK = 1440, 48, 480


def made_up(sizes: np.ndarray, images: np.ndarray) -> ShardRanges:
    """Shards with `sizes` samples, whose images have these bytes; there are no files."""
    padded = 512 + -(-images.astype(np.int64) // 512) * 512 + 1024
    first = np.cumsum(sizes) - sizes
    ends = np.cumsum(padded)
    before = np.repeat(np.append(0, ends)[first], sizes)
    offset = ends - padded - before + 512
    shards = tuple(
        Shard(
            url=f"{n}.tar", nsamples=int(size), filesize=int(total) + 1024, sha256="", split="train"
        )
        for n, (size, total) in enumerate(zip(sizes, np.add.reduceat(padded, first), strict=True))
    )
    zeros = np.zeros(len(images), np.uint32)
    index = Index(
        offset.astype(np.uint64), images.astype(np.uint32), zeros.astype(np.int32), zeros, first
    )
    manifest = Manifest.model_construct(folder=Path(), shardlist=shards)
    return ShardRanges(manifest, "train", index, None, False)


def rank_blocks(order: Order, readers: Readers, rank: int, epoch: int) -> Iterator[np.ndarray]:
    """The samples of each block of an epoch that a rank reads, as its stream does."""
    low, high = epoch * order.num_samples, (epoch + 1) * order.num_samples

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(low // readers.batch * readers.batch, high, readers.batch):
            world = World(rank, readers.world_size)
            steps = rank_positions(start, readers.batch, readers.accumulation, world, order.lanes)
            for positions in steps:
                mine = positions[(positions >= low) & (positions < high)]
                if len(mine):
                    yield mine, order.at(mine)

    for _, samples in grouped(parts(), order):
        yield np.sort(samples)


def by_hand(data: ShardRanges, order: Order, readers: Readers, epoch: int) -> dict[str, int]:
    """Bytes, requests, and largest memory and first block of a rank."""
    max_gap = ranges.MERGED_BYTES if order.lanes == 1 else 0
    nodes: dict[int, int] = {}
    num_requests, firsts, memory = 0, [], []
    for rank in range(readers.world_size):
        fetched, encoded = [], []
        for samples in rank_blocks(order, readers, rank, epoch):
            shards = data.index.shards_of(samples)
            parts = np.split(samples, np.flatnonzero(np.diff(shards)) + 1)
            found = [span for part in parts for span in ranges.spans(data.index, part, max_gap)]
            fetched.append(sum(span.stop - span.start for span in found))
            encoded.append(int(data.index.size[samples].sum()))
            num_requests += len(found)
        if not fetched:  # fewer samples than ranks
            continue
        node = rank // readers.ranks_per_node
        nodes[node] = nodes.get(node, 0) + sum(fetched)
        firsts.append(fetched[0])
        memory += [a + b for a, b in itertools.pairwise([*encoded, encoded[0]])]
    return {
        "num_bytes": sum(nodes.values()), "node_bytes": max(nodes.values()),
        "requests": num_requests, "first_batch_bytes": max(firsts), "memory_bytes": max(memory),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
def test_counts_are_those_of_the_readers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random sizes, lanes, blocks, ranks and accumulations; requests of at most a few images."""
    random = np.random.default_rng(seed)
    for module in (ranges, traffic):
        monkeypatch.setattr(module, "MAX_BYTES", 20_000)
        monkeypatch.setattr(module, "MERGED_BYTES", 5_000)
    sizes = random.integers(1, 60, random.integers(1, 20))
    data = made_up(sizes, random.integers(1, 4000, sizes.sum()))
    world, accumulation = int(random.integers(1, 7)), int(random.integers(1, 4))
    batch = world * accumulation * int(random.integers(1, 9))
    lanes, block = int(random.choice([1, 2, 4, 7, 16])), int(random.integers(1, sizes.sum() + 9))
    order = Order(sizes, seed, block, lanes)
    readers = Readers(world, batch, accumulation, ranks_per_node=int(random.integers(1, 4)))
    for epoch in (0, 1):
        blocks = blocks_of_epoch(order, epoch)
        found = simulate(data, order, blocks, readers)
        expected = by_hand(data, order, readers, epoch)
        if any(
            len(list(rank_blocks(order, readers, r, epoch))) < len(blocks) for r in range(world)
        ):
            del expected["memory_bytes"]  # counted for consecutive blocks, of which it reads none
        assert found.counted == 1
        assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize("lanes", [1, 4, 6, 7, 10])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_owners_are_the_ranks_that_read_positions(lanes: int, ranks: int) -> None:
    readers = Readers(ranks, 48, 2)
    owners = traffic.owners(readers, lanes)
    for rank, start in itertools.product(range(ranks), (0, 48, 480)):
        for positions in rank_positions(start, 48, 2, World(rank, ranks), lanes):
            assert set(owners[positions % len(owners)]) == {rank}


def test_lanes_that_fit_are_read_by_one_rank_each() -> None:
    for world, batch in itertools.product((1, 2, 3, 8, 24, 64, 512), (1, 2, 6, 16)):
        lanes = traffic.fitting_lanes([batch * world, 4 * batch * world], world)
        assert traffic.ranks_per_lane(Readers(world, batch * world), lanes) == 1
    assert traffic.fitting_lanes([2048], 64) == default_lanes([2048], 10**6) == 512
    assert traffic.ranks_per_lane(Readers(12, 48), 16) > 1


def test_a_long_epoch_is_extrapolated() -> None:
    sizes = np.full(100, 50)
    data = made_up(sizes, np.full(5000, 3000))
    order, readers = Order(sizes, 0, 500, 10), Readers(5, 50)
    whole = simulate(data, order, blocks_of_epoch(order), readers)
    part = simulate(data, order, blocks_of_epoch(order, max_samples=1200), readers)
    assert (part.counted, whole.counted) == (0.3, 1)
    assert part.num_bytes == pytest.approx(whole.num_bytes, rel=0.02)
    assert part.requests == pytest.approx(whole.requests, rel=0.1)


def test_imagenet_on_1024_ranks_is_counted_in_seconds() -> None:
    sizes = np.append(np.full(1143, 1120), 1007)
    data = made_up(sizes, np.full(sizes.sum(), 117_000))
    began = time.process_time()
    order = Order(sizes, 0, 65_536, 256)
    found = simulate(data, order, blocks_of_epoch(order), Readers(1024, 2048))
    fitting = simulate(data, order, blocks_of_epoch(order), Readers(256, 2048))
    assert time.process_time() - began < 20
    assert (found.ranks_per_lane, fitting.ranks_per_lane) == (4, 1)
    assert 0.99 < fitting.ratio <= 1
    assert found.requests > 20 * fitting.requests  # nearly one for each image
    assert fitting.first_batch_bytes < 1.2 * fitting.set_bytes * 65_536 / sizes.sum() / 256


# --- real streams over HTTP -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,440 PNG files of random sizes, in 36 shards of 40."""
    folder = tmp_path_factory.mktemp("data") / "images"
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (NUM, 16, 16, 3), dtype=np.uint8)
    for number in range(NUM):
        noise[number, number % 16 :] = 0
    pack([(image, n % 10) for n, image in enumerate(noise)], folder, resolution=16,
         shard_size=40, test_fraction=0, encoding="png")  # fmt: skip
    return folder


@pytest.fixture
def web(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    with serving(images) as server:
        yield server


def served(web: Web) -> tuple[int, int]:
    """(bytes, requests) of shards."""
    return num_bytes(web), sum(n for name, n in web.requests.items() if name.endswith(".tar"))


QUICK = [
    *((size, None, True, False) for size in (1, 2, 4, 8)),
    (4, None, True, True),
    (4, None, False, False),
    (4, 1, True, False),
    (4, 6, True, False),
]
FULL = [
    case
    for case in itertools.product((1, 2, 4, 8), (None, 1, 6, 7), (True, False), (True, False))
    if case not in QUICK
]


@pytest.mark.parametrize(
    ("size", "lanes", "ranges", "cached"),
    [
        *QUICK,
        *(pytest.param(*case, marks=pytest.mark.full) for case in FULL[::7]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in FULL if case not in FULL[::7]),
    ],
)
def test_counts_are_those_of_real_streams(
    web: Web, images: Path, tmp_path: Path, size: int, lanes: int | None, ranges: bool, cached: bool
) -> None:
    """After 21 of 30 batches the last block is read, but not yet the first one of the next epoch.

    Requests of a cache are not compared: the first batches do not wait for those of their block.
    """
    web.ranges = ranges
    manifest = Manifest.load(images)
    lanes = lanes or default_lanes([BATCH], NUM)
    order = Order([shard.nsamples for shard in manifest.shards("train")], 0, BLOCK, lanes)
    kind = "cache" if cached else "stream"
    readers = Readers(size, BATCH, ranks_per_node=2, kind=kind, has_ranges=ranges)
    data = ShardRanges(manifest, "train", manifest.load_index("train"), None, False)
    expected = simulate(data, order, blocks_of_epoch(order), readers)
    with contextlib.ExitStack() as opened:
        for rank in range(size):
            cache = tmp_path / f"node{rank // 2}" if cached else None
            stream = ShardStream(
                web.url, "train", seed=0, world=World(rank, size), batch=BATCH, block=BLOCK,
                lanes=lanes, fetch=Fetch(prefetch=1, cache=cache),
            )  # fmt: skip
            for _ in itertools.islice(opened.enter_context(stream), 21):
                pass
        end = time.monotonic() + 20
        while served(web)[0] < 0.99 * expected.num_bytes and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)
        found = served(web)
    assert found[0] == pytest.approx(expected.num_bytes, rel=0.05)
    if not cached:
        assert found == (expected.num_bytes, expected.requests)

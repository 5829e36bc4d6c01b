"""Ranks that read a URL: every byte is fetched once, every image is read once, by all together."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from streams import num_bytes
from web import Web, serving

from bigan.data import DataError
from bigan.data.format.manifest import Manifest
from bigan.data.packing.pack import pack
from bigan.data.settings import Fetch
from bigan.data.streaming.stream import ShardStream
from bigan.distributed.world import World

NUM, BATCH, BLOCK = 1440, 48, 480


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,440 images whose pixels are their number, in 36 shards of 40."""
    folder = tmp_path_factory.mktemp("data") / "numbered"
    images = []
    for number in range(NUM):
        image = np.zeros((16, 16, 3), np.uint8)
        image[0, 0] = (*divmod(number, 256), 0)
        images.append((image, number % 10))
    pack(images, folder, resolution=16, shard_size=40, test_fraction=0)
    return folder


@pytest.fixture
def web(numbered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    with serving(numbered) as server:
        yield server


def size_of(web: Web) -> int:
    return sum(shard.filesize for shard in Manifest.load(web.folder).shards("train"))


def stream(url: str | Path, world: World, **changes: object) -> ShardStream:
    settings: dict = {"seed": 0, "batch": BATCH, "block": BLOCK, **changes}
    return ShardStream(url, "train", world=world, **settings)


def numbers(opened: ShardStream, num: int) -> list[int]:
    """The numbers in the images of `num` micro-batches."""
    batches = list(itertools.islice(opened, num))
    return [int(p[0, 0, 0]) * 256 + int(p[0, 0, 1]) for b in batches for p in b.pixels]


def epoch(url: str, size: int, start: int = 0, stop: int = NUM, **changes: object) -> list[int]:
    """What `size` ranks read from position `start` to `stop`."""
    found = []
    for rank in range(size):
        with stream(url, World(rank, size), images_seen=start, **changes) as opened:
            found += numbers(opened, (stop - start) // BATCH)
    return found


@pytest.mark.parametrize(
    ("ranges", "cached"),
    [
        (True, False),
        (False, False),
        pytest.param(True, True, marks=pytest.mark.full),
        pytest.param(False, True, marks=pytest.mark.full),
    ],
)
def test_the_bytes_do_not_grow_with_the_number_of_ranks(
    web: Web, tmp_path: Path, ranges: bool, cached: bool
) -> None:
    """Servers that do not answer range requests cost one shard more at each border of ranks.

    When 21 of the 30 batches have been read, the last block has been fetched, but not yet the first
    one of the next epoch.
    """
    web.ranges = ranges
    fetched = {}
    for size in (1, 3, 8):
        web.bytes.clear()
        for rank in range(size):
            cache = tmp_path / f"{size}-{rank}" if cached else None
            fetch = Fetch(prefetch=1, cache=cache)
            with stream(web.url, World(rank, size), fetch=fetch) as opened:
                numbers(opened, 21)
        fetched[size] = num_bytes(web)
    for size, num in fetched.items():
        extra = 0 if ranges else size_of(web) * (size - 1) / 36
        assert num <= 1.01 * fetched[1] + extra
    assert 0.85 * size_of(web) < fetched[1] <= size_of(web)


def test_the_first_batch_needs_the_own_part_of_the_first_block(web: Web) -> None:
    for ranks in (1, 3, 8):
        for rank in {0, ranks - 1}:
            web.bytes.clear()
            with stream(web.url, World(rank, ranks)) as opened:
                next(opened)
                assert num_bytes(web) <= 1.2 * size_of(web) * BLOCK / NUM / ranks


@pytest.mark.parametrize("cached", [pytest.param(False, marks=pytest.mark.slow), True])
def test_eight_ranks_then_four_then_two_read_every_image_once(
    web: Web, tmp_path: Path, cached: bool
) -> None:
    """Stopped after 13 and after 21 of 30 batches, each time with batches that were read ahead."""
    fetch = Fetch(cache=tmp_path / "cache") if cached else Fetch()
    found = epoch(web.url, 8, 0, 13 * BATCH, fetch=fetch)
    found += epoch(web.url, 4, 13 * BATCH, 21 * BATCH, fetch=fetch)
    found += epoch(web.url, 2, 21 * BATCH, 30 * BATCH, fetch=fetch)
    assert sorted(found) == list(range(NUM))


def test_two_nodes_with_small_caches_fetch_the_set_once(web: Web, tmp_path: Path) -> None:
    """Caches of a third of the set, two ranks on each node, over two epochs."""
    for rank in range(4):
        node = tmp_path / f"node{rank // 2}"
        fetch = Fetch(cache=node, cache_bytes=size_of(web) // 3, prefetch=1)
        with stream(web.url, World(rank, 4), fetch=fetch) as opened:
            numbers(opened, 2 * NUM // BATCH)
        held = sum(file.stat().st_size for file in node.glob("*.*-*"))
        assert held <= size_of(web) // 3
    assert num_bytes(web) <= 1.3 * 2 * size_of(web)


def test_a_cache_keeps_what_its_ranks_need(web: Web, tmp_path: Path) -> None:
    """A node with two of four ranks holds half of the images, after an epoch."""
    for rank in (0, 1):
        with stream(web.url, World(rank, 4), fetch=Fetch(cache=tmp_path / "node")) as opened:
            numbers(opened, NUM // BATCH)
    files = len(list((tmp_path / "node").glob("*.*-*")))  # of one image each
    assert NUM // 2 <= files <= NUM // 2 + BLOCK // 2  # the next epoch's first block is read ahead


def test_ranks_that_do_not_divide_the_lanes_read_every_image_once(web: Web) -> None:
    found = epoch(web.url, 4, lanes=7)
    assert sorted(found) == list(range(NUM))


def test_a_small_cache_is_judged_by_the_part_of_the_rank(web: Web, tmp_path: Path) -> None:
    fetch = Fetch(cache=tmp_path / "cache", cache_bytes=size_of(web) // 6)
    with pytest.raises(DataError, match="cannot hold two blocks"):
        stream(web.url, World(0, 2), fetch=fetch)
    stream(web.url, World(0, 4), fetch=fetch).close()


def test_micro_batches_with_more_blocks_than_are_held(web: Web) -> None:
    """A batch that needs several blocks of each lane is read all the same."""
    found = epoch(web.url, 2, 0, 10 * BATCH, block=24, lanes=8)
    assert len(set(found)) == len(found) == 10 * BATCH


def test_a_small_cache_is_judged_by_the_ranks_of_the_node(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    fetch = Fetch(cache=tmp_path / "cache", cache_bytes=size_of(web) // 6)
    with pytest.raises(DataError, match="cannot hold two blocks"):
        stream(web.url, World(0, 4), fetch=fetch)


def test_a_failed_shard_is_reported_while_others_hang(numbered: Path, web: Web) -> None:
    """The other downloads are cancelled, not waited for."""
    missing, hanging = "train-000007.tar", {"train-000003.tar", "train-000011.tar"}
    web.fault = lambda number, name: "404" if name == missing else "hang" if name in hanging else ""
    began = time.monotonic()
    with stream(web.url, World(), block=NUM) as opened, pytest.raises(DataError, match=missing):
        numbers(opened, 30)
    assert time.monotonic() - began < 15

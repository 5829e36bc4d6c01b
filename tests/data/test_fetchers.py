"""All fetchers return the same samples in the same order; URLs and caches."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from streams import BLOCK, data_threads, same, take
from web import Web

from bigan.data import DataError
from bigan.data.format.manifest import Manifest
from bigan.data.settings import DataConfig, Fetch
from bigan.data.streaming import cache
from bigan.data.streaming.order import Order, grouped
from bigan.data.streaming.stores import Store
from bigan.data.streaming.stream import ShardStream, sequential
from bigan.distributed.world import World

# --- one order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [World(), World(1, 3)])
@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_local_modes_are_equal(digits8: Path, mode: str, world: World) -> None:
    """Across the end of an epoch, from the middle of a block, on 1 and on 3 ranks."""
    want = take(digits8, world=world, images_seen=480)
    assert same(want, take(digits8, world=world, images_seen=480, fetch=Fetch(mode=mode)))
    assert not data_threads()


@pytest.mark.parametrize("how", [{}, {"mode": "resident"}, {"cache": Path("cache")}])
def test_remote_modes_are_equal(digits8: Path, web: Web, tmp_path: Path, how: dict) -> None:
    if "cache" in how:
        how = {"cache": tmp_path / "cache"}
    assert same(take(digits8), take(web.url, fetch=Fetch(**how)))
    assert not data_threads()


def test_evaluation_reads_a_url_once(digits8: Path, web: Web) -> None:
    want = list(sequential(digits8, "test", World(1, 2), 64))
    assert same(want, list(sequential(web.url, "test", World(1, 2), 64)))
    assert max(n for name, n in web.requests.items() if name.endswith(".tar")) == 1


def test_evaluation_batch_must_be_positive(digits8: Path) -> None:
    with pytest.raises(DataError, match="must be positive"):
        sequential(digits8, "test", World(), 0)


def test_groups_end_with_the_blocks() -> None:
    order = Order([10, 7, 9], 0, 10)
    ends = list(itertools.islice(order.block_ends(30), 6))
    assert all(end > 30 for end in ends)
    assert ends == sorted(set(ends))
    full = list(itertools.islice(order.block_ends(0), 12))
    assert 26 in full  # the end of an epoch ends a block
    assert 52 in full
    parts = [(np.arange(i, i + 4), np.arange(i, i + 4)) for i in range(0, 60, 4)]
    found = list(itertools.islice(grouped(iter(parts), iter(full)), 4))
    assert [int(p[-1]) + 1 for p, _ in found] == full[:4]
    assert np.concatenate([p for p, _ in found]).tolist() == list(range(full[3]))


def test_fetch_settings() -> None:
    assert [Fetch().num_threads(r) for r in (32, 64, 65, 256)] == [1, 1, 2, 2]
    assert Fetch(threads=5).num_threads(32) == 5
    assert DataConfig(path="data/digits/").path == "data/digits"
    assert DataConfig(path="s3://bucket/x/").path == "s3://bucket/x/"
    assert DataConfig(path="pipe:cat a//b").path == "pipe:cat a//b"


# --- streaming and caching ------------------------------------------------------------------------


def test_stream_holds_two_blocks_at_most(digits8: Path) -> None:
    fetch = Fetch(mode="stream", prefetch=1, threads=1)
    settings: dict = {"seed": 0, "world": World(), "batch": 20, "block": 200}
    with ShardStream(digits8, "train", fetch=fetch, **settings) as stream:
        held = []
        for _ in itertools.islice(stream, 60):
            source = stream._fetcher._source  # type: ignore[attr-defined]
            held.append(max(len(source._ready), len(source._block_of)))
    assert 0 < max(held) <= 2 * 300  # a block consists of entire shards of 100 samples


def test_broken_transfers_are_repeated(digits8: Path, web: Web) -> None:
    web.cut["train-000003.tar"] = 2
    assert same(take(digits8), take(web.url))
    assert web.requests["train-000003.tar"] >= 3


def test_a_truncated_shard_stops_the_run(web: Web) -> None:
    web.cut["train-000003.tar"] = 10**9
    with pytest.raises(DataError, match=r"train-000003\.tar: cannot be read.*bytes arrived") as got:
        take(web.url, fetch=Fetch(patience_seconds=1))
    assert "\n" not in str(got.value)
    assert not data_threads()


@pytest.mark.parametrize("cached", [False, True])
def test_close_does_not_wait_for_a_silent_server(web: Web, tmp_path: Path, cached: bool) -> None:
    web.silent = "train-000004.tar"
    fetch = Fetch(cache=tmp_path / "cache") if cached else Fetch()
    settings: dict = {"seed": 0, "world": World(), "batch": 48, "block": BLOCK, "fetch": fetch}
    stream = ShardStream(web.url, "train", **settings)
    threading.Timer(1.0, stream._fetcher.stop.set).start()
    threading.Timer(1.0, stream._fetcher.close).start()
    with pytest.raises((RuntimeError, DataError), match=r"closed|cannot be read"):
        list(itertools.islice(stream, 100))
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 2
    assert not data_threads()


def test_download_with_wrong_sha256(digits8: Path, tmp_path: Path, web: Web) -> None:
    web.folder = tmp_path / "changed"
    shutil.copytree(digits8, web.folder)
    shard = web.folder / "train-000002.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"train-000002\.tar: cannot be read.*sha256"):
        take(web.url)


def test_no_data_set_at_the_url(web: Web) -> None:
    with pytest.raises(DataError, match=r"nowhere/manifest\.json: cannot be read.*status 404"):
        take(f"{web.url}/nowhere")
    assert web.requests["nowhere/manifest.json"] == 1  # a 404 is not repeated
    with pytest.raises(DataError, match="unsupported URL scheme"):
        take("gopher://host/data")


def test_commands_must_be_allowed(digits8: Path, tmp_path: Path, web: Web) -> None:
    proof = tmp_path / "proof"
    url = f"pipe:touch {proof}; cat {digits8}"
    with pytest.raises(DataError, match=r"data\.allow_pipe=true"):
        take(url)
    assert not proof.exists()
    assert same(take(digits8, 3), take(f"pipe:cat {digits8}", 3, fetch=Fetch(allow_pipe=True)))


def test_rewritten_urls_must_be_allowed(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", f"{web.url}=pipe:cat ")
    with pytest.raises(DataError, match="GOPEN_REWRITE"):
        take("ais://bucket/set")
    assert take(web.url, 1)  # is not read through gopen


def test_cache_downloads_each_shard_once(digits8: Path, web: Web, tmp_path: Path) -> None:
    fetch = Fetch(cache=tmp_path / "cache")
    for rank in range(3):
        take(web.url, fetch=fetch, world=World(rank, 3))
    shards = [n for name, n in web.requests.items() if name.endswith(".tar")]
    assert len(shards) == 13
    assert set(shards) == {1}
    held = {path.stem for path in fetch.cache.glob("*.tar")}  # type: ignore[union-attr]
    assert held == {shard.sha256 for shard in Manifest.load(digits8).shards("train")}


def test_small_cache_evicts_and_loses_nothing(digits8: Path, web: Web, tmp_path: Path) -> None:
    sizes = [shard.filesize for shard in Manifest.load(digits8).shards("train")]
    limit = max(sizes) * 9
    fetch = Fetch(cache=tmp_path / "cache", cache_bytes=limit)
    assert same(take(digits8, 80, block=200), take(web.url, 80, fetch=fetch, block=200))
    assert sum(p.stat().st_size for p in (tmp_path / "cache").glob("*.tar")) <= limit
    assert sum(n for name, n in web.requests.items() if name.endswith(".tar")) > 13
    with pytest.raises(DataError, match="cannot hold two blocks"):
        take(web.url, fetch=Fetch(cache=tmp_path / "cache", cache_bytes=max(sizes)))
    everything = Fetch(cache=tmp_path / "cache", cache_bytes=sum(sizes))
    take(web.url, 1, fetch=everything, block=65_536)


def test_evicted_shards_do_not_stay_open(digits8: Path, web: Web, tmp_path: Path) -> None:
    """A deleted file occupies space while it is open."""
    largest = max(shard.filesize for shard in Manifest.load(digits8).shards("train"))
    fetch = Fetch(cache=tmp_path / "cache", cache_bytes=8 * largest)
    settings: dict = {"seed": 0, "world": World(), "batch": 48, "block": 200, "fetch": fetch}
    gc.collect()
    with ShardStream(web.url, "train", **settings) as stream:
        for _ in itertools.islice(stream, 60):
            deleted = 0
            for link in Path("/proc/self/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed in between
                    deleted += str(link.readlink()).endswith("tar (deleted)")
            assert deleted <= 4 + 2
    locks = {path.stem for path in (tmp_path / "cache").glob("*.lock")}
    assert locks <= {"eviction"}


def test_eviction_between_fetch_and_open(
    digits8: Path, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A race of the cache may cost a download, but never change a sample."""
    node = cache.NodeCache(tmp_path / "cache", Store(web.url))
    shard = Manifest.load(digits8).shards("train")[0]
    fetch, raced = node.fetch, []

    def fetch_then_evict(wanted: object) -> None:
        fetch(shard)
        if not raced:
            raced.append((tmp_path / "cache" / f"{shard.sha256}.tar").unlink())

    monkeypatch.setattr(node, "fetch", fetch_then_evict)
    descriptor = node.open(shard)
    try:
        assert os.read(descriptor, shard.filesize) == (digits8 / shard.url).read_bytes()
    finally:
        os.close(descriptor)
    assert node.num_downloads == 2


def test_truncated_download_is_never_cached(web: Web, tmp_path: Path) -> None:
    web.cut["train-000000.tar"] = 10**9
    with pytest.raises(DataError, match=r"train-000000\.tar"):
        take(web.url, fetch=Fetch(cache=tmp_path / "cache", patience_seconds=1))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix == ".tmp"]
    web.cut.clear()
    take(web.url, fetch=Fetch(cache=tmp_path / "cache"))


def test_random_access_needs_a_disk_and_resident_needs_memory(digits8: Path, web: Web) -> None:
    with pytest.raises(DataError, match=r"data\.cache=FOLDER"):
        take(web.url, fetch=Fetch(mode="random_access"))
    with pytest.raises(DataError, match=r"83,008 bytes of pixels.*data\.resident_bytes"):
        take(digits8, fetch=Fetch(mode="resident", resident_bytes=83_007))
    take(digits8, 1, fetch=Fetch(mode="resident", resident_bytes=83_008))

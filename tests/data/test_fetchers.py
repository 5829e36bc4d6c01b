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

import pytest
from streams import BLOCK, data_threads, flip, node_cache, num_bytes, same, take
from web import Web

from bigan.data import DataError
from bigan.data.format.manifest import Manifest
from bigan.data.settings import DataConfig, Fetch
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


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("how", [{}, {"mode": "resident"}, {"cache": Path("cache")}])
def test_remote_modes_are_equal(
    digits8: Path, web: Web, tmp_path: Path, how: dict, lanes: int
) -> None:
    """Also if the server answers range requests with all of a file."""
    world = World(1, 3) if lanes > 1 else World()
    settings: dict = {"lanes": lanes, "world": world, "images_seen": 480}
    want = take(digits8, **settings)
    for ranges in (True, False):
        web.ranges = ranges
        if "cache" in how:
            how = {"cache": tmp_path / f"cache-{ranges}"}
        assert same(want, take(web.url, fetch=Fetch(**how), **settings))
        assert not data_threads()


def test_evaluation_reads_a_url_once(digits8: Path, web: Web) -> None:
    want = list(sequential(digits8, "test", World(1, 2), 64))
    assert same(want, list(sequential(web.url, "test", World(1, 2), 64)))
    assert max(n for name, n in web.requests.items() if name.endswith(".tar")) == 1


def test_evaluation_batch_must_be_positive(digits8: Path) -> None:
    with pytest.raises(DataError, match="must be positive"):
        sequential(digits8, "test", World(), 0)


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
    with pytest.raises(DataError, match=r"train-000003\.tar: .*bytes arrived") as got:
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


@pytest.mark.parametrize("ranges", [True, False])
def test_an_image_that_is_damaged_in_the_store(
    digits8: Path, tmp_path: Path, web: Web, ranges: bool
) -> None:
    web.folder, web.ranges = tmp_path / "changed", ranges
    shutil.copytree(digits8, web.folder)
    manifest = Manifest.load(digits8)
    sample = int(manifest.load_index("train").first[2]) + 1
    flip(web.folder / "train-000002.tar", int(manifest.load_index("train").offset[sample]))
    for how in ({}, {"cache": tmp_path / "cache"}):
        with pytest.raises(DataError, match=r"train-000002\.tar.*(sha256|crc32)"):
            take(web.url, fetch=Fetch(**how))  # type: ignore[arg-type]


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


@pytest.mark.parametrize("lanes", [pytest.param(1, marks=pytest.mark.full), 24])
def test_cache_downloads_every_byte_once(
    digits8: Path, web: Web, tmp_path: Path, lanes: int
) -> None:
    """Three ranks with one cache, over more than an epoch."""
    fetch = Fetch(cache=tmp_path / "cache")
    for rank in range(3):
        take(web.url, fetch=fetch, world=World(rank, 3), lanes=lanes)
    manifest = Manifest.load(digits8)
    sizes = sum(shard.filesize for shard in manifest.shards("train"))
    assert num_bytes(web) <= sizes
    assert len(list((tmp_path / "cache").glob("*.*-*"))) == 1297  # chunks of one small image


def test_small_cache_evicts_and_loses_nothing(digits8: Path, web: Web, tmp_path: Path) -> None:
    sizes = [shard.filesize for shard in Manifest.load(digits8).shards("train")]
    limit = max(sizes) * 9
    fetch = Fetch(cache=tmp_path / "cache", cache_bytes=limit)
    assert same(take(digits8, 80, block=200), take(web.url, 80, fetch=fetch, block=200))
    assert sum(p.stat().st_size for p in (tmp_path / "cache").glob("*.*-*")) <= limit
    assert num_bytes(web) > 1.5 * 1297 * 704  # header and pixels of an image
    with pytest.raises(DataError, match="cannot hold two blocks"):
        take(web.url, fetch=Fetch(cache=tmp_path / "cache", cache_bytes=max(sizes)))
    everything = Fetch(cache=tmp_path / "cache", cache_bytes=sum(sizes))
    take(web.url, 1, fetch=everything, block=65_536)


def test_evicted_chunks_do_not_stay_open(digits8: Path, web: Web, tmp_path: Path) -> None:
    """A deleted file occupies space while it is open."""
    largest = max(shard.filesize for shard in Manifest.load(digits8).shards("train"))
    fetch = Fetch(cache=tmp_path / "cache", cache_bytes=8 * largest)
    settings: dict = {"seed": 0, "world": World(), "batch": 48, "block": 200, "fetch": fetch}
    gc.collect()
    with ShardStream(web.url, "train", lanes=1, **settings) as stream:
        for _ in itertools.islice(stream, 60):
            deleted = 0
            for link in Path("/proc/self/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed in between
                    target = link.readlink()
                    if str(target).startswith(str(fetch.cache)) and "(deleted)" in str(target):
                        deleted += link.stat().st_size
            assert deleted <= 5 * largest
    locks = {path.stem for path in (tmp_path / "cache").glob("*.lock")}
    assert locks <= {"eviction"}


def test_eviction_between_fetch_and_open(
    digits8: Path, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A race of the cache may cost a download, but never change a sample."""
    node = node_cache(digits8, web.url, tmp_path / "cache")
    fetch, raced = node.fetch, []

    def fetch_then_evict(chunks: list[int]) -> None:
        fetch(chunks)
        if not raced:
            raced.append((tmp_path / "cache" / node.chunks.name(3)).unlink())

    monkeypatch.setattr(node, "fetch", fetch_then_evict)
    descriptor = node.open(3)
    shard, span = Manifest.load(digits8).shards("train")[0], node.chunks.span(3)
    try:
        want = (digits8 / shard.url).read_bytes()[span.start : span.stop]
        assert os.read(descriptor, shard.filesize) == want
    finally:
        os.close(descriptor)
    assert node.num_downloads == 2


def test_a_damaged_file_of_the_cache_is_downloaded_again(
    digits8: Path, web: Web, tmp_path: Path
) -> None:
    fetch = Fetch(cache=tmp_path / "cache")
    want = take(web.url, fetch=fetch)
    files = sorted((tmp_path / "cache").glob("*.*-*"))
    flip(files[0], 700)
    os.truncate(files[1], 600)
    assert same(want, take(web.url, fetch=fetch))
    assert same(want, take(web.url, fetch=Fetch(cache=tmp_path / "cache", mode="resident")))


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

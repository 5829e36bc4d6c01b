"""Every fetcher shows the same samples in the same order, over networks, caches and damage."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from web import Web, serving

from bigan.data import DataError, cache, local, remote
from bigan.data import fetch as fetching
from bigan.data.pack import pack
from bigan.data.plan import Order, grouped
from bigan.data.settings import DataConfig, Fetch
from bigan.data.shards import Manifest
from bigan.data.stream import Batch, ShardStream, sequential
from bigan.world import World

BLOCK = 400


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    pack("digits", folder, resolution=8, shard_size=100)
    return folder


@pytest.fixture
def web(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setattr(remote, "WAITS_SECONDS", (0.0, 0.0))
    with serving(digits) as server:
        yield server


def take(data: object, num: int = 40, fetch: Fetch | None = None, **changes: object) -> list[Batch]:
    settings: dict = {"seed": 0, "world": World(), "batch": 48, "block": BLOCK, **changes}
    with ShardStream(data, "train", fetch=fetch, **settings) as stream:  # type: ignore[arg-type]
        return list(itertools.islice(stream, num))


def same(left: list[Batch], right: list[Batch]) -> bool:
    pairs = list(zip(left, right, strict=True))
    return all(
        torch.equal(a.real, b.real)
        and torch.equal(a.labels, b.labels)
        and np.array_equal(a.positions, b.positions)
        for a, b in pairs
    )


def data_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("bigan-")]


# --- one order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [World(), World(1, 3)])
@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_local_modes_show_the_same(digits: Path, mode: str, world: World) -> None:
    """Over an epoch's end, from the middle of a block on, on a rank of one and of three."""
    want = take(digits, world=world, images_seen=480)
    assert same(want, take(digits, world=world, images_seen=480, fetch=Fetch(mode=mode)))
    assert not data_threads()


@pytest.mark.parametrize("how", [{}, {"mode": "resident"}, {"cache": Path("cache")}])
def test_remote_modes_show_the_same(digits: Path, web: Web, tmp_path: Path, how: dict) -> None:
    if "cache" in how:
        how = {"cache": tmp_path / "cache"}
    assert same(take(digits), take(web.url, fetch=Fetch(**how)))
    assert not data_threads()


def test_evaluation_reads_a_url_once(digits: Path, web: Web) -> None:
    want = list(sequential(digits, "test", World(1, 2), 64))
    assert same(want, list(sequential(web.url, "test", World(1, 2), 64)))
    assert max(n for name, n in web.requests.items() if name.endswith(".tar")) == 1


def test_groups_end_with_the_blocks() -> None:
    order = Order([10, 7, 9], 0, 10)
    ends = list(itertools.islice(order.block_ends(30), 6))
    assert all(end > 30 for end in ends)
    assert ends == sorted(set(ends))
    whole = list(itertools.islice(order.block_ends(0), 12))
    assert 26 in whole  # an epoch ends a block
    assert 52 in whole
    parts = [(np.arange(i, i + 4), np.arange(i, i + 4)) for i in range(0, 60, 4)]
    found = list(itertools.islice(grouped(iter(parts), iter(whole)), 4))
    assert [int(p[-1]) + 1 for p, _ in found] == whole[:4]
    assert np.concatenate([p for p, _ in found]).tolist() == list(range(whole[3]))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="processes cannot be used"):
        Fetch(mode="stream", backend="processes")
    assert DataConfig(path="data/digits/").path == "data/digits"
    assert DataConfig(path="s3://bucket/x/").path == "s3://bucket/x/"


# --- streaming and caching ------------------------------------------------------------------------


def test_stream_holds_two_blocks_at_most(digits: Path) -> None:
    fetch = Fetch(mode="stream", prefetch=1, threads=1)
    settings: dict = {"seed": 0, "world": World(), "batch": 20, "block": 200}
    with ShardStream(digits, "train", fetch=fetch, **settings) as stream:
        held = []
        for _ in itertools.islice(stream, 60):
            source = stream._fetcher._source  # type: ignore[attr-defined]
            held.append(len(source._ready))
    assert 0 < max(held) <= 2 * 300  # a block is of whole shards, 100 samples each


def test_broken_transfers_are_repeated(digits: Path, web: Web) -> None:
    web.cut["train-000003.tar"] = 2
    assert same(take(digits), take(web.url))
    assert web.requests["train-000003.tar"] >= 3


def test_a_shard_that_stays_short_stops_the_run(web: Web) -> None:
    web.cut["train-000003.tar"] = 1000
    with pytest.raises(DataError, match=r"train-000003\.tar: cannot be read.*bytes arrived") as got:
        take(web.url)
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


def test_other_bytes_than_the_manifest_says(digits: Path, tmp_path: Path, web: Web) -> None:
    web.folder = tmp_path / "changed"
    shutil.copytree(digits, web.folder)
    shard = web.folder / "train-000002.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"train-000002\.tar: cannot be read.*sha256"):
        take(web.url)


def test_no_data_set_at_the_url(web: Web) -> None:
    with pytest.raises(DataError, match=r"nowhere/manifest\.json: cannot be read.*error: 404"):
        take(f"{web.url}/nowhere")
    with pytest.raises(DataError, match="unknown kind of URL"):
        take("gopher://host/data")


def test_commands_run_only_if_allowed(digits: Path, tmp_path: Path, web: Web) -> None:
    proof = tmp_path / "proof"
    url = f"pipe:touch {proof}; cat {digits}"
    with pytest.raises(DataError, match=r"data\.allow_pipe=true"):
        take(url)
    assert not proof.exists()
    assert same(take(digits, 3), take(f"pipe:cat {digits}", 3, fetch=Fetch(allow_pipe=True)))


def test_rewritten_urls_need_permission(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", f"{web.url}=pipe:cat ")
    with pytest.raises(DataError, match="GOPEN_REWRITE"):
        take(web.url)


def test_cache_downloads_each_shard_once(digits: Path, web: Web, tmp_path: Path) -> None:
    fetch = Fetch(cache=tmp_path / "cache")
    for rank in range(3):
        take(web.url, fetch=fetch, world=World(rank, 3))
    shards = [n for name, n in web.requests.items() if name.endswith(".tar")]
    assert len(shards) == 13
    assert set(shards) == {1}
    held = {path.stem for path in fetch.cache.glob("*.tar")}  # type: ignore[union-attr]
    assert held == {shard.sha256 for shard in Manifest.load(digits).shards("train")}


def test_small_cache_evicts_and_loses_nothing(digits: Path, web: Web, tmp_path: Path) -> None:
    sizes = [shard.filesize for shard in Manifest.load(digits).shards("train")]
    limit = max(sizes) * 9
    fetch = Fetch(cache=tmp_path / "cache", cache_bytes=limit)
    assert same(take(digits, 80, block=200), take(web.url, 80, fetch=fetch, block=200))
    assert sum(p.stat().st_size for p in (tmp_path / "cache").glob("*.tar")) <= limit
    assert sum(n for name, n in web.requests.items() if name.endswith(".tar")) > 13
    with pytest.raises(DataError, match="cannot hold two blocks"):
        take(web.url, fetch=Fetch(cache=tmp_path / "cache", cache_bytes=max(sizes)))


def test_evicted_shards_do_not_stay_open(digits: Path, web: Web, tmp_path: Path) -> None:
    """An unlinked file takes space as long as anybody has it open."""
    largest = max(shard.filesize for shard in Manifest.load(digits).shards("train"))
    fetch = Fetch(cache=tmp_path / "cache", cache_bytes=8 * largest)
    settings: dict = {"seed": 0, "world": World(), "batch": 48, "block": 200, "fetch": fetch}
    gc.collect()
    with ShardStream(web.url, "train", **settings) as stream:
        for _ in itertools.islice(stream, 60):
            deleted = 0
            for link in Path("/proc/self/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed in between
                    deleted += str(link.readlink()).endswith("tar (deleted)")
            assert deleted <= 4 + fetch.threads
    locks = {path.stem for path in (tmp_path / "cache").glob("*.lock")}
    assert locks <= {"eviction"}


def test_eviction_between_fetch_and_open(
    digits: Path, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache race must cost a download, never change a sample (facts/data.md, section 2.2)."""
    node = cache.NodeCache(tmp_path / "cache", web.url)
    shard = Manifest.load(digits).shards("train")[0]
    fetch, raced = node.fetch, []

    def fetch_then_evict(wanted: object) -> None:
        fetch(shard)
        if not raced:
            raced.append((tmp_path / "cache" / f"{shard.sha256}.tar").unlink())

    monkeypatch.setattr(node, "fetch", fetch_then_evict)
    descriptor = node.open(shard)
    try:
        assert os.read(descriptor, shard.filesize) == (digits / shard.url).read_bytes()
    finally:
        os.close(descriptor)
    assert node.num_downloads == 2


def test_truncated_download_is_never_cached(web: Web, tmp_path: Path) -> None:
    web.cut["train-000000.tar"] = 1000
    with pytest.raises(DataError, match=r"train-000000\.tar"):
        take(web.url, fetch=Fetch(cache=tmp_path / "cache"))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix == ".tmp"]
    web.cut.clear()
    take(web.url, fetch=Fetch(cache=tmp_path / "cache"))


def test_exact_needs_a_disk_and_resident_needs_memory(digits: Path, web: Web) -> None:
    with pytest.raises(DataError, match=r"data\.cache=FOLDER"):
        take(web.url, fetch=Fetch(mode="exact"))
    with pytest.raises(DataError, match=r"83,008 bytes of pixels.*data\.resident_bytes"):
        take(digits, fetch=Fetch(mode="resident", resident_bytes=83_007))
    take(digits, 1, fetch=Fetch(mode="resident", resident_bytes=83_008))


# --- bad samples ----------------------------------------------------------------------------------


@pytest.fixture
def damaged(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, int]:
    """A copy whose sample at position 100 does not decode any more, and that sample's number."""
    folder = tmp_path / "damaged"
    shutil.copytree(digits, folder)
    manifest = Manifest.load(folder)
    index = manifest.load_index("train")
    shards = manifest.shards("train")
    sample = int(Order([s.nsamples for s in shards], 0, BLOCK).samples(100, 101)[0])
    file = folder / shards[int(index.shard[sample])].url
    content = bytearray(file.read_bytes())
    content[int(index.offset[sample])] ^= 0xFF
    file.write_bytes(bytes(content))
    monkeypatch.setattr(fetching, "CHECKSUM_BYTES", 0)
    return folder, sample


@pytest.mark.parametrize("how", [{}, {"mode": "resident"}, {"backend": "processes"}])
def test_skipping_puts_the_next_sample_in_place(
    digits: Path, damaged: tuple[Path, int], how: dict
) -> None:
    folder, sample = damaged
    """In order over an epoch's end, whoever decodes: threads, memory, worker processes."""
    good, got = take(digits, 30), take(folder, 30, fetch=Fetch(on_bad="skip", **how))
    images = torch.cat([b.real for b in sequential(digits, "train", World(), 500)])
    labels = torch.cat([b.labels for b in sequential(digits, "train", World(), 500)])
    for before, after in zip(good, got, strict=True):
        expected = before.real.clone()
        if 100 in before.positions:
            row = before.positions.tolist().index(100)
            expected[row] = images[sample + 1]
            assert int(after.labels[row]) == int(labels[sample + 1])
            (bad,) = after.bad
            assert (bad.position, bad.member) == (100, f"{sample:09d}.npy")
            assert bad.shard.endswith(".tar")
            assert bad.replacement == sample + 1
        else:
            assert after.bad == ()
            assert torch.equal(after.labels, before.labels)
        assert torch.equal(after.real, expected)


def test_skipping_is_the_same_after_a_resume_and_on_other_ranks(
    damaged: tuple[Path, int],
) -> None:
    fetch = Fetch(on_bad="skip")
    whole = take(damaged[0], 6, fetch=fetch)
    again = take(damaged[0], 4, fetch=fetch, images_seen=96)
    assert same(whole[2:], again)
    assert [b.bad for b in again] == [b.bad for b in whole[2:]]
    ranks = [take(damaged[0], 6, fetch=fetch, world=World(r, 2)) for r in range(2)]
    joined = [torch.cat([ranks[0][i].real, ranks[1][i].real]) for i in range(6)]
    assert all(torch.equal(a.real, b) for a, b in zip(whole, joined, strict=True))
    assert sum(len(b.bad) for rank in ranks for b in rank) == 1


def test_stopping_names_shard_and_member(damaged: tuple[Path, int]) -> None:
    with pytest.raises(DataError) as error:
        take(damaged[0], fetch=Fetch(mode="resident"))
    assert f"bad sample {damaged[1]:09d}.npy" in str(error.value)
    assert "data.on_bad=skip" in str(error.value)


def test_a_broken_data_set_is_not_skipped(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise fetching.BadImageError("not today")

    monkeypatch.setattr(fetching, "decode_into", refuse)
    monkeypatch.setattr(local.LocalShards, "read_raw", lambda self, p, s, *_: list(range(len(s))))
    with pytest.raises(DataError, match="no image decodes"):
        take(digits, 1, fetch=Fetch(on_bad="skip"))


def test_read_errors_are_not_skipped(digits: Path, tmp_path: Path) -> None:
    """Only an image that does not decode is replaced: a flaky disk must not change the data."""
    shutil.copytree(digits, tmp_path / "d")
    settings: dict = {"seed": 0, "world": World(), "batch": 48, "block": BLOCK}
    fetch = Fetch(on_bad="skip", prefetch=1)
    with ShardStream(tmp_path / "d", "train", fetch=fetch, **settings) as stream:
        next(stream)
        for shard in (tmp_path / "d").glob("train-*.tar"):
            os.truncate(shard, 1000)
        with pytest.raises(DataError, match="ends before byte"):
            list(itertools.islice(stream, 30))

"""Fetchers: bad samples, read errors, closing."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from streams import BLOCK, data_threads, flip, node_cache, same, take
from web import Web

from bigan import atomic_files
from bigan.data import DataError
from bigan.data.format.manifest import Manifest
from bigan.data.settings import Fetch
from bigan.data.stores.store import Store
from bigan.data.streaming import cache, local_shards
from bigan.data.streaming import fetchers as fetching
from bigan.data.streaming.order import Order
from bigan.data.streaming.ranges import ShardRanges
from bigan.data.streaming.stream import ShardStream, sequential
from bigan.data.streaming.streamed_shards import StreamedShards
from bigan.distributed.world import World

# --- bad samples ----------------------------------------------------------------------------------


@pytest.fixture
def damaged(digits8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, int]:
    """A copy whose sample at position 100 does not decode, and the number of that sample."""
    folder = tmp_path / "damaged"
    shutil.copytree(digits8, folder)
    manifest = Manifest.load(folder)
    index = manifest.load_index("train")
    shards = manifest.shards("train")
    sample = int(Order([s.nsamples for s in shards], 0, BLOCK).samples(100, 101)[0])
    file = folder / shards[int(index.shards_of(sample))].url
    flip(file, int(index.offset[sample]))
    monkeypatch.setattr(fetching, "CHECKSUM_BYTES", 0)
    return folder, sample


def test_last_sample_is_replaced_by_the_first(digits8: Path, damaged: tuple[Path, int]) -> None:
    folder, _ = damaged
    manifest = Manifest.load(folder)
    flip(folder / manifest.shards("train")[-1].url, int(manifest.load_index("train").offset[-1]))
    *_, end = sequential(folder, "train", World(), 500, Fetch(on_bad="skip"))
    first = next(iter(sequential(digits8, "train", World(), 1)))
    assert torch.equal(end.pixels[-1:], first.pixels)
    assert end.labels[-1] == first.labels[0]
    assert (end.bad[-1].position, end.bad[-1].replacement) == (1296, 0)


def test_a_damaged_shard_is_not_streamed(damaged: tuple[Path, int]) -> None:
    with pytest.raises(DataError, match="damaged"):
        take(damaged[0], fetch=Fetch(mode="stream", on_bad="skip"))


@pytest.mark.parametrize("how", [{}, {"mode": "resident"}])
def test_bad_sample_is_replaced_by_the_next(
    digits8: Path, damaged: tuple[Path, int], how: dict
) -> None:
    folder, sample = damaged
    """In order across the end of an epoch, with random access and in resident mode."""
    good, got = take(digits8, 30), take(folder, 30, fetch=Fetch(on_bad="skip", **how))
    images = torch.cat([b.pixels for b in sequential(digits8, "train", World(), 500)])
    labels = torch.cat([b.labels for b in sequential(digits8, "train", World(), 500)])
    for before, after in zip(good, got, strict=True):
        expected = before.pixels.clone()
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
        assert torch.equal(after.pixels, expected)


def test_replacements_do_not_depend_on_resume_and_ranks(
    damaged: tuple[Path, int],
) -> None:
    fetch = Fetch(on_bad="skip")
    full = take(damaged[0], 6, fetch=fetch)
    again = take(damaged[0], 4, fetch=fetch, images_seen=96)
    assert same(full[2:], again)
    assert [b.bad for b in again] == [b.bad for b in full[2:]]
    ranks = [take(damaged[0], 6, fetch=fetch, world=World(r, 2)) for r in range(2)]
    joined = [torch.cat([ranks[0][i].pixels, ranks[1][i].pixels]) for i in range(6)]
    assert all(torch.equal(a.pixels, b) for a, b in zip(full, joined, strict=True))
    assert sum(len(b.bad) for rank in ranks for b in rank) == 1


def test_error_names_shard_and_member(damaged: tuple[Path, int]) -> None:
    with pytest.raises(DataError) as error:
        take(damaged[0], fetch=Fetch(mode="resident"))
    assert f"bad sample {damaged[1]:09d}.npy" in str(error.value)
    assert "data.on_bad=skip" in str(error.value)


def test_a_broken_data_set_is_not_skipped(digits8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise fetching.BadImageError("not today")

    monkeypatch.setattr(fetching, "decode_into", refuse)
    monkeypatch.setattr(
        local_shards.LocalShards, "read_raw", lambda self, p, s, *_: list(range(len(s)))
    )
    with pytest.raises(DataError, match=r"no image from .* decodes"):
        take(digits8, 1, fetch=Fetch(on_bad="skip"))


def test_read_errors_are_not_skipped(digits8: Path, tmp_path: Path) -> None:
    """Only an image that does not decode is replaced: a faulty disk must not change the data."""
    shutil.copytree(digits8, tmp_path / "d")
    settings: dict = {"seed": 0, "world": World(), "batch": 48, "block": BLOCK}
    fetch = Fetch(on_bad="skip", prefetch=1)
    with ShardStream(tmp_path / "d", "train", fetch=fetch, **settings) as stream:
        next(stream)
        for shard in (tmp_path / "d").glob("train-*.tar"):
            os.truncate(shard, 1000)
        with pytest.raises(DataError, match="is shorter than"):
            list(itertools.islice(stream, 30))


# --- the parts ------------------------------------------------------------------------------------


def until(condition: Callable[[], bool]) -> bool:
    """Wait up to two seconds for a condition that a thread fulfils."""
    deadline = time.monotonic() + 2
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_read_ahead_stays_one_block_ahead() -> None:
    """The next block is downloaded once a quarter of the current one was requested."""

    class Chunks:
        def of(self, samples: np.ndarray) -> np.ndarray:
            return samples // 10

        def by_shard(self, chunks: np.ndarray) -> list[np.ndarray]:
            return np.split(chunks, len(chunks))

    class Cache:
        chunks = Chunks()
        fetched: ClassVar[list[int]] = []

        def fetch(self, chunks: list[int]) -> None:
            self.fetched += chunks
            if chunks == [1]:  # raised for its reader only; later chunks are downloaded
                raise DataError("no such shard")

    numbers = np.arange(40)
    blocks = [(numbers[i : i + 10], numbers[i : i + 10]) for i in range(0, 40, 10)]
    ahead = cache.ReadAhead(Cache(), iter(blocks), 1)  # type: ignore[arg-type]
    try:
        for position, chunks in [(0, 1), (1, 1), (2, 2), (11, 2), (12, 3), (5, 3), (22, 4)]:
            ahead.reached(position)
            assert until(lambda: len(Cache.fetched) == chunks)  # noqa: B023
            time.sleep(0.02)
            assert Cache.fetched == list(range(chunks))
    finally:
        ahead.close()


def test_cache_evicts_least_recently_used(digits8: Path, web: Web, tmp_path: Path) -> None:
    leftover = tmp_path / "cache" / ".x.killed.tmp"
    leftover.parent.mkdir()
    leftover.write_text("half a chunk")
    os.utime(leftover, (1, 1))
    node = node_cache(digits8, web.url, tmp_path / "cache")
    download = atomic_files.temporary_name(tmp_path / "cache" / node.chunks.name(50))
    for other in (download, tmp_path / "cache" / "my.notes-1"):  # not chunks
        other.write_text("of another process")
        os.utime(other, (1, 1))
    span = node.chunks.span(0)
    node.limit_bytes = 32 * (span.stop - span.start)
    files = [tmp_path / "cache" / node.chunks.name(chunk) for chunk in range(40)]
    for chunk in range(30):
        os.close(node.open(chunk))
        os.utime(files[chunk], (chunk + 1, chunk + 1))
    os.close(node.open(0))
    for chunk in range(30, 40):
        os.close(node.open(chunk))
    assert sum(file.stat().st_size for file in files if file.exists()) <= node.limit_bytes
    assert files[0].exists()
    assert not files[1].exists()
    assert files[39].exists()
    assert not leftover.exists()
    assert download.exists()
    assert (tmp_path / "cache" / "my.notes-1").exists()


def test_unusable_cache_folder(digits8: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be used as data\.cache"):
        node_cache(digits8, "http://127.0.0.1:1/data", tmp_path / "file" / "cache")


def test_a_damaged_copy_of_the_index_is_replaced(digits8: Path, web: Web, tmp_path: Path) -> None:
    fetch = Fetch(cache=tmp_path / "cache")
    take(web.url, 1, fetch=fetch)
    assert not (tmp_path / "user-cache").exists()
    copies = list((tmp_path / "cache").glob("manifests/*/*/index/*"))
    assert copies
    for copy in copies:
        copy.write_bytes(b"damaged")
    assert same(take(digits8, 1), take(web.url, 1, fetch=fetch))


@pytest.mark.parametrize("mode", ["random_access", "stream"])
def test_a_damaged_index_stops_every_mode(digits8: Path, tmp_path: Path, mode: str) -> None:
    shutil.copytree(digits8, tmp_path / "d")
    (file,) = (tmp_path / "d" / "index").glob("train*label*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match="label"):
        take(tmp_path / "d", 1, fetch=Fetch(mode=mode))  # type: ignore[arg-type]


def test_members_are_the_same_from_disk_and_stream(digits8: Path) -> None:
    manifest = Manifest.load(digits8)
    exact = local_shards.LocalShards(manifest, "train")
    ranges = ShardRanges(manifest, "train", manifest.load_index("train"), None, False)
    streamed = StreamedShards(ranges, iter(()), threading.Event(), 1, 0)
    for sample in (0, 101, 1296):
        assert streamed.member(sample) == exact.member(sample)


def test_raw_reads_are_complete_or_skipped(digits8: Path, tmp_path: Path) -> None:
    shutil.copytree(digits8, tmp_path / "d")
    shards = local_shards.LocalShards(Manifest.load(tmp_path / "d"), "train")
    out, numbers = np.zeros((6, 8, 8, 1), np.uint8), np.arange(6)
    assert shards.read_raw(numbers, numbers, out, lambda: True) == []
    assert not out.any()  # stopped before the first one
    end = int(shards.index.offset[5] + shards.index.size[5])
    os.truncate(tmp_path / "d" / "train-000000.tar", end - 1)
    assert shards.read_raw(numbers, numbers, out, lambda: False) == [5]
    shards.close()


def test_a_dropped_stream_of_a_url_ends_its_threads(web: Web, tmp_path: Path) -> None:
    for fetch in (Fetch(), Fetch(cache=tmp_path / "cache")):
        settings: dict = {"seed": 0, "world": World(), "batch": 48, "block": 100}
        stream = ShardStream(web.url, "train", fetch=fetch, **settings)
        next(stream)
        del stream
        gc.collect()
        assert not data_threads()


def test_a_failed_resident_split_ends_its_threads(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise fetching.BadImageError("not today")

    monkeypatch.setattr(fetching, "decode_into", refuse)
    monkeypatch.setattr(fetching, "RESIDENT_CHUNK", 1)  # blocks of 64: the third one waits
    with pytest.raises(DataError, match="not today"):
        take(web.url, 1, fetch=Fetch(mode="resident"))
    assert not data_threads()


def test_a_running_command_is_killed() -> None:
    store = Store("pipe:echo x; exec sleep 20", allow_pipe=True)
    threading.Timer(0.5, store.close).start()
    began = time.monotonic()
    with store.open() as stream, pytest.raises(InterruptedError):
        stream.read()
    assert time.monotonic() - began < 10


def test_cache_on_a_disk_that_becomes_read_only(
    digits8: Path, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    node = node_cache(digits8, web.url, tmp_path / "cache")
    node.fetch([0])
    monkeypatch.setattr(os, "utime", read_only)
    os.close(node.open(0))


@pytest.mark.parametrize("cached", [False, True])
def test_interrupted_while_a_resident_split_is_loaded(
    web: Web, tmp_path: Path, cached: bool
) -> None:
    web.fault = lambda number, name: "503" if name.endswith(".tar") else ""
    cache = tmp_path / "cache" if cached else None
    fetch = Fetch(mode="resident", cache=cache, patience_seconds=40)
    main = threading.main_thread().ident
    timer = threading.Timer(1, signal.pthread_kill, (main, signal.SIGINT))
    began = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            take(web.url, fetch=fetch)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 30

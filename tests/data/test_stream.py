"""The input pipeline in one process: order, resume, errors, threads, one-pass reading."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bigan.data import DataError
from bigan.data.format.manifest import Manifest
from bigan.data.packing import sources
from bigan.data.packing.pack import pack, pack_source
from bigan.data.settings import Fetch
from bigan.data.streaming import fetchers as fetching
from bigan.data.streaming import local_shards
from bigan.data.streaming.order import Order
from bigan.data.streaming.stream import Batch, ShardStream, sequential
from bigan.distributed.world import World

NUM = 1297


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    pack("digits", folder, resolution=8)
    return folder


def open_stream(folder: Path, **changes: object) -> ShardStream:
    how = {key: changes.pop(key) for key in changes.keys() & Fetch.model_fields.keys()}
    settings: dict = {"seed": 0, "world": World(), "batch": 48, "block": 400, **changes}
    return ShardStream(folder, "train", fetch=Fetch(**how), **settings)


def take(folder: Path, num: int, **changes: object) -> list[Batch]:
    with open_stream(folder, **changes) as batches:
        return list(itertools.islice(batches, num))


def joined(batches: list[Batch]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        torch.cat([b.pixels for b in batches]).numpy(),
        torch.cat([b.labels for b in batches]).numpy(),
        np.concatenate([b.positions for b in batches]),
    )


def data_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("bigan-data")]


def num_open_shards() -> int:
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(descriptor.readlink()))
    return sum(link.endswith(".tar") for link in links)


def test_batches_are_the_samples_of_the_order(digits: Path) -> None:
    """Pixels and labels at every position follow the order, over more than two epochs."""
    plan = Order([s.nsamples for s in Manifest.load(digits).shards("train")], 0, 400)
    everything = list(sequential(digits, "train", World(), 100))
    images, labels, places = joined(everything)
    assert places.tolist() == list(range(NUM))
    num = 2 * NUM // 48 + 2
    real, got, positions = joined(take(digits, num))
    samples = plan.samples(0, num * 48)
    assert positions.tolist() == list(range(num * 48))
    assert np.array_equal(real, images[samples])
    assert np.array_equal(got, labels[samples])


def test_batch_types(digits: Path) -> None:
    (batch,) = take(digits, 1, accumulation=2)
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels.shape == (24, 8, 8, 1)
    assert batch.labels.dtype == torch.int64
    assert batch.labels.shape == (24,)
    assert batch.positions.dtype == np.int64
    assert batch.pixels.permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)


def test_sequential_returns_the_source_once(digits: Path) -> None:
    source = sources.digits(8)
    for split, num in [("train", NUM), ("test", 500)]:
        images, labels, _ = joined(list(sequential(digits, split, World(), 64)))
        got = sorted((i.tobytes(), int(y)) for i, y in zip(images, labels, strict=True))
        want = sorted(
            (image.tobytes(), label)
            for (_, label, image), s in zip(source, source.splits, strict=True)
            if s == split
        )
        assert len(got) == num
        assert got == want


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_sequential_over_ranks(digits: Path, size: int) -> None:
    """500 test images on 3 or 7 ranks: each once, in order, last batches shorter."""
    ranks = [list(sequential(digits, "test", World(r, size), 32)) for r in range(size)]
    images, labels, places = joined([batch for rank in ranks for batch in rank])
    full, full_labels, _ = joined(list(sequential(digits, "test", World(), 500)))
    assert places.tolist() == list(range(500))
    assert np.array_equal(images, full)
    assert np.array_equal(labels, full_labels)
    assert all(len(b.labels) == 32 for rank in ranks for b in rank[:-1])


def test_sequential_with_more_ranks_than_samples(tmp_path: Path) -> None:
    source = sources.digits(8)
    few = sources.Source(
        **{**source.__dict__, "keys": source.keys[:3], "labels": source.labels[:3],
           "splits": ("train",) * 3}
    )  # fmt: skip
    pack_source(few, tmp_path / "few")
    counts = [
        sum(len(b.labels) for b in sequential(tmp_path / "few", "train", World(r, 5), 2))
        for r in range(5)
    ]
    assert sorted(counts) == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("changes", [{"threads": 1, "prefetch": 1}, {"threads": 4, "prefetch": 9}])
def test_threads_and_prefetch_change_nothing(digits: Path, changes: dict) -> None:
    for a, b in zip(joined(take(digits, 60)), joined(take(digits, 60, **changes)), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("images_seen", [48, 96 * 7, 48 * 27, 48 * 1000])
def test_resume_anywhere(digits: Path, images_seen: int) -> None:
    """A stream from `images_seen` on equals the rest of the uninterrupted one."""
    real, labels, positions = joined(take(digits, 3, images_seen=images_seen))
    plan = Order([s.nsamples for s in Manifest.load(digits).shards("train")], 0, 400)
    images, all_labels, _ = joined(list(sequential(digits, "train", World(), 500)))
    samples = plan.samples(images_seen, images_seen + 144)
    assert positions[0] == images_seen
    assert np.array_equal(real, images[samples])
    assert np.array_equal(labels, all_labels[samples])


@pytest.mark.parametrize(("size", "accumulation"), [(1, 2), (2, 2), (4, 2), (2, 1), (8, 3)])
def test_global_micro_batches_do_not_depend_on_ranks(
    digits: Path, size: int, accumulation: int
) -> None:
    steps = 30
    want = joined(take(digits, steps))
    ranks = [
        take(digits, steps * accumulation, world=World(r, size), accumulation=accumulation)
        for r in range(size)
    ]
    in_order = [ranks[r][i] for i in range(steps * accumulation) for r in range(size)]
    assert {len(b.labels) for b in in_order} == {48 // size // accumulation}
    for a, b in zip(joined(in_order), want, strict=True):
        assert np.array_equal(a, b)


def test_fingerprint_covers_the_inputs_of_the_order(digits: Path, tmp_path: Path) -> None:
    pack("digits", tmp_path / "other", resolution=8, seed=1)
    variants: list[dict] = [
        {}, {"seed": 1}, {"block": 401}, {"batch": 96}, {"accumulation": 2}, {"images_seen": 48},
        {"world": World(0, 2)}, {"folder": tmp_path / "other"},
    ]  # fmt: skip
    found = {open_stream(**{"folder": digits, **change}).fingerprint for change in variants}
    assert len(found) == len(variants)
    ranks = {open_stream(digits, world=World(r, 4), threads=r + 1).fingerprint for r in range(4)}
    assert len(ranks) == 1


def test_a_referenced_batch_is_not_overwritten(digits: Path) -> None:
    """Neither a referenced batch nor one with a referenced view; other memory is reused."""
    with open_stream(digits) as batches:
        first = next(batches)
        view = next(batches).pixels.permute(0, 3, 1, 2)[:, :, 2:]
        copies = first.pixels.clone(), view.clone()
        addresses = {next(batches).pixels.data_ptr() for _ in range(50)}
        assert first.pixels.data_ptr() not in addresses
    assert torch.equal(first.pixels, copies[0])
    assert torch.equal(view, copies[1])
    assert len(addresses) <= 6  # prefetch + the one in use + the one being dropped


# --- errors -------------------------------------------------------------------------------------


@pytest.fixture
def copy(digits: Path, tmp_path: Path) -> Path:
    for file in digits.rglob("*"):
        if file.is_file():
            target = tmp_path / "copy" / file.relative_to(digits)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return tmp_path / "copy"


def test_damage_is_found_before_training(copy: Path) -> None:
    shard = copy / "train-000004.tar"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"train-000004\.tar: damaged"):
        open_stream(copy)
    with pytest.raises(DataError, match=r"train-000004\.tar: damaged"):
        sequential(copy, "train", World(), 10)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-000004\.tar: shard is missing"):
        open_stream(copy)
    assert not data_threads()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"folder": "nowhere"}, "no such data folder"),
        ({"batch": 50, "accumulation": 4}, "cannot be divided evenly"),
        ({"batch": 49, "world": World(1, 2)}, "cannot be divided evenly"),
        ({"block": 0}, "must be positive"),
        ({"images_seen": -1}, "not negative"),
    ],
)
def test_bad_settings(digits: Path, changes: dict, part: str) -> None:
    with pytest.raises(DataError, match=part) as error:
        open_stream(**{"folder": digits, **changes})
    assert "\n" not in str(error.value)


def break_sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Damage the header of one image, as after the check at the start; returns its position."""
    manifest = Manifest.load(folder)
    index = manifest.load_index("train")
    position = 48 * 5 + 3
    plan = Order([s.nsamples for s in manifest.shards("train")], 0, 400)
    sample = int(plan.samples(position, position + 1)[0])
    file = folder / manifest.shards("train")[int(index.shards_of(sample))].url
    content = bytearray(file.read_bytes())
    content[int(index.offset[sample]) + 1] ^= 0xFF
    file.write_bytes(bytes(content))
    monkeypatch.setattr(fetching, "CHECKSUM_BYTES", 0)
    return sample


def test_bad_sample_raises_with_its_name(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = break_sample(copy, monkeypatch)
    batches = open_stream(copy, prefetch=8)
    good = [next(batches) for _ in range(5)]
    assert len(good) == 5  # all batches before it
    with pytest.raises(DataError) as error:
        next(batches)
    text = str(error.value)
    assert f"{sample:09d}.npy" in text
    assert "train-00000" in text
    assert "\n" not in text
    with pytest.raises(RuntimeError, match="has failed"):  # not StopIteration
        next(batches)
    assert not data_threads()


def test_shard_truncated_during_the_run(copy: Path) -> None:
    batches = open_stream(copy, prefetch=1)
    next(batches)
    for shard in copy.glob("train-*.tar"):
        os.truncate(shard, 5000)
    with pytest.raises(DataError, match=r"is shorter than|bad sample"):
        list(itertools.islice(batches, 30))


def test_shard_deleted_before_it_is_opened(copy: Path) -> None:
    batches = open_stream(copy, prefetch=1, block=1)
    next(batches)
    for shard in copy.glob("train-*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match=r"cannot be opened.*No such file"):
        list(itertools.islice(batches, 30))


# --- threads and files --------------------------------------------------------------------------


def test_close_stops_threads_and_files(digits: Path) -> None:
    gc.collect()  # tracebacks of earlier tests hold files
    batches = open_stream(digits, threads=3, prefetch=6)
    next(batches)
    assert data_threads()
    assert num_open_shards()
    batches.close()
    batches.close()
    assert not data_threads()
    assert num_open_shards() == 0
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_close_does_not_wait_for_a_slow_batch(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object) -> None:
        time.sleep(0.01)

    monkeypatch.setattr(fetching, "decode_into", slow)
    monkeypatch.setattr(
        local_shards.LocalShards, "read_raw", lambda self, p, s, *_: list(range(len(s)))
    )
    batches = open_stream(digits, batch=12, prefetch=40)
    next(batches)
    bigger = open_stream(digits, batch=1200, prefetch=3)
    threading.Timer(0.2, bigger._fetcher.stop.set).start()
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match="closed"):  # not an incomplete batch
        next(bigger)
    bigger.close()
    batches.close()
    assert time.perf_counter() - start < 2  # 1,200 images would take 12 seconds
    assert not data_threads()


def test_dropped_stream_stops_its_threads(digits: Path) -> None:
    batches = open_stream(digits)
    next(batches)
    del batches
    gc.collect()
    assert not data_threads()
    unused = open_stream(digits)
    del unused


def test_interpreter_exits_with_an_open_stream(digits: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from bigan.data.streaming.stream import ShardStream;"
        "from bigan.distributed.world import World;"
        "s = ShardStream(Path(sys.argv[1]), seed=0, world=World(), batch=640);"
        "print(len(next(s).labels))"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(digits)]
    result = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "640\n", "")


def test_few_open_files_serve_many_shards(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are closed and opened again during reads without a wrong byte."""
    pack("digits", tmp_path / "many", resolution=8, shard_size=10)
    want = joined(take(tmp_path / "many", 60, threads=1))
    monkeypatch.setattr(local_shards, "MAX_OPEN_SHARDS", 2)
    with open_stream(tmp_path / "many", threads=8, prefetch=16) as batches:
        got = []
        for _ in range(60):
            got.append(next(batches))
            assert num_open_shards() <= 2 + 8
    for a, b in zip(joined(got), want, strict=True):
        assert np.array_equal(a, b)


def test_memory_stays_bounded(digits: Path) -> None:
    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    with open_stream(digits, batch=512) as batches:
        for _ in range(50):
            next(batches)
        before = resident_pages()
        for _ in range(400):  # 200,000 images
            next(batches)
        grown = (resident_pages() - before) * os.sysconf("SC_PAGE_SIZE")
    assert grown < 8 * 2**20

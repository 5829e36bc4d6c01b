"""Large data sets: time and memory of opening them; their index is checked in chunks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from large_sets import large_set
from verify_folders import reseal
from web import serving

from bigan.data import DataError
from bigan.data.format import index_files, manifest
from bigan.data.format.manifest import COLUMNS, Manifest

# Prints, of opening a set: seconds, the highest memory and the memory at last (MiB).
OPEN = """
import json, sys, time
from pathlib import Path
from bigan.data.settings import Fetch
from bigan.data.streaming.dataset import open_manifest
from bigan.data.streaming.stream import ShardStream, sequential
from bigan.distributed.world import World

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

path, cache, mode = sys.argv[1:]
fetch = Fetch(mode=mode, cache=Path(cache) if cache else None)
Path("/proc/self/clear_refs").write_text("5")  # resets the highest memory
before = memory("VmRSS")
if cache:
    open_manifest(path, fetch)  # copies manifest and index to the node
began = time.perf_counter()
manifest = open_manifest(path, fetch)
manifest.load_index("train")
stream = ShardStream(manifest, seed=0, world=World(), batch=64, fetch=fetch)
seconds = time.perf_counter() - began
evaluation = sequential(manifest, "train", World(), 64, fetch)
print(json.dumps([seconds, memory("VmHWM") - before, memory("VmRSS") - before]))
evaluation.close()
stream.close()
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet-21k: 14 million samples in 21,841 classes and 3,300 shards, which are empty."""
    folder = tmp_path_factory.mktemp("large") / "set"
    yield large_set(folder, 14_000_000, 21_841, 3_300)
    shutil.rmtree(folder)


def opened(path: str, cache: str, mode: str) -> tuple[float, float, float]:
    command = [sys.executable, "-c", OPEN, path, cache, mode]
    return tuple(json.loads(subprocess.check_output(command, text=True, timeout=120)))


@pytest.mark.full
@pytest.mark.parametrize("mode", ["random_access", "stream"])
@pytest.mark.parametrize("remote", [False, True])
def test_a_large_set_opens_fast(large: Path, tmp_path: Path, mode: str, remote: bool) -> None:
    """In less than a second on a quiet core, and in less than 100 MB."""
    if remote:
        with serving(large) as web:
            seconds, highest, now = opened(web.url, str(tmp_path / "cache"), mode)
    else:
        seconds, highest, now = opened(str(large), "", mode)
    print(f"{seconds:.2f} s, {highest:.0f} MiB, then {now:.0f} MiB")
    assert seconds < 4
    assert highest < 95
    assert (large / "manifest.json").stat().st_size < 2 * 10**6


# --- the check of the index in chunks -------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 3, 40, 100])
@pytest.mark.parametrize("chunk", [1, 7, 50, 100, 1000])
def test_every_chunk_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_shards: int, chunk: int
) -> None:
    monkeypatch.setattr(index_files, "CHUNK", chunk)
    folder = large_set(tmp_path / "set", 100, 10, num_shards)
    loaded = Manifest.load(folder)
    index, shards = loaded.load_index("train"), loaded.shards("train")
    expected = np.repeat(np.arange(num_shards), [shard.nsamples for shard in shards])
    assert np.array_equal(index.shards_of(np.arange(100)), expected)
    offset, label = index.offset.tolist(), index.label.tolist()
    text = (folder / "manifest.json").read_bytes()
    for sample in (0, 33, 49, 50, 99):
        for column, value in (
            ("offset", 2**64 - 1),
            ("size", 2**32 - 1),
            ("size", shards[expected[sample]].filesize - offset[sample] + 1),
            ("label", -1),
            ("label", 10),
            ("label", (label[sample] + 1) % 10),
        ):
            file = folder / "index" / f"train.{column}.npy"
            full = file.read_bytes()
            values = np.load(file)
            values[sample] = value
            np.save(file, values)
            with pytest.raises(DataError, match=rf"{column}\.npy: damaged"):
                Manifest.load(folder).load_index("train")
            reseal(folder)
            with pytest.raises(DataError, match="inconsistent"):
                Manifest.load(folder).load_index("train")
            file.write_bytes(full)
            (folder / "manifest.json").write_bytes(text)


@pytest.mark.parametrize("column", COLUMNS)
def test_any_other_byte_of_an_index_file(tmp_path: Path, column: str) -> None:
    folder = large_set(tmp_path / "set", 100, 10, 3)
    file = folder / "index" / f"train.{column}.npy"
    full = file.read_bytes()
    for damaged in (
        *(full[:at] + bytes([full[at] ^ 1]) + full[at + 1 :] for at in range(0, len(full), 13)),
        full + b"\0",
        full[:-1],
        b"",
    ):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{column}\.npy: "):
            Manifest.load(folder).load_index("train")


def test_the_hashes_of_a_huge_index_are_compared_by_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = large_set(tmp_path / "set", 100, 10, 3)
    monkeypatch.setattr(manifest, "HASHED_BYTES", 1999)
    file = folder / "index" / "train.crc32.npy"
    np.save(file, np.load(file) + np.uint32(1))
    assert Manifest.load(folder).load_index("train").crc32[0] == 1
    with pytest.raises(DataError, match=r"crc32\.npy: damaged"):
        Manifest.load(folder).verify_index()

"""More shards than a process may have open files (`ulimit -n`)."""

from __future__ import annotations

import contextlib
import itertools
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset
from verify_folders import picture

from bigan.data.format.codec import encode
from bigan.data.packing.pack import pack
from bigan.data.packing.verify import verify
from bigan.data.settings import Fetch
from bigan.data.streaming.resampled import ResampledStream
from bigan.data.streaming.stream import ShardStream
from bigan.distributed.world import World

NUM, LIMIT = 150, 100  # shards of one image; descriptors


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[Path]:
    for n in range(NUM):
        with webdataset.TarWriter(str(tmp_path / f"{n:06d}.tar")) as writer:
            image = encode(picture(n), "png")
            writer.write({"__key__": "0", "png": image, "cls": n % 2})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open() + LIMIT, hard))
    try:
        yield tmp_path
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def num_open() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
@pytest.mark.parametrize("mode", ["random_access", "resident", "stream", "resampled"])
def test_every_mode_keeps_few_files_open(shards: Path, mode: str) -> None:
    before = num_open()
    settings: dict = {"seed": 0, "world": World(), "batch": 50, "fetch": Fetch(mode=mode)}  # type: ignore[arg-type]
    with contextlib.ExitStack() as stack:
        for _ in range(3):  # streams of one process
            stream: ShardStream | ResampledStream
            if mode == "resampled":
                stream = ResampledStream(str(shards), shape=(8, 8, 3), num_classes=2, **settings)
            else:
                stream = ShardStream(shards, **settings)
            stack.enter_context(stream)
            assert sum(len(batch.labels) for batch in itertools.islice(stream, 8)) == 400
        assert num_open() - before <= LIMIT * 3 // 4


def test_packing_and_verifying_keep_few_files_open(
    shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    packed = tmp_path_factory.mktemp("packed")
    pack(shards, packed, resolution=8, shard_size=1, test_fraction=0)
    report = verify(packed)
    assert (report.num_shards, report.ok) == (NUM, True)

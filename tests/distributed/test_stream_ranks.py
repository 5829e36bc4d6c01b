"""Gloo processes read the shards: the union is exact, also when the world size changes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bigan.data.format.manifest import Manifest
from bigan.data.packing.pack import pack
from bigan.data.streaming.order import Order

RANK = """
import hashlib, json, os, sys
from datetime import timedelta
from itertools import islice
from pathlib import Path
import torch.distributed as dist
from bigan.data.streaming.stream import ShardStream, sequential
from bigan.distributed.world import World

folder, images_seen, steps, batch, accumulation, out = sys.argv[1:]
steps, batch, accumulation = int(steps), int(batch), int(accumulation)
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
world = World(dist.get_rank(), dist.get_world_size())

def describe(b):
    hashes = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16] for image in b.pixels]
    return list(zip(b.positions.tolist(), hashes, b.labels.tolist()))

stream = ShardStream(
    Path(folder), "train", seed=3, world=world, batch=batch, accumulation=accumulation,
    images_seen=int(images_seen), block=300,
)
seen = []
with stream:
    for batch in islice(stream, steps * accumulation):
        everyone = [None] * world.size
        dist.all_gather_object(everyone, describe(batch))
        seen += [sample for rank in everyone for sample in rank]
fingerprints = [None] * world.size
dist.all_gather_object(fingerprints, stream.fingerprint)
once = [None] * world.size
mine = [s for b in sequential(Path(folder), "test", world, 64) for s in describe(b)]
dist.all_gather_object(once, mine)
if world.is_rank_0:
    result = {"seen": seen, "fingerprints": fingerprints, "once": [s for r in once for s in r]}
    Path(out).write_text(json.dumps(result))
dist.destroy_process_group()
"""


def launch(num_processes: int, *arguments: object) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ, "WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *map(str, arguments)],
            env={**shared, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_processes)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    pack("digits", folder, resolution=8)
    return folder


@pytest.mark.slow  # tests/data/test_lanes.py has ranks in one process
def test_two_ranks_then_three_read_one_epoch(digits: Path, tmp_path: Path) -> None:
    """A third of an epoch on 2 ranks, the rest on 3: every sample once, in the order of 1 rank."""
    batch, total = 48, 1297
    launch(2, digits, 0, 9, batch, 2, tmp_path / "first")
    launch(3, digits, 9 * batch, 20, batch, 1, tmp_path / "second")
    first, second = (json.loads((tmp_path / n).read_text()) for n in ("first", "second"))
    seen = first["seen"] + second["seen"]
    assert [position for position, _, _ in seen] == list(range(29 * batch))

    manifest = Manifest.load(digits)
    order = Order([s.nsamples for s in manifest.shards("train")], 3, 300).samples(0, 29 * batch)
    labels = manifest.load_index("train").label
    assert [label for _, _, label in seen] == labels[order].tolist()
    epoch = seen[:total]
    hash_of = dict(zip(order[:total].tolist(), [h for _, h, _ in epoch], strict=True))
    assert sorted(hash_of) == list(range(total))
    again = [h for _, h, _ in seen[total:]]  # the second epoch: another order of the same images
    assert again == [hash_of[i] for i in order[total:].tolist()]
    assert not np.array_equal(order[: len(again)], order[total:])

    for result, ranks in ((first, 2), (second, 3)):
        assert len(result["fingerprints"]) == ranks
        assert len(set(result["fingerprints"])) == 1
        assert [place for place, _, _ in result["once"]] == list(range(500))
    assert first["once"] == second["once"]

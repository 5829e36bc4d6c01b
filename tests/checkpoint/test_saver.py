"""Asynchronous saving; a failed save ends neither the run nor an older checkpoint."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from commands import environment, free_port

from bigan import atomic_files, checkpoint
from bigan.checkpoint import Progress, Reader, Saver, TensorShard
from bigan.checkpoint.retention import kept
from bigan.checkpoint.tensor_shards import shards_to_write
from bigan.distributed.world import World
from bigan.errors import RunError

NUM = 50_000  # elements: 200 kB


def shard(tensor: torch.Tensor, name: str = "networks/x") -> TensorShard:
    return TensorShard(name, tuple(tensor.shape), 0, tensor, replicated=True)


def stored(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@contextmanager
def full_disk(num_bytes: int = 1000) -> Iterator[None]:
    """No file of this process may grow beyond `num_bytes`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_saved_state_is_that_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state changes while a slow writer writes; nothing is complete before all have written."""
    release = threading.Event()
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (release.wait(20), sync(number)))
    weight, progress = torch.arange(float(NUM)), Progress(images_seen=80, seconds=1.0)
    saver = Saver(tmp_path, World())
    assert saver.poll() == 0.0
    saver.settle(all_done=True)  # nothing to settle
    saver.save(progress, [shard(weight)])
    assert saver.poll() == 1.0
    weight += 1
    progress.seconds = 9.0
    saver.settle(all_done=False)
    assert checkpoint.latest(tmp_path) is None
    release.set()
    while saver.poll():
        time.sleep(0.01)
    assert checkpoint.latest(tmp_path) is None, "completed by rank 0, not by the thread"
    saver.settle(all_done=True)
    assert stored(tmp_path) == ["80"]
    reader = Reader(tmp_path / "checkpoints" / "80")
    assert torch.equal(reader.read("networks/x"), weight - 1)
    assert reader.progress == Progress(images_seen=80, seconds=1.0)
    assert (saver.failures, saver.final_error()) == (0, None)


def test_next_save_completes_the_previous_one_and_prunes(tmp_path: Path) -> None:
    weight = torch.zeros(NUM)
    saver = Saver(tmp_path, World(), keep=1, milestone_images=100)
    for seen in (40, 120, 160, 220, 280):
        saver.save(Progress(images_seen=seen), [shard(weight + seen)])
    assert [name for name in stored(tmp_path) if name.isdigit()] == ["120", "220"]
    saver.finish()
    assert stored(tmp_path) == ["120", "220", "280"]
    for seen in (120, 220, 280):
        values = Reader(tmp_path / "checkpoints" / str(seen)).read("networks/x")
        assert torch.equal(values, weight + seen)


def test_kept_checkpoints() -> None:
    seen = [40, 120, 160, 220, 280, 430]
    assert kept(seen, 2) == {280, 430}
    assert kept(seen, 1, 100) == {120, 220, 430}
    assert kept(seen, 9) == set(seen)
    assert kept([], 2, 100) == set()
    stay: list[int] = []
    for images in range(30, 1000, 30):  # pruned after every save, as in a run
        stay = sorted(kept([*stay, images], 1, 250))
    assert stay == [270, 510, 750, 990]


def test_replicated_shards_are_assigned_by_size() -> None:
    sizes = [1000, 900, 500, 400, 300, 200, 90, 5, 5]
    common = [shard(torch.zeros(n), f"networks/{i}") for i, n in enumerate(sizes)]
    own = TensorShard("optimizers/x", (8,), 4, torch.zeros(4), replicated=False)
    empty = TensorShard("optimizers/y", (2,), 2, torch.zeros(0), replicated=False)
    for size in (1, 2, 3, 16):
        shares = [
            shards_to_write([own, *reversed(common), empty], World(r, size)) for r in range(size)
        ]
        assert all(mine[0] is own and empty not in mine for mine in shares)
        names = [p.name for mine in shares for p in mine[1:]]
        assert sorted(names) == sorted(p.name for p in common)
        loads = [sum(p.num_bytes for p in mine[1:]) for mine in shares]
        assert max(loads) <= max(4 * sum(sizes) / size * 1.1, 4000)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_numbers_are_refused(tmp_path: Path, bad: float) -> None:
    weight = torch.zeros(2, 3)
    weight[1, 1] = bad
    saver = Saver(tmp_path, World())
    good = shard(torch.ones(3), "networks/d.good")
    with pytest.raises(RunError, match=r"g\.bad is not finite at images_seen = 40"):
        saver.save(Progress(images_seen=40), [good, shard(weight, "networks/g.bad")])
    assert not (tmp_path / "checkpoints").exists()
    numbers = torch.tensor([2**40, -1])
    saver.save(Progress(images_seen=40), [good, shard(numbers), shard(torch.empty(0), "x")])
    saver.finish()
    assert stored(tmp_path) == ["40"]


def refused(saver: Saver, seen: int, said: list[str]) -> str:
    """The one line that a failing save passes to `echo`."""
    before = len(said)
    saver.save(Progress(images_seen=seen), [shard(torch.full((NUM,), float(seen)))])
    saver.finish()
    assert len(said) == before + 1
    assert "\n" not in said[-1]
    return said[-1]


def test_full_disk_is_reported_once_and_a_later_save_succeeds(tmp_path: Path) -> None:
    said: list[str] = []
    saver = Saver(tmp_path, World(), keep=1, echo=said.append)
    saver.save(Progress(images_seen=40), [shard(torch.zeros(NUM))])
    saver.finish()
    with full_disk():
        line = refused(saver, 80, said)
    assert "images_seen = 80 was not saved (rank 0: [Errno 27] File too large" in line
    assert "free some space" in line
    assert stored(tmp_path) == ["40"]
    verdict = saver.final_error()
    assert verdict is not None
    assert "images_seen = 80 was not saved" in verdict
    assert saver.failures == 1
    saver.save(Progress(images_seen=120), [shard(torch.ones(NUM))])
    saver.finish()
    assert stored(tmp_path) == ["120"]
    assert (saver.failures, saver.final_error(), len(said)) == (1, None, 1)


def test_disk_that_fills_up(tmp_path: Path) -> None:
    """A file system of 1 MB: two checkpoints of 400 kB fit, the third does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        # A privilege that cannot be installed; the test above covers the same failures.
        pytest.skip("needs the privilege to mount a file system; full_disk covers the failure")
    try:
        said: list[str] = []
        saver = Saver(disk, World(), keep=9, echo=said.append)
        for seen in (40, 80):
            saver.save(Progress(images_seen=seen), [shard(torch.zeros(2 * NUM))])
        saver.save(Progress(images_seen=120), [shard(torch.zeros(2 * NUM))])
        saver.finish()
        assert len(said) == 1
        assert "No space left on device" in said[0]
        assert stored(disk) == ["40", "80"]
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert "Read-only file system" in refused(saver, 160, said)
        assert "run_dir" in said[-1]
        assert stored(disk) == ["40", "80"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_unusable_folder_and_incomplete_tensors_are_reported(tmp_path: Path) -> None:
    said: list[str] = []
    saver = Saver(tmp_path, World(), echo=said.append)
    (tmp_path / "checkpoints").write_text("in the way")
    assert "run_dir" in refused(saver, 40, said)
    (tmp_path / "checkpoints").unlink()
    half = TensorShard("networks/x", (10,), 0, torch.zeros(5), replicated=False)
    saver.save(Progress(images_seen=80), [half])
    saver.finish()
    assert "ends at element 5 of 10" in said[-1], "not complete unless readable"
    assert stored(tmp_path) == []
    assert saver.failures == 2


RANKS = """
import json, os, sys, time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from bigan.checkpoint import TensorShard, Progress, Saver
from bigan.distributed.world import World
from test_saver import full_disk

run = Path(sys.argv[1])
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
world = World(dist.get_rank(), dist.get_world_size())
said = []
saver = Saver(run, world, keep=2, echo=said.append)

def shards(seen):
    weight = torch.arange(60.0).reshape(3, 4, 5) + seen
    moment = torch.arange(3000.0) + seen
    start, stop = ((0, 1111), (1111, 3000))[world.rank]  # not at a row
    return [
        TensorShard("networks/w", (3, 4, 5), 0, weight, True),
        TensorShard("networks/b", (3000,), 0, -moment, True),
        TensorShard("optimizers/w.exp_avg", (30, 100), start, moment[start:stop], False),
    ]

saver.save(Progress(images_seen=40), shards(40))
for _ in range(2000):  # as the trainer does at a tick
    busy = torch.tensor(saver.poll())
    dist.all_reduce(busy, op=dist.ReduceOp.MAX)
    saver.settle(all_done=not busy)
    if not busy:
        break
    time.sleep(0.01)
first = sorted(p.name for p in (run / "checkpoints").iterdir())
with full_disk() if world.rank == 1 else nullcontext():  # only the disk of rank 1
    saver.save(Progress(images_seen=80), shards(80))
    saver.finish()
failed = [saver.failures, saver.final_error()]
saver.save(Progress(images_seen=120), shards(120))
saver.finish()
try:
    bad = shards(160)
    bad[2].data[5] += float("inf") if world.rank else 0.0
    saver.save(Progress(images_seen=160), bad)
    refused = ""
except Exception as error:
    refused = f"{type(error).__name__}: {error}"
results = [None] * world.size
mine = {"said": said, "failed": failed, "refused": refused, "first": first}
mine["last"] = saver.final_error()
dist.all_gather_object(results, mine)
if world.is_rank_0:
    (run / "result.json").write_text(json.dumps(results))
sync = os.fsync
if world.rank == 1:  # the next part is written and never synced
    os.fsync = lambda number: ((run / "hangs").touch(), time.sleep(60))
saver.save(Progress(images_seen=200), shards(200))
saver.finish()
"""


def test_two_processes_save_fail_on_both_and_are_killed(tmp_path: Path) -> None:
    shared = environment() | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    shared["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent) + os.pathsep
    shared["PYTHONPATH"] += str(Path(__file__).parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(tmp_path)],
            env=shared | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        until = time.monotonic() + 90
        while not (tmp_path / "hangs").exists():
            assert time.monotonic() < until, "the last save never began"
            for process in processes:
                assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
    finally:  # SIGKILL during a save
        for process in processes:
            process.kill()
            process.communicate(timeout=20)
    assert {process.returncode for process in processes} == {-signal.SIGKILL}

    main, other = json.loads((tmp_path / "result.json").read_text())
    assert main["first"] == ["40"]
    assert main["failed"] == other["failed"]
    assert main["failed"][0] == 1
    assert "rank 1: [Errno 27] File too large" in main["failed"][1]
    assert [len(main["said"]), other["said"]] == [1, []]
    assert main["last"] is None
    for rank in (main, other):
        assert rank["refused"].startswith("NonFiniteError: optimizers/w.exp_avg is not finite")

    assert [name for name in stored(tmp_path) if name.isdigit()] == ["120", "40"]
    assert any(name.startswith(".200.") for name in stored(tmp_path)), (
        "the staging folder of the killed save"
    )
    atomic_files.remove_leftovers(tmp_path / "checkpoints")
    assert stored(tmp_path) == ["120", "40"]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert len(list(newest.glob("part-*-of-00002.safetensors"))) == 2
    reader, moment = Reader(newest), torch.arange(3000.0) + 120
    assert torch.equal(reader.read("networks/w"), torch.arange(60.0).reshape(3, 4, 5) + 120)
    assert torch.equal(reader.read("networks/b"), -moment)
    assert torch.equal(reader.read("optimizers/w.exp_avg"), moment.reshape(30, 100))
    for rank in range(3):  # as at world size 3
        ends = (rank * 1000, rank * 1000 + 1000)
        found = Reader(newest).read_range("optimizers/w.exp_avg", *ends)
        assert torch.equal(found, moment[slice(*ends)])
    shutil.rmtree(newest)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "40"

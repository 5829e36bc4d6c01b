"""Packing that is killed or divided among processes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from data_helpers import tree
from PIL import Image

from bigan import atomic_files
from bigan.data import DataError
from bigan.data.format.manifest import Manifest
from bigan.data.packing.destination import STAMP
from bigan.data.packing.pack import Packed, pack

Part = tuple[int, int]


def make_photos(root: Path, num: int, size: int) -> Path:
    """`num` JPEG files in two classes, one of them an error page of a web server."""
    draws = np.random.default_rng(0)
    for i in range(num):
        file = root / f"class{i % 2}" / f"{i:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 256, (size // 8, size // 8, 3), np.uint8)
        Image.fromarray(pixels).resize((size + i % 7, size)).save(file)
    file.write_bytes(b"<html>404 Not Found</html>")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos") / "photos", 200, 400)


@pytest.fixture(scope="module")
def small_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests without kills at random times."""
    return make_photos(tmp_path_factory.mktemp("small") / "photos", 200, 32)


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "d"
    assert len(packed(photos, folder, 5).bad) == 1
    return folder


def start(source: Path, target: Path, shard_size: int, part: Part | None = None) -> BaseProcess:
    """`packed` in a forked process: importing would take longer than packing."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=packed, args=(source, target, shard_size, part))
    process.start()
    return process


def packed(source: Path, target: Path, shard_size: int, part: Part | None = None) -> Packed:
    return pack(
        source,
        target,
        resolution=32,
        shard_size=shard_size,
        pyramid=16,
        max_bad=1,
        jobs=2,
        part=part,
    )


def finished(target: Path) -> set[str]:
    return {path.stem for path in target.glob("r0032/index/*.json")}


# --- killed -------------------------------------------------------------------------------------


def kill_twice(source: Path, target: Path, shard_size: int) -> None:
    """SIGKILL at random times; all files equal those of an uninterrupted pack."""
    for _ in range(2):
        before = finished(target)
        process = start(source, target, shard_size)
        until = len(before) + random.randint(1, 5)
        while len(finished(target)) < until:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with pytest.raises(DataError, match="bigan pack"):
            Manifest.load(target)
    kept = {name: (target / f"r0032/{name}.tar").stat().st_mtime_ns for name in finished(target)}
    assert packed(source, target, shard_size).complete
    assert {n: (target / f"r0032/{n}.tar").stat().st_mtime_ns for n in kept} == kept


def test_killed_twice(photos: Path, undisturbed: Path, tmp_path: Path) -> None:
    kill_twice(photos, tmp_path / "killed", 5)
    assert tree(tmp_path / "killed") == tree(undisturbed)


@pytest.mark.slow
def test_5000_photos_killed_twice(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 5000, 128)
    packed(photos, tmp_path / "undisturbed", 200)
    kill_twice(photos, tmp_path / "killed", 200)
    assert tree(tmp_path / "killed") == tree(tmp_path / "undisturbed")


def killed_pack(source: Path, target: Path, writes: int) -> None:
    """Pack in a child process that SIGKILLs itself during its n-th write of a file."""
    child = os.fork()
    if child == 0:
        real, count = os.fsync, itertools.count(1)

        def fsync(descriptor: int) -> None:
            if next(count) == writes:  # the temporary file is written, but not yet renamed
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = fsync
        try:
            pack(source, target, resolution=8, shard_size=32, max_bad=1)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_killed_during_every_kind_of_write(small_photos: Path, tmp_path: Path) -> None:
    """In the plan, a tar, a record, an index column and the manifest."""
    full = pack(small_photos, tmp_path / "undisturbed", resolution=8, shard_size=32, max_bad=1)
    shards = len(full.manifests[0].shardlist)
    target = tmp_path / "killed"
    # Writes: plan, stamp, tar and record of each shard, bad.txt, 8 index columns, the manifest.
    moments = [(1, 0, 0), (5, 1, 1), (4, 3, 2), (2 * shards - 3, shards, shards)]
    for writes, tars, records in [*moments, (1, shards, shards), (3, shards, shards)]:
        killed_pack(small_photos, target, writes)
        assert len(list(target.glob("[a-z]*.tar"))) == tars
        assert len(list(target.glob("index/[a-z]*.json"))) == records
        assert list(target.rglob(".*.tmp"))
        with pytest.raises(DataError, match="bigan pack"):
            Manifest.load(target)
    kept = (target / "train-000000.tar").stat().st_mtime_ns
    pack(small_photos, target, resolution=8, shard_size=32, max_bad=1)
    assert tree(target) == tree(tmp_path / "undisturbed")
    assert (target / "train-000000.tar").stat().st_mtime_ns == kept


def test_source_changed_after_the_start(tmp_path: Path) -> None:
    """Changed pixels must not be mixed with earlier ones."""

    def photos(red: int) -> None:
        (tmp_path / "photos").mkdir(exist_ok=True)
        for i in range(80):
            Image.new("RGB", (8, 8), (red, i, i)).save(tmp_path / "photos" / f"{i}.bmp")

    def run(spec: Path, **options: object) -> Packed:
        return pack(spec, tmp_path / "d", resolution=8, shard_size=20, **options)  # type: ignore[arg-type]

    photos(1)
    copy = shutil.copytree(tmp_path / "photos", tmp_path / "copy" / "photos")  # keeps the times
    assert not run(tmp_path / "photos", part=(0, 2)).complete
    assert not run(copy, part=(0, 2)).complete
    photos(2)
    with pytest.raises(DataError) as error:
        run(tmp_path / "photos")
    assert str(error.value) == (
        f"{tmp_path / 'd'}: the source files were modified after this pack was started; delete "
        f"{tmp_path / 'd'} and pack again"
    )
    # The stamp is not part of the result; a complete pack is accepted.
    assert run(copy).complete
    for file in copy.iterdir():
        os.utime(file, ns=(1, 1))
    pack(copy, tmp_path / "other", resolution=8, shard_size=20)
    assert tree(tmp_path / "d") == tree(tmp_path / "other")
    assert run(tmp_path / "photos").complete
    # Killed just before the end: the stamp is deleted.
    (tmp_path / "d" / STAMP).write_text("other")
    assert run(copy).complete
    assert tree(tmp_path / "d") == tree(tmp_path / "other")


@pytest.mark.parametrize("damage", ["tar gone", "tar cut", "record gone", "record cut", "other"])
def test_unfinished_shards_are_written_again(
    damage: str, small_photos: Path, tmp_path: Path
) -> None:
    options = {"resolution": 8, "shard_size": 50, "max_bad": 1}
    target = tmp_path / "d"
    pack(small_photos, target, **options)  # type: ignore[arg-type]
    before = tree(target)
    other = (target / "train-000001.tar").stat().st_mtime_ns
    tar, record = target / "train-000000.tar", target / "index" / "train-000000.json"
    (target / "manifest.json").unlink()
    if damage == "tar gone":
        tar.unlink()
    elif damage == "tar cut":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif damage == "record gone":
        record.unlink()
    elif damage == "record cut":
        record.write_bytes(record.read_bytes()[:-100])
    else:
        record.write_bytes(record.read_bytes().replace(b'"plan":"', b'"plan":"x'))
    pack(small_photos, target, **options)  # type: ignore[arg-type]
    assert tree(target) == before
    assert (target / "train-000001.tar").stat().st_mtime_ns == other


def test_deleted_shard_is_packed_again(digits: Path, tmp_path: Path) -> None:
    before = tree(digits)
    pack("digits", tmp_path / "d")
    (tmp_path / "d" / "train-000003.tar").unlink()
    with pytest.raises(DataError, match=r"train-000003\.tar: shard is missing"):
        Manifest.load(tmp_path / "d")
    pack("digits", tmp_path / "d")
    assert tree(tmp_path / "d") == before


# --- parts --------------------------------------------------------------------------------------


def test_concurrent_parts(photos: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Two processes that start together on an empty folder write the same files as one."""
    target = tmp_path / "parts"
    parts = [start(photos, target, 5, (i, 2)) for i in (0, 1)]
    for part in parts:
        part.join()
        assert part.exitcode == 0
    assert tree(target) == tree(undisturbed)


@pytest.mark.parametrize("first", [0, 1])
def test_sequential_parts(first: int, small_photos: Path, tmp_path: Path) -> None:
    """0/3, 1/3, 2/3 and 1/3, 2/3, 3/3 are equal; each part writes its own shards only."""
    options = {"resolution": 8, "shard_size": 20, "max_bad": 1}
    target, calls, bad = tmp_path / "d", [], []
    full = pack(small_photos, tmp_path / "one", **options)  # type: ignore[arg-type]
    for i in (2, 0, 1):
        assert not (target / "manifest.json").exists()
        result = pack(
            small_photos,
            target,
            part=(first + i, 3),
            progress=lambda *call: calls.append(call),
            **options,  # type: ignore[arg-type]
        )
        assert result.complete == bool(result.manifests) == (i == 1)
        bad.append(result.bad)
    assert tree(target) == tree(tmp_path / "one")
    totals = {total for _, total in calls}
    assert len(calls) - 3 == 200
    assert 200 not in totals
    assert bad[-1] == full.bad


def record_bad(folder: Path, shard: str) -> list[list[str]]:
    name = shard.removesuffix(".tar")
    return json.loads((folder / "index" / f"{name}.json").read_text())["bad"]


def test_max_bad_is_checked_by_the_last_part(small_photos: Path, tmp_path: Path) -> None:
    options = {"resolution": 8, "shard_size": 20}
    found: list[tuple[str, str]] = []
    # The shard with the bad image and eight others; the last part follows.
    full = pack(small_photos, tmp_path / "full", max_bad=1, **options)  # type: ignore[arg-type]
    names = [shard.url for shard in full.manifests[0].shardlist]
    lost = next(i for i in range(10) if len(record_bad(tmp_path / "full", names[i])) == 1)
    order = [lost, *(i for i in range(10) if i != lost)]
    target = tmp_path / "d"
    for i in order[:9]:
        result = pack(small_photos, target, part=(i, 10), **options)  # type: ignore[arg-type]
        assert not result.complete
        again = pack(small_photos, target, part=(i, 10), **options)  # type: ignore[arg-type]
        assert again == result
        found += result.bad
    assert len(found) == 1
    with pytest.raises(DataError, match="1 of 200 images cannot be used"):
        pack(small_photos, target, part=(order[9], 10), **options)  # type: ignore[arg-type]
    assert (target / "bad.txt").read_text().startswith("class1/00199.jpg\t")
    assert pack(small_photos, target, part=(3, 10), max_bad=1, **options).complete  # type: ignore[arg-type]


def test_one_of_several_plans_wins(tmp_path: Path) -> None:
    """All find the folder empty; only one may write into it."""
    outcomes: list[object] = []
    barrier = threading.Barrier(8)

    def claim(seed: int) -> None:
        barrier.wait()
        try:
            outcomes.append(pack("digits", tmp_path / "d", resolution=8, seed=seed).complete)
        except DataError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=claim, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(True) == 1
    assert sum("already holds another pack (seed" in str(outcome) for outcome in outcomes) == 7
    files_there = tree(tmp_path / "d")
    assert not [name for name in files_there if name.endswith(".tmp")]


def test_one_of_several_creators_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_files.create_atomic(tmp_path / "x", "first")
    atomic_files.create_atomic(tmp_path / "x", "second")
    assert (tmp_path / "x").read_text() == "first"

    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(atomic_files.os, "link", refuse)
    atomic_files.create_atomic(tmp_path / "y", "first")
    atomic_files.create_atomic(tmp_path / "y", "second")
    assert (tmp_path / "y").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_a_part_started_meanwhile_is_accepted(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another part writes its plan and first shard just before the folder is listed."""
    target, real = tmp_path / "d", Path.iterdir

    def iterdir(folder: Path) -> object:
        if folder == target:
            (target / "index").mkdir()
            (target / "plan.json").write_bytes((digits / "plan.json").read_bytes())
        return real(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert pack("digits", target).complete
    monkeypatch.undo()
    assert tree(target) == tree(digits)


@pytest.mark.parametrize("array", [range(8), range(1, 5), range(4, 16, 3), range(5, 6)])
def test_sbatch_array_covers_every_shard(array: range, tmp_path: Path) -> None:
    """The script as SLURM runs it, with a `bigan` that prints its arguments."""
    (tmp_path / "bigan").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "bigan").chmod(0o755)
    found = []
    for task in array:
        variables = {
            "SLURM_ARRAY_TASK_ID": task,
            "SLURM_ARRAY_TASK_MIN": min(array),
            "SLURM_ARRAY_TASK_STEP": array.step,
            "SLURM_ARRAY_TASK_COUNT": len(array),
            "SLURM_CPUS_PER_TASK": 6,
        }
        environment = os.environ | {key: str(value) for key, value in variables.items()}
        environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
        arguments = subprocess.run(
            ["bash", ROOT / "slurm" / "pack.sbatch", "my photos", "to here", "--resolution", "64"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        assert arguments[:4] == ["pack", "my photos", "to here", "--part"]
        assert arguments[5:] == ["--jobs", "6", "--resolution", "64"]
        found.append(arguments[4])
    assert found == [f"{i}/{len(array)}" for i in range(len(array))]

"""What users get wrong, on the command line: one line that says what to do, and the exit code.

A situation is made by a function of (folder, packed digits), which returns the arguments of `bigan`
and the variables of its environment. Details are tested beside each module; hangs in
test_rendezvous.py, full disks in test_full_disk.py, outages of a tracking server in test_outage.py.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, environment
from PIL import Image
from short_runs import TINY

from bigan.data.packing.pack import pack
from bigan.run_folder import RunFolder

Situation = tuple[list[str | Path], dict[str, str]]

pytestmark = pytest.mark.full
RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
SHORT = (*TINY, "train.total_images=16", "train.tick_images=16", "tracking.mlflow=false")


def train(run: Path, digits: Path, *settings: str) -> list[str | Path]:
    return ["train", SMOKE, f"run_dir={run}", f"data.path={digits}", *SHORT, *settings]


def bigan(arguments: list[str | Path], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bigan", *map(str, arguments)],
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete short run, to be copied."""
    run = tmp_path_factory.mktemp("trained") / "run"
    done = bigan(train(run, digits))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def owned(run: Path, host: str, silent_seconds: float) -> Path:
    """A run folder with the lock of a process on another host."""
    run.mkdir()
    owner = {"host": host, "pid": 4711, "scope": f"{host}-1", "boot": "b", "born": "1", "since": ""}
    lock = RunFolder(run).lock
    lock.write_text(json.dumps({**owner, "attempts": {}, "token": "x"}))
    os.utime(lock, (time.time() - silent_seconds,) * 2)
    return run


def images_added(folder: Path) -> Situation:
    for n in range(12):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(folder / f"src{n}.png")
    source = folder / "src"
    source.mkdir()
    for file in [*folder.glob("src*.png")][:-1]:
        shutil.move(file, source)
    pack(source, folder / "packed", resolution=8)
    shutil.move(next(folder.glob("src*.png")), source)
    return ["pack", source, folder / "packed", "--resolution", "8"], {}


SITUATIONS: dict[str, tuple[Callable[[Path, Path], Situation], int, tuple[str, ...]]] = {
    "variables of MPI": (
        lambda folder, digits: (
            train(folder / "run", digits),
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
        ), 2, ("OMPI_COMM_WORLD_SIZE", "accelerate launch"),
    ),
    "a size without an address": (
        lambda folder, digits: (train(folder / "run", digits), {"WORLD_SIZE": "2"}), 2,
        ("MASTER_ADDR",),
    ),
    "a port that is no number": (
        lambda folder, digits: (train(folder / "run", digits), {**RANK, "MASTER_PORT": "x"}), 2,
        ("MASTER_PORT",),
    ),
    "a run on another host": (
        lambda folder, digits: (train(owned(folder / "run", "node7", 5), digits), {}), 2,
        ("node7", "pid 4711", "LOCK"),
    ),
    "a watched run that does not exist": (
        lambda folder, digits: (
            ["evaluate", folder / "rnu", "--watch", "--timeout", "1", "--poll-seconds", "0.2"], {}
        ), 1, ("rnu",),
    ),
    "images were added to a packed source": (
        lambda folder, digits: images_added(folder), 2, ("11 images then, 12 now", "new folder"),
    ),
    "half an image": (
        lambda folder, digits: (train(folder / "run", digits, "train.total_images=1.5"), {}), 2,
        ("train.total_images", "1.5"),
    ),
    "a named change without a run": (
        lambda folder, digits: (
            [*train(folder / "run", digits), "--allow-change", "optimizer.generator.lr=1e-4"], {}
        ), 2, ("--allow-change",),
    ),
    "images instead of packed data": (
        lambda folder, digits: (train(folder / "run", ROOT / "docs"), {}), 2, ("bigan pack",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SITUATIONS)
def test_one_line_says_what_to_do(name: str, digits: Path, tmp_path: Path) -> None:
    prepare, code, words = SITUATIONS[name]
    arguments, variables = prepare(tmp_path, digits)
    done = bigan(arguments, **variables)
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("bigan: ")]
    assert all(word in line for word in words), line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_port_in_use(busy_port: int, digits: Path, tmp_path: Path) -> None:
    done = bigan(train(tmp_path / "run", digits), **RANK, MASTER_PORT=str(busy_port))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("bigan: ")]
    assert f"MASTER_PORT = {busy_port}: address already in use" in line
    assert line.count("MASTER_PORT=") == 1  # a free one


def test_a_finished_run_goes_on(trained: Path, digits: Path, tmp_path: Path) -> None:
    """Moved, its lock left by another host, its newest checkpoint damaged, a setting changed."""
    run = shutil.copytree(trained, tmp_path / "moved")
    first = [*RunFolder(run).checkpoints.iterdir()]
    more = train(run, digits, "train.total_images=3.2e1", "train.checkpoint_keep=3")
    assert bigan(more).returncode == 0
    newest = next(path for path in RunFolder(run).checkpoints.iterdir() if path not in first)
    damaged = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-10])
    owner = owned(tmp_path / "owner", "node7", 1_000)
    shutil.copy2(RunFolder(owner).lock, RunFolder(run).lock)
    change = ["--allow-change", "optimizer.generator.lr=1e-5"]
    done = bigan([*train(run, digits, "train.total_images=48"), *change])
    assert done.returncode == 0, done.stderr
    assert newest.with_name(f"{newest.name}.damaged").is_dir()
    assert "node7" in done.stdout + done.stderr
    (entry,) = map(json.loads, RunFolder(run).config_history.read_text().splitlines())
    assert (entry["key"], entry["new"]) == ("optimizer.generator.lr", 1e-5)
    assert entry["images_seen"] == 16
    assert RunFolder(run).done.read_text() == "48\n"
    assert not RunFolder(run).lock.exists()

"""A run that is killed often, on changing world sizes, ends as an uninterrupted one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, environment, free_port
from safetensors.torch import load_file
from web import serving

from bigan import atomic_files, checkpoint
from bigan.run_config import load_config

pytestmark = pytest.mark.full
FULL_RUN_SECONDS = 600  # of an uninterrupted attempt on a busy machine


class Attempt:
    """One start of the command: its launcher and its ranks."""

    def __init__(self, world_size: int, records: Path, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "recording", str(records), str(SMOKE), *arguments]
        if world_size > 1:
            launcher = ["-m", "accelerate.commands.launch", "--config_file"]
            launcher += [str(ROOT / "launch" / "cpu.yaml"), "--num_processes", str(world_size)]
            launcher += ["--main_process_port", str(free_port()), "-m"]
            command = [sys.executable, *launcher, *command[2:]]
        self.world_size = world_size
        self.process = subprocess.Popen(
            command,
            env=environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ranks(self) -> list[int]:
        """Process numbers of the training processes."""
        if self.world_size == 1:
            return [self.process.pid]
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        return [int(pid) for pid in listed.stdout.split()]

    def kill_one(self, chance: random.Random) -> bool:
        """Send SIGKILL to a rank; returns whether all ranks were running."""
        ranks = self.ranks()
        if len(ranks) < self.world_size or self.process.poll() is not None:
            return False
        os.kill(chance.choice(ranks), signal.SIGKILL)
        return True

    def end(self, seconds: float = 60) -> str:
        """Wait until the launcher has ended the other ranks; returns its stderr."""
        try:
            _, errors = self.process.communicate(timeout=seconds)
        finally:
            self.destroy()
        return errors

    def destroy(self) -> None:
        for pid in [*self.ranks(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def train_with_kills(
    sizes: list[int], run: Path, arguments: list[str], seed: int
) -> tuple[list[int], Path]:
    """One kill per entry of `sizes`, then to the end; returns where each attempt began."""
    chance, records = random.Random(seed), run.parent / f"{run.name}-records"
    begins: list[int] = []
    for size in [*sizes, sizes[-1]]:
        newest = checkpoint.latest(run)
        begins.append(int(newest.name) if newest else 0)
        attempt = Attempt(size, records / str(len(begins) - 1), arguments)
        try:
            if len(begins) > len(sizes):
                errors = attempt.end(FULL_RUN_SECONDS)
                assert attempt.process.returncode == 0, errors[-3000:]
                break
            wait_for(attempt, run, begins[-1] + 80 * chance.choice([0, 1, 1, 2, 3]))
            time.sleep(chance.uniform(0, 0.12))  # somewhere in a step, or in a save
            assert attempt.kill_one(chance), attempt.end()[-3000:]
            attempt.end()
        finally:
            attempt.destroy()
    return begins, records


def wait_for(attempt: Attempt, run: Path, images_seen: int) -> None:
    """Until all ranks run and the run has a checkpoint of `images_seen`, or a later one."""
    until = time.monotonic() + 120
    while time.monotonic() < until and attempt.process.poll() is None:
        newest = checkpoint.latest(run)
        reached = newest is not None and int(newest.name) >= images_seen
        if (reached or images_seen == 0) and len(attempt.ranks()) == attempt.world_size:
            return
        time.sleep(0.003)
    raise AssertionError(f"no progress: {attempt.end()[-3000:]}")


def check_samples(begins: list[int], records: Path, total: int) -> None:
    """The samples of each attempt up to the start of the next one are all, each exactly once."""
    trained: list[int] = []
    for number, (first, end) in enumerate(zip(begins, [*begins[1:], total], strict=True)):
        read = [
            position
            for path in (records / str(number)).glob("*.jsonl")
            for line in path.read_text().splitlines()
            if line.endswith("]")  # the last line of a killed rank may be incomplete
            for position in json.loads(line)
        ]
        trained += sorted(p for p in read if first <= p < end)
    assert trained == list(range(total))


def final_weights(run: Path, total: int) -> bytes:
    return (run / "snapshots" / str(total) / "generator_ema.safetensors").read_bytes()


def settings(digits: Path, run: Path, total: int, *more: str) -> list[str]:
    return [
        f"data.path={digits}", f"run_dir={run}", f"train.total_images={total}",
        "train.checkpoint_images=80", "train.snapshot_images=100000", "train.tick_images=400",
        *more,
    ]  # fmt: skip


def uninterrupted(size: int, run: Path, arguments: list[str]) -> None:
    attempt = Attempt(size, run.parent / "uninterrupted-records", arguments)
    errors = attempt.end(FULL_RUN_SECONDS)
    assert attempt.process.returncode == 0, errors[-3000:]


@pytest.mark.parametrize(
    ("size", "kills", "total"),
    # With 3 and more processes, sums depend on DDP's buckets.
    [(2, 2, 1200), pytest.param(3, 8, 2400, marks=pytest.mark.slow)],
)
def test_kills_at_a_constant_world_size_leave_the_bytes_unchanged(
    size: int, kills: int, total: int, digits: Path, tmp_path: Path
) -> None:
    batch = f"train.batch={20 * size}"
    expected, run = tmp_path / "expected", tmp_path / "run"
    uninterrupted(size, expected, settings(digits, expected, total, batch))
    arguments = settings(digits, run, total, batch)
    begins, records = train_with_kills([size] * kills, run, arguments, seed=1)
    assert final_weights(expected, total) == final_weights(run, total)
    check_samples(begins, records, total)
    assert begins[-1] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_kills_on_two_one_and_two_processes(digits: Path, tmp_path: Path) -> None:
    """The run finishes, and no rank has lost or repeated a sample."""
    total, run = 12_000, tmp_path / "run"
    sizes = [2] * 10 + [1] * 10 + [2] * 10
    begins, records = train_with_kills(sizes, run, settings(digits, run, total), seed=0)
    assert len(begins) == 31
    assert begins == sorted(begins)
    check_samples(begins, records, total)
    progress = checkpoint.read_progress(run / "checkpoints" / str(total))
    # An attempt that is killed before its first checkpoint is not counted.
    assert progress.attempt == len(set(begins))
    assert (run / "DONE").read_text() == f"{total}\n"
    for name in ("checkpoints", "snapshots", "samples"):
        assert not list((run / name).glob(".*")), "later attempts clean up"
    assert load_file(run / "snapshots" / str(total) / "generator_ema.safetensors")
    assert atomic_files.numbered_folders(run / "checkpoints")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_on_eight_four_and_two_processes_that_stream(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a web server, by lanes: every sample once, over more than an epoch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    total, run = 2400, tmp_path / "run"
    with serving(digits) as web:
        arguments = settings(digits, run, total, f"data.path={web.url}", "data.block=400")
        begins, records = train_with_kills([8, 4, 2], run, arguments, seed=3)
    assert load_config(run / "config.yaml").streams["images"].lanes == 40
    check_samples(begins, records, total)

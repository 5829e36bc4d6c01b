"""Signals to a launcher: the run saves, marks itself for a requeue, and resumes bitwise."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, environment, free_port, launch

from bigan import checkpoint

LAUNCH = ROOT / "launch" / "cpu.yaml"
# Forwarded to the workers, which have as long to save as SLURM allows.
SIGNALS = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR2,SIGINT", "PET_SHUTDOWN_TIMEOUT": "90"}


@pytest.fixture
def begin(digits: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the smoke config on two processes, in `tmp_path/run`."""
    started: list[subprocess.Popen[str]] = []

    def start(*overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", LAUNCH]
        command += ["--main_process_port", free_port(), "-m", "bigan", "train", SMOKE]
        command += [f"data.path={digits}", f"run_dir={tmp_path / 'run'}", *overrides]
        started.append(
            subprocess.Popen(
                [str(part) for part in command],
                env=environment() | SIGNALS,
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until_training(run: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    journal = run / "metrics.jsonl"
    while not journal.exists() or "train/discriminator/loss" not in journal.read_text():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline, "training does not start"
        time.sleep(0.05)


def stopped_at(run: Path, number: signal.Signals) -> int:
    """images_seen of REQUEUE, which is that of the newest checkpoint."""
    marker = json.loads((run / "REQUEUE").read_text())
    newest = checkpoint.latest(run)
    assert newest is not None
    assert marker == {"signal": number, "images_seen": int(newest.name)}
    return marker["images_seen"]


def test_sigterm_to_the_launcher_saves_and_marks(
    begin: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = begin("train.total_images=1000000", "train.checkpoint_images=1000000")
    wait_until_training(run, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=40)
    assert process.returncode != 0
    assert stopped_at(run, signal.SIGTERM) > 0
    lines = [line for line in errors.splitlines() if "signal 15: saving at the next step" in line]
    assert len(lines) == 1, "two processes, one line"
    assert "bigan: rank" not in errors, "no rank is reported lost"


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_same_command_resumes_bitwise(
    begin: Callable[..., subprocess.Popen[str]],
    digits: Path,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    """The signal reaches all processes at once, as SLURM's does, and the launcher forwards it."""
    run, expected = tmp_path / "run", tmp_path / "expected"
    length = ["train.total_images=1600", "train.checkpoint_images=1600"]
    length += ["train.snapshot_images=1600"]
    process = begin(*length)
    wait_until_training(run, process)
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    assert 0 < stopped_at(run, number) < 1600
    rest = begin(*length)
    assert rest.wait(timeout=180) == 0
    assert not (run / "REQUEUE").exists()
    options = ["--config_file", LAUNCH]
    launch(SMOKE, f"data.path={digits}", f"run_dir={expected}", *length, options=options)
    name = "snapshots/1600/generator_ema.safetensors"
    assert (run / name).read_bytes() == (expected / name).read_bytes()

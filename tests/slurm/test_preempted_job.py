"""Jobs that SLURM signals leave a checkpoint and REQUEUE; submitted again, they finish."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, free_port, launch
from slurm.minislurm import Cluster

from bigan import checkpoint

LAUNCH = ROOT / "launch" / "cpu.yaml"
ACCELERATE = f"{sys.executable} -m accelerate.commands.launch --config_file {LAUNCH}"

pytestmark = pytest.mark.full

# The names of these nodes do not resolve; those of a real cluster do.
BARE = """#!/bin/bash
#SBATCH --nodes=2 --ntasks=2
export MASTER_ADDR=127.0.0.1
srun --ntasks=2 {python} -m bigan train {arguments}
"""
# One task per node, the launcher, which forwards signals and lets its processes save.
LAUNCHER = """#!/bin/bash
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=2
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGUSR2,SIGINT PET_SHUTDOWN_TIMEOUT=90
srun --ntasks=1 {accelerate} --main_process_port {port} -m bigan train {arguments}
"""
SCRIPTS = {"bare": BARE, "accelerate": LAUNCHER}


def script(kind: str, *arguments: object) -> str:
    return SCRIPTS[kind].format(
        python=sys.executable,
        accelerate=ACCELERATE,
        port=free_port(),
        arguments=shlex.join(map(str, arguments)),
    )


def stop_while_training(cluster: Cluster, job: int, name: str, run: Path, number: str) -> str:
    """Signal the job's processes once it trains; returns the state in which it ends."""
    deadline = time.monotonic() + 180
    journal = run / "metrics.jsonl"
    while not journal.exists() or "train/discriminator/loss" not in journal.read_text():
        output = cluster.output(name).read_text() if cluster.output(name).exists() else ""
        assert cluster.state(job) in ("PENDING", "CONFIGURING", "RUNNING"), output
        assert time.monotonic() < deadline, output
        time.sleep(0.1)
    cluster.run("scancel", f"--signal={number}", job)
    return cluster.wait(job, timeout=60)


def stopped_at(run: Path, number: int) -> int:
    """images_seen of REQUEUE, which is that of the newest checkpoint."""
    marker = json.loads((run / "REQUEUE").read_text())
    newest = checkpoint.latest(run)
    assert newest is not None
    assert marker == {"signal": number, "images_seen": int(newest.name)}
    return marker["images_seen"]


@pytest.mark.slow  # test_job_script.py tests the signals of batch scripts
def test_signal_to_bare_tasks_saves_and_marks(
    cluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    """`srun python -m bigan train` on two nodes; SIGUSR2 reaches both processes."""
    run = tmp_path / "run"
    length = ["train.total_images=1000000", "train.checkpoint_images=1000000"]
    batch = script("bare", SMOKE, f"data.path={digits}", f"run_dir={run}", *length)
    job = cluster.submit(batch, "marked")
    assert stop_while_training(cluster, job, "marked", run, "USR2") == "FAILED"
    assert stopped_at(run, 12) > 0
    output = cluster.output("marked").read_text()
    assert output.count("signal 12: saving") == 1, "two processes, one line"
    assert "bigan: rank" not in output, "no rank is reported lost"


@pytest.fixture(scope="module")
def uninterrupted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training without SLURM and without a stop."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = launch(*arguments(digits, run), options=["--config_file", LAUNCH])
    assert done.returncode == 0, done.stderr[-2000:]
    return run


def arguments(digits: Path, run: Path) -> list[object]:
    length = ["train.total_images=1600", "train.checkpoint_images=1600"]
    return [SMOKE, f"data.path={digits}", f"run_dir={run}", *length, "train.snapshot_images=1600"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), [("bare", "TERM"), ("accelerate", "USR2")])
def test_stopped_job_submitted_again_is_bitwise(
    cluster: Cluster, digits: Path, tmp_path: Path, uninterrupted: Path, kind: str, number: str
) -> None:
    run = tmp_path / "run"
    batch = script(kind, *arguments(digits, run))
    job = cluster.submit(batch, kind)
    assert stop_while_training(cluster, job, kind, run, number) == "FAILED"
    assert 0 < stopped_at(run, {"TERM": 15, "USR2": 12}[number]) < 1600
    assert cluster.wait(cluster.submit(batch, kind), timeout=180) == "COMPLETED"
    assert not (run / "REQUEUE").exists()
    name = "snapshots/1600/generator_ema.safetensors"
    assert (run / name).read_bytes() == (uninterrupted / name).read_bytes()

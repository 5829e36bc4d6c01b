"""`bigan submit` trains real runs on a real SLURM: the bits of a local run, also after stops."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, launch
from slurm.minislurm import Cluster

pytestmark = pytest.mark.full
BIGGAN = ROOT / "configs" / "smoke" / "biggan.yaml"


def submit(
    cluster: Cluster, *arguments: object, time_limit: str = "30:00", hold: bool = False
) -> list[dict[str, object]]:
    """`bigan submit`; the jobs that it records in the run folder."""
    command = [sys.executable, "-m", "bigan", "submit", *arguments, f"--time={time_limit}"]
    cluster.run(*command, timeout=120, extra={"SBATCH_HOLD": "1"} if hold else None)
    run = next(str(a)[8:] for a in arguments if str(a).startswith("run_dir="))
    lines = Path(run, "slurm", "jobs.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(run: Path) -> bytes:
    snapshots = sorted((run / "snapshots").iterdir(), key=lambda path: int(path.name))
    return (snapshots[-1] / "generator_ema.safetensors").read_bytes()


def log_of(run: Path, job: str) -> str:
    path = run / "slurm" / "logs" / f"{job}.log"
    return path.read_text() if path.exists() else f"{path} is missing"


def test_two_nodes_give_the_bits_of_two_processes(
    cluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    """And the evaluator, a job of its own, follows the run and ends with it."""
    run, local = tmp_path / "run $(x) 1", tmp_path / "local"
    data = f"data.path={digits}"
    jobs = submit(cluster, BIGGAN, data, f"run_dir={run}", "--nodes=2", "--evaluate=during")
    cpu = ROOT / "launch" / "cpu.yaml"
    done = launch(BIGGAN, data, f"run_dir={local}", options=["--config_file", cpu])
    assert done.returncode == 0, done.stderr[-2000:]
    train, evaluate = (str(job["job"]) for job in jobs)
    assert cluster.wait(train, timeout=180) == "COMPLETED", log_of(run, train)
    assert cluster.wait(evaluate, timeout=120) == "COMPLETED", log_of(run, evaluate)
    assert weights(run) == weights(local)
    measured = sorted(path.stem for path in (run / "evaluation").glob("*.json"))
    assert measured == sorted(path.name for path in (run / "snapshots").iterdir())


SHORT, LONG = 12_000, 60_000  # images; LONG takes longer than the time limit


def length(total: int) -> list[str]:
    images = {"total": total, "checkpoint": 1_000, "snapshot": total, "tick": 1_000}
    return [f"train.{name}_images={num}" for name, num in images.items()]


@pytest.fixture(scope="module")
def uninterrupted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a short run without SLURM and without a stop."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    cpu = ROOT / "launch" / "cpu.yaml"
    arguments = [BIGGAN, f"data.path={digits}", f"run_dir={run}", *length(SHORT)]
    done = launch(*arguments, options=["--config_file", cpu], timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return weights(run)


def events(run: Path) -> list[str]:
    lines = (run / "slurm" / "attempts.tsv").read_text().splitlines()
    return [line.split("\t")[1] for line in lines]


def wait_for_checkpoint(run: Path, after: int) -> int:
    """images_seen of the newest checkpoint, which is one after `after`."""
    deadline = time.monotonic() + 240
    while True:
        found = [int(p.parent.name) for p in run.glob("checkpoints/[0-9]*/COMPLETE")]
        if max(found, default=0) > after:
            return max(found)
        assert time.monotonic() < deadline, [log.read_text() for log in run.rglob("*.log")]
        time.sleep(0.1)


def requeue(cluster: Cluster, job: str) -> None:
    cluster.run("scontrol", "requeue", job)


def preempt(cluster: Cluster, job: str) -> None:
    script = cluster.folder / "important.sbatch"
    script.write_text("#!/bin/bash\nsleep 1\n")
    cluster.run(
        "sbatch", "--output=/dev/null", "--partition=high", "--exclusive", "--nodes=2", script
    )


def lose_node(cluster: Cluster, job: str) -> None:
    cluster.kill_node("n2")
    cluster.wait_for_restart(job)
    cluster.start_node("n2")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("interrupt", [requeue, preempt, lose_node])
def test_interrupted_run_gives_the_bits_of_an_uninterrupted_one(
    cluster: Cluster,
    digits: Path,
    tmp_path: Path,
    uninterrupted: bytes,
    interrupt: Callable[[Cluster, str], None],
) -> None:
    """So that every image was seen exactly once, in the same order."""
    run = tmp_path / "run"
    data = f"data.path={digits}"
    [job] = submit(cluster, BIGGAN, data, f"run_dir={run}", *length(SHORT), "--nodes=2")
    name = str(job["job"])
    wait_for_checkpoint(run, 0)
    interrupt(cluster, name)
    assert cluster.wait(name, timeout=400) == "COMPLETED", log_of(run, name)
    found = events(run)
    assert found[0] == "started"
    assert found[-1] == "completed"
    assert found.count("started") >= 2
    assert weights(run) == uninterrupted


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_run_longer_than_its_time_limit_needs_several_allocations(
    cluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    """The signal comes up to a minute early."""
    run, profile = tmp_path / "run", tmp_path / "profile.yaml"
    profile.write_text("signal_seconds: 85\n")
    jobs = submit(
        cluster, BIGGAN, f"data.path={digits}", f"run_dir={run}", *length(LONG), "--nodes=2",
        f"--profile={profile}", time_limit="2:00",
    )  # fmt: skip
    name = str(jobs[0]["job"])
    assert cluster.wait(name, timeout=600) == "COMPLETED", log_of(run, name)
    found = events(run)
    assert found[:2] == ["started", "requeued"]
    assert found[-1] == "completed"
    assert (run / "DONE").read_text().strip() == str(LONG)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("optimizer.discriminator.lr=1e30", "non-finite"),
        ("evaluation.seed=1", None),
    ],
)
@pytest.mark.slow
def test_deterministic_failure_ends_at_once(
    cluster: Cluster, digits: Path, tmp_path: Path, override: str, reason: str | None
) -> None:
    """A loss that is not finite, and a data set that is no longer there."""
    run = tmp_path / "run"
    data = tmp_path / "data"
    data.symlink_to(digits)
    jobs = submit(
        cluster, BIGGAN, f"data.path={data}", f"run_dir={run}", *length(SHORT), override,
        "--nodes=2", hold=reason is None,
    )  # fmt: skip
    name = str(jobs[0]["job"])
    if reason is None:
        data.unlink()
        reason = str(data)
        cluster.run("scontrol", "release", name)
    assert cluster.wait(name, timeout=180) == "FAILED", log_of(run, name)
    assert events(run) == ["started", "failed"]
    last = (run / "slurm" / "attempts.tsv").read_text().splitlines()[-1]
    assert reason in last.split("\t")[6]
    assert "FAILED" in log_of(run, name)
    assert cluster.field(name, "Restarts") == "0"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sweeps_of_real_runs_have_one_experiment(
    cluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    """A 2 x 2 grid and a Bayesian search with pruning, each with a parent run in MLflow."""
    from mlflow import MlflowClient

    lrs = "optimizer.{}.lr: [2.0e-4, 2.0e-3]"
    methods = {
        "grid": f"method: {{name: grid}}\nparameters: {{{lrs.format('generator')}, "
        f"{lrs.format('discriminator')}}}\n",
        "optuna": "method: {name: optuna, trials: 6, startup_trials: 3, prune: {name: median, "
        "startup_trials: 2}}\nparallel: 2\n"
        "parameters: {optimizer.generator.lr: {min: 1.0e-5, max: 1.0e-2, log: true}}\n",
    }
    jobs = {}
    for name, text in methods.items():
        sweep, run = tmp_path / f"{name}.yaml", tmp_path / "runs" / name
        sweep.write_text(f"experiment: search\n{text}")
        jobs[name] = submit(
            cluster, SMOKE, f"data.path={digits}", f"run_dir={run}", f"--sweep={sweep}",
            "tracking.mlflow=true", "train.total_images=800", "train.snapshot_images=400",
        )[0]["job"]  # fmt: skip
    for (name, job), num in zip(jobs.items(), (4, 6), strict=True):
        logs = tmp_path / "runs" / name / "slurm" / "logs"
        states = [cluster.wait(f"{job}_{index}", 600) for index in range(num)]
        assert states == ["COMPLETED"] * num, [log.read_text() for log in logs.glob("*.log")]
        done = cluster.run(sys.executable, "-m", "bigan", "sweep-report", tmp_path / "runs" / name)
        assert str(tmp_path / "runs" / name / "00") in done
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("search")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    parents = {run.info.run_id: run.info.run_name for run in runs if run.info.run_name in jobs}
    assert sorted(parents.values()) == ["grid", "optuna"]
    children = [parents[run.data.tags["mlflow.parentRunId"]] for run in runs
                if run.info.run_id not in parents]  # fmt: skip
    assert (children.count("grid"), children.count("optuna")) == (4, 6)

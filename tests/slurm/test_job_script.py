"""slurm/train.sbatch and evaluate.sbatch on a real SLURM, with a trainer that needs no torch."""

from __future__ import annotations

import csv
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, SMOKE
from slurm.minislurm import Cluster

pytestmark = pytest.mark.full


@dataclass
class Toy:
    """A run of the toy trainer (toy.py), submitted with slurm/train.sbatch."""

    cluster: Cluster
    run: Path
    python: Path

    def submit(
        self,
        *arguments: str,
        script: str = "train",
        options: Sequence[str] = (),
        nodes: int = 1,
        extra: dict[str, str] | None = None,
        **settings: Any,
    ) -> str:
        """The id of a job that trains `settings` (see toy.py)."""
        self.run.mkdir(exist_ok=True)
        config = self.run.with_suffix(".json")
        defaults = {"run_dir": str(self.run), "total": 40, "every": 20, "seconds": 0.05}
        config.write_text(json.dumps(defaults | settings))
        first = [str(config)] if script == "train" else [str(self.run)]
        printed = self.cluster.run(
            "sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10",
            f"--nodes={nodes}",
            f"--output={self.log}", f"--chdir={ROOT}", *options,
            ROOT / "slurm" / f"{script}.sbatch", *first, *arguments,
            extra={"BIGAN_PYTHON": str(self.python), "BIGAN_POLL_SECONDS": "1",
                   "BIGAN_SLURM": str(ROOT / "slurm"), **(extra or {})},
        )  # fmt: skip
        return printed.strip()

    @property
    def log(self) -> Path:
        return self.run.with_suffix(".log")

    @property
    def events(self) -> list[tuple[str, str, int]]:
        """(event, restart, images_seen) of each line of attempts.tsv."""
        lines = (self.run / "slurm" / "attempts.tsv").read_text().splitlines()
        fields = [line.split("\t") for line in lines]
        assert all(len(found) == 7 for found in fields), lines
        return [(event, restart, int(seen)) for _, event, _, _, restart, seen, _ in fields]

    @property
    def reason(self) -> str:
        return (self.run / "slurm" / "attempts.tsv").read_text().splitlines()[-1].split("\t")[6]

    def wait(self, job: str, timeout: float = 60) -> str:
        try:
            return self.cluster.wait(job, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.log.read_text()}") from error

    def wait_for(self, path: str, containing: str = "", timeout: float = 60) -> None:
        deadline, file = time.monotonic() + timeout, self.run / path
        while not file.exists() or containing not in file.read_text():
            log = self.log.read_text() if self.log.exists() else ""
            assert time.monotonic() < deadline, f"{path} does not appear: {log}"
            time.sleep(0.05)


@pytest.fixture
def toys(cluster: Cluster, tmp_path: Path) -> Callable[[], Toy]:
    """Makes runs."""
    python = tmp_path / "python"
    toy = ROOT / "tests" / "slurm" / "toy.py"
    python.write_text(
        f'#!/bin/bash\nif [ "$2" = bigan.cluster.trial ]; then exec "{sys.executable}" "$@"; fi\n'
        f'exec "{sys.executable}" "{toy}" "$@"\n'
    )
    python.chmod(0o755)
    numbers = itertools.count()
    return lambda: Toy(cluster, tmp_path / f"run {next(numbers)}", python)


@pytest.fixture
def toy(toys: Callable[[], Toy]) -> Toy:
    return toys()


def test_a_run_completes(toy: Toy) -> None:
    odd = "a.b=$(touch executed) 'x' \"y\"; z"
    job = toy.submit(odd)
    assert toy.wait(job) == "COMPLETED"
    assert toy.events == [("started", "0", 0), ("completed", "0", 40)]
    assert odd in (toy.run / "slurm" / "logs" / f"{job}-0" / "rank-0.log").read_text()
    assert odd in toy.log.read_text(), "the log of rank 0 is in the log of the job"


@pytest.mark.parametrize("launcher", ["accelerate", "srun"])
def test_two_nodes_know_each_other(toy: Toy, launcher: str) -> None:
    job = toy.submit(nodes=2, extra={"BIGAN_LAUNCHER": launcher})
    assert toy.wait(job) == "COMPLETED"
    logs = toy.run / "slurm" / "logs" / f"{job}-0"
    assert {path.name for path in logs.glob("rank-*")} == {"rank-0.log", "rank-1.log"}
    if launcher == "accelerate":
        options = [json.loads((logs / f"launcher-{n}.json").read_text()) for n in range(2)]
        assert options[0][2:] == options[1][2:]
        found = dict(zip(options[0][::2], options[0][1::2], strict=True))
        assert found["--num_machines"] == found["--num_processes"] == "2"
        assert found["--main_process_ip"] == "127.0.0.1"
        assert 20_000 <= int(found["--main_process_port"]) < 32_768


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        ("input\nconfig.yaml: train.batch = 30: wrong", "config.yaml: train.batch = 30: wrong"),
        ("run\nthe loss is not finite", "the loss is not finite"),
    ],
)
def test_failure_that_would_happen_again_is_final(toy: Toy, ends: str, reason: str) -> None:
    """Although the run made progress in this attempt."""
    job = toy.submit(ends={"30": ends})
    assert toy.wait(job) == "FAILED"
    assert toy.events == [("started", "0", 0), ("failed", "0", 20)]
    assert toy.reason == reason
    assert f"FAILED: {reason}" in toy.log.read_text()


def test_crash_after_progress_is_requeued(toys: Callable[[], Toy]) -> None:
    """Several jobs at once: a requeued job waits for seconds."""
    how = ("crash", "kill", "bug\nRuntimeError: CUDA error", "lost\nrank 1")
    runs = [(toy, toy.submit(ends={"30": end})) for end in how for toy in [toys()]]
    ends = dict.fromkeys(("30", "50", "70"), "crash")
    former = toys()  # with failures of jobs with the same number
    for number in range(int(runs[-1][1]) + 1, int(runs[-1][1]) + 10):
        logs = former.run / "slurm" / "logs" / f"{number}-0"
        logs.mkdir(parents=True)
        (logs / "failure-1-rank-0.txt").write_text("input\nold\n")
    runs.append((former, former.submit(ends={"30": "crash"})))
    bounded = toys()
    runs.append((bounded, bounded.submit(total=80, ends=ends, extra={"BIGAN_MAX_REQUEUES": "1"})))
    assert [toy.wait(job) for toy, job in runs] == [*["COMPLETED"] * 5, "FAILED"]
    for toy, _ in runs[:5]:
        expected = [("started", "0", 0), ("requeued", "0", 20)]
        assert toy.events == [*expected, ("started", "1", 20), ("completed", "1", 40)]
        assert (toy.run / "seen.txt").read_text().split() == ["10", "20", "30", "30", "40"]
    assert [event for event, *_ in bounded.events] == ["started", "requeued", "started", "failed"]
    assert "BIGAN_MAX_REQUEUES" in bounded.reason


def test_crash_without_progress_is_final(toy: Toy) -> None:
    assert toy.wait(toy.submit(ends={"10": "crash"})) == "FAILED"
    assert toy.events == [("started", "0", 0), ("failed", "0", 0)]
    assert "exit code" in toy.reason


def test_users_stop_is_not_requeued(toy: Toy) -> None:
    job = toy.submit(total=100_000)
    toy.wait_for("checkpoints/20/COMPLETE")
    (toy.run / "STOP").touch()
    assert toy.wait(job) == "COMPLETED"
    assert [event for event, *_ in toy.events] == ["started", "stopped"]


def test_time_limit_too_short_for_a_checkpoint_is_final(toy: Toy) -> None:
    job = toy.submit(total=2000, every=2000, hangs=True)
    toy.wait_for("seen.txt")
    toy.cluster.run("scancel", "--batch", "--signal=USR1", job)
    state = toy.wait(job)
    assert (state, [event for event, *_ in toy.events]) == ("FAILED", ["started", "failed"])


def test_interrupted_runs_continue_where_they_stopped(toys: Callable[[], Toy]) -> None:
    """The signal before the time limit, `scontrol requeue`, and a job of higher priority."""
    runs = [toys() for _ in range(3)]
    limit, requeue, preempted = (toy.submit(total=3000, every=2000) for toy in runs)
    for toy in runs:
        toy.wait_for("seen.txt")
    cluster = runs[0].cluster
    cluster.run("scancel", "--batch", "--signal=USR1", limit)
    cluster.run("scontrol", "requeue", requeue)
    runs[0].wait_for("slurm/attempts.tsv", containing="requeued")
    runs[1].wait_for("slurm/attempts.tsv", containing="requeued")
    script = cluster.folder / "important.sbatch"
    script.write_text("#!/bin/bash\nsleep 1\n")
    cluster.run(
        "sbatch", "--output=/dev/null", "--partition=high", "--exclusive", "--nodes=2", script
    )
    for toy, job in zip(runs, (limit, requeue, preempted), strict=True):
        assert toy.wait(job, 120) == "COMPLETED"
        starts = [found for found in toy.events if found[0] == "started"]
        assert len(starts) >= 2
        assert all(seen > 0 for *_, seen in starts[1:])
        seen = [int(line) for line in (toy.run / "seen.txt").read_text().split()]
        assert seen == list(range(10, 3010, 10))
        assert not (toy.run / "STOP").exists()


def test_signals_while_staging(toys: Callable[[], Toy]) -> None:
    """Before there is a trainer: SIGTERM requeues the job, the signal before the limit ends it."""
    jobs = {}
    for signal in ("TERM", "USR1"):
        jobs[signal] = (toy := toys(), toy.submit("data.cache=/local", stages=60))
    for signal, (toy, job) in jobs.items():
        toy.wait_for("staging")
        toy.cluster.run("scancel", "--batch", f"--signal={signal}", job)
    states = {signal: toy.wait(job) for signal, (toy, job) in jobs.items()}
    assert states == {"TERM": "COMPLETED", "USR1": "FAILED"}
    found = [event for event, *_ in jobs["TERM"][0].events]
    assert found == ["started", "requeued", "started", "completed"]
    assert "--time" in jobs["USR1"][0].reason


def test_wrong_variables_are_named(toys: Callable[[], Toy]) -> None:
    wrong = [
        {"BIGAN_PROCESSES": "two"},
        {"BIGAN_LAUNCHER": "torchrun"},
        {"BIGAN_CONTAINER": "docker"},
        {"BIGAN_CONTAINER": "pyxis"},
    ]
    runs = [(toy := toys(), toy.submit(extra=extra)) for extra in wrong]
    for (toy, job), extra in zip(runs, wrong, strict=True):
        assert toy.wait(job) == "FAILED"
        name, value = next(iter(extra.items()))
        [line] = toy.log.read_text().splitlines()
        assert f"FAILED: {name}={value}" in line


def test_files_of_earlier_attempts_decide_nothing(toys: Callable[[], Toy]) -> None:
    """DONE of a shorter run, and REQUEUE."""
    longer, crashes = toys(), toys()
    (longer.run / "slurm").mkdir(parents=True)
    (longer.run / "DONE").touch()
    (longer.run / "slurm" / "attempts.tsv").write_text("a line that was cut o")
    crashes.run.mkdir()
    (crashes.run / "REQUEUE").touch()
    jobs = [longer.submit(ends={"10": "input\nwrong"}), crashes.submit(ends={"10": "bug\nwrong"})]
    runs = zip((longer, crashes), jobs, strict=True)
    assert [toy.wait(job) for toy, job in runs] == ["FAILED", "FAILED"]
    lines = (longer.run / "slurm" / "attempts.tsv").read_text().splitlines()
    assert [line.count("\t") for line in lines] == [0, 6, 6]
    assert [event for event, *_ in crashes.events] == ["started", "failed"]


@pytest.mark.slow
def test_node_that_is_lost_before_the_first_checkpoint(toy: Toy) -> None:
    """The surviving rank reports it before SLURM notices."""
    job = toy.submit(nodes=2, total=600, every=600, rank_1=20, ends={"300": "lost\nrank 1"})
    toy.wait_for("seen.txt")
    toy.cluster.kill_node("n2")
    toy.cluster.wait_for_restart(job)
    toy.cluster.start_node("n2")
    assert toy.wait(job, timeout=120) == "COMPLETED"
    assert toy.events[-1] == ("completed", "1", 600)


def test_cancelled_job_stays_cancelled(toy: Toy) -> None:
    job = toy.submit(total=100_000)
    toy.wait_for("checkpoints/20/COMPLETE")
    toy.cluster.run("scancel", job)
    assert toy.wait(job) == "CANCELLED"
    toy.wait_for("slurm/attempts.tsv", containing="cancelled")
    assert [event for event, *_ in toy.events] == ["started", "stopped"]


def test_chain_replaces_requeue(toy: Toy) -> None:
    """Three links, of which the second completes the run; no link requeues itself."""
    jobs: list[str] = []
    for link in (1, 2, 3):
        chain = {"BIGAN_CHAIN": "c", "BIGAN_CHAIN_LINK": str(link), "BIGAN_CHAIN_LENGTH": "3"}
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        options = ["--no-requeue", *after]
        jobs.append(toy.submit(ends={"30": "crash"}, options=options, extra=chain))
    assert [toy.wait(job) for job in jobs] == ["COMPLETED"] * 3
    expected = [("started", "0", 0), ("limit", "0", 20)]
    assert toy.events == [*expected, ("started", "0", 20), ("completed", "0", 40)]


def test_failure_ends_a_chain(toy: Toy) -> None:
    jobs: list[str] = []
    for link in (1, 2):
        chain = {"BIGAN_CHAIN": "c", "BIGAN_CHAIN_LINK": str(link), "BIGAN_CHAIN_LENGTH": "2"}
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        jobs.append(toy.submit(ends={"30": "input\nwrong"}, options=after, extra=chain))
    assert [toy.wait(job) for job in jobs] == ["FAILED", "FAILED"]
    assert [event for event, *_ in toy.events] == ["started", "failed", "failed"]


def test_evaluator_follows_and_ends_with_training(toys: Callable[[], Toy]) -> None:
    """Also where the training job fails, so that DONE never appears."""
    complete, failing = toys(), toys()
    jobs = []
    for toy, ends in ((complete, {}), (failing, {"30": "run\nnot finite"})):
        settings = {"ends": ends, "seconds": 0.3}
        train = toy.submit(**settings)
        options = [f"--dependency=after:{train}"]
        extra = {"BIGAN_TRAINING_JOB": train, "BIGAN_RUN_DIR": str(toy.run)}
        jobs += [
            train,
            toy.submit(script="evaluate", options=options, extra=extra, ends=ends, seconds=0.3),
        ]
    assert [complete.wait(job) for job in jobs] == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    for toy, names in ((complete, ["20", "40"]), (failing, ["20"])):
        assert sorted(path.stem for path in (toy.run / "evaluation").iterdir()) == names


def submit_sweep(
    toy: Toy, method: str, parameters: str, *overrides: str, seconds: float = 0
) -> str:
    """The id of the job array of a sweep over a real config, with the toy trainer.

    seconds: of the first evaluation of each trial.
    """
    sweep, profile = toy.run.with_suffix(".sweep.yaml"), toy.run.with_suffix(".profile.yaml")
    sweep.write_text(f"method: {method}\nparameters: {parameters}\n")
    profile.write_text(f"python: {toy.python}\n")
    toy.cluster.run(
        sys.executable, "-m", "bigan", "submit", SMOKE, f"run_dir={toy.run}", *overrides,
        f"--sweep={sweep}", f"--profile={profile}", "--time=10:00", timeout=120,
        extra={"TOY_EVALUATION_SECONDS": str(seconds)},
    )  # fmt: skip
    lines = (toy.run / "slurm" / "jobs.jsonl").read_text().splitlines()
    return str(json.loads(lines[-1])["job"])


def test_sweeps_are_job_arrays(toys: Callable[[], Toy], digits: Path) -> None:
    """A grid, of which two elements are requeued alone, and a Bayesian search."""
    grid, bayesian = toys(), toys()
    data = f"data.path={digits}"
    lrs = "optimizer.generator.lr: [0.001, 0.002], optimizer.discriminator.lr: [0.1, 0.2]"
    first = submit_sweep(grid, "{name: grid}", f"{{{lrs}}}", data, seconds=5)
    grid.wait_for("002/checkpoints/20/COMPLETE")
    grid.cluster.run("scontrol", "requeue", f"{first}_2")
    grid.wait_for("001/evaluating")
    grid.cluster.run("scancel", "--batch", "--signal=USR1", f"{first}_1")
    lr = "{optimizer.generator.lr: {min: 0.0001, max: 0.01, log: true}}"
    second = submit_sweep(bayesian, "{name: optuna, trials: 6, startup_trials: 3}", lr, data)
    for toy, job, num in ((grid, first, 4), (bayesian, second, 6)):
        elements = [f"{job}_{index}" for index in range(num)]
        states = [toy.cluster.wait(element, 120) for element in elements]
        logs = toy.run / "slurm" / "logs"
        assert states == ["COMPLETED"] * num, [p.read_text() for p in logs.glob("*.log")]
        done = toy.cluster.run(sys.executable, "-m", "bigan", "sweep-report", toy.run)
        rows = list(csv.DictReader((toy.run / "report.csv").open()))
        assert [row["state"] for row in rows] == ["complete"] * num
        best = min(rows, key=lambda row: float(row["eval/fd/digits8-cnn-v1"]))
        assert str(toy.run / f"{int(best['trial']):03d}") in done
    restarts = [grid.cluster.field(f"{first}_{index}", "Restarts") for index in range(4)]
    assert restarts == ["0", "1", "1", "0"]
    assert float(best["optimizer.generator.lr"]) != 0.003

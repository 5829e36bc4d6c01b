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


def test_two_nodes_know_each_other(toys: Callable[[], Toy]) -> None:
    launchers = ("accelerate", "srun")
    runs = [toys() for _ in launchers]
    jobs = [
        toy.submit(nodes=2, extra={"BIGAN_LAUNCHER": launcher})
        for toy, launcher in zip(runs, launchers, strict=True)
    ]
    for toy, job in zip(runs, jobs, strict=True):
        assert toy.wait(job) == "COMPLETED"
        logs = toy.run / "slurm" / "logs" / f"{job}-0"
        assert {path.name for path in logs.glob("rank-*")} == {"rank-0.log", "rank-1.log"}
    logs = runs[0].run / "slurm" / "logs" / f"{jobs[0]}-0"
    options = [json.loads((logs / f"launcher-{n}.json").read_text()) for n in range(2)]
    assert options[0][2:] == options[1][2:]
    found = dict(zip(options[0][::2], options[0][1::2], strict=True))
    assert found["--num_machines"] == found["--num_processes"] == "2"
    assert found["--main_process_ip"] == "127.0.0.1"
    assert 20_000 <= int(found["--main_process_port"]) < 32_768


def test_failure_that_would_happen_again_is_final(toys: Callable[[], Toy]) -> None:
    """Although the run made progress in this attempt; a crash without progress is final, too."""
    reasons = {
        "input": "config.yaml: train.batch = 30: wrong",
        "run": "the loss is not finite",
    }
    runs = {kind: toys() for kind in reasons}
    jobs = {k: toy.submit(ends={"30": f"{k}\n{reasons[k]}"}) for k, toy in runs.items()}
    crashed = toys()
    crash = crashed.submit(ends={"10": "crash"})
    for kind, toy in runs.items():
        assert toy.wait(jobs[kind]) == "FAILED"
        assert toy.events == [("started", "0", 0), ("failed", "0", 20)]
        assert toy.reason == reasons[kind]
        assert f"FAILED: {reasons[kind]}" in toy.log.read_text()
    assert crashed.wait(crash) == "FAILED"
    assert crashed.events == [("started", "0", 0), ("failed", "0", 0)]
    assert "exit code" in crashed.reason


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
    limit, requeue, preempted = (toy.submit(total=1500, every=1200) for toy in runs)
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
        assert seen == list(range(10, 1510, 10))
        assert not (toy.run / "STOP").exists()


@pytest.mark.slow
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


def submit_chain(toy: Toy, links: int, **settings: Any) -> list[str]:
    """The ids of the jobs of a chain."""
    jobs: list[str] = []
    for link in range(1, links + 1):
        chain = {"LINK": str(link), "LENGTH": str(links)}
        extra = {"BIGAN_CHAIN": "c"} | {f"BIGAN_CHAIN_{key}": n for key, n in chain.items()}
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        jobs.append(toy.submit(options=["--no-requeue", *after], extra=extra, **settings))
    return jobs


def test_chain_replaces_requeue(toys: Callable[[], Toy]) -> None:
    """The second link completes the run; in another chain, the first one fails for good."""
    complete, failing = toys(), toys()
    links = submit_chain(complete, 3, ends={"30": "crash"})
    failed = submit_chain(failing, 2, ends={"30": "input\nwrong"})
    assert [complete.wait(job) for job in links] == ["COMPLETED"] * 3
    expected = [("started", "0", 0), ("limit", "0", 20)]
    assert complete.events == [*expected, ("started", "0", 20), ("completed", "0", 40)]
    assert [failing.wait(job) for job in failed] == ["FAILED", "FAILED"]
    assert [event for event, *_ in failing.events] == ["started", "failed", "failed"]


def test_evaluator_follows_and_ends_with_training(toys: Callable[[], Toy]) -> None:
    """Also where the training job fails, so that DONE never appears."""
    complete, failing = toys(), toys()
    jobs = []
    for toy, ends in ((complete, {}), (failing, {"30": "run\nnot finite"})):
        settings = {"ends": ends, "seconds": 0.15}
        train = toy.submit(**settings)
        options = [f"--dependency=after:{train}"]
        extra = {"BIGAN_TRAINING_JOB": train, "BIGAN_RUN_DIR": str(toy.run)}
        jobs += [
            train,
            toy.submit(script="evaluate", options=options, extra=extra, ends=ends, seconds=0.15),
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


def reported(toy: Toy, job: str, num: int) -> list[dict[str, str]]:
    """The rows of the report of a sweep, all of whose trials complete."""
    states = [toy.cluster.wait(f"{job}_{index}", 120) for index in range(num)]
    logs = toy.run / "slurm" / "logs"
    assert states == ["COMPLETED"] * num, [p.read_text() for p in logs.glob("*.log")]
    done = toy.cluster.run(sys.executable, "-m", "bigan", "sweep-report", toy.run)
    rows = list(csv.DictReader((toy.run / "report.csv").open()))
    assert [row["state"] for row in rows] == ["complete"] * num
    best = min(rows, key=lambda row: float(row["eval/fd/digits8-cnn-v1"]))
    assert str(toy.run / f"{int(best['trial']):03d}") in done
    return rows


def test_grid_is_a_job_array(toy: Toy, digits: Path) -> None:
    """Two of its elements are requeued alone: in training, and in the evaluation."""
    lrs = "{optimizer.generator.lr: [0.001, 0.002], optimizer.discriminator.lr: [0.1, 0.2]}"
    job = submit_sweep(toy, "{name: grid}", lrs, f"data.path={digits}", seconds=2)
    toy.wait_for("002/checkpoints/20/COMPLETE")
    toy.cluster.run("scontrol", "requeue", f"{job}_2")
    toy.wait_for("001/evaluating")
    toy.cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    reported(toy, job, 4)
    restarts = [toy.cluster.field(f"{job}_{index}", "Restarts") for index in range(4)]
    assert restarts == ["0", "1", "1", "0"]


@pytest.mark.slow
def test_bayesian_search_is_a_job_array(toy: Toy, digits: Path) -> None:
    lr = "{optimizer.generator.lr: {min: 0.0001, max: 0.01, log: true}}"
    method = "{name: optuna, trials: 6, startup_trials: 3}"
    rows = reported(toy, submit_sweep(toy, method, lr, f"data.path={digits}"), 6)
    assert len({row["optimizer.generator.lr"] for row in rows}) == 6

"""`bigan sweep` with a program in place of `bigan` that trains nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from cluster.fake_slurm import FakeSlurm, line, submission
from sweeps import GRID, LR, OPTUNA, SEED, frozen

from bigan.cli.main import main
from bigan.cluster import jobs, sweep_local
from bigan.cluster.sweep_folder import SweepFolder
from bigan.cluster.trial import PRUNED
from bigan.errors import UserError
from bigan.run.lock import LockedError

# Writes what `bigan train CONFIG` and `bigan evaluate RUN [--watch]` leave. train.seed = 9 always
# fails; FAKE_SECONDS: duration of a run of two snapshots; SIGTERM saves; a run that was saved
# resumes. Its metric is the learning rate.
PROGRAM = """
import json, os, re, signal, sys, time
from pathlib import Path
command, path = sys.argv[1], Path(sys.argv[2])
print(command, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["BIGAN_LOG_DIR"], flush=True)
def snapshots(run):
    return sorted(int(p.name) for p in run.glob("snapshots/*") if (p / "COMPLETE").exists())
if command == "train":
    text = path.read_text()
    run = Path(re.search("run_dir: (.*)", text)[1])
    if "seed: 9" in text:
        log = Path(os.environ["BIGAN_LOG_DIR"])
        (log / "failure-1-rank-0.txt").write_text("run\\nloss became non-finite\\n")
        sys.exit(1)
    run.mkdir(exist_ok=True)
    (run / "lr").write_text(re.search(r"generator:\\s+lr: (.*)", text)[1])
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    (run / "attempts").open("a").write("x")
    for images in (200, 400):
        if images in snapshots(run):
            continue
        end = time.time() + float(os.environ["FAKE_SECONDS"]) / 2
        while time.time() < end:
            time.sleep(0.02)
            if stopped or (run / "STOP").exists():
                (run / "saved").touch()
                sys.exit(143)
        for name in ("snapshots", "checkpoints"):
            folder = run / name / str(images)
            folder.mkdir(parents=True)
            (folder / "COMPLETE").touch()
    (run / "DONE").write_text("400")
else:
    while True:
        done = (path / "DONE").exists()
        for images in snapshots(path):
            (path / "evaluation").mkdir(exist_ok=True)
            metrics = {"fd/digits8-cnn-v1": float((path / "lr").read_text())}
            temporary = path / "temporary"
            temporary.write_text(json.dumps({"metrics": metrics}))
            temporary.replace(path / "evaluation" / f"{images}.json")
        if done or "--watch" not in sys.argv:
            break
        time.sleep(0.02)
"""


@pytest.fixture(autouse=True)
def _fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(sweep_local, "COMMAND", (sys.executable, "-S", str(program)))
    monkeypatch.setattr(sweep_local, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(sweep_local.trials, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(sweep_local, "publish", lambda folder: "")
    monkeypatch.setenv("FAKE_SECONDS", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")


def _run(folder: SweepFolder, jobs: int = 1) -> tuple[int, list[str], int]:
    """(exit code, lines, largest number of trials at a time)."""
    lines: list[str] = []
    num_running: list[int] = [0]
    code = sweep_local.run_sweep(
        folder,
        jobs,
        lines.append,
        lambda trials: num_running.append(sum(t.state == "running" for t in trials)),
    )
    return code, lines, max(num_running)


def _states(folder: SweepFolder) -> list[str]:
    return [trial.state for trial in folder.read_all()]


def test_failed_trial_does_not_stop_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "0.2")
    folder = frozen(tmp_path, **{**GRID, "parameters": {LR: [0.2, 0.1], SEED: [9, 1]}})
    code, lines, most = _run(folder, jobs=2)
    assert code == 0
    assert _states(folder) == ["failed", "complete", "failed", "complete"]
    assert folder.read_all()[0].error == "loss became non-finite"
    assert [t.value for t in folder.read_all()[1::2]] == [0.2, 0.1]
    assert most == 2
    assert any("loss became non-finite" in line for line in lines)
    logs = [(folder.logs / f"local-{i:03d}.log").read_text().split() for i in (0, 1)]
    assert {log[1] for log in logs} == {"5", "7"}  # a GPU for each place
    assert logs[0][2] == str(folder.logs / "local-000-0")
    assert _run(folder) == (0, [], 0)  # nothing is left


def test_sweep_without_a_complete_trial_has_exit_code_1(tmp_path: Path) -> None:
    folder = frozen(tmp_path, method={"name": "grid"}, parameters={SEED: [9]})
    assert _run(folder)[0] == 1


@pytest.mark.full
def test_pruned_trials_end_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "3")
    method: dict[str, Any] = {"name": "optuna", "trials": 6, "startup_trials": 6, "seed": 0}
    method["prune"] = {"name": "median", "startup_trials": 1}
    folder = frozen(tmp_path, **{**OPTUNA, "method": method})
    assert _run(folder, jobs=2)[0] == 0
    pruned = [t for t in folder.read_all() if t.state == "pruned"]
    assert pruned
    assert {t.state for t in folder.read_all()} == {"pruned", "complete"}
    for trial in pruned:
        run = folder.run(trial.index)
        assert run.stop.read_text() == PRUNED
        assert (run.path / "saved").exists()
        assert not run.done.exists()
        assert trial.images_seen == 200


@pytest.mark.parametrize(
    ("number", "cancels"),
    [
        (signal.SIGINT, False),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.full),
        (signal.SIGTERM, True),
    ],
)
def test_stopped_sweep_saves_and_continues(
    number: signal.Signals, cancels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "60")
    folder = frozen(tmp_path, **GRID)

    def stop() -> None:
        wanted = [folder.path / name / "attempts" for name in ("000", "001")]
        while not all(path.exists() for path in wanted):
            time.sleep(0.02)
        with contextlib.suppress(LockedError):  # a second `bigan sweep`, in another terminal
            _run(folder)
            refused.clear()
        if cancels:
            main(["cancel", str(folder.path)])
        else:
            os.kill(os.getpid(), number)

    refused = [True]
    before = signal.getsignal(number)
    thread = threading.Thread(target=stop)
    thread.start()
    code, lines, _ = _run(folder, jobs=2)
    thread.join()
    assert refused
    assert code == 128 + number
    assert signal.getsignal(number) is before
    assert _states(folder) == ["running", "running"]
    assert all((folder.path / name / "saved").exists() for name in ("000", "001"))
    monkeypatch.setenv("FAKE_SECONDS", "0")
    assert _run(folder, jobs=2)[0] == 0
    assert _states(folder) == ["complete"] * 4
    assert (folder.path / "000" / "attempts").read_text() == "xx"
    assert "continues" in lines[-1]


def test_sweep_in_the_queue_is_not_run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trials would fail here, and be recorded as failed."""
    folder = frozen(tmp_path, **GRID)
    jobs.append(folder.path, submission(folder.path, "7", "sweep"))
    fake = FakeSlurm(tmp_path / "slurm", monkeypatch)
    fake.set(line("7_1", "running", folder.path, "sweep"))
    with pytest.raises(UserError, match="job 7 "):
        _run(folder)
    assert not folder.read_all()


@pytest.mark.full
def test_trials_end_with_a_killed_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "60")
    folder = frozen(tmp_path, **GRID)
    child = os.fork()
    if child == 0:
        _run(folder, jobs=2)
        os._exit(0)
    while not (folder.path / "001" / "attempts").exists():
        time.sleep(0.02)
    time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.time() + 20
    while not (folder.path / "001" / "saved").exists():
        assert time.time() < deadline
        time.sleep(0.02)

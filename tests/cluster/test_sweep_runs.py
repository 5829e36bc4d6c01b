"""Sweeps of real runs without SLURM, and their runs in MLflow."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, environment, run_bigan
from sweeps import GRID, LR, METRIC, SEED, fake_run, frozen, sweep_file

from bigan.cluster import sweep_mlflow, trial
from bigan.cluster.sweep_folder import SweepFolder
from bigan.reporting import tracker
from bigan.reporting.metrics_log import read_metrics
from bigan.reporting.mlflow_run import PARENT_TAG, exclusive, open_run
from bigan.run_config import TrackingConfig


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def _file(tmp_path: Path, digits: Path, content: dict[str, Any], *overrides: str) -> Path:
    """A sweep file of short runs, with MLflow, in `tmp_path`/runs/sweep."""
    given = [
        f"run_dir={tmp_path / 'runs' / 'sweep'}",
        f"data.path={digits}",
        "tracking.mlflow=true",
        "evaluation.num_samples=50",
        *overrides,
    ]
    return sweep_file(tmp_path, **content, overrides=given)


def _runs(store: Path, experiment: str) -> tuple[Any, list[Any], Any]:
    """(parent run, its children by name, client)."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store}")
    found = client.get_experiment_by_name(experiment)
    runs = sorted(client.search_runs([found.experiment_id]), key=lambda run: run.info.run_name)
    (parent,) = [run for run in runs if PARENT_TAG not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags[PARENT_TAG] for run in children} == {parent.info.run_id}
    return parent, children, client


@pytest.mark.slow
def test_grid_without_slurm(digits: Path, tmp_path: Path) -> None:
    path = _file(
        tmp_path, digits, {**GRID, "experiment": "grids"},
        "train.total_images=80", "train.checkpoint_images=80", "train.snapshot_images=80",
    )  # fmt: skip
    done = run_bigan("sweep", path, "--jobs", "2", timeout=280)
    assert done.returncode == 0, done.stderr
    folder = SweepFolder(tmp_path / "runs" / "sweep")
    trials = folder.read_all()
    assert [t.state for t in trials] == ["complete"] * 4
    for t in trials:
        record = json.loads((folder.run(t.index).evaluation / "80.json").read_text())
        assert t.value == record["metrics"][METRIC.removeprefix("eval/")]
    best = min(trials, key=lambda t: t.value or 0.0)
    assert f"best: {folder.run(best.index).path}" in done.stdout
    assert len(list(csv.DictReader((folder.path / "report.csv").open()))) == 4

    store = tmp_path / "runs" / "mlflow.db"  # where other runs beside the sweep have theirs
    assert store.is_file()
    assert not (folder.path / "mlflow.db").exists()
    parent, children, client = _runs(store, "grids")
    assert [run.info.run_name for run in children] == [f"sweep/00{i}" for i in range(4)]
    assert [run.info.status for run in (parent, *children)] == ["FINISHED"] * 5
    assert [(float(run.data.params[LR]), int(run.data.params[SEED])) for run in children] == [
        (t.parameters[LR], t.parameters[SEED]) for t in trials
    ]
    assert [run.data.metrics[METRIC] for run in children] == [t.value for t in trials]
    assert parent.data.params["method.name"] == "grid"
    assert parent.data.params[f"parameters.{LR}"] == "[0.1, 0.2]"
    assert parent.data.metrics[f"best/{METRIC}"] == best.value
    assert parent.data.tags["best.trial"] == f"00{best.index}"
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"report.csv", "report.md", "sweep.png"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bayesian_search_with_pruning(digits: Path, tmp_path: Path) -> None:
    method = {
        "name": "optuna",
        "trials": 6,
        "startup_trials": 3,
        "prune": {"name": "median", "startup_trials": 1},
    }
    parameters = {LR: {"min": 1e-8, "max": 1e-2, "log": True}}
    path = _file(
        tmp_path, digits, {"method": method, "parameters": parameters},
        "train.total_images=3000", "train.checkpoint_images=1000", "train.snapshot_images=300",
    )  # fmt: skip
    done = run_bigan("sweep", path, "--jobs", "2", timeout=600)
    assert done.returncode == 0, done.stderr
    folder = SweepFolder(tmp_path / "runs" / "sweep")
    trials = folder.read_all()
    states = [t.state for t in trials]
    assert set(states) == {"complete", "pruned"}
    assert all(t.images_seen < 3000 for t in trials if t.state == "pruned")
    _, children, _ = _runs(tmp_path / "runs" / "mlflow.db", "bigan")
    expected = {"complete": "FINISHED", "pruned": "KILLED"}
    assert [run.info.status for run in children] == [expected[state] for state in states]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interrupted_sweep_resumes_its_trials(digits: Path, tmp_path: Path) -> None:
    path = _file(
        tmp_path, digits, {"method": {"name": "grid"}, "parameters": {SEED: [0, 1]}},
        "train.total_images=2000", "train.checkpoint_images=200", "tracking.mlflow=false",
    )  # fmt: skip
    command = [sys.executable, "-m", "bigan", "sweep", str(path), "--jobs", "2"]
    folder = SweepFolder(tmp_path / "runs" / "sweep")
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not all(list(folder.run(i).checkpoints.glob("[1-9]*")) for i in (0, 1)):
        assert time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert [t.state for t in folder.read_all()] == ["running", "running"]
    assert all(folder.run(i).requeue.exists() for i in (0, 1))
    done = run_bigan("sweep", path, "--jobs", "2", timeout=280)
    assert done.returncode == 0, done.stderr
    assert [t.state for t in folder.read_all()] == ["complete", "complete"]
    for index in (0, 1):
        seen = [
            r["images_seen"]
            for r in read_metrics(folder.run(index).path)
            if "train/generator/loss" in r
        ]
        assert seen == sorted(set(seen))  # no image twice


@pytest.mark.full
def test_trials_that_start_at_once_have_one_parent(tmp_path: Path) -> None:
    folder = frozen(tmp_path / "runs", **GRID)
    runs = [folder.run(index).path for index in range(4)]

    def opened(run: Path) -> str:
        run.mkdir()
        with exclusive(run):
            client, record = open_run(run, "tests", "train", folder.path)
        return client.get_run(record.run_id).data.tags[PARENT_TAG]

    with ThreadPoolExecutor(4) as pool:
        parents = set(pool.map(opened, runs))
    assert len(parents) == 1
    parent, children, _ = _runs(tmp_path / "runs" / "mlflow.db", "tests")
    assert len(children) == 4
    assert parent.data.params[f"parameters.{SEED}"] == "[0, 1]"


@pytest.mark.full
def test_server_that_is_away_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    folder = frozen(tmp_path, ["tracking.mlflow=true"], **GRID)
    trial.begin(folder, 0)
    fake_run(folder, 0, {400: 1.0})
    assert trial.end(folder, 0).state == "complete"
    note = sweep_mlflow.deliver(folder)
    assert "MLflow" in note
    assert "\n" not in note


def test_sweep_without_mlflow_sends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_mlflow, "open_parent", None)
    assert sweep_mlflow.deliver(frozen(tmp_path, ["tracking.mlflow=false"], **GRID)) == ""


def test_run_that_was_moved_out_of_its_sweep_has_no_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(tracker, "MlflowWriter", lambda *arguments: given.append(arguments[-1]))
    folder = frozen(tmp_path, **GRID)
    config = TrackingConfig(parent=Path(".."))
    tracker.Tracker(folder.run(0).path, config, role="train")
    tracker.Tracker(tmp_path / "elsewhere", config, role="train")
    tracker.Tracker(folder.run(0).path, TrackingConfig(), role="train")
    assert [parent and parent.resolve() for parent in given] == [folder.path, None, None]

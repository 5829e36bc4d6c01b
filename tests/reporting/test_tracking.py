"""The tracker with a real MLflow store (SQLite)."""

from __future__ import annotations

import json
import logging
import math
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import finish, python

from bigan.config import leaves
from bigan.reporting import metrics_log, mlflow_run, mlflow_writer
from bigan.reporting import tracker as tracking
from bigan.reporting.mlflow_run import Record
from bigan.reporting.tracker import Tracker, read_metrics
from bigan.run_config import TrackingConfig

OFF = TrackingConfig(mlflow=False)
ON = TrackingConfig(experiment="tests")


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_mlflow_is_not_imported_without_it(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from bigan.run_config import TrackingConfig
from bigan.reporting.tracker import Tracker
tracker = Tracker(Path(sys.argv[1]), TrackingConfig(mlflow=False), role="train")
tracker.log(1, {"a": 1.0})
assert tracker.close("FINISHED") is None
assert not [name for name in sys.modules if name.partition(".")[0] == "mlflow"]
"""
    finish(python(code, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_unwritten_lines_are_reported_by_close(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    tracker = Tracker(tmp_path, OFF, role="train")
    tracker.log(1, {"a": 1.0})
    tracker.log(2, {"a": 1.0})
    note = tracker.close("FINISHED")
    assert note is not None
    assert "2 line(s)" in note


# --- MLflow: one real store for all tests -----------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs whose store was created by a trainer and an evaluator at the same time."""
    folder = tmp_path_factory.mktemp("runs")
    code = """
import sys
from pathlib import Path
from bigan.reporting import metrics_log
from bigan.reporting.mlflow_writer import MlflowWriter  # without torch
run, role = Path(sys.argv[1]), sys.argv[2]
run.mkdir(exist_ok=True)
writer = MlflowWriter(run, "tests", role)
metrics_log.append(run / "metrics.jsonl", 7, 1.5, {f"{role}/a": 1.0})
note = writer.close(None, 110)
assert note is None, note
"""
    both = [python(code, folder / "raced", role) for role in ("train", "evaluation")]
    outputs = [finish(process) for process in both]
    assert outputs == [("", "")] * 2  # no migration log, no warning
    return folder


@pytest.fixture
def client(runs: Path) -> Iterator[Any]:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")


def run_id(run_dir: Path) -> str:
    return json.loads((run_dir / "mlflow.json").read_text())["run_id"]


def points(client: Any, run_dir: Path, key: str) -> list[tuple[int, float, int]]:
    history = client.get_metric_history(run_id(run_dir), key)
    return sorted((m.step, m.value, m.timestamp) for m in history)


def status(client: Any, run_dir: Path) -> str:
    return client.get_run(run_id(run_dir)).info.status


def write_config(run_dir: Path, values: dict[str, Any]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values))


def wait_until(true: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.full
def test_store_created_by_two_processes_has_one_run(runs: Path, client: Any) -> None:
    experiment = client.get_experiment_by_name("tests")
    found = client.search_runs([experiment.experiment_id], "run_name = 'raced'")
    assert [r.info.run_id for r in found] == [run_id(runs / "raced")]
    assert set(found[0].data.metrics) == {"train/a", "evaluation/a"}
    assert found[0].info.status == "RUNNING"  # close(None)


def test_metrics_params_and_artifacts_are_delivered(runs: Path, client: Any) -> None:
    run_dir = runs / "everything"
    picture = run_dir / "samples" / "20.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"png")
    (run_dir / "curves.png").write_bytes(b"curves")
    config = {"train": {"batch": 64, "seed": 0, "lr": 1e-5, "end": None}, "loss": "hinge"}
    write_config(run_dir, config)
    tracker = Tracker(run_dir, ON, role="train")
    for step in (10, 20):
        tracker.log(
            step, {"train/discriminator/loss": step / 8, "train/a@b": 1.0, "train/nan": math.nan}
        )
    tracker.log(30, {f"many/{i}": float(i) for i in range(2500)})  # 1000 fit into one call
    assert tracker.close("FINISHED") is None

    records = read_metrics(run_dir)
    expected = [
        (r["images_seen"], r["train/discriminator/loss"], round(r["time"] * 1000))
        for r in records[:2]
    ]
    assert points(client, run_dir, "train/discriminator/loss") == expected
    run = client.get_run(run_id(run_dir))
    params = {key: str(value) for key, value in leaves(config)}
    assert run.data.params == params
    assert (params["train.batch"], params["train.lr"], params["train.end"]) == (
        "64",
        "1e-05",
        "None",
    )
    assert run.data.metrics["train/a_b"] == 1.0
    assert math.isnan(run.data.metrics["train/nan"])
    assert run.data.metrics["many/2499"] == 2499.0
    assert (run.info.status, run.info.run_name) == ("FINISHED", "everything")
    stored = runs / "mlartifacts" / run.info.run_id / "artifacts"
    assert (stored / "samples/20.png").read_bytes() == b"png"
    assert (stored / "curves.png").read_bytes() == b"curves"
    assert run.info.experiment_id == client.get_run(run_id(runs / "raced")).info.experiment_id


def test_resume_continues_the_run_and_delivers_lost_metrics(runs: Path, client: Any) -> None:
    run_dir = runs / "resumed"
    write_config(run_dir, {"total": 100})
    tracker = Tracker(run_dir, ON, role="train")
    tracker.log(10, {"train/a": 1.0})
    assert tracker.close("KILLED") is None
    first, before = run_id(run_dir), points(client, run_dir, "train/a")
    assert status(client, run_dir) == "KILLED"
    # Killed between the metrics log and MLflow, and within a line
    metrics_log.append(run_dir / "metrics.jsonl", 20, 1700000000.5, {"train/a": 2.0})
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"images_seen": 3')

    record = Record.read(run_dir)
    assert record.sent_bytes > 0
    record.sent_bytes = 0  # killed before the delivery was recorded
    record.write(run_dir)
    write_config(run_dir, {"total": 200, "new": 1})
    tracker = Tracker(run_dir, ON, role="train")
    wait_until(lambda: status(client, run_dir) == "RUNNING")
    tracker.log_tags({"changed.total": "100 -> 200 at images_seen = 10"})
    tracker.log(30, {"train/a": 3.0})
    assert tracker.close("FINISHED") is None
    assert run_id(run_dir) == first
    after = points(client, run_dir, "train/a")
    assert [(step, value) for step, value, _ in after] == [(10, 1.0), (20, 2.0), (30, 3.0)]
    assert after[0] == before[0]  # sent twice, stored once
    assert after[1][2] == 1700000000500
    run = client.get_run(first)
    assert run.data.params == {"total": "100", "new": "1"}
    assert run.data.tags["resumed.total"] == "200"
    assert run.data.tags["changed.total"] == "100 -> 200 at images_seen = 10"
    assert run.info.status == "FINISHED"


def test_evaluator_logs_to_the_run_of_the_trainer_and_keeps_its_status(
    runs: Path, client: Any
) -> None:
    run_dir = runs / "evaluated"
    trainer = Tracker(run_dir, ON, role="train")
    trainer.log(10, {"train/a": 1.0})
    wait_until(lambda: (run_dir / "mlflow.json").exists())
    evaluator = Tracker(run_dir, ON, role="evaluation")
    evaluator.log(10, {"eval/fd/digits8-cnn-v1": 0.75})
    assert evaluator.close("FINISHED") is None
    assert status(client, run_dir) == "RUNNING"
    assert [p[:2] for p in points(client, run_dir, "eval/fd/digits8-cnn-v1")] == [(10, 0.75)]
    assert trainer.close("FINISHED") is None

    late = Tracker(run_dir, ON, role="evaluation")
    late.log(20, {"eval/fd/digits8-cnn-v1": 0.5})
    assert late.close("FAILED") is None
    assert status(client, run_dir) == "FINISHED"
    assert len(points(client, run_dir, "eval/fd/digits8-cnn-v1")) == 2


def test_trainer_continues_a_run_created_by_the_evaluator(runs: Path, client: Any) -> None:
    run_dir = runs / "evaluator_first"
    evaluator = Tracker(run_dir, ON, role="evaluation")
    evaluator.log(10, {"eval/a": 1.0})
    assert evaluator.close(None) is None
    made = run_id(run_dir)
    assert Tracker(run_dir, ON, role="train").close("FINISHED") is None
    assert run_id(run_dir) == made
    assert status(client, run_dir) == "FINISHED"


def test_errors_are_retried_and_reported_once_with_their_remedy(
    runs: Path, client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow's remedies are behind several sentences."""
    attempts = []
    remedy = "run 'mlflow db upgrade <database_uri>' to migrate"

    def flaky(*arguments: Any) -> Any:
        attempts.append(1)
        if len(attempts) < 3:
            raise ConnectionError("the schema\nis out of date. " + 20 * "It is old. " + remedy)
        return open_run(*arguments)

    open_run = mlflow_run.open_run
    monkeypatch.setattr(mlflow_writer, "open_run", flaky)
    monkeypatch.setattr(mlflow_writer, "_BACKOFF_SECONDS", (0.05, 0.1))
    run_dir = runs / "flaky"
    with caplog.at_level(logging.WARNING, logger="bigan"):
        tracker = Tracker(run_dir, ON, role="train")
        tracker.log(1, {"a": 1.0})
        wait_until(lambda: len(attempts) == 3)
        tracker.log(2, {"a": 2.0})
        assert tracker.close("FINISHED") is None
    assert [p[:2] for p in points(client, run_dir, "a")] == [(1, 1.0), (2, 2.0)]
    assert status(client, run_dir) == "FINISHED"
    (record,) = caplog.records  # one line however often it fails
    assert remedy in record.getMessage()
    assert "\n" not in record.getMessage()


def test_values_that_mlflow_does_not_accept_are_reported_and_not_retried(
    runs: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_writer, "_name", lambda key: key)
    run_dir = runs / "refused"
    tracker = Tracker(run_dir, ON, role="train")
    tracker.log(1, {"a@b": 1.0})
    wait_until(lambda: Record.read(run_dir).sent_bytes > 0)
    tracker.log(2, {"a": 2.0})
    note = tracker.close("FINISHED")
    assert note is not None
    assert "a@b" in note
    assert [p[:2] for p in points(client, run_dir, "a")] == [(2, 2.0)]


def test_metrics_of_a_full_disk_are_delivered(runs: Path, client: Any) -> None:
    run_dir = runs / "full"
    (run_dir / "metrics.jsonl").mkdir(parents=True)
    tracker = Tracker(run_dir, ON, role="train")
    tracker.log(1, {"a": 1.0})
    note = tracker.close("FINISHED")
    assert note is not None
    assert "1 line(s)" in note
    assert [p[:2] for p in points(client, run_dir, "a")] == [(1, 1.0)]


def test_run_deleted_from_the_store_is_created_again(runs: Path, client: Any) -> None:
    run_dir = runs / "deleted"
    tracker = Tracker(run_dir, ON, role="train")
    tracker.log(1, {"a": 1.0})
    assert tracker.close("KILLED") is None
    first = run_id(run_dir)
    client.delete_run(first)
    tracker = Tracker(run_dir, ON, role="train")
    assert tracker.close("FINISHED") is None
    assert run_id(run_dir) != first
    assert [p[:2] for p in points(client, run_dir, "a")] == [(1, 1.0)]


@pytest.mark.full
def test_store_that_is_lost_during_a_run_gets_everything_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr(mlflow_writer, "_BACKOFF_SECONDS", (0.05, 0.1))
    uris = iter([f"sqlite:///{tmp_path / 'first.db'}", f"sqlite:///{tmp_path / 'second.db'}"])
    lost = threading.Event()

    def log_batch(self: Any, *arguments: Any, **values: Any) -> Any:
        if lost.is_set():
            lost.clear()
            monkeypatch.setenv("MLFLOW_TRACKING_URI", next(uris))
            raise ConnectionError("the store is lost")
        return original(self, *arguments, **values)

    original = MlflowClient.log_batch
    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", next(uris))
    run_dir = tmp_path / "run"
    write_config(run_dir, {"seed": 1})
    tracker = Tracker(run_dir, ON, role="train")
    tracker.log(1, {"a": 1.0})
    wait_until(lambda: Record.read(run_dir).sent_bytes > 0, 60)
    lost.set()
    tracker.log(2, {"a": 2.0})
    assert tracker.close("FINISHED", timeout_seconds=100) is None
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'second.db'}")
    assert [p[:2] for p in points(client, run_dir, "a")] == [(1, 1.0), (2, 2.0)]
    assert client.get_run(run_id(run_dir)).data.params == {"seed": "1"}


# --- unreachable servers ----------------------------------------------------------------------


def slowest_call(tracker: Tracker, seconds: float) -> float:
    slowest, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        tracker.log(1, {"train/a": 1.0, "train/b": 2.0})
        slowest = max(slowest, time.perf_counter() - began)
        time.sleep(0.01)
    return slowest


def test_unreachable_server_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow  # noqa: F401 - the time of the import is not measured

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://somebody:secret@127.0.0.1:{port}")
    tracker = Tracker(tmp_path, ON, role="train")
    # A shared machine may suspend any call for a moment: the best of three rounds is used.
    assert min(slowest_call(tracker, 0.7) for _ in range(3)) < 0.05
    began = time.monotonic()
    note = tracker.close("FINISHED", timeout_seconds=20)
    assert time.monotonic() - began < 10  # connections are refused at once
    assert note is not None
    assert "\n" not in note
    assert str(tmp_path) in note
    written = note + caplog.text + "".join(p.read_text() for p in tmp_path.rglob("*.json*"))
    assert "secret" not in written
    assert len(read_metrics(tmp_path)) > 20


def test_server_that_never_answers_does_not_delay_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        tracker = Tracker(tmp_path, ON, role="train")
        tracker.log(1, {"a": 1.0})
        silent.settimeout(30)
        connection, _ = silent.accept()  # the request is under way
        began = time.monotonic()
        note = tracker.close("FINISHED", timeout_seconds=0.5)
        assert time.monotonic() - began < 3
        assert note is not None
        connection.close()


def test_evaluator_uses_the_store_of_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "runs" / "a"
    local = f"sqlite:///{tmp_path.resolve()}/runs/mlflow.db"
    none = Record()
    here = Record("1", "sqlite:////moved/since/mlflow.db", local=True)
    server = Record("1", "http://server:5000", local=False)
    store = mlflow_run._store
    assert store(run_dir, none, "train") == store(run_dir, none, "evaluation") == (local, True)
    assert store(run_dir, here, "train") == (local, True)  # the whole folder may move
    assert store(run_dir, server, "train") == ("http://server:5000", False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:word@server:5000")
    for role in ("train", "evaluation"):
        assert store(run_dir, none, role) == ("http://me:word@server:5000", False)
        assert store(run_dir, server, role) == ("http://me:word@server:5000", False)
    assert store(run_dir, here, "train") == ("http://me:word@server:5000", False)
    assert store(run_dir, here, "evaluation") == (local, True)


def test_moved_run_continues_in_the_new_place(runs: Path, tmp_path: Path) -> None:
    """All runs under another folder, and the run under another name."""
    from mlflow import MlflowClient

    first = Tracker(runs / "before", ON, role="train")
    first.log(10, {"train/a": 1.0})
    assert first.close("KILLED") is None
    moved = tmp_path / "moved"
    shutil.copytree(runs, moved)  # the other tests still need the original
    (moved / "before").rename(moved / "after")
    content = sorted(path for path in runs.rglob("*") if path.suffix != ".db")
    picture = moved / "after" / "curves.png"
    picture.write_bytes(b"png")
    tracker = Tracker(moved / "after", ON, role="train")
    tracker.log(20, {"train/a": 2.0})
    tracker.pictures_changed()
    assert tracker.close("FINISHED") is None
    client = MlflowClient(tracking_uri=f"sqlite:///{moved / 'mlflow.db'}")
    assert run_id(moved / "after") == run_id(runs / "before")
    steps = [step for step, _, _ in points(client, moved / "after", "train/a")]
    assert steps == [10, 20]
    found = client.get_run(run_id(moved / "after"))
    assert found.data.tags["run_dir"] == str(moved / "after")
    stored = moved / "mlartifacts" / found.info.run_id / "artifacts" / "curves.png"
    assert stored.read_bytes() == b"png"
    assert str(moved) in json.loads((moved / "after" / "mlflow.json").read_text())["uri"]
    assert sorted(path for path in runs.rglob("*") if path.suffix != ".db") == content


# --- environment ------------------------------------------------------------------------------


def test_environment_has_versions_and_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    for name in ("SLURM_JWT", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, "hunter2")
    found = tracking.environment()
    text = json.dumps(found)
    assert "hunter2" not in text
    assert found["variables"]["SLURM_JOB_ID"] == "4711"
    assert found["versions"]["torch"] == torch.__version__
    assert {"python", "numpy", "accelerate"} <= set(found["versions"])
    assert found["devices"]["num_cpus"] >= 1
    assert found["host"]


def test_commit_is_recorded_only_for_a_tracked_source(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    source, installed = tmp_path / "source.py", tmp_path / "installed.py"
    source.write_text("1")
    installed.write_text("1")
    assert tracking.revision(source) is None
    git("init", "-q")
    git("add", "source.py")
    git("commit", "-q", "-m", "one")
    assert tracking.revision(source) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    source.write_text("2")
    found = tracking.revision(source)
    assert found is not None
    assert found["dirty"] is True
    assert tracking.revision(installed) is None

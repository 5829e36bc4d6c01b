"""A real MLflow server that stops and returns: afterwards it has everything, once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import SMOKE, environment, free_port

from bigan.cli.main import main
from bigan.config import leaves
from bigan.reporting import mlflow_writer
from bigan.reporting.tracker import Tracker, read_metrics
from bigan.run_config import TrackingConfig

pytestmark = pytest.mark.full
ON = TrackingConfig(experiment="tests")
FIRST, SECOND, THIRD = ({"train/a": value, "train/b": -value} for value in (1.0, 2.0, 3.0))


class Server:
    """An MLflow server with a store in `folder`, on a fixed port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--workers",
            "1",
        ]
        command += ["--port", str(self.port), "--artifacts-destination", str(self.folder / "files")]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        self._process = subprocess.Popen(
            command,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(self._answers, 120)

    def stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
            return True
        return False


def wait_until(true: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", found.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(mlflow_writer, "_BACKOFF_SECONDS", (0.2, 1.0))
    try:
        yield found
    finally:
        found.stop()


class Delivered:
    """What the server has of a run."""

    def __init__(self, server: Server, run_dir: Path) -> None:
        from mlflow import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=server.uri)
        self._id = json.loads((run_dir / "mlflow.json").read_text())["run_id"]
        run = self._client.get_run(self._id)
        self.params, self.tags, self.status = run.data.params, run.data.tags, run.info.status
        self._keys = run.data.metrics

    def points(self) -> Counter[tuple[str, int, float]]:
        histories = (self._client.get_metric_history(self._id, key) for key in self._keys)
        return Counter((m.key, m.step, m.value) for history in histories for m in history)

    def files(self, folder: str = "") -> list[str]:
        found: list[str] = []
        for entry in self._client.list_artifacts(self._id, folder or None):
            found += self.files(entry.path) if entry.is_dir else [entry.path]
        return sorted(found)


def logged(run_dir: Path) -> Counter[tuple[str, int, float]]:
    """The points of the metrics log."""
    return Counter(
        (key, record["images_seen"], value)
        for record in read_metrics(run_dir)
        for key, value in record.items()
        if key not in ("images_seen", "time")
    )


def add_picture(run_dir: Path, name: str) -> None:
    path = run_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(name.encode())


def write_config(run_dir: Path, **values: object) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values))


def test_server_that_returns_has_everything_once(
    server: Server, digits: Path, tmp_path: Path
) -> None:
    # A run that begins with the server, a run that ends without it, and one that never had it.
    during, ended, absent = (tmp_path / name for name in ("during", "ended", "absent"))
    server.start()
    trackers = []
    for run_dir in (during, ended):
        write_config(run_dir, seed=1, lr=0.5)
        add_picture(run_dir, "samples/0.png")
        trackers.append(Tracker(run_dir, ON, role="train"))
        trackers[-1].log(10, FIRST)
        sent = run_dir / "mlflow.json"
        wait_until(lambda sent=sent: sent.exists() and json.loads(sent.read_text())["files"])
    server.stop()

    first, second = trackers
    evaluator = Tracker(during, ON, role="evaluation")
    evaluator.log(10, {"eval/fd": 7.0})
    for tracker, run_dir in zip(trackers, (during, ended), strict=True):
        add_picture(run_dir, "samples/20.png")
        add_picture(run_dir, "evaluation/truncation-20.png")
        tracker.log(20, SECOND)
    note = second.close("KILLED")
    assert note is not None
    assert str(ended) in note
    command = ["train", str(SMOKE), f"data.path={digits}", f"run_dir={absent}"]
    command += ["tracking.mlflow=true", "train.total_images=200", "train.snapshot_images=100"]
    assert main(command) == 0
    assert not (absent / "mlflow.json").exists()

    server.start()
    first.log(30, THIRD)  # in the same run
    wait_until(lambda: Delivered(server, during).files("samples")[-1:] == ["samples/20.png"])
    assert first.close("FINISHED") is None
    assert evaluator.close(None) is None
    assert Tracker(ended, ON, role="evaluation").close(None) is None  # delivers the status as well
    assert main(command) == 0  # the same command again

    pictures = ["evaluation/truncation-20.png", "samples/0.png", "samples/20.png"]
    for run_dir, status in ((during, "FINISHED"), (ended, "KILLED")):
        found = Delivered(server, run_dir)
        assert found.status == status
        assert found.params == {"seed": "1", "lr": "0.5"}
        assert found.files() == pictures
        assert found.points() == logged(run_dir)
        assert set(found.points().values()) == {1}
    found = Delivered(server, absent)
    assert found.status == "FINISHED"
    config = yaml.safe_load((absent / "config.yaml").read_text())
    assert found.params == {key: str(value) for key, value in leaves(config)}
    assert len(found.params) > 60
    grids = [f"samples/{path.name}" for path in (absent / "samples").iterdir()]
    assert len(grids) >= 3
    assert found.files() == sorted(["curves.png", "timeline.png", *grids])
    assert found.points() == logged(absent)
    assert set(found.points().values()) == {1}
    assert found.tags["run_dir"] == str(absent)

"""Training from a store that is stopped, refuses, cuts and corrupts: the weights do not change."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, environment, free_port
from s3 import S3
from web import Web, served

from bigan.checkpoint import snapshots

OUTAGE_SECONDS = 60
LOST_AFTER_SECONDS = 20  # without a heartbeat


def weights(run_dir: Path) -> bytes:
    return (snapshots.find(run_dir)[-1] / "generator_ema.safetensors").read_bytes()


def start(run_dir: Path, server: Web, cache: Path) -> subprocess.Popen:
    """A run on two processes, whose data is in the bucket `digits` of `server`."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "launch" / "cpu.yaml"), "--num_processes", "2"]
    command += ["--main_process_port", str(free_port()), "-m", "bigan", "train", str(SMOKE)]
    command += [f"run_dir={run_dir}", "data.path=s3://digits", "data.block=200"]
    command += [f"train.lost_after_seconds={LOST_AFTER_SECONDS}", "train.total_images=400"]
    variables = environment() | S3(server.url).environment | {"XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_faulty_store_changes_no_weight(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "digits").symlink_to(digits)
    web = Web(tmp_path / "served")
    with served(web):
        port = int(web.url.rpartition(":")[2])
        undisturbed = start(tmp_path / "a", web, tmp_path / "cache-a")
        _, errors = undisturbed.communicate(timeout=300)
        assert undisturbed.returncode == 0, errors
        web.requests.clear()
        corrupted = threading.Event()

        def fault(number: int, name: str) -> str:
            if number < 6 or not name.endswith(".tar"):
                return ""
            if not corrupted.is_set():
                corrupted.set()
                return "corrupt"
            return "503" if number % 2 and number < 60 else "cut" if number % 10 == 4 else ""

        web.fault = fault
        run = start(tmp_path / "b", web, tmp_path / "cache-b")
        while not corrupted.is_set():
            assert run.poll() is None
            time.sleep(0.01)
    time.sleep(OUTAGE_SECONDS)
    with served(web, port):
        _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert "silent since" in errors
    assert "is slow" not in errors

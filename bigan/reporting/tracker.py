"""Metrics of a run: always to `metrics.jsonl`, to MLflow if configured; never raises into training.

    <run_dir>/metrics.jsonl     the metrics log (metrics_log.py), independent of MLflow
    <run_dir>/mlflow.json       the MLflow run, and what was delivered to it (mlflow_run.py)
    <run_dir>/environment.json  versions and hardware: `environment()`

Without `MLFLOW_TRACKING_URI`, MLflow's store is `mlflow.db` next to the run folder, shared by all
runs there so that they can be compared:

    mlflow ui --backend-store-uri sqlite:///runs/mlflow.db
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigan.reporting import metrics_log
from bigan.reporting.metrics_log import read_metrics, series
from bigan.reporting.mlflow_run import Role
from bigan.reporting.mlflow_writer import MlflowWriter, Status
from bigan.run_config import TrackingConfig
from bigan.run_folder import SWEEP_FILE
from bigan.versions import hardware, versions

__all__ = ["Role", "Status", "Tracker", "environment", "read_metrics", "series"]


class Tracker:
    """Writes the metrics log of one run, and copies the run folder to MLflow in the background.

    Role "train" sets the status of the MLflow run, RUNNING at the start and that of `close` at the
    end. Role "evaluation" logs to the same run (creating it if the trainer has not yet) and sets
    only a status that an ended trainer could not deliver.

    A full disk (except in `append`) or an unreachable server raises nowhere, and only `close` waits
    for the server. Use one tracker per role, on rank 0, once config.yaml has been written.
    """

    def __init__(self, run_dir: Path, config: TrackingConfig, *, role: Role) -> None:
        self._path = run_dir / metrics_log.FILENAME
        self._num_unwritten = 0
        with contextlib.suppress(OSError):  # if it fails, every line is counted as unwritten
            run_dir.mkdir(parents=True, exist_ok=True)
        self._mlflow: MlflowWriter | None = None
        if config.mlflow:
            parent = run_dir.resolve() / config.parent if config.parent else None
            if parent and not (parent / SWEEP_FILE).is_file():  # the run was moved out of it
                parent = None
            self._mlflow = MlflowWriter(run_dir, config.experiment, role, parent)

    def log(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Append {key: number} at `images_seen` to the metrics log."""
        try:
            self.append(images_seen, metrics)
        except OSError:
            self._num_unwritten += 1
            if self._mlflow:
                self._mlflow.unwritten(images_seen, time.time(), metrics)

    def append(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """As `log`, but raises OSError if the metrics log cannot be written."""
        values = {key: float(value) for key, value in metrics.items()}
        # MLflow stores milliseconds, and a resent metric must be equal.
        metrics_log.append(self._path, images_seen, round(time.time(), 3), values)
        if self._mlflow:
            self._mlflow.changed()

    def pictures_changed(self) -> None:
        """Copy new pictures of the run folder (`mlflow_writer.PICTURES`) to MLflow."""
        if self._mlflow:
            self._mlflow.changed(pictures=True)

    def log_tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the MLflow run; an existing one is replaced."""
        if self._mlflow and values:
            self._mlflow.tags(values)

    def close(self, status: Status | None, timeout_seconds: float = 60.0) -> str | None:
        """Send what is queued, within `timeout_seconds`, and set the final status of the run.

        `None` leaves the status unchanged, for a preempted run. Returns one line for the user if
        something could not be written or delivered, else None.
        """
        notes = []
        if self._num_unwritten:
            notes.append(f"{self._path}: {self._num_unwritten} line(s) could not be written")
        if self._mlflow:
            note = self._mlflow.close(status, timeout_seconds)
            notes += [note] if note else []
            self._mlflow = None
        return "; ".join(notes) or None


# --- environment ------------------------------------------------------------------------------

# An explicit list: SLURM_JWT and many other variables of clusters are credentials.
_VARIABLES = (
    "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_NNODES",
    "SLURM_NTASKS", "SLURM_NODEID", "SLURM_PROCID", "SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE",
    "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_CLUSTER_NAME",
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, devices, host, code revision and launch variables as JSON values.

    Environment variables are taken from a fixed list without credentials. The URL of the git
    remote, which may contain one, is left out.
    """
    return {
        "versions": versions(),
        "host": platform.node(),
        "platform": platform.platform(),
        "devices": hardware(),
        "git": revision(Path(__file__).resolve().parents[1] / "__init__.py"),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


REVISION = "revision.json"  # beside a package that `bigan submit` has copied (cluster/freeze.py)


def revision(source: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout that tracks the file `source`, or None.

    A frozen copy of the package has a record of it. A package that is installed inside an unrelated
    checkout is not tracked by it.
    """

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    with contextlib.suppress(OSError, ValueError):
        recorded = json.loads((source.parent.parent / REVISION).read_text())
        return (
            {name: recorded[name] for name in ("commit", "dirty")} if recorded["commit"] else None
        )
    try:
        ask("ls-files", "--error-unmatch", source.name)
        dirty = bool(ask("status", "--porcelain", "--untracked-files=no"))
        return {"commit": ask("rev-parse", "--verify", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return None

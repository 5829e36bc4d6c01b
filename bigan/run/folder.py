"""The run folder: what makes the same command restart a run, and refuses to mix two runs.

runs/<name>/config.yaml  environment.json  metrics.jsonl  mlflow.json  curves.png  timeline.png
            checkpoints/<images_seen>/  snapshots/<images_seen>/  samples/<images_seen>.png
            evaluation/  DONE (written last, when all images have been seen)
            REQUEUE (stopped before its end)  STOP (made by a user: stop at the next boundary)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bigan import atomic_files, checkpoint
from bigan import config as configs
from bigan.checkpoint.snapshots import DONE
from bigan.config import ConfigError
from bigan.distributed import signals
from bigan.reporting.tracker import environment
from bigan.run_config import RunConfig

# What may differ between two lives of a run: how it is executed, shown and kept, and its length.
# Everything else would make it another experiment.
FREE = (
    "run_dir",
    "engine",
    "compile",
    "data.path",
    "data.mode",
    "data.threads",
    "data.prefetch",
    "data.on_bad",
    "data.allow_pipe",
    "data.cache",
    "data.cache_bytes",
    "data.resident_bytes",
    "data.connections",
    "train.total_images",
    "train.micro_batch",
    "train.tick_images",
    "train.checkpoint_images",
    "train.checkpoint_keep",
    "train.checkpoint_milestone_images",
    "train.snapshot_images",
    "train.replica_check_images",
    "train.lost_after_seconds",
    "train.collective_timeout_seconds",
    "collapse",
    "evaluation",
    "tracking",
)


def check(config: RunConfig) -> Path | None:
    """The checkpoint to resume from, or None for a new run; changes nothing on disk.

    Raises `ConfigError` if the folder holds a run of another recipe, or something else entirely.
    """
    folder = config.run_dir
    stored = folder / "config.yaml"
    _require_writable(folder)
    if not stored.exists():
        # A killed first start leaves at most a temporary file: config.yaml is written first.
        if folder.exists() and any(not p.name.endswith(".tmp") for p in folder.iterdir()):
            raise ConfigError(
                f"{folder}: not empty and not a run (no config.yaml in it); use another run_dir"
            )
        return None
    old, new = _fixed(configs.load(RunConfig, stored)), _fixed(config)
    for key, before, now in configs.differences(old, new):
        if not any(key == free or key.startswith(f"{free}.") for free in FREE):
            raise ConfigError(
                f"{folder}: this run has {key} = {before!r}, not {now!r}; use another "
                f"run_dir=... for another experiment, or {key}={before} to go on"
            )
    newest = checkpoint.latest(folder)
    if newest is not None:
        checkpoint.read_progress(newest)
    return newest


def _fixed(config: RunConfig) -> dict[str, Any]:
    """Its settings, without those of `FREE` that are inside a list."""
    settings = config.model_dump(mode="json")
    for level in (settings["growth"] or {}).get("levels", ()):
        del level["micro_batch"]
    return settings


def prepare(config: RunConfig) -> None:
    """Create or refresh the folder; call on rank 0 once everything has been checked."""
    folder = config.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "environment.json"):  # not all: an evaluator may be writing here
        atomic_files.remove_leftovers(folder, name)
    atomic_files.write_atomic(folder / "config.yaml", configs.dump(config))
    for name in ("checkpoints", "snapshots", "samples"):
        (folder / name).mkdir(exist_ok=True)
        atomic_files.remove_leftovers(folder / name)
    record = json.dumps(environment(), indent=2, sort_keys=True) + "\n"
    atomic_files.write_atomic(folder / "environment.json", record)
    (folder / DONE).unlink(missing_ok=True)
    signals.clear(folder)


def finish(config: RunConfig, images_seen: int) -> None:
    """Mark the run as complete; call on rank 0 after everything else has been written."""
    atomic_files.write_atomic(config.run_dir / DONE, f"{images_seen}\n")


def _require_writable(folder: Path) -> None:
    """Find out now, not at the first checkpoint; raises `ConfigError`."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir():
        raise ConfigError(f"run_dir = {folder}: {place} is a file, not a folder; use another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir = {folder}: {place} cannot be written to; use another run_dir")

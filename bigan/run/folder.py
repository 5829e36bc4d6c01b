"""Resume a run with the same command, and refuse to mix two runs in one folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bigan import atomic_files, checkpoint
from bigan import config as configs
from bigan.config import ConfigError
from bigan.distributed import signals
from bigan.reporting.tracker import environment
from bigan.run_config import IMAGES, RunConfig, load_config
from bigan.run_folder import RunFolder

# Settings that may differ between two attempts of a run: execution, logging, saving, and length.
# Any other change would make it another experiment.
MAY_CHANGE = (
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


def require_usable(folder: Path) -> None:
    """Raises `ConfigError` unless the folder can be that of a run; changes nothing on disk."""
    _require_writable(folder)
    if RunFolder(folder).config.exists() or not folder.exists():
        return
    # A killed first start leaves at most its lock and a temporary file.
    lock = RunFolder(folder).lock.name
    if any(p.name != lock and not p.name.endswith(".tmp") for p in folder.iterdir()):
        raise ConfigError(
            f"{folder}: not empty and not a run (no config.yaml in it); use another run_dir"
        )


def check(config: RunConfig) -> Path | None:
    """The checkpoint to resume from, or None for a new run; changes nothing on disk.

    Raises `ConfigError` if the folder contains a run of another config, or other files.
    """
    folder = config.run_dir
    require_usable(folder)
    stored = RunFolder(folder).config
    if not stored.exists():
        return None
    old, new = _fixed(load_config(stored)), _fixed(config)
    changed = [change for change in configs.differences(old, new) if not _may_change(change[0])]
    if changed:
        # A section of another `name` has other keys: the name is the change to report.
        key, before, now = min(changed, key=lambda change: not change[0].endswith(".name"))
        if not isinstance(config.data, dict):
            key = key.replace(f"data.{IMAGES}.", "data.")
        setting = before if isinstance(before, str) else json.dumps(before)
        raise ConfigError(
            f"{folder}: this run has {key} = {before!r}, not {now!r}; use another "
            f"run_dir=... for another experiment, or {key}={setting} to resume"
        )
    newest = checkpoint.latest(folder)
    if newest is not None:
        checkpoint.read_progress(newest)
    return newest


def _fixed(config: RunConfig) -> dict[str, Any]:
    """The settings of a config, streams by name, without those of `MAY_CHANGE` inside a list."""
    settings = config.model_dump(mode="json")
    settings["data"] = {n: data.model_dump(mode="json") for n, data in config.streams.items()}
    for level in (settings["growth"] or {}).get("levels", ()):
        del level["micro_batch"]
    return settings


def _may_change(key: str) -> bool:
    parts = key.split(".")
    if parts[0] == "data":  # data.<stream>.path
        key = ".".join(["data", *parts[2:]])
    return any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)


def prepare(config: RunConfig) -> None:
    """Create or refresh the folder; call on rank 0 once everything has been checked."""
    folder = RunFolder(config.run_dir)
    folder.path.mkdir(parents=True, exist_ok=True)
    for path in (folder.config, folder.environment):  # an evaluator may be writing other files
        atomic_files.remove_leftovers(folder.path, path.name)
    atomic_files.write_atomic(folder.config, configs.dump(config))
    for path in (folder.checkpoints, folder.snapshots, folder.samples):
        path.mkdir(exist_ok=True)
        atomic_files.remove_leftovers(path)
    record = json.dumps(environment(), indent=2, sort_keys=True) + "\n"
    atomic_files.write_atomic(folder.environment, record)
    folder.done.unlink(missing_ok=True)
    signals.clear_markers(folder.path)


def finish(config: RunConfig, images_seen: int) -> None:
    """Mark the run as complete; call on rank 0 after everything else has been written."""
    atomic_files.write_atomic(RunFolder(config.run_dir).done, f"{images_seen}\n")


def _require_writable(folder: Path) -> None:
    """Raises `ConfigError` if the folder is not writable: at the start, not when saving."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir():
        raise ConfigError(f"run_dir = {folder}: {place} is a file, not a folder; use another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir = {folder}: {place} cannot be written to; use another run_dir")

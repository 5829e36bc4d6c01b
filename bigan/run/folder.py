"""Resume a run with the same command, and refuse to mix two runs in one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bigan import atomic_files, checkpoint
from bigan import config as configs
from bigan.checkpoint import Progress, snapshots
from bigan.config import ConfigError
from bigan.distributed import signals
from bigan.reporting.tracker import environment, read_metrics
from bigan.run import changes
from bigan.run.changes import Change, History
from bigan.run_config import RunConfig, load_config
from bigan.run_folder import RunFolder


class Plan(NamedTuple):
    """How a run folder is continued; decided on rank 0."""

    resumes: bool  # False: a new run
    settings: dict[str, Any]  # of the run: plain content of its config.yaml
    superseded: tuple[str, ...]  # settings whose value in `settings` replaces the given one
    changes: tuple[Change, ...]  # made by `--allow-change`


NEW = Plan(False, {}, (), ())


def require_usable(folder: Path) -> None:
    """Raises `ConfigError` unless the folder can be that of a run; changes nothing on disk."""
    _require_writable(folder)
    run = RunFolder(folder)
    for path in (run.checkpoints, run.snapshots, run.samples):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path}: is a file, not a folder; move it, or use another run_dir")
    if run.config.exists() or not folder.exists():
        return
    found = checkpoint.newest_first(folder)
    if found:
        copies = sorted(run.snapshots.glob("*/config.yaml"), key=_number)
        copy = f"; {copies[-1]} is a copy" if copies else ""
        raise ConfigError(
            f"{run.config}: is missing, but the folder has the checkpoint "
            f"{found[0].name}{copy}; restore the file to resume, or use another run_dir"
        )
    # Before the first start: `bigan submit` and `bigan cancel`. If that start is killed, it leaves
    # at most its lock and a temporary file.
    known = {run.lock.name, run.stop.name, run.slurm.name}
    if any(p.name not in known and not p.name.endswith(".tmp") for p in folder.iterdir()):
        raise ConfigError(
            f"{folder}: not empty and not a run (no config.yaml in it); use another run_dir"
        )


def check(config: RunConfig, allowed: Sequence[str] = ()) -> Plan:
    """How to continue the run of `config.run_dir`; changes nothing on disk.

    `allowed`: key paths of settings that may change. Raises `ConfigError` if the folder contains a
    run of another config, or other files, or if a setting cannot change during a run.
    """
    folder = RunFolder(config.run_dir)
    require_usable(folder.path)
    if not folder.config.exists():
        if allowed:
            raise ConfigError(
                f"{folder.path}: there is no run whose {allowed[0]} could be changed; correct "
                "run_dir, or set it without --allow-change to start a new run"
            )
        return NEW
    stored = load_config(folder.config)
    history = changes.read_history(folder)
    named, superseded, refused = [], [], []
    for change in changes.differences(stored, config):
        if changes.is_named(change, allowed):
            why = changes.why_fixed(change)
            if why:
                raise ConfigError(
                    f"--allow-change {change.key}: {why}; use another run_dir=... for a run with "
                    "this setting"
                )
            named.append(change)
        elif changes.is_superseded(change, history):
            superseded.append(change.key)
        else:
            refused.append(change)
    if refused:
        raise _refusal(config, refused)
    plain = stored.model_dump(mode="json")
    return Plan(True, plain, tuple(superseded), tuple(named))


def _refusal(config: RunConfig, refused: Sequence[Change]) -> ConfigError:
    # A section of another `name` has other keys: the name is the change to report.
    change = min(refused, key=lambda change: not change.key.endswith(".name"))
    key, before = change.key, change.old
    if not isinstance(config.data, dict):
        key = changes.in_config(key)
    setting = before if isinstance(before, str) else json.dumps(before)
    may = "" if changes.why_fixed(change) else f", or --allow-change {key}=... to change it"
    return ConfigError(
        f"{config.run_dir}: this run has {key} = {before!r}, not {change.new!r}; use another "
        f"run_dir=... for another experiment{may}, or {key}={setting} to resume"
    )


def prepare(
    config: RunConfig, changed: Sequence[Change] = (), progress: Progress | None = None
) -> History:
    """Create or refresh the folder; call on rank 0 once everything has been checked.

    `changed` are settings that differ from those of the run so far, whose counters are `progress`.
    Returns all changes of the run.
    """
    progress = progress or Progress()
    folder = RunFolder(config.run_dir)
    folder.path.mkdir(parents=True, exist_ok=True)
    for path in (folder.config, folder.environment):  # an evaluator may be writing other files
        atomic_files.remove_leftovers(folder.path, path.name)
    history = changes.record(folder, changed, progress.images_seen, progress.attempt)
    _describe(config)
    for path in (folder.checkpoints, folder.snapshots, folder.samples):
        atomic_files.remove_leftovers(path)
    folder.done.unlink(missing_ok=True)
    signals.clear_markers(folder.path)
    return history


def restore(config: RunConfig, history: History) -> bool:
    """Write what resuming needs again if config.yaml is missing; returns whether it was.

    Somebody deleted it, or the whole folder, while the run trains. Raises OSError.
    """
    folder = RunFolder(config.run_dir)
    if folder.config.exists():
        return False
    folder.path.mkdir(parents=True, exist_ok=True)
    if history and not folder.config_history.exists():
        changes.write_history(folder, history)
    _describe(config)
    return True


def _describe(config: RunConfig) -> None:
    """Write config.yaml and environment.json, and make the folders of a run."""
    folder = RunFolder(config.run_dir)
    atomic_files.write_atomic(folder.config, configs.dump(config))
    for path in (folder.checkpoints, folder.snapshots, folder.samples):
        path.mkdir(exist_ok=True)
    record = json.dumps(environment(), indent=2, sort_keys=True) + "\n"
    atomic_files.write_atomic(folder.environment, record)


def remarks(plan: Plan, history: History) -> list[str]:
    """Lines to print at the start: settings that this attempt, or an earlier one, has changed."""
    lines = changes.describe(history)
    return [
        *(f"changed: {change} (config_history.jsonl)" for change in plan.changes),
        *(
            f"the run has changed {key}: {lines[key]}; this value is kept, not that of the config"
            for key in plan.superseded
        ),
    ]


def without_checkpoint(run_dir: Path) -> list[str]:
    """A line if a run without a checkpoint has metrics or snapshots: they were deleted."""
    seen = [record["images_seen"] for record in read_metrics(run_dir)]
    last = max([*seen, *(int(path.name) for path in snapshots.find(run_dir))], default=0)
    if not last:
        return []
    return [
        f"{RunFolder(run_dir).checkpoints}: no checkpoint, although metrics or snapshots go to "
        f"images_seen = {last}: starting again from 0"
    ]


def refuse_changes(config: RunConfig, plan: Plan, images_seen: int) -> None:
    """Raises `ConfigError` if `--allow-change` names changes of a complete run."""
    if plan.changes:
        raise ConfigError(
            f"--allow-change {plan.changes[0].key}: {config.run_dir} is complete at images_seen = "
            f"{images_seen}; nothing was changed; raise train.total_images in the same command"
        )


def finish(config: RunConfig, images_seen: int) -> None:
    """Mark the run as complete; call on rank 0 after everything else has been written."""
    atomic_files.write_atomic(RunFolder(config.run_dir).done, f"{images_seen}\n")
    signals.clear_markers(config.run_dir)  # or its job would be requeued for ever


def _number(copy: Path) -> int:
    return int(copy.parent.name) if copy.parent.name.isdecimal() else -1


def _require_writable(folder: Path) -> None:
    """Raises `ConfigError` if the folder is not writable: at the start, not when saving."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir():
        raise ConfigError(f"run_dir = {folder}: {place} is a file, not a folder; use another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir = {folder}: {place} cannot be written to; use another run_dir")

"""Which settings may differ between two attempts of a run, and the history of changed ones.

    <run_dir>/config_history.jsonl   one JSON object per change of `--allow-change`:
                                     {"images_seen", "attempt", "time", "key", "old", "new"}

Settings of execution, logging, saving and length may differ without further notice (`MAY_CHANGE`).
A setting of the training method changes only if it is named (`--allow-change KEY=VALUE`), and only
if the stored state still fits (`why_fixed`). config.yaml then has the new value. The former value,
which the config file of the user still has, is replaced by it at every later start: the same
command without the option continues with the change, as it does after any other stop.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigan import atomic_files
from bigan import config as configs
from bigan.config import ConfigError
from bigan.run_config import IMAGES, RunConfig
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
    "data.patience_seconds",
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
ORDER = "it determines the images of each step and their order"
# Settings that cannot change although they are named, and why.
FIXED = {
    "data": ORDER,
    "train.seed": ORDER,
    "train.batch": "it determines the images of each step and when lazy penalties are due",
    "objective.discriminator_steps": ORDER,
    "objective.name": "the checkpoint has the networks of the other objective",
    "objective.path_length": "the mean path length is part of the checkpoint",
    "augment.name": "the strength of an augmentation is part of the checkpoint",
    "augment.fixed": "an adaptive strength is part of the checkpoint",
    "model": "the checkpoint has the networks of the former setting",
    "growth": "the stage of the networks follows from it",
    "trainable": "the checkpoint has the optimizer state of the parameters trained so far",
}


History = list[dict[str, Any]]  # the lines of config_history.jsonl, oldest first


@dataclass(frozen=True)
class Change:
    """One setting that differs from that of the run: key path, value of the run, new value."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} = {json.dumps(self.new)} instead of {json.dumps(self.old)}"


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """The settings of a config, streams by name, without those of `MAY_CHANGE` inside a list."""
    settings = config.model_dump(mode="json")
    settings["data"] = {n: data.model_dump(mode="json") for n, data in config.streams.items()}
    for level in (settings["growth"] or {}).get("levels", ()):
        del level["micro_batch"]
    return settings


def differences(old: RunConfig, new: RunConfig) -> list[Change]:
    """The settings of a run that `new` changes and that may not differ without notice."""
    found = configs.differences(fixed_settings(old), fixed_settings(new))
    changes = [Change(*change) for change in found if not _may_change(change[0])]
    return [change for change in changes if not _is_default_of_lanes(change)]


def _may_change(key: str) -> bool:
    parts = key.split(".")
    if parts[0] == "data":  # data.<stream>.path
        key = ".".join(["data", *parts[2:]])
    return any(_is_below(key, free) for free in MAY_CHANGE)


def _is_default_of_lanes(change: Change) -> bool:
    """Whether `data.lanes` is not set now, so that those of the run are kept.

    A run whose config has none was made with one lane.
    """
    is_lanes = change.key.startswith("data.") and change.key.endswith(".lanes")
    return is_lanes and (change.new is None or (change.old, change.new) == (None, 1))


def _is_below(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def is_named(change: Change, allowed: Iterable[str]) -> bool:
    """Whether `--allow-change` names the setting or its section."""
    keys = (change.key, in_config(change.key))
    return any(_is_below(key, section) for key in keys for section in allowed)


def in_config(key: str) -> str:
    """The key of a setting in the config of a run with one stream: data.block."""
    return key.replace(f"data.{IMAGES}.", "data.", 1)


def why_fixed(change: Change) -> str | None:
    """Why a setting cannot change during a run; None if it can, when it is named."""
    key = change.key
    if key == "growth.levels" and _without_lr(change.old) == _without_lr(change.new):
        return None
    if key.startswith("optimizer."):
        leaf = key.split(".", 2)[2:]
        if leaf in ([], ["name"]):
            return "the checkpoint has the state of the former optimizer"
        if leaf == ["momentum"] and not (change.old and change.new):
            return "the checkpoint has, or lacks, the momentum of each parameter"
        return None
    if key == "precision" and change.new == "fp16":
        return "the loss scale of fp16 is not part of the checkpoint"
    if key.startswith("augment.fixed") and change.old is not None and change.new is not None:
        return None
    if key.startswith("objective.path_length."):
        return None
    return next((why for section, why in FIXED.items() if _is_below(key, section)), None)


def _without_lr(levels: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    return [{k: v for k, v in level.items() if k != "lr"} for level in levels or ()]


# ---- history ------------------------------------------------------------------------------------


def read_history(folder: RunFolder) -> History:
    """The changes of a run, oldest first. Raises `ConfigError` for a damaged line."""
    try:
        lines = folder.config_history.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [_entry(folder, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _entry(folder: RunFolder, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if (
        not isinstance(entry, dict)
        or not {"images_seen", "key", "old", "new"} <= entry.keys()
        or not isinstance(entry["key"], str)
    ):
        raise ConfigError(
            f"{folder.config_history}, line {number}: is damaged, not a change of a setting; "
            "restore the file from a backup, or delete the line and name its change again "
            "(--allow-change KEY=VALUE)"
        )
    return entry


def record(folder: RunFolder, changes: Sequence[Change], images_seen: int, attempt: int) -> History:
    """Append changes to the history; returns all of it.

    Those at its end already are left out: a start that was killed before it wrote config.yaml.
    """
    history = read_history(folder)
    for change in changes:
        entry = {"images_seen": images_seen, "key": change.key, "old": change.old}
        entry["new"] = change.new
        if not any(entry.items() <= known.items() for known in history[-len(changes) :]):
            history.append({**entry, "attempt": attempt, "time": round(time.time(), 3)})
    if changes:
        write_history(folder, history)
    return history


def write_history(folder: RunFolder, history: History) -> None:
    """Replace the history of a run."""
    text = "".join(json.dumps(entry) + "\n" for entry in history)
    atomic_files.write_atomic(folder.config_history, text)


def is_superseded(change: Change, history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the new value is one that the run had before it was changed."""
    return any(entry["key"] == change.key and entry["old"] == change.new for entry in history)


def describe(history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Key -> its changes in one line: "0.0016 -> 0.0001 at images_seen = 400"."""
    found: dict[str, list[str]] = {}
    for entry in history:
        old, new = json.dumps(entry["old"]), json.dumps(entry["new"])
        line = f"{old} -> {new} at images_seen = {entry['images_seen']}"
        found.setdefault(entry["key"], []).append(line)
    return {key: "; ".join(lines) for key, lines in found.items()}


def with_values_of(config: RunConfig, run: Mapping[str, Any], keys: Sequence[str]) -> RunConfig:
    """`config` with the settings `keys` of the plain settings `run`."""
    if not keys:
        return config
    if "train.batchnorm" in keys and config.train.micro_batch is None:
        keys = [*keys, "train.micro_batch"]  # batchnorm=local is invalid without
    settings = config.model_dump(mode="json", context=configs.CREDENTIALS)
    for key in keys:
        *parents, leaf = key.split(".")
        source: Any = run
        target: Any = settings
        for name in parents:
            source, target = source[name], target[name]
        if leaf in source:
            target[leaf] = source[leaf]
        else:  # of another class of a tagged union
            target.pop(leaf, None)
    return configs.validate(RunConfig, settings, "config.yaml")

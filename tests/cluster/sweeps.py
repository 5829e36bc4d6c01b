"""Folders of sweeps and fake trials, for tests without training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from commands import SMOKE

from bigan.cluster.sweep import Sweep, load_sweep
from bigan.cluster.sweep_check import freeze
from bigan.cluster.sweep_folder import SweepFolder

METRIC = "eval/fd/digits8-cnn-v1"
LR, SEED = "optimizer.generator.lr", "train.seed"
GRID: dict[str, Any] = {
    "method": {"name": "grid"},
    "parameters": {LR: [0.1, 0.2], SEED: [0, 1]},
}
OPTUNA: dict[str, Any] = {
    "method": {"name": "optuna", "trials": 6, "startup_trials": 2},
    "parameters": {LR: {"min": 1e-4, "max": 1e-1, "log": True}, SEED: {"min": 0, "max": 3}},
}


def sweep_file(folder: Path, **content: Any) -> Path:
    """A sweep file of the smoke config; its folder is `folder`/sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep-file.yaml"
    base = {"config": str(SMOKE), "overrides": [f"run_dir={folder / 'sweep'}"]}
    path.write_text(yaml.safe_dump(base | content, sort_keys=False))
    return path


def sweep_of(folder: Path, **content: Any) -> Sweep:
    return load_sweep(sweep_file(folder, **content))


def frozen(folder: Path, overrides: Sequence[str] = (), **content: Any) -> SweepFolder:
    """The folder of a sweep that is ready to begin."""
    sweep = sweep_of(folder, **content)
    assert sweep.config is not None
    return freeze(sweep, sweep.config, overrides)


def fake_run(
    folder: SweepFolder, index: int, values: Mapping[int, float], done: bool = True
) -> None:
    """What trainer and evaluator leave in the run folder of a trial: images_seen -> value."""
    run = folder.run(index)
    run.evaluation.mkdir(parents=True, exist_ok=True)
    for images, value in values.items():
        for parent in (run.snapshots, run.checkpoints):
            (parent / str(images)).mkdir(parents=True, exist_ok=True)
            (parent / str(images) / "COMPLETE").touch()
        metrics = {METRIC.removeprefix("eval/"): value}
        (run.evaluation / f"{images}.json").write_text(json.dumps({"metrics": metrics}))
    if done:
        run.done.write_text(f"{max(values, default=0)}\n")

"""Checkpoints are whole, fit their model, and bring back everything that changes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import SMOKE, TEN_CLASSES, environment, run_bigan
from torch import nn

from bigan import checkpoint, files, run_folder
from bigan.checkpoint import CheckpointError, Progress
from bigan.config import ConfigError
from bigan.engine import Engine
from bigan.errors import RunError
from bigan.recipe import RunConfig
from bigan.trainer import train
from bigan.training import Training

Recipe = Callable[..., RunConfig]


def quiet(config: RunConfig) -> int:
    return train(config, lambda _: None, lambda *_: None)


def weights(run: Path, images_seen: int) -> bytes:
    return (run / "snapshots" / str(images_seen) / "weights.safetensors").read_bytes()


def test_save_and_load_restore_networks_moments_and_counters(recipe: Recipe) -> None:
    config = recipe()
    quiet(config)
    folder = checkpoint.latest(config.run_dir)
    assert folder is not None
    assert folder.name == "400"
    training = Training(recipe("train.seed=9"), Engine(config, print), TEN_CLASSES)
    training.resume(folder)
    assert (training.progress.images_seen, training.progress.attempt) == (400, 2)
    stored = checkpoint.load(folder, training.networks, training.optimizers)
    assert stored.seconds > 0
    for name in ("g", "d"):
        state = training.optimizers[name].state
        assert len(state) == len(list(training.networks[name].parameters()))
        for parameter, moments in state.items():
            assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert moments["exp_avg"].stride() == parameter.stride()
            assert moments["step"].item() == 10
            assert moments["exp_avg_sq"].abs().sum() > 0 or parameter.numel() < 50
    again = checkpoint.save(
        config.run_dir / "copy", Progress(400), training.networks, training.optimizers
    )
    for name in ("networks.safetensors", "optimizers.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_resumed_equals_uninterrupted_bitwise(recipe: Recipe, tmp_path: Path) -> None:
    extra = ["penalties=[{name: r1, weight: 1.0, every: 3}]", "train.num_d_steps=2"]
    whole = recipe(*extra, f"run_dir={tmp_path / 'whole'}")
    parts = recipe(*extra, f"run_dir={tmp_path / 'parts'}")
    quiet(whole)
    first = recipe(*extra, f"run_dir={tmp_path / 'parts'}", "train.total_images=160")
    quiet(first)
    quiet(parts)
    assert weights(whole.run_dir, 400) == weights(parts.run_dir, 400)


def start(run: Path, digits: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bigan", "train", str(SMOKE), f"data.path={digits}"]
    command += [f"run_dir={run}", *overrides]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)


LONG = ("train.total_images=1600", "train.checkpoint_images=80", "train.snapshot_images=1600")


def test_sigkill_between_and_during_saves(digits: Path, tmp_path: Path) -> None:
    """Killed at random moments, saves included, the same command ends with the same bytes.

    Every fourth step is saved, so that a good part of the kills fall into a save.
    """
    undisturbed = start(tmp_path / "whole", digits, *LONG)
    assert undisturbed.wait(120) == 0
    run, chance, kills = tmp_path / "killed", random.Random(0), 0
    for _ in range(40):
        process = start(run, digits, *LONG)
        have = len(files.numbered_folders(run / "checkpoints"))
        until = time.monotonic() + 60
        if kills < 4:
            newest = checkpoint.latest(run)
            while checkpoint.latest(run) == newest and process.poll() is None:
                assert time.monotonic() < until, f"no progress, {have} checkpoints"
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            kills += process.wait(30) == -signal.SIGKILL
        elif process.wait(120) == 0:
            break
    assert kills >= 3
    assert weights(tmp_path / "whole", 1600) == weights(run, 1600)
    for name in ("checkpoints", "snapshots", "samples"):
        assert not list((run / name).glob(".*")), "a later life cleans up"


class Killed(BaseException):
    """Stands for SIGKILL at one exact point."""


@pytest.mark.parametrize("point", ["fsync", "rename", "marker"])
def test_killed_inside_a_save_the_previous_checkpoint_counts(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """At each stage of a save there is a complete checkpoint, and leftovers do no harm."""
    config = recipe("train.total_images=200")
    quiet(config)
    before = checkpoint.latest(config.run_dir)
    networks: dict[str, nn.Module] = {"g": nn.Linear(2, 2)}

    def die(*_: object, **__: object) -> None:
        raise Killed

    target = {"fsync": "fsync", "rename": "replace", "marker": "open"}[point]
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # the dead clean nothing up
        patch.setattr(Path if point == "rename" else os, target, die)
        with pytest.raises(Killed):
            checkpoint.save(config.run_dir, Progress(images_seen=400), networks, {})
    assert checkpoint.latest(config.run_dir) == before
    quiet(recipe())
    assert weights(config.run_dir, 400)


def test_prune_keeps_the_newest_and_never_counts_incomplete(tmp_path: Path) -> None:
    for seen in (80, 160, 240):
        checkpoint.save(tmp_path, Progress(images_seen=seen), {"g": nn.Linear(1, 1)}, {})
    (tmp_path / "checkpoints" / "320").mkdir()
    checkpoint.prune(tmp_path, keep=2)
    assert [p.name for p in files.numbered_folders(tmp_path / "checkpoints")] == ["160", "240"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    network = nn.Linear(1, 1)
    with torch.no_grad():
        network.weight.fill_(torch.inf)
    with pytest.raises(RunError, match=r"g\.weight is not finite"):
        checkpoint.save(tmp_path, Progress(images_seen=1), {"g": network}, {})
    assert checkpoint.latest(tmp_path) is None


def test_damaged_checkpoints_are_answered_with_the_way_out(recipe: Recipe) -> None:
    config = recipe()
    quiet(config)
    longer = recipe("train.total_images=800")
    folder = checkpoint.latest(config.run_dir)
    assert folder is not None
    path = folder / "networks.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"networks\.safetensors: damaged.*delete"):
        quiet(longer)
    path.write_bytes(whole)
    record = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        quiet(longer)


def test_checkpoint_of_another_model(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe()
    quiet(config)
    before = sorted(p for p in config.run_dir.rglob("*"))
    done = run_bigan(
        "train", SMOKE, f"data.path={config.data.path}", f"run_dir={config.run_dir}",
        "model.channels=4", "train.total_images=800",
    )  # fmt: skip
    assert done.returncode == 2
    assert "model.channels = 8, not 4" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(p for p in config.run_dir.rglob("*")) == before
    folder = checkpoint.latest(config.run_dir)
    assert folder is not None
    other = Training(recipe("model.channels=4"), Engine(config, print), TEN_CLASSES)
    with pytest.raises(CheckpointError, match="another model: g"):
        other.resume(folder)


def test_what_may_change_between_two_lives(recipe: Recipe) -> None:
    config = recipe()
    quiet(config)
    assert run_folder.check(recipe("train.total_images=800", "compile=aot_eager", "data.threads=1"))
    for override in ("train.seed=5", "train.batch=20", "loss=wasserstein", "data.block=100"):
        with pytest.raises(ConfigError, match=override.partition("=")[0]):
            run_folder.check(recipe(override))


def test_foreign_folder_is_refused(recipe: Recipe) -> None:
    config = recipe()
    config.run_dir.mkdir()
    (config.run_dir / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="not empty and not a run"):
        quiet(config)
    assert [p.name for p in config.run_dir.iterdir()] == ["thesis.tex"]


def test_finished_run_says_so_and_repairs_its_marker(recipe: Recipe) -> None:
    config = recipe()
    quiet(config)
    (config.run_dir / "DONE").unlink()
    said: list[str] = []
    assert train(config, said.append, lambda *_: None) == 0
    assert any("already complete at images_seen = 400" in line for line in said)
    assert (config.run_dir / "DONE").exists()


def test_signal_saves_and_the_same_command_goes_on(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ("train.total_images=4000", "train.checkpoint_images=4000", "train.tick_images=40")
    process = start(run, digits, *overrides)
    until = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    newest = checkpoint.latest(run)
    assert newest is not None
    assert 0 < int(newest.name) < 4000
    assert not (run / "DONE").exists()

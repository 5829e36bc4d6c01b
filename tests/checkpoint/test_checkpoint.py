"""Checkpoints are complete, fit their model, and restore the complete state of a run."""

from __future__ import annotations

import json
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

from bigan import atomic_files, checkpoint
from bigan.checkpoint import CheckpointError, Reader, Saver
from bigan.config import ConfigError
from bigan.engine import Engine
from bigan.run import folder as run_folder
from bigan.run.state import TrainState
from bigan.run.trainer import train
from bigan.run_config import RunConfig

MakeConfig = Callable[..., RunConfig]


def quiet(config: RunConfig) -> int:
    return train(config, lambda _: None, lambda *_: None)


def weights(run: Path, images_seen: int) -> bytes:
    return (run / "snapshots" / str(images_seen) / "generator_ema.safetensors").read_bytes()


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    reader = Reader(folder)
    return {name: reader.read(name) for name in reader.shapes()}


def test_resume_restores_networks_moments_and_counters(make_config: MakeConfig) -> None:
    config = make_config()
    quiet(config)
    folder = checkpoint.latest(config.run_dir)
    assert folder is not None
    assert folder.name == "400"
    state = TrainState(make_config("train.seed=9"), Engine(config, print), TEN_CLASSES)
    state.resume(folder)
    state.prepare()
    assert (state.progress.images_seen, state.progress.attempt) == (400, 2)
    assert state.progress.seconds > 0
    for name, prepared in state.prepared.items():
        found = prepared.optimizer.state
        assert len(found) == len(list(state.networks[name].parameters()))
        for parameter, moments in found.items():
            assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert moments["exp_avg"].stride() == parameter.stride()
            assert moments["step"].item() == 10
            assert moments["exp_avg_sq"].abs().sum() > 0 or parameter.numel() < 50
    saver = Saver(config.run_dir / "copy", state.world)
    saver.save(state.progress, state.shards())
    saver.finish()
    again = state_of(config.run_dir / "copy" / "checkpoints" / "400")
    before = state_of(folder)
    assert {key.partition(".")[0] for key in before} == {
        "networks/generator", "networks/discriminator", "networks/generator_ema",
        "optimizers/generator", "optimizers/discriminator",
    }  # fmt: skip
    assert "optimizers/discriminator.blocks.0.conv1.bias.exp_avg" in before
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


def test_resumed_equals_uninterrupted_bitwise(make_config: MakeConfig, tmp_path: Path) -> None:
    extra = ["objective.penalties=[{name: r1, weight: 1.0, every: 3}]"]
    extra += ["objective.discriminator_steps=2"]
    straight = make_config(*extra, f"run_dir={tmp_path / 'straight'}")
    parts = make_config(*extra, f"run_dir={tmp_path / 'parts'}")
    quiet(straight)
    first = make_config(*extra, f"run_dir={tmp_path / 'parts'}", "train.total_images=160")
    quiet(first)
    quiet(parts)
    assert weights(straight.run_dir, 400) == weights(parts.run_dir, 400)


def start(run: Path, digits: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bigan", "train", str(SMOKE), f"data.path={digits}"]
    command += [f"run_dir={run}", *overrides]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)


LONG = ("train.total_images=960", "train.checkpoint_images=80", "train.snapshot_images=960")


@pytest.mark.full
@pytest.mark.slow  # tests/launch/test_chaos.py kills at random times
def test_sigkill_between_and_during_saves(digits: Path, tmp_path: Path) -> None:
    """After SIGKILL at random moments, the same command ends with the same bytes.

    Every second step is saved, so that many of the kills happen during a save.
    """
    undisturbed = start(tmp_path / "straight", digits, *LONG)  # in parallel with the killed run
    run, chance, kills = tmp_path / "killed", random.Random(0), 0
    for _ in range(40):
        process = start(run, digits, *LONG)
        have = len(atomic_files.numbered_folders(run / "checkpoints"))
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
    assert undisturbed.wait(120) == 0
    assert weights(tmp_path / "straight", 960) == weights(run, 960)
    for name in ("checkpoints", "snapshots", "samples"):
        assert not list((run / name).glob(".*")), "the next attempt deletes staging folders"


def test_damaged_checkpoints_are_refused_with_advice(make_config: MakeConfig) -> None:
    config = make_config("train.checkpoint_keep=1")
    quiet(config)
    longer = make_config("train.checkpoint_keep=1", "train.total_images=800")
    folder = checkpoint.latest(config.run_dir)
    assert folder is not None
    path = folder / "part-00000-of-00001.safetensors"
    intact = path.read_bytes()
    path.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(CheckpointError, match=r"part-00000-of-00001\.safetensors: .*run_dir"):
        quiet(longer)
    path.write_bytes(intact)
    record = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        quiet(longer)


def test_checkpoint_of_another_model(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
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
    other = TrainState(make_config("model.channels=4"), Engine(config, print), TEN_CLASSES)
    with pytest.raises(CheckpointError, match=r"another model: generator\."):
        other.resume(folder)


def test_settings_that_may_change_between_attempts(make_config: MakeConfig) -> None:
    config = make_config()
    quiet(config)
    free = make_config("train.total_images=800", "compile=aot_eager", "data.threads=1")
    assert run_folder.check(free).resumes
    optimizer = "optimizer.generator.schedule={name: linear, end: 0.0, images: 10}"
    for override in (
        optimizer,
        "trainable=['*.linear.*']",
        "train.seed=5",
        "train.batch=20",
        "objective.loss=wasserstein",
        "data.block=100",
    ):
        with pytest.raises(ConfigError, match=f"has {override.partition('=')[0]}"):
            run_folder.check(make_config(override))


def test_folder_that_is_not_a_run_is_refused(make_config: MakeConfig) -> None:
    config = make_config()
    config.run_dir.mkdir()
    (config.run_dir / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="not empty and not a run"):
        quiet(config)
    assert [p.name for p in config.run_dir.iterdir()] == ["thesis.tex"]


def test_a_run_that_was_submitted_has_not_started(make_config: MakeConfig) -> None:
    """Its folder has the files of its job, and a stop request of a cancelled earlier one."""
    config = make_config()
    (config.run_dir / "slurm").mkdir(parents=True)
    (config.run_dir / "STOP").touch()
    assert not run_folder.check(config).resumes
    run_folder.prepare(config)
    assert not (config.run_dir / "STOP").exists()
    assert (config.run_dir / "slurm").exists()


def test_finished_run_is_reported_and_its_marker_restored(make_config: MakeConfig) -> None:
    config = make_config()
    quiet(config)
    (config.run_dir / "DONE").unlink()
    printed: list[str] = []
    assert train(config, printed.append, lambda *_: None) == 0
    assert any("already complete at images_seen = 400" in line for line in printed)
    assert (config.run_dir / "DONE").exists()


def test_signal_saves_a_checkpoint(digits: Path, tmp_path: Path) -> None:
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

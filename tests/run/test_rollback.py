"""Rollback: decisions, and real runs that collapse and then warn, stop or roll back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import ROOT, SMOKE, TEN_CLASSES, launch

from bigan import checkpoint
from bigan.checkpoint import Progress, TensorShard
from bigan.distributed.world import World
from bigan.engine import Engine
from bigan.errors import NonFiniteError, RunError
from bigan.layers.spectral import spectral_layers
from bigan.reporting import plots
from bigan.reporting.metrics_log import append, read_metrics
from bigan.run.collapse import NEVER
from bigan.run.rollback import Rollback, best_snapshot, singular_values
from bigan.run.state import TrainState
from bigan.run.trainer import train
from bigan.run_config import RunConfig
from bigan.run_folder import RunFolder

MakeConfig = Callable[..., RunConfig]


def test_counters_of_a_checkpoint_are_amended(tmp_path: Path) -> None:
    saver = checkpoint.Saver(tmp_path, World())
    saver.save(
        Progress(images_seen=200),
        [TensorShard("networks/generator.weight", (2,), 0, torch.ones(2), True)],
    )
    saver.finish()
    folder = tmp_path / "checkpoints" / "200"
    checkpoint.update_progress(folder, rollbacks=2, lr_factor=0.25)
    progress = checkpoint.read_progress(folder)
    assert (progress.images_seen, progress.rollbacks, progress.lr_factor) == (200, 2, 0.25)
    checkpoint.Reader(folder)  # its parts are still known


def test_the_best_snapshot_is_the_evaluators(tmp_path: Path) -> None:
    """Of the metric logged last, by the last value of each snapshot that exists."""
    assert best_snapshot(tmp_path) is None

    def log(seen: int, **metrics: float) -> None:
        values = {f"eval/{key}/x": value for key, value in metrics.items()}
        append(RunFolder(tmp_path).metrics, seen, 0.0, values)

    def snapshot(seen: int) -> None:
        folder = tmp_path / "snapshots" / str(seen)
        folder.mkdir(parents=True)
        (folder / "COMPLETE").touch()

    for seen, value in ((10, 5.0), (20, 1.0), (30, 0.5), (40, 9.0), (20, 3.0)):
        log(seen, fd=value, cs=-value)
    log(50, fd=float("nan"))
    for seen in (10, 20, 40, 50):  # 30 was deleted by the user
        snapshot(seen)
    log(50, cs=7.0)
    append(RunFolder(tmp_path).metrics, 40, 0.0, {"train/generator/loss": 0.1})
    assert best_snapshot(tmp_path) == (20, "fd/x", 3.0)
    log(40, fid=80.0)
    assert best_snapshot(tmp_path) == (40, "fid/x", 80.0)


def test_a_run_without_watched_values_is_not_checked(make_config: MakeConfig) -> None:
    """It keeps no checkpoint for a rollback either; singular values alone are enough for both."""
    config = make_config("collapse.window_images=80")
    state = TrainState(config, Engine(config, print), TEN_CLASSES)
    saver = checkpoint.Saver(config.run_dir, World())
    rollback = Rollback(state, saver)
    state.progress.images_seen = 1000
    rollback.check({"train/encoder/loss": math.inf, "train/encoder/grad_norm": 1e9})
    assert (saver.trusted_until, state.progress.collapse_began) == (0, NEVER)
    assert not rollback.pending
    rollback.check({"spectral/encoder/conv1": 1.0})
    assert saver.trusted_until == 1000 - 2 * 80


# --- real runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _empty_plots() -> Iterator[None]:
    """Curves would take a quarter of the time of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "curves", lambda run_dir, path: path.touch())
        yield


# Learning rates that rise until training collapses: healthy at 160 images, collapsed at 360.
COLLAPSING = (
    "train.total_images=440",
    "train.tick_images=40",
    "train.checkpoint_images=80",
    "train.snapshot_images=440",
    "anneal_images=1200",
    "optimizer.generator={lr: 2.0e-4, schedule: {name: cosine, end: 0.3}}",
    "optimizer.discriminator={lr: 1.6e-3, schedule: {name: cosine, end: 0.3}}",
    "collapse.window_images=80",
    "collapse.baseline_images=200",
    "collapse.min_images=300",
    "collapse.vanished_ratio=1000",  # ticks of one step are noisy
    "collapse.lr_factor=0.01",
)


class Killed(BaseException):
    """Not an Exception: no handler catches it."""


def run(config: RunConfig, killed_at_tick: int = 0) -> list[str]:
    """Train, killed at the n-th tick if given; returns the messages about collapses."""
    lines: list[str] = []
    num_ticks = 0

    def on_tick(progress: Progress, report: dict[str, float]) -> None:
        nonlocal num_ticks
        num_ticks += 1
        if num_ticks == killed_at_tick:
            raise Killed

    assert train(config, lines.append, on_tick) == 0
    return [line for line in lines if "collapse" in line]


def seen_by_tick(config: RunConfig) -> list[int]:
    return [
        r["images_seen"] for r in read_metrics(config.run_dir) if "train/discriminator/loss" in r
    ]


def checkpoints(config: RunConfig) -> list[int]:
    return sorted(int(p.name) for p in (config.run_dir / "checkpoints").iterdir())


def test_a_collapsing_run_warns_once_and_keeps_a_healthy_checkpoint(
    make_config: MakeConfig,
) -> None:
    config = make_config(*COLLAPSING)
    (line,) = run(config)
    assert "from images_seen = 200 to 360" in line
    assert "the largest singular value of discriminator." in line
    assert "checkpoint 160 is from before it and is kept" in line
    assert checkpoints(config)[0] == 160
    assert checkpoints(config)[-2:] == [400, 440]
    record = json.loads((config.run_dir / "checkpoints/440/progress.json").read_text())
    assert record["collapse_began"] == 200
    longer = make_config(*COLLAPSING, "train.total_images=520")
    assert run(longer) == [], "one warning per episode, also over two attempts"
    with pytest.raises(RunError, match=r"collapse\.action=rollback continues from 160"):
        run(make_config(*COLLAPSING, "train.total_images=600", "collapse.action=stop"))


def test_singular_values_of_every_layer_are_logged(make_config: MakeConfig) -> None:
    config = make_config("train.total_images=40", "train.tick_images=40")
    run(config)
    state = TrainState(config, Engine(config, print), TEN_CLASSES)
    state.resume(config.run_dir / "checkpoints" / "40")
    state.prepare()
    names = {
        f"spectral/{name}/{layer}"
        for name in ("generator", "discriminator")
        for layer, _ in spectral_layers(state.networks[name])
    }
    (line,) = read_metrics(config.run_dir)
    assert {key for key in line if key.startswith("spectral/")} == names
    values = singular_values(state)
    for name in names:
        assert line[name] == pytest.approx(values[name].item(), rel=1e-6)
    weight = state.networks["discriminator"].get_parameter("linear.weight")
    largest = torch.linalg.svdvals(weight.detach().flatten(1))[0].item()
    assert line["spectral/discriminator/linear"] == pytest.approx(largest, rel=1e-3)  # a single row


def test_a_collapsing_run_may_be_stopped(make_config: MakeConfig) -> None:
    config = make_config(*COLLAPSING, "collapse.action=stop")
    for _ in range(2):  # the same command stops at the same point
        with pytest.raises(RunError, match="checkpoint 160 is from before it; stopped"):
            run(config)
        assert checkpoints(config) == [160, 240, 320]
        assert seen_by_tick(config)[-1] == 360
    (line,) = run(make_config(*COLLAPSING, "collapse.action=rollback"))
    assert "rollback 1 of 3" in line


@pytest.fixture(scope="module")
def rolled_back(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The last snapshot of a run that collapsed and rolled back, without interruption."""
    from bigan import config as configs

    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    common = [f"data.path={digits}", f"run_dir={run_dir}", "collapse.action=rollback"]
    config = configs.load(RunConfig, SMOKE, [*common, *COLLAPSING])
    (line,) = run(config)
    assert "checkpoint 160 is from before it" in line
    assert "(rollback 1 of 3)" in line
    assert seen_by_tick(config) == [*range(40, 361, 40), *range(200, 441, 40)]
    assert checkpoints(config)[-2:] == [400, 440]
    record = json.loads((run_dir / "checkpoints/440/progress.json").read_text())
    assert (record["rollbacks"], record["lr_factor"], record["attempt"]) == (1, 0.01, 1)
    last = read_metrics(run_dir)[-1]
    assert last["train/lr_factor"] == 0.01
    assert max(v for k, v in last.items() if k.startswith("spectral/")) < 2
    return (run_dir / "snapshots/440/generator_ema.safetensors").read_bytes()


# Before detection; after the rollback, when the healthy checkpoint is the newest; one tick later.
@pytest.mark.parametrize("killed_at_tick", [9, 10, 12])
def test_killed_around_a_rollback_and_resumed_is_bitwise(
    make_config: MakeConfig, rolled_back: bytes, killed_at_tick: int
) -> None:
    config = make_config(*COLLAPSING, "collapse.action=rollback")
    with pytest.raises(Killed):
        run(config, killed_at_tick)
    assert len(run(config)) == (killed_at_tick == 9), "a rollback is not repeated"
    snapshot = config.run_dir / "snapshots/440/generator_ema.safetensors"
    assert snapshot.read_bytes() == rolled_back


def test_killed_during_a_rollback(
    make_config: MakeConfig, rolled_back: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*COLLAPSING, "collapse.action=rollback")

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "update_progress", killed)
        with pytest.raises(Killed):
            run(config)
    assert checkpoints(config) == [80, 160] or checkpoints(config) == [160]
    (line,) = run(config)
    assert "rollback 1 of 3" in line
    snapshot = config.run_dir / "snapshots/440/generator_ema.safetensors"
    assert snapshot.read_bytes() == rolled_back


def test_rollbacks_come_to_an_end(make_config: MakeConfig) -> None:
    """With unchanged learning rates it collapses again, at the same point."""
    again = ("collapse.action=rollback", "collapse.lr_factor=1", "collapse.max_rollbacks=1")
    config = make_config(*COLLAPSING, *again)
    with pytest.raises(RunError, match=r"stopped after 1 rollback\(s\)"):
        run(config)
    assert seen_by_tick(config) == [*range(40, 361, 40), *range(200, 361, 40)]


def test_no_checkpoint_to_restore(make_config: MakeConfig) -> None:
    config = make_config(*COLLAPSING, "train.checkpoint_images=600", "collapse.action=rollback")
    with pytest.raises(RunError, match="there is no checkpoint from before it"):
        run(config)


@pytest.mark.slow
def test_two_processes_roll_back_together(digits: Path, tmp_path: Path) -> None:
    """They have the same weights afterwards, which is verified at every checkpoint."""
    options = ["--config_file", ROOT / "launch" / "cpu.yaml"]
    common = [SMOKE, f"data.path={digits}", f"run_dir={tmp_path / 'run'}", *COLLAPSING]
    done = launch(*common, "collapse.action=rollback", options=options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(rollback 1 of 3)" in done.stdout + done.stderr
    record = json.loads((tmp_path / "run/checkpoints/440/progress.json").read_text())
    assert record["rollbacks"] >= 1


# Learning rate of the generator x 1e38 in the step from 240 to 280 images: huge weights, and a loss
# of NaN in the next step.
EXPLODING = (
    "optimizer.generator.schedule={name: step, every_images: 260, factor: 1.0e38}",
    "train.tick_images=40",
    "train.snapshot_images=400",
    "collapse.action=rollback",
)


# The newest checkpoint is sound; it holds the huge weights, so that the one before it is needed.
@pytest.mark.parametrize(
    ("every", "restored"), [pytest.param(80, [240], marks=pytest.mark.full), (40, [280, 240])]
)
def test_a_non_finite_state_is_rolled_back(
    make_config: MakeConfig, every: int, restored: list[int]
) -> None:
    """With lower learning rates; updates are made again."""
    config = make_config(*EXPLODING, f"train.checkpoint_images={every}", "collapse.lr_factor=1e-38")
    lines: list[str] = []
    assert train(config, lines.append, lambda *_: None) == 0
    found = [line for line in lines if "(rollback " in line]
    assert [int(line.partition("checkpoint ")[2].split()[0]) for line in found] == restored
    assert all("images_seen = 280;" in line for line in found)
    progress = checkpoint.read_progress(config.run_dir / "checkpoints" / "400")
    assert (progress.rollbacks, progress.attempt) == (len(restored), 1)
    assert progress.lr_factor == pytest.approx(1e-38 ** len(restored))
    last = checkpoint.Reader(config.run_dir / "checkpoints" / "400")
    assert last.read("optimizers/discriminator.linear.weight.step").item() == 10
    assert last.read("networks/generator_ema.shared.weight").abs().max() < 10


def test_rollbacks_after_non_finite_losses_come_to_an_end(make_config: MakeConfig) -> None:
    """Also over several starts: the number is stored in the checkpoint."""
    bounded = ("collapse.lr_factor=1", "collapse.max_rollbacks=2", "train.checkpoint_images=80")
    config = make_config(*EXPLODING, *bounded)
    for _ in range(2):
        with pytest.raises(RunError, match=r"stopped after 2 rollback\(s\)"):
            train(config, print, lambda *_: None)
    assert checkpoint.read_progress(config.run_dir / "checkpoints" / "240").rollbacks == 2


def test_without_a_checkpoint_a_non_finite_loss_ends_the_run(make_config: MakeConfig) -> None:
    config = make_config(*EXPLODING, "train.checkpoint_images=400")
    with pytest.raises(NonFiniteError, match="there is no checkpoint yet"):
        train(config, print, lambda *_: None)


@pytest.mark.slow
def test_two_processes_roll_back_after_a_non_finite_loss(digits: Path, tmp_path: Path) -> None:
    options = ["--config_file", ROOT / "launch" / "cpu.yaml"]
    common = [SMOKE, f"data.path={digits}", f"run_dir={tmp_path / 'run'}", *EXPLODING]
    more = ["train.checkpoint_images=40", "collapse.lr_factor=1e-38"]
    done = launch(*common, *more, options=options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(rollback 2 of 3)" in done.stdout + done.stderr
    progress = checkpoint.read_progress(tmp_path / "run/checkpoints/400")
    assert (progress.rollbacks, progress.attempt) == (2, 1)

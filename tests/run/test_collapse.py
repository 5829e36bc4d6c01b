"""Collapse: found on synthetic curves and in real runs, which warn, stop, or go back and go on."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import ROOT, SMOKE, TEN_CLASSES, launch

from bigan import checkpoint
from bigan.checkpoint import Progress, TensorShard
from bigan.checkpoint.retention import kept
from bigan.distributed.world import World
from bigan.engine import Engine
from bigan.errors import RunError
from bigan.layers.spectral import spectral_layers
from bigan.reporting.metrics_log import read_metrics
from bigan.run.collapse import GAP, NEVER, CollapseConfig, Detector, Spans, Tick, history, spans
from bigan.run.rollback import best_snapshot, singular_values
from bigan.run.state import Training
from bigan.run.trainer import train
from bigan.run_config import RunConfig

Recipe = Callable[..., RunConfig]

LENGTHS = Spans(window=4_000, baseline=40_000, minimum=40_000)
TICK = 1_000


def curve(
    num: int, gap: Callable[[int], float] = lambda _: 0.5, sigma: Callable[[int], float] = math.log
) -> list[Tick]:
    """`num` noisy ticks: a gap that changes its sign now and then, and two layers."""
    noise = random.Random(3)
    ticks = []
    for seen in range(TICK, (num + 1) * TICK, TICK):
        wide, narrow = noise.gauss(0, 0.3), noise.gauss(1, 0.05)
        report = {
            "train/logits_real": 0.2 + gap(seen) + wide * gap(seen),
            "train/logits_fake": 0.2,
            "spectral/g/blocks.0.conv1": sigma(seen) * narrow,
            "spectral/d/linear": 2.0 * narrow,
            "train/seconds": 1.0,
        }
        tick = Tick.of(seen, report)
        assert tick is not None
        ticks.append(tick)
    return ticks


def alarms(ticks: list[Tick], detector: Detector | None = None) -> list[tuple[int, str]]:
    """(images_seen, worst sign) of every tick at which an episode begins."""
    detector = detector or Detector(CollapseConfig(), LENGTHS)
    found = []
    for tick in ticks:
        before = detector.began
        signs = detector.look(tick)
        if signs and before == NEVER:
            found.append((tick.images_seen, str(signs[0])))
    return found


def test_a_healthy_run_gives_no_alarm() -> None:
    """It falls from 3 to 0.3 in time, singular values grow twentyfold, and it has odd ticks."""
    ticks = curve(300, gap=lambda seen: 0.3 + 2.7 * 0.5 ** (seen / 30_000), sigma=lambda s: s / 1e4)
    ticks[90] = ticks[90]._replace(values=ticks[90].values | {GAP: 100.0})
    ticks[200] = ticks[200]._replace(values=ticks[200].values | {"d.linear": 100.0})
    ticks[250] = ticks[250]._replace(values=ticks[250].values | {GAP: math.nan})
    assert alarms(ticks) == []


def test_an_alarm_within_a_window_and_one_per_episode() -> None:
    ticks = curve(150, sigma=lambda seen: 2.0 if seen <= 100_000 else 40.0)
    ((seen, sign),) = alarms(ticks)
    assert 100_000 < seen <= 100_000 + LENGTHS.window
    assert sign.startswith("the largest singular value of g.blocks.0.conv1 rose from")


def test_the_gap_may_explode_or_vanish() -> None:
    ((seen, sign),) = alarms(curve(150, gap=lambda s: 1.0 if s <= 100_000 else 30.0))
    assert 100_000 < seen <= 104_000
    assert sign.startswith("|D(real) - D(fake)| rose from")
    ((seen, sign),) = alarms(curve(150, gap=lambda s: 1.0 if s <= 100_000 else 1e-3))
    assert 100_000 < seen <= 104_000
    assert sign.startswith("|D(real) - D(fake)| fell from")


def test_recovery_ends_an_episode_and_another_may_follow() -> None:
    def gap(seen: int) -> float:
        return 30.0 if 100_000 < seen <= 120_000 or seen > 200_000 else 1.0

    assert [seen // 10_000 for seen, _ in alarms(curve(230, gap=gap))] == [10, 20]


def test_nothing_at_the_start_nor_after_a_growth() -> None:
    def sigma(seen: int) -> float:
        return 2.0 if seen % 100_000 <= 30_000 else 40.0

    early = curve(39, sigma=sigma)
    assert alarms(early) == []
    grown = [tick._replace(resolution=4.0 if i < 60 else 8.0) for i, tick in enumerate(curve(150))]
    for i, tick in enumerate(grown):
        tick.values[GAP] = 1.0 if i < 75 else 30.0  # it settles some time after the growth
    assert alarms(grown) == []
    assert alarms([tick._replace(resolution=8.0) for tick in grown])


def test_what_an_interrupted_detector_knows_is_the_same() -> None:
    """Cut anywhere, also inside an episode that outlasts its own history."""
    ticks = curve(240, gap=lambda s: 30.0 if 100_000 < s <= 180_000 else 1.0)
    whole = Detector(CollapseConfig(), LENGTHS)
    for cut, tick in enumerate(ticks):
        if cut % 7 == 0:
            again = Detector(CollapseConfig(), LENGTHS)
            again.restore(ticks[:cut], whole.began)
            assert vars(again) == vars(whole)
        whole.look(tick)


def test_lines_beyond_a_checkpoint_are_void() -> None:
    def line(seen: int, value: float) -> dict[str, float]:
        return {"images_seen": seen, "train/logits_real": value, "train/logits_fake": 0.0}

    records = [line(10, 1), line(20, 2), line(30, 3), {"images_seen": 5, "eval/fid": 9.0}]
    assert [t.values[GAP] for t in history(records, 20)] == [1, 2]
    records += [line(20, 7)]  # it went back to 10
    assert [t.values[GAP] for t in history(records, 40)] == [1, 7]
    assert history(records, 5) == []


def test_lengths_follow_the_batch_and_the_ticks() -> None:
    assert spans(CollapseConfig(), batch=2048, tick_images=1_000).window == 50 * 2048
    assert spans(CollapseConfig(), batch=50, tick_images=20_000).window == 80_000
    given = CollapseConfig(window_images=7, baseline_images=70, min_images=700)
    assert spans(given, 40, 1_000) == Spans(7, 70, 700)


def test_a_checkpoint_from_before_is_always_there() -> None:
    """However often one is saved; and no more than four are kept."""
    lag = LENGTHS.hindsight
    for every in (1_000, 3_000, 10_000):
        there: list[int] = []
        for seen in range(every, 200_000, every):
            there = sorted(kept([*there, seen], 2, None, seen - lag))
            assert len(there) <= 4
            if seen >= LENGTHS.minimum:
                healthy = max(s for s in there if s <= seen - lag)
                assert seen - healthy <= 2 * (lag + every)


def test_counters_of_a_checkpoint_are_amended(tmp_path: Path) -> None:
    saver = checkpoint.Saver(tmp_path, World())
    saver.save(
        Progress(images_seen=200), [TensorShard("networks/g.weight", (2,), 0, torch.ones(2), True)]
    )
    saver.finish()
    folder = tmp_path / "checkpoints" / "200"
    checkpoint.update_progress(folder, rollbacks=2, lr_factor=0.25)
    progress = checkpoint.read_progress(folder)
    assert (progress.images_seen, progress.rollbacks, progress.lr_factor) == (200, 2, 0.25)
    checkpoint.Reader(folder)  # its parts are still known


def test_the_best_snapshot_is_the_evaluators(tmp_path: Path) -> None:
    assert best_snapshot(tmp_path) is None
    (tmp_path / "evaluation").mkdir()
    for seen, value in ((10, 5.0), (20, 3.0), (30, 1.0), (40, 9.0)):
        metrics = {"fd/x": value, "cs/x": -value}
        (tmp_path / f"evaluation/{seen}.json").write_text(json.dumps({"metrics": metrics}))
        if seen != 30:  # deleted by the user
            folder = tmp_path / "snapshots" / str(seen)
            folder.mkdir(parents=True)
            (folder / "COMPLETE").touch()
    (tmp_path / "evaluation" / "truncation-20.json").write_text("{}")
    (tmp_path / "evaluation" / "50.json").write_text("half")
    assert best_snapshot(tmp_path) == (20, "fd/x", 3.0)


# --- real runs ------------------------------------------------------------------------------------

# Learning rates that rise until nothing holds: well at 160 images, collapsed at 360.
COLLAPSING = (
    "train.total_images=600",
    "train.tick_images=40",
    "train.checkpoint_images=80",
    "train.snapshot_images=600",
    "anneal_images=1200",
    "optimizer.g={lr: 2.0e-4, lr_end: 0.3}",
    "optimizer.d={lr: 1.6e-3, lr_end: 0.3}",
    "collapse.window_images=80",
    "collapse.baseline_images=200",
    "collapse.min_images=300",
    "collapse.vanished_ratio=1000",  # ticks of one step are noisy
    "collapse.lr_factor=0.01",
)


class Killed(BaseException):
    """What no handler of ours catches."""


def run(config: RunConfig, killed_at_tick: int = 0) -> list[str]:
    """Train, silently or killed at the n-th tick; what was said about collapses."""
    said: list[str] = []
    num_ticks = 0

    def on_tick(progress: Progress, report: dict[str, float]) -> None:
        nonlocal num_ticks
        num_ticks += 1
        if num_ticks == killed_at_tick:
            raise Killed

    assert train(config, said.append, on_tick) == 0
    return [line for line in said if "collapse" in line]


def seen_by_tick(config: RunConfig) -> list[int]:
    return [r["images_seen"] for r in read_metrics(config.run_dir) if "train/loss_d" in r]


def checkpoints(config: RunConfig) -> list[int]:
    return sorted(int(p.name) for p in (config.run_dir / "checkpoints").iterdir())


def test_a_collapsing_run_warns_once_and_keeps_what_was_sound(recipe: Recipe) -> None:
    config = recipe(*COLLAPSING)
    (line,) = run(config)
    assert "from images_seen = 200 to 360" in line
    assert "the largest singular value of d." in line
    assert "checkpoint 160 is from before it and is kept" in line
    assert checkpoints(config)[0] == 160
    assert checkpoints(config)[-2:] == [560, 600]
    record = json.loads((config.run_dir / "checkpoints/600/progress.json").read_text())
    assert record["collapse_began"] == 200
    longer = recipe(*COLLAPSING, "train.total_images=680")
    assert run(longer) == [], "one episode, one warning, also over two lives"
    with pytest.raises(RunError, match=r"collapse\.action=rollback goes back to 160"):
        run(recipe(*COLLAPSING, "train.total_images=760", "collapse.action=stop"))


def test_singular_values_of_every_layer_are_logged(recipe: Recipe) -> None:
    config = recipe("train.total_images=40", "train.tick_images=40")
    run(config)
    training = Training(config, Engine(config, print), TEN_CLASSES)
    training.resume(config.run_dir / "checkpoints" / "40")
    training.prepare()
    names = {
        f"spectral/{name}/{layer}"
        for name in ("g", "d")
        for layer, _ in spectral_layers(training.networks[name])
    }
    (line,) = read_metrics(config.run_dir)
    assert {key for key in line if key.startswith("spectral/")} == names
    values = singular_values(training)
    for name in names:
        assert line[name] == pytest.approx(values[name].item(), rel=1e-6)
    weight = training.discriminator.get_parameter("linear.weight")
    largest = torch.linalg.svdvals(weight.detach().flatten(1))[0].item()
    assert line["spectral/d/linear"] == pytest.approx(largest, rel=1e-3)  # a single row


def test_a_collapsing_run_may_be_stopped(recipe: Recipe) -> None:
    config = recipe(*COLLAPSING, "collapse.action=stop")
    for _ in range(2):  # the same command comes to the same end
        with pytest.raises(RunError, match="checkpoint 160 is from before it; stopped"):
            run(config)
        assert checkpoints(config) == [160, 240, 320]
        assert seen_by_tick(config)[-1] == 360
    (said,) = run(recipe(*COLLAPSING, "collapse.action=rollback"))
    assert "going back there" in said


@pytest.fixture(scope="module")
def rolled_back(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The last snapshot of a run that collapsed, went back and was never interrupted."""
    from bigan import config as configs

    run_dir = tmp_path_factory.mktemp("whole") / "run"
    common = [f"data.path={digits}", f"run_dir={run_dir}", "collapse.action=rollback"]
    config = configs.load(RunConfig, SMOKE, [*common, *COLLAPSING])
    (line,) = run(config)
    assert "checkpoint 160 is from before it; going back there" in line
    assert "(rollback 1 of 3)" in line
    assert seen_by_tick(config) == [*range(40, 361, 40), *range(200, 601, 40)]
    assert checkpoints(config)[-2:] == [560, 600]
    record = json.loads((run_dir / "checkpoints/600/progress.json").read_text())
    assert (record["rollbacks"], record["lr_factor"], record["attempt"]) == (1, 0.01, 1)
    last = read_metrics(run_dir)[-1]
    assert last["train/lr_factor"] == 0.01
    assert max(v for k, v in last.items() if k.startswith("spectral/")) < 2
    return (run_dir / "snapshots/600/weights.safetensors").read_bytes()


# Before it is noticed; after going back, with the healthy checkpoint the newest; after the next.
@pytest.mark.parametrize("killed_at_tick", [9, 10, 12])
def test_killed_around_a_rollback_and_resumed_is_bitwise(
    recipe: Recipe, rolled_back: bytes, killed_at_tick: int
) -> None:
    config = recipe(*COLLAPSING, "collapse.action=rollback")
    with pytest.raises(Killed):
        run(config, killed_at_tick)
    assert len(run(config)) == (killed_at_tick == 9), "what is done is not done again"
    snapshot = config.run_dir / "snapshots/600/weights.safetensors"
    assert snapshot.read_bytes() == rolled_back


def test_killed_in_the_middle_of_going_back(
    recipe: Recipe, rolled_back: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(*COLLAPSING, "collapse.action=rollback")

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "update_progress", killed)
        with pytest.raises(Killed):
            run(config)
    assert checkpoints(config) == [80, 160] or checkpoints(config) == [160]
    (line,) = run(config)
    assert "rollback 1 of 3" in line
    snapshot = config.run_dir / "snapshots/600/weights.safetensors"
    assert snapshot.read_bytes() == rolled_back


def test_rollbacks_come_to_an_end(recipe: Recipe) -> None:
    """With the learning rates left as they are it collapses again, at the same point."""
    again = ("collapse.action=rollback", "collapse.lr_factor=1", "collapse.max_rollbacks=1")
    config = recipe(*COLLAPSING, *again)
    with pytest.raises(RunError, match=r"stopped after 1 rollback\(s\)"):
        run(config)
    assert seen_by_tick(config) == [*range(40, 361, 40), *range(200, 361, 40)]


def test_no_checkpoint_to_go_back_to(recipe: Recipe) -> None:
    config = recipe(*COLLAPSING, "train.checkpoint_images=600", "collapse.action=rollback")
    with pytest.raises(RunError, match="there is no checkpoint from before it"):
        run(config)


@pytest.mark.slow
def test_two_processes_go_back_together(digits: Path, tmp_path: Path) -> None:
    """They hold the same weights afterwards: that is checked at every checkpoint."""
    options = ["--config_file", ROOT / "launch" / "cpu.yaml"]
    common = [SMOKE, f"data.path={digits}", f"run_dir={tmp_path / 'run'}", *COLLAPSING]
    done = launch(*common, "collapse.action=rollback", options=options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(rollback 1 of 3)" in done.stdout + done.stderr
    record = json.loads((tmp_path / "run/checkpoints/600/progress.json").read_text())
    assert record["rollbacks"] >= 1

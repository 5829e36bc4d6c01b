"""Progressive growing: stages as arithmetic, what a new stage takes over, and whole runs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import ROOT, TEN_CLASSES
from torch._dynamo.utils import counters

from bigan import checkpoint
from bigan import config as configs
from bigan.augment.discriminator_inputs import real_images
from bigan.checkpoint import snapshots
from bigan.config import ConfigError
from bigan.data.packing.pack import pack
from bigan.data.streaming.stream import ShardStream
from bigan.distributed.world import World
from bigan.engine import Engine
from bigan.evaluation.watcher import evaluate
from bigan.objectives import growth
from bigan.run import collapse
from bigan.run.folder import check
from bigan.run.state import Training
from bigan.run.streams import Shrunk, check_data, open_stream
from bigan.run.trainer import train
from bigan.run_config import RunConfig

GROWING = ROOT / "configs" / "smoke" / "progan-digits.yaml"
Grown = Callable[..., RunConfig]


@pytest.fixture
def grown(digits: Path, tmp_path: Path) -> Grown:
    """The growing smoke recipe: 4, 8 and 16 px, 80 images to each of five stages."""

    def make(*overrides: str) -> RunConfig:
        base = [f"data.path={digits}", f"run_dir={tmp_path / 'run'}"]
        return configs.load(RunConfig, GROWING, [*base, *overrides])

    return make


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pyramid"
    pack("digits", folder, resolution=16, pyramid=4)
    return folder


def last_weights(config: RunConfig) -> bytes:
    return (snapshots.find(config.run_dir)[-1] / "weights.safetensors").read_bytes()


def seen_by(run: Path, key: str) -> dict[int, float]:
    """images_seen -> value, of every line of the log that has it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["images_seen"]: line[key] for line in lines if key in line}


# --- arithmetic ----------------------------------------------------------------------------------


def test_stages_are_those_of_the_schedule(grown: Grown) -> None:
    stages = growth.stages(grown())
    assert [(s.resolution, s.fading) for s in stages] == [
        (4, False), (8, True), (8, False), (16, True), (16, False),
    ]  # fmt: skip
    assert [(s.start, s.end) for s in stages] == [
        (0, 80), (80, 160), (160, 240), (240, 320), (320, math.inf),
    ]  # fmt: skip
    assert [growth.stage_at(stages, n).index for n in (0, 79, 80, 319, 320, 10**9)] == [
        0, 0, 1, 3, 4, 4,
    ]  # fmt: skip


def test_a_level_has_its_own_batch_and_learning_rate(grown: Grown) -> None:
    first, second, *_ = growth.stages(grown())
    assert (first.config.train.batch, second.config.train.batch) == (40, 16)
    assert first.config.optimizer.g.lr == first.config.optimizer.d.lr == 1.5e-3
    assert second.config.optimizer.g.lr == 1e-3
    assert first.config.model.resolution == 4


def test_stages_begin_at_step_boundaries_and_do_not_drift(grown: Grown) -> None:
    """A stage that ends within a step ends with it, the next ones are where they should be."""
    stages = growth.stages(grown("growth.stable_images=90", "train.num_d_steps=2"))
    starts = [s.start for s in stages]
    assert starts == [0, 160, 192, 288, 352]  # asked for: 90, 170, 260, 340; steps of 80 and 32
    for stage, following in itertools.pairwise(stages):
        step = stage.config.train.batch * 2
        assert (following.start - stage.start) % step == 0
        assert stage.end == following.start


def test_alpha_goes_from_0_to_1_over_the_fade(grown: Grown) -> None:
    stages = growth.stages(grown())
    assert [stages[1].alpha(n) for n in (80, 96, 120, 160)] == [0, 0.2, 0.5, 1]
    assert stages[2].alpha(160) == stages[0].alpha(0) == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("growth.start_resolution=16", "use a power of two from 4 to 8"),
        ("growth.start_resolution=6", "use a power of two from 4 to 8"),
        ("growth.levels=[{resolution: 32}]", "32 px is no resolution on the way"),
        ("growth.levels=[{resolution: 8}, {resolution: 8}]", "given once"),
        ("model.fading=true", "leave model.fading out"),
        ("model.conditional=true", ""),
    ],
)
def test_impossible_growth_is_a_config_error(grown: Grown, override: str, said: str) -> None:
    if not said:
        assert grown(override).growth is not None
        return
    with pytest.raises(ConfigError, match=said):
        grown(override)


def test_a_fixed_resolution_cannot_grow(recipe: Grown) -> None:
    with pytest.raises(ConfigError, match=r"biggan has a fixed resolution; use model.name=progan"):
        recipe("growth={stable_images: 10, fade_images: 10}")


def test_a_group_must_be_whole_at_every_level_on_every_process(grown: Grown) -> None:
    config = grown("growth.levels=[{resolution: 8, batch: 12}]")
    engine = Engine(config, print)
    engine.world = World(0, 2)
    with pytest.raises(ConfigError, match=r"does not divide the 6 images .* \(8 px"):
        Training(config, engine, TEN_CLASSES)
    engine.world = World(0, 1)
    Training(config, engine, TEN_CLASSES)


def test_the_average_of_new_layers_ramps_up_anew(grown: Grown) -> None:
    """Else their first values, which are noise, would stay in it for most of a short fade-in."""
    assert [stage.born for stage in growth.stages(grown())] == [0, 80, 80, 240, 240]
    config = grown("ema.halflife_images=1.0e+9", "ema.rampup=0.1")
    training = Training(config, Engine(config, print), TEN_CLASSES)
    training.progress.images_seen = 80
    training.enter(training.stages[1])
    training.prepare()
    first = training.generator.to_image["8"].weight.detach().clone()
    with open_stream(training) as stream:
        training.step(stream)
    now, average = (n.to_image["8"].weight for n in (training.generator, training.average))
    kept = 0.5 ** (16 / (0.1 * 16))  # of a half-life of a tenth of the 16 images since 80
    torch.testing.assert_close(average, kept * first + (1 - kept) * now.detach())


# --- a new stage ---------------------------------------------------------------------------------


def test_a_new_stage_takes_over_all_weights_and_nothing_of_adam(grown: Grown) -> None:
    config = grown()
    training = Training(config, Engine(config, print), TEN_CLASSES)
    training.prepare()
    with torch.no_grad():
        for parameter in training.average.parameters():
            parameter.add_(1)  # it is not the generator
    before = {n: {k: t.clone() for k, t in net.state_dict().items()}
              for n, net in training.networks.items()}  # fmt: skip
    training.progress.images_seen = 80
    training.enter(training.stages[1])
    training.prepare()
    for name in ("g", "d", "ema"):
        after = training.networks[name].state_dict()
        assert after.keys() > before[name].keys()
        for key, tensor in before[name].items():
            if key != "alpha":
                assert torch.equal(after[key], tensor), (name, key)
        assert after["alpha"] == 0
    new = training.generator.state_dict().keys() - before["g"].keys()
    assert new
    for key in new:  # what the average has not seen begins as the generator's
        assert torch.equal(training.average.state_dict()[key], training.generator.state_dict()[key])
    assert all(not optimizer.state for optimizer in training.optimizers.values())
    assert all(
        parameter is own
        for parameter, own in zip(
            training.optimizers["d"].param_groups[0]["params"],
            training.discriminator.parameters(),
            strict=True,
        )
    )


def test_real_images_fade_in_with_the_networks(grown: Grown) -> None:
    config = grown()
    training = Training(config, Engine(config, print), TEN_CLASSES)
    training.enter(training.stages[1])
    real = torch.randint(256, (2, 8, 8, 1), dtype=torch.uint8)
    plain = real.permute(0, 3, 1, 2) / 127.5 - 1
    coarse = plain.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    coarse = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for alpha in (0.0, 0.25, 1.0):
        growth.set_alpha(training.discriminator, alpha)
        shown = real_images(training.stage.fading, training.discriminator, real, None)
        torch.testing.assert_close(shown, (1 - alpha) * coarse + alpha * plain)
    training.enter(training.stages[2])
    shown = real_images(training.stage.fading, training.discriminator, real, None)
    torch.testing.assert_close(shown, plain)


def test_shrunk_images_are_those_of_a_pyramid(digits: Path, pyramid: Path) -> None:
    def stream(folder: Path) -> ShardStream:
        return ShardStream(folder, seed=0, world=World(), batch=40)

    for factor, level in ((2, "r0008"), (4, "r0004")):
        with Shrunk(stream(digits), factor) as shrunk, stream(pyramid / level) as packed:
            for _ in range(2):
                ours, theirs = next(shrunk), next(packed)
                assert torch.equal(ours.pixels, theirs.pixels)
                assert torch.equal(ours.labels, theirs.labels)


def test_missing_levels_are_named_before_anything_begins(grown: Grown, pyramid: Path) -> None:
    config = grown(f"data.path={pyramid}", "model.resolution=32")
    with pytest.raises(configs.UserError, match="r0032"):
        check_data(config)


# --- whole runs ----------------------------------------------------------------------------------


def test_a_run_grows_and_shows_it(grown: Grown, pyramid: Path, tmp_path: Path) -> None:
    """Through all stages: what is logged, kept and told; a pyramid and a plain pack are alike."""
    said: list[str] = []
    config = grown(f"data.path={pyramid}")
    assert train(config, said.append, lambda *_: None) == 0
    assert [line.split(",")[0] for line in said if line.startswith("stage")] == [
        "stage 1 of 5: 4 px", "stage 2 of 5: 8 px", "stage 3 of 5: 8 px",
        "stage 4 of 5: 16 px", "stage 5 of 5: 16 px",
    ]  # fmt: skip
    resolution, alpha = (seen_by(config.run_dir, f"train/{key}") for key in ("resolution", "alpha"))
    assert [resolution[n] for n in (80, 128, 160, 240, 320, 400)] == [4, 8, 8, 8, 16, 16]
    assert 0 < alpha[128] < 1 == alpha[160] == alpha[400]
    found = snapshots.find(config.run_dir)
    assert [int(folder.name) for folder in found] == [80, 160, 240, 320, 400, 480]
    labels = torch.zeros(1, dtype=torch.int64)
    sizes = {int(f.name): snapshots.load(f)[0](torch.zeros(1, 16), labels) for f in found}
    assert [image.shape[-1] for image in sizes.values()] == [4, 8, 8, 16, 16, 16]
    assert (config.run_dir / "timeline.png").exists()
    plain = grown(f"run_dir={tmp_path / 'plain'}")
    assert train(plain, print, lambda *_: None) == 0
    assert last_weights(plain) == last_weights(config)


@pytest.mark.parametrize("stop_at", [112, 160])
def test_resumed_in_a_fade_or_between_stages_it_is_bitwise_the_same(
    grown: Grown, tmp_path: Path, stop_at: int
) -> None:
    whole, parts = (grown(f"run_dir={tmp_path / n}", "train.total_images=240") for n in "ab")
    assert train(whole, print, lambda *_: None) == 0
    first = parts.model_copy(
        update={"train": parts.train.model_copy(update={"total_images": stop_at})}
    )
    assert train(first, print, lambda *_: None) == 0
    progress = json.loads(
        (first.run_dir / "checkpoints" / str(stop_at) / "progress.json").read_text()
    )
    assert progress["stage"] == 1  # of the networks in it, though 160 is the start of stage 2
    assert check(parts) is not None
    assert train(parts, print, lambda *_: None) == 0
    assert last_weights(parts) == last_weights(whole)


def test_a_levels_micro_batch_may_change_between_two_lives(grown: Grown) -> None:
    """As `train.micro_batch` may: another machine has other memory. Its batch may not."""
    levels = "growth.levels=[{{resolution: 4, batch: {}, micro_batch: {}}}]"
    assert train(grown(levels.format(40, 20), "train.total_images=40"), print, lambda *_: None) == 0
    assert check(grown(levels.format(40, 10))) is not None
    with pytest.raises(ConfigError, match=r"growth\.levels"):
        check(grown(levels.format(20, 10)))


def test_a_collapse_is_gone_back_from_into_a_former_stage(
    grown: Grown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 16 px into the fade-in of 8 px, and on from there as a run that was there all along."""
    kept = ("train.checkpoint_images=56", "train.checkpoint_keep=9", "train.total_images=320")
    kept += ("collapse.action=rollback",)
    config = grown(f"run_dir={tmp_path / 'collapsed'}", *kept)
    fell: list[int] = []

    def look(detector: collapse.Detector, tick: collapse.Tick) -> list[collapse.Sign]:
        if tick.images_seen < 280 or fell:
            return []
        fell.append(tick.images_seen)
        detector.began = 150
        return [collapse.Sign(collapse.GAP, 1.0, 9.0, 3.0)]

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(collapse.Detector, "update", look)
        assert train(config, said.append, lambda *_: None) == 0
    assert sum("(rollback 1 of " in line for line in said) == 1
    assert [line.split(",")[0] for line in said if line.startswith("stage")] == [
        "stage 1 of 5: 4 px", "stage 2 of 5: 8 px", "stage 3 of 5: 8 px", "stage 4 of 5: 16 px",
        "stage 2 of 5: 8 px", "stage 3 of 5: 8 px", "stage 4 of 5: 16 px",
    ]  # fmt: skip
    other = grown(f"run_dir={tmp_path / 'amended'}", *kept)
    short = other.model_copy(update={"train": other.train.model_copy(update={"total_images": 112})})
    assert train(short, print, lambda *_: None) == 0
    healthy = other.run_dir / "checkpoints" / "112"
    checkpoint.update_progress(healthy, rollbacks=1, lr_factor=other.collapse.lr_factor)
    assert train(other, print, lambda *_: None) == 0
    assert last_weights(other) == last_weights(config)


def test_one_graph_for_each_stage_and_phase(grown: Grown) -> None:
    """alpha moves at every step of a fade and must not be a constant of the graph."""
    config = grown("compile=aot_eager", "penalties=[]", "loss=non_saturating")
    counters.clear()
    torch.compiler.reset()
    said: list[str] = []
    assert train(config, said.append, lambda *_: None) == 0
    assert sum("compiled phase" in line for line in said) == 10
    assert not any("eager mode" in line for line in said)
    assert counters["stats"]["unique_graphs"] == 10


def test_snapshots_of_all_stages_are_evaluated(grown: Grown) -> None:
    config = grown("train.total_images=240")
    assert train(config, print, lambda *_: None) == 0
    said: list[str] = []
    evaluate(config.run_dir, World(), watch=False, echo=said.append)
    assert sum("fd/digits8-cnn-v1" in line for line in said) >= 3
    record = json.loads((config.run_dir / "evaluation" / "80.json").read_text())
    assert record["protocol"]["enlarged"] == "lower resolutions by repeating pixels"

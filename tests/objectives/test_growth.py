"""Progressive growing: stages as arithmetic, what a new stage inherits, and complete runs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, TEN_CLASSES
from phase_inputs import network
from torch import Tensor
from torch._dynamo.utils import counters

from bigan import checkpoint, models
from bigan import config as configs
from bigan.checkpoint import snapshots
from bigan.config import ConfigError
from bigan.data.packing.pack import pack
from bigan.data.streaming.stream import ShardStream
from bigan.distributed.world import World
from bigan.engine import Engine
from bigan.evaluation.watcher import evaluate
from bigan.image_size import ImageSize
from bigan.objectives import growth
from bigan.run import collapse
from bigan.run.folder import check
from bigan.run.stages import final_config, stage_at, stages
from bigan.run.state import TrainState
from bigan.run.streams import Shrunk, check_data, open_streams
from bigan.run.trainer import train
from bigan.run_config import RunConfig

GROWING = ROOT / "configs" / "smoke" / "progan-digits.yaml"
Grown = Callable[..., RunConfig]


@pytest.fixture
def grown(digits: Path, tmp_path: Path) -> Grown:
    """The growing smoke config: 4, 8 and 16 px, 80 images to each of five stages."""

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
    return (snapshots.find(config.run_dir)[-1] / "generator_ema.safetensors").read_bytes()


def logged(run: Path, key: str) -> dict[int, float]:
    """images_seen -> value, of every line of the log that has the key."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["images_seen"]: line[key] for line in lines if key in line}


# --- arithmetic ----------------------------------------------------------------------------------


def test_stages_are_those_of_the_schedule(grown: Grown) -> None:
    found = stages(grown())
    assert [(s.resolution, s.fading) for s in found] == [
        (4, False), (8, True), (8, False), (16, True), (16, False),
    ]  # fmt: skip
    assert [(s.start, s.end) for s in found] == [
        (0, 80), (80, 160), (160, 240), (240, 320), (320, math.inf),
    ]  # fmt: skip
    assert [stage_at(found, n).index for n in (0, 79, 80, 319, 320, 10**9)] == [
        0, 0, 1, 3, 4, 4,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("resolution", "start", "levels", "expected"),
    [
        ("96", "4", "[{resolution: 12, batch: 8}]", [6, 12, 24, 48, 96]),
        ("96", "24", "[{resolution: 48, batch: 8}]", [24, 48, 96]),
        ("[24, 40]", "4", "[{resolution: [12, 20], batch: 8}]", [(6, 10), (12, 20), (24, 40)]),
        ("[24, 40]", "[12, 20]", "[{resolution: [24, 40], batch: 8}]", [(12, 20), (24, 40)]),
    ],
)
def test_stages_of_other_sizes(
    grown: Grown, resolution: str, start: str, levels: str, expected: list[ImageSize]
) -> None:
    config = grown(
        f"model.resolution={resolution}", f"growth.start_resolution={start}",
        f"growth.levels={levels}",
    )  # fmt: skip
    found = stages(config)
    assert list(dict.fromkeys(stage.resolution for stage in found)) == expected
    changed = {stage.resolution for stage in found if stage.config.train.batch == 8}
    assert changed == {config.growth.levels[0].resolution}
    shapes = [
        {key: t.shape for key, t in network.state_dict().items() if "image" not in key}
        for stage in found
        for network in [models.build(stage.config.model, "meta")["discriminator"]]
    ]
    for former, later in itertools.pairwise(shapes):  # what a stage inherits
        assert former.items() <= later.items()


def test_the_last_stage_does_not_grow(grown: Grown) -> None:
    config = final_config(grown())
    assert (config.model.resolution, config.model.is_fading, config.growth) == (16, False, None)


def test_a_level_has_its_own_batch_and_learning_rate(grown: Grown) -> None:
    first, second, *_ = stages(grown())
    assert (first.config.train.batch, second.config.train.batch) == (40, 16)
    assert [entry.lr for entry in first.config.optimizer.values()] == [1.5e-3, 1.5e-3]
    assert [entry.lr for entry in second.config.optimizer.values()] == [1e-3, 1e-3]
    assert first.config.model.resolution == 4


def test_stages_begin_at_step_boundaries_and_do_not_drift(grown: Grown) -> None:
    """A stage that ends within a step ends with that step; later stages are not delayed by it."""
    found = stages(grown("growth.stable_images=90", "objective.discriminator_steps=2"))
    starts = [s.start for s in found]
    assert starts == [0, 160, 192, 288, 352]  # asked for: 90, 170, 260, 340; steps of 80 and 32
    for stage, following in itertools.pairwise(found):
        step = stage.config.train.batch * 2
        assert (following.start - stage.start) % step == 0
        assert stage.end == following.start


def test_alpha_goes_from_0_to_1_over_the_fade(grown: Grown) -> None:
    first, fading, stable, *_ = (stage.setup((1,)) for stage in stages(grown()))
    assert [fading.alpha(n) for n in (80, 96, 120, 160)] == [0, 0.2, 0.5, 1]
    assert stable.alpha(160) == first.alpha(0) == 1


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("growth.start_resolution=16", "growth.start_resolution = 16.* 4, 8"),
        ("growth.start_resolution=6", "growth.start_resolution = 6.* 4, 8"),
        ("growth.levels=[{resolution: 32}]", "growth.levels.*32.* 4, 8, 16"),
        ("growth.levels=[{resolution: 8}, {resolution: 8}]", "growth.levels.*once"),
        ("model.fading=true", "leave model.fading out"),
        ("model.conditional=true", ""),
    ],
)
def test_impossible_growth_is_a_config_error(grown: Grown, override: str, facts: str) -> None:
    if not facts:
        assert grown(override).growth is not None
        return
    with pytest.raises(ConfigError, match=facts):
        grown(override)


def test_a_fixed_resolution_cannot_grow(make_config: Grown) -> None:
    with pytest.raises(ConfigError, match=r"growth.*biggan.*use model.name=progan"):
        make_config("growth={stable_images: 10, fade_images: 10}")


def test_a_group_must_be_whole_at_every_level_on_every_process(grown: Grown) -> None:
    config = grown("growth.levels=[{resolution: 8, batch: 12}]")
    engine = Engine(config, print)
    engine.world = World(0, 2)
    with pytest.raises(ConfigError, match=r"minibatch_group = 4 .* 6 images .*\(8 px"):
        TrainState(config, engine, TEN_CLASSES)
    engine.world = World(0, 1)
    TrainState(config, engine, TEN_CLASSES)


def test_the_ema_of_new_layers_ramps_up_from_their_start(grown: Grown) -> None:
    """Else their initial values, which are noise, would remain in it for most of a short fade."""
    assert [stage.born for stage in stages(grown())] == [0, 80, 80, 240, 240]
    state = entered(grown("ema.halflife_images=1.0e+9", "ema.rampup=0.1"), 1)
    state.prepare()
    key = "to_image.8.weight"
    first = state.networks["generator"].get_parameter(key).detach().clone()
    with open_streams(state) as streams:
        state.advance(streams)
    now, average = (n["generator"].get_parameter(key) for n in (state.networks, state.averages))
    kept = 0.5 ** (16 / (0.1 * 16))  # of a half-life of a tenth of the 16 images since 80
    torch.testing.assert_close(average, kept * first + (1 - kept) * now.detach())


# --- a new stage ---------------------------------------------------------------------------------


def entered(config: RunConfig, index: int) -> TrainState:
    """The state of a run that has just entered a stage; `prepare` follows."""
    state = TrainState(config, Engine(config, print), TEN_CLASSES)
    state.progress.images_seen = state.stages[index].start
    state.enter(state.stages[index])
    return state


def test_a_new_stage_inherits_all_weights_and_no_optimizer_state(grown: Grown) -> None:
    config = grown()
    state = TrainState(config, Engine(config, print), TEN_CLASSES)
    state.prepare()
    with open_streams(state) as streams:
        state.advance(streams)
    with torch.no_grad():
        for parameter in state.averages["generator"].parameters():
            parameter.add_(1)  # so that it differs from the generator
    before = {n: {k: t.clone() for k, t in net.state_dict().items()}
              for n, net in state.saved_networks.items()}  # fmt: skip
    assert all(prepared.optimizer.state for prepared in state.prepared.values())
    state.progress.images_seen = 80
    state.enter(state.stages[1])
    state.prepare()
    assert set(before) == {"generator", "discriminator", "generator_ema"}
    for name, old in before.items():
        after = state.saved_networks[name].state_dict()
        assert after.keys() > old.keys()
        for key, tensor in old.items():
            if key != "alpha":
                assert torch.equal(after[key], tensor), (name, key)
        assert after["alpha"] == 0
    generator, average = (n["generator"].state_dict() for n in (state.networks, state.averages))
    new = generator.keys() - before["generator"].keys()
    assert new
    for key in new:  # the EMA of new layers starts from the network
        assert torch.equal(average[key], generator[key])
    assert all(not prepared.optimizer.state for prepared in state.prepared.values())
    (group,) = state.prepared["discriminator"].optimizer.param_groups
    own = state.networks["discriminator"].parameters()
    assert all(a is b for a, b in zip(group["params"], own, strict=True))


def test_real_images_fade_in_with_the_networks(grown: Grown) -> None:
    state = entered(grown(), 1)
    pixels = torch.randint(256, (2, 8, 8, 1), dtype=torch.uint8)
    plain = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    coarse = plain.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    coarse = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def shown() -> Tensor:
        """The images that the discriminator phase is given."""
        phase, discriminator = (
            state.objective.phases["discriminator"],
            network(state, "discriminator"),
        )
        images: Tensor = phase._real(discriminator, {"images.pixels": pixels})  # type: ignore[operator]
        return images

    for alpha in (0.0, 0.25, 1.0):
        growth.set_alpha(state.networks["discriminator"], alpha)
        torch.testing.assert_close(shown(), (1 - alpha) * coarse + alpha * plain)
    state.enter(state.stages[2])
    torch.testing.assert_close(shown(), plain)


def test_shrunk_images_are_those_of_a_pyramid(digits: Path, pyramid: Path) -> None:
    def stream(folder: Path) -> ShardStream:
        return ShardStream(folder, seed=0, world=World(), batch=40)

    for factor, level in ((2, "r0008"), (4, "r0004")):
        with Shrunk(stream(digits), factor) as shrunk, stream(pyramid / level) as packed:
            for _ in range(2):
                ours, theirs = next(shrunk), next(packed)
                assert torch.equal(ours.pixels, theirs.pixels)
                assert torch.equal(ours.labels, theirs.labels)


def test_shrunk_images_with_alpha_are_those_of_a_pyramid(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 40, 4), np.uint8)
    pixels[:, :5, :5] = 0  # transparent where a pixel of level 2 is
    images = [(image, 0) for image in pixels]
    options = {"resolution": (24, 40), "channels": 4, "test_fraction": 0.0}
    levels = pack(images, tmp_path / "d", pyramid=6, **options).manifests
    for factor, level in ((4, levels[0]), (2, levels[1])):
        with (
            ShardStream(levels[-1], seed=0, world=World(), batch=24) as top,
            ShardStream(level, seed=0, world=World(), batch=24) as packed,
        ):
            assert torch.equal(next(Shrunk(top, factor)).pixels, next(packed).pixels)


def test_missing_levels_are_named_before_training_begins(grown: Grown, pyramid: Path) -> None:
    config = grown(f"data.path={pyramid}", "model.resolution=32")
    with pytest.raises(configs.UserError, match="r0032"):
        check_data(config)


# --- complete runs -------------------------------------------------------------------------------


def test_a_run_goes_through_all_stages(grown: Grown, pyramid: Path, tmp_path: Path) -> None:
    """All stages: log, snapshots and messages; a pyramid and a plain pack give the same run."""
    printed: list[str] = []
    config = grown(f"data.path={pyramid}")
    assert train(config, printed.append, lambda *_: None) == 0
    assert [line.split(",")[0] for line in printed if line.startswith("stage")] == [
        "stage 1 of 5: 4 px", "stage 2 of 5: 8 px", "stage 3 of 5: 8 px",
        "stage 4 of 5: 16 px", "stage 5 of 5: 16 px",
    ]  # fmt: skip
    resolution, alpha = (logged(config.run_dir, f"train/{key}") for key in ("resolution", "alpha"))
    assert [resolution[n] for n in (80, 128, 160, 240, 320, 400)] == [4, 8, 8, 8, 16, 16]
    assert 0 < alpha[128] < 1 == alpha[160] == alpha[400]
    found = snapshots.find(config.run_dir)
    assert [int(folder.name) for folder in found] == [80, 160, 240, 320, 400, 480]
    sizes = []
    for snapshot in map(snapshots.load, found):
        sampler = snapshot.samplers["latent"]
        sizes.append(sampler(snapshot.networks, sampler.draws(0, "test", 0, 1, None)).shape[-1])
    assert sizes == [4, 8, 8, 16, 16, 16]
    assert (config.run_dir / "timeline.png").exists()
    plain = grown(f"run_dir={tmp_path / 'plain'}")
    assert train(plain, print, lambda *_: None) == 0
    assert last_weights(plain) == last_weights(config)


@pytest.mark.parametrize("stop_at", [pytest.param(112, marks=pytest.mark.slow), 160])
def test_a_run_resumed_in_a_fade_or_between_stages_is_bitwise_the_same(
    grown: Grown, tmp_path: Path, stop_at: int
) -> None:
    straight, parts = (grown(f"run_dir={tmp_path / n}", "train.total_images=240") for n in "ab")
    assert train(straight, print, lambda *_: None) == 0
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
    assert last_weights(parts) == last_weights(straight)


def test_the_micro_batch_of_a_level_may_change_between_attempts(grown: Grown) -> None:
    """As `train.micro_batch` may: another machine has other memory. Its batch may not."""
    levels = "growth.levels=[{{resolution: 4, batch: {}, micro_batch: {}}}]"
    assert train(grown(levels.format(40, 20), "train.total_images=40"), print, lambda *_: None) == 0
    assert check(grown(levels.format(40, 10))) is not None
    with pytest.raises(ConfigError, match=r"growth\.levels"):
        check(grown(levels.format(20, 10)))


@pytest.mark.slow  # tests/run/test_rollback.py restores other states
def test_a_rollback_may_lead_into_an_earlier_stage(
    grown: Grown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 16 px into the fade-in of 8 px; then as a run that was never at 16 px before."""
    kept = ("train.checkpoint_images=56", "train.checkpoint_keep=9", "train.total_images=320")
    kept += ("collapse.action=rollback",)
    config = grown(f"run_dir={tmp_path / 'collapsed'}", *kept)
    collapsed: list[int] = []

    def update(detector: collapse.Detector, tick: collapse.Tick) -> list[collapse.Sign]:
        if tick.images_seen < 280 or collapsed:
            return []
        collapsed.append(tick.images_seen)
        detector.began = 150
        return [collapse.Sign(collapse.GAP, 1.0, 9.0, 3.0)]

    printed: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(collapse.Detector, "update", update)
        assert train(config, printed.append, lambda *_: None) == 0
    assert [line.split(",")[0] for line in printed if line.startswith("stage")] == [
        "stage 1 of 5: 4 px", "stage 2 of 5: 8 px", "stage 3 of 5: 8 px", "stage 4 of 5: 16 px",
        "stage 2 of 5: 8 px", "stage 3 of 5: 8 px", "stage 4 of 5: 16 px",
    ]  # fmt: skip
    newest = checkpoint.latest(config.run_dir)
    assert newest is not None
    assert checkpoint.read_progress(newest).rollbacks == 1
    other = grown(f"run_dir={tmp_path / 'amended'}", *kept)
    short = other.model_copy(update={"train": other.train.model_copy(update={"total_images": 112})})
    assert train(short, print, lambda *_: None) == 0
    healthy = other.run_dir / "checkpoints" / "112"
    checkpoint.update_progress(healthy, rollbacks=1, lr_factor=other.collapse.lr_factor)
    assert train(other, print, lambda *_: None) == 0
    assert last_weights(other) == last_weights(config)


@pytest.mark.slow  # tests/parity compiles growth, too
def test_one_graph_for_each_stage_and_phase(grown: Grown) -> None:
    """alpha moves at every step of a fade and must not be a constant of the graph."""
    config = grown("compile=aot_eager", "objective.penalties=[]", "objective.loss=non_saturating")
    counters.clear()
    torch.compiler.reset()
    printed: list[str] = []
    assert train(config, printed.append, lambda *_: None) == 0
    assert sum("compiled phase" in line for line in printed) == 10
    assert not any("eager mode" in line for line in printed)
    assert counters["stats"]["unique_graphs"] == 10


def test_snapshots_of_all_stages_are_evaluated(grown: Grown) -> None:
    config = grown("train.total_images=240")
    assert train(config, print, lambda *_: None) == 0
    printed: list[str] = []
    evaluate(config.run_dir, World(), watch=False, echo=printed.append)
    assert sum("fd/digits8-cnn-v1" in line for line in printed) >= 3
    record = json.loads((config.run_dir / "evaluation" / "80.json").read_text())
    assert record["protocol"]["upsampling"] == "lower resolutions by repeating pixels"

"""The large configs: figures in their headers, their last stage on meta, one real step of it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT
from network_parts import built
from torch import Tensor, nn

from bigan import config as configs
from bigan import models
from bigan.config import ConfigError
from bigan.data.streaming.stream import Batch
from bigan.engine import Engine
from bigan.layers.batchnorm import BatchNorm2d
from bigan.objectives import gan
from bigan.run.describe import describe
from bigan.run.state import TrainState
from bigan.run_config import RunConfig, setup_of

CONFIGS = ROOT / "configs"
ON_CPU = ["compile=eager", "precision=fp32", "train.seed=0"]

BIGGAN_512 = ["model.resolution=512", "model.z_dim=160"]  # 8 slots of 20
BIGGAN_DEEP_512 = ["model.resolution=512"]


def built_objective(config: RunConfig) -> gan.GAN:
    """The objective for data of one class."""
    assert isinstance(config.objective, gan.Config)
    return config.objective.build(setup_of(config, (1,)))


def load(name: str, *overrides: str) -> RunConfig:
    return configs.load(RunConfig, CONFIGS / f"{name}.yaml", overrides)


# --- figures -------------------------------------------------------------------------------------

PARAMETERS = re.compile(r"G has ([\d,]+) parameters and D\s+([\d,]+)")
MEMORY = re.compile(r"([\d.]+) GiB per process estimated")


def headers_with(figures: re.Pattern[str]) -> dict[str, tuple[float, ...]]:
    """Config name -> the figures in its header, for the headers that have them."""
    found = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
        match = figures.search(" ".join(line.removeprefix("# ") for line in lines))
        if match:
            found[path.stem] = tuple(float(text.replace(",", "")) for text in match.groups())
    return found


@pytest.mark.parametrize(("name", "counts"), headers_with(PARAMETERS).items())
def test_networks_have_the_parameters_of_the_header(name: str, counts: tuple[float, ...]) -> None:
    networks = built(load(name).model, "meta")
    assert tuple(sum(p.numel() for p in network.parameters()) for network in networks) == counts


@pytest.mark.full
@pytest.mark.parametrize(("name", "gib"), headers_with(MEMORY).items())
def test_a_full_step_fits_the_memory_of_the_header(name: str, gib: tuple[float]) -> None:
    """`bigan describe` runs each phase of the last stage on the meta device, at full width."""
    described = describe(load(name), world_size=8)
    assert described["memory_bytes"]["total"] / 2**30 == pytest.approx(gib[0], rel=0.1)


def test_headers_are_read() -> None:
    assert {"progan-1024", "stylegan2-256", "stylegan2-1024"} <= headers_with(PARAMETERS).keys()
    assert {"progan-1024", "r3gan-64", "biggan-128-8gpu"} <= headers_with(MEMORY).keys()


@pytest.mark.parametrize(
    ("name", "overrides"), [("biggan-128", BIGGAN_512), ("biggan-deep-128", BIGGAN_DEEP_512)]
)
def test_biggan_takes_a_full_step_at_512_px_on_the_meta_device(
    name: str, overrides: list[str]
) -> None:
    at_128, at_512 = (
        describe(load(name, "train.micro_batch=4", *changes), world_size=8)["memory_bytes"]
        for changes in ([], overrides)
    )
    assert at_512["weights"] > at_128["weights"]
    # 16 times the pixels, in maps that are narrower the larger they are.
    assert 4 < at_512["activations"] / at_128["activations"] < 16


def test_progan_has_the_batches_and_learning_rates_of_eight_gpus() -> None:
    described = describe(load("progan-1024"), world_size=8)
    stages = described["stages"]
    assert len(stages) == 17
    stable = {s["resolution"]: s for s in stages if not s["fading"]}
    assert {r: s["batch"] for r, s in stable.items()} == {
        4: 512, 8: 256, 16: 128, 32: 64, 64: 32, 128: 32, 256: 32, 512: 32, 1024: 32,
    }  # fmt: skip
    assert {r: s["lr"]["generator"] for r, s in stable.items() if r >= 64} == {
        64: 1e-3, 128: 1.5e-3, 256: 2e-3, 512: 3e-3, 1024: 3e-3,
    }  # fmt: skip
    for fading, after in itertools.pairwise(stages):
        if fading["fading"]:  # batch and rate are those of the resolution from its first image on
            assert (fading["batch"], fading["lr"]) == (after["batch"], after["lr"])
    assert stages[-1]["images"] == [9_600_000, 12_000_000]
    assert described["schedule"]["accumulation_steps"] == 1


def test_stylegan2_has_the_published_gamma_and_without_it_the_heuristic() -> None:
    for name, gamma in (("stylegan2-256", 1), ("stylegan2-1024", 10)):
        config = load(name)
        (r1,) = config.objective.penalties
        assert r1.weight == gamma
        assert built_objective(config).separate_steps == {"discriminator": 16, "generator": 4}
    config = load("stylegan2-256", "objective.penalties=[{name: r1}]")
    (line,) = [line for line in built_objective(config).remarks() if "r1" in line]
    assert "0.2048" in line


# --- one real step -------------------------------------------------------------------------------


def noise(state: TrainState) -> Iterator[Batch]:
    """A stream of random images of the stage's resolution, all of class 0."""
    config, draw = state.config, torch.Generator().manual_seed(0)
    num = config.train.batch // state.accumulation
    shape = (num, config.model.resolution, config.model.resolution, config.model.image_channels)
    while True:
        real = torch.randint(256, shape, dtype=torch.uint8, generator=draw)
        yield Batch(real, torch.zeros(num, dtype=torch.int64), np.arange(num))


def check_step(state: TrainState) -> None:
    """Prepare and take one training step; every parameter changes and is finite."""
    state.prepare()
    before = {
        (name, key): parameter.detach().clone()
        for name, network in state.networks.items()
        for key, parameter in network.named_parameters()
    }
    seen = state.progress.images_seen
    state.advance({"images": noise(state)})
    assert state.engine.halted_at() == -1
    for (name, key), former in before.items():
        parameter = state.networks[name].get_parameter(key)
        assert parameter.isfinite().all(), (name, key)
        assert not torch.equal(parameter, former), (name, key)
    assert state.progress.images_seen == seen + state.config.images_per_step


@pytest.mark.full
def test_progan_takes_real_steps_at_1024_px() -> None:
    """The last fade-in and what follows it, in narrow networks: 8 channels, 1 at 1024 px."""
    narrow = ["model.base_channels=512", "model.max_channels=8", "model.z_dim=8"]
    small = ["model.minibatch_group=2", "train.batch=2", "train.micro_batch=2"]
    config = load("progan-1024", *narrow, *small, *ON_CPU)
    state = TrainState(config, Engine(config, print), {"face": 1})
    for stage in state.stages[-2:]:
        assert stage.resolution == 1024
        state.progress.images_seen = stage.start + stage.config.train.batch  # alpha is not 0
        state.enter(stage)
        check_step(state)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("biggan-128", [*BIGGAN_512, "model.shared_dim=8"]),
        ("biggan-deep-128", [*BIGGAN_DEEP_512, "model.z_dim=8", "model.shared_dim=8"]),
    ],
)
def test_biggan_takes_a_real_step_at_512_px(name: str, overrides: list[str]) -> None:
    narrow = ["model.channels=4", "model.num_classes=3", "train.batch=4", "train.micro_batch=2"]
    config = load(name, *overrides, *narrow, *ON_CPU)
    check_step(TrainState(config, Engine(config, print), {"a": 1, "b": 1, "c": 1}))


# --- wrong combinations --------------------------------------------------------------------------


class BatchNormed(nn.Module):
    """A network of either kind with one BatchNorm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = BatchNorm2d(1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.bn(images).sum((1, 2, 3))


def with_batchnorm(monkeypatch: pytest.MonkeyPatch, config: RunConfig, name: str) -> None:
    """Let the objective of `config` build a BatchNormed network under this name."""
    networks = models.build(config.model, "meta") | {name: BatchNormed()}
    monkeypatch.setattr(gan.models, "build", lambda *_: networks)


@pytest.mark.parametrize("name", ["r1", "r2", "wgan_gp"])
def test_batchnorm_under_a_penalty_is_a_config_error(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = make_config(f"objective.penalties=[{{name: {name}}}]")
    built_objective(config)  # BatchNorm in the generator is allowed
    with_batchnorm(monkeypatch, config, "discriminator")
    with pytest.raises(ConfigError, match=rf"^objective\.penalties: {name}: .*BatchNormed"):
        built_objective(config)
    built_objective(make_config())


def test_batchnorm_under_path_length_is_a_config_error(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load("smoke/stylegan2-256", f"data.path={digits}", f"run_dir={tmp_path}")
    built_objective(config)
    with_batchnorm(monkeypatch, config, "generator")
    with pytest.raises(ConfigError, match=r"^objective\.path_length: .*BatchNormed"):
        built_objective(config)

"""The trainer's parts without its loop, and run folders without a training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TEN_CLASSES
from torch import Tensor, nn

from bigan import config as configs
from bigan import models, rng
from bigan.checkpoint import snapshots
from bigan.engine import Engine
from bigan.evaluation import moments
from bigan.evaluation.moments import Moments
from bigan.objectives import gan
from bigan.objectives.base import Setup
from bigan.objectives.samplers import Sampler, truncated_normal
from bigan.run.state import TrainState
from bigan.run.streams import OpenStreams, open_streams
from bigan.run_config import RunConfig


def make(config: RunConfig) -> tuple[TrainState, OpenStreams]:
    """A prepared train state of `config` on the digits' classes, and its streams."""
    state = TrainState(config, Engine(config, print), TEN_CLASSES)
    state.prepare()
    return state, open_streams(state)


MODELS: dict[str, dict[str, object]] = {
    "biggan": {
        "name": "biggan", "resolution": 16, "num_classes": 10, "z_dim": 12,
        "image_channels": 1, "channels": 4, "shared_dim": 4,
    },
    "stylegan2": {
        "name": "stylegan2", "resolution": 16, "num_classes": 10, "z_dim": 12, "w_dim": 12,
        "image_channels": 1, "channel_base": 128, "max_channels": 8, "mapping_layers": 2,
    },
}  # fmt: skip


def evaluated(
    run_dir: Path,
    data: Path,
    model: str = "biggan",
    train: dict[str, object] | None = None,
    **evaluation: object,
) -> RunConfig:
    """A config of tiny networks, evaluated by the digits extractor on few samples."""
    content = {
        "run_dir": str(run_dir),
        "data": {"path": str(data)},
        "model": MODELS[model],
        "optimizer": {"generator": {"lr": 1e-4}, "discriminator": {"lr": 1e-4}},
        "ema": {"halflife_images": 100},
        "train": {"total_images": 100, "batch": 10} | (train or {}),
        "evaluation": {
            "extractor": "digits8-cnn-v1", "batch": 16, "num_samples": 40, **evaluation
        },
        "tracking": {"mlflow": False},
    }  # fmt: skip
    return configs.validate(RunConfig, content, "test")


def start_run(config: RunConfig) -> None:
    """Create the run folder with its config.yaml."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(configs.dump(config))


def untrained_generator(config: RunConfig, seed: int = 0) -> nn.Module:
    """In evaluation mode, as a snapshot holds it; a mean latent is random as well."""
    generator = models.build(config.model)["generator"]
    generator.init_weights(rng.torch_generator(seed, "test/init"))
    if config.model.name == "stylegan2":
        generator.mapping.w_average.normal_(generator=torch.Generator().manual_seed(seed))
    return generator.eval().requires_grad_(False)


def write_snapshot(config: RunConfig, images_seen: int, seed: int | None = None) -> Path:
    """A snapshot of an untrained generator; its seed is `images_seen` by default."""
    generator = untrained_generator(config, images_seen if seed is None else seed)
    networks = {"generator_ema": generator}
    return snapshots.write(config.run_dir, images_seen, networks, config, TEN_CLASSES)


def uniform_noise(num: int) -> Tensor:
    values = np.random.default_rng(0).integers(0, 256, (num, 1, 8, 8), dtype=np.uint8)
    return torch.from_numpy(values)


def merged(parts: list[Moments]) -> Moments:
    total = moments.empty(len(parts[0].mean))
    for part in parts:
        total = moments.merge(total, part)
    return total


@dataclass(frozen=True)
class Inverter:
    """A sampler with an input stream: inverted images, brighter or darker by a random value."""

    networks: tuple[str, ...] = ("generator",)
    inputs: str | None = "images"
    reference: str = "images"
    truncates: str = ""
    labeled: bool = False

    def draws(
        self, seed: int, stream: str, at: int, num: int, truncation: float | None
    ) -> dict[str, Tensor]:
        return {"shift": truncated_normal(seed, f"{stream}/shift", at, (num, 1, 1, 1), truncation)}

    def __call__(self, networks: dict[str, nn.Module], inputs: dict[str, Tensor]) -> Tensor:
        pixels = inputs["images.pixels"].permute(0, 3, 1, 2)
        return 1 - pixels / 127.5 + inputs["shift"] / 8


def add_inverter(patch: pytest.MonkeyPatch) -> None:
    """Give the objective `gan` a second sampler, "inverted"."""
    init = gan.GAN.__init__

    def with_inverter(self: gan.GAN, config: gan.Config, setup: Setup) -> None:
        init(self, config, setup)
        inverter: Sampler = Inverter()  # type: ignore[assignment]
        self.samplers["inverted"] = inverter

    patch.setattr(gan.GAN, "__init__", with_inverter)

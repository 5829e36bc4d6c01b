"""The cells of the parity table: what is trained for three steps, and how far two results differ.

Run as a script under a launcher, this file is one rank of an engine: it trains every cell and
leaves checkpoints of each, which the test compares with the one-process eager reference.

    cells.py DIGITS FOLDER ENGINE,... CELL,...
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from bigan import config as configs
from bigan import models
from bigan.checkpoint import Reader, Saver
from bigan.engine import Engine
from bigan.files import numbered_folders
from bigan.inputs import open_stream
from bigan.launching import disconnect
from bigan.recipe import RunConfig
from bigan.training import Training

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke" / "digits.yaml"
CLASSES = {str(digit): 1 for digit in range(10)}
STEPS = 3

R1 = "penalties=[{name: r1, weight: 10.0}]"
WGAN_GP = "penalties=[{name: wgan_gp, weight: 10.0}]"
MICRO = "train.micro_batch=10"  # per process, of two
# With momentum, so that Adam's first moment tells of all three gradients.
COMMON = ["optimizer.g.beta1=0.5", "optimizer.d.beta1=0.5", "train.batch=40"]
CELLS: dict[str, list[str]] = {
    "no penalty": [],
    "r1": [R1],
    "wgan-gp": [WGAN_GP],
    "lazy r1": ["penalties=[{name: r1, weight: 10.0, every: 2}]"],
    "r1 + accumulation": [R1, MICRO],
    "wgan-gp + accumulation": [WGAN_GP, MICRO],
    "two d steps": [R1, "train.num_d_steps=2"],
    "attention + orthogonal": [
        "train.orthogonal_weight=0.01", "model.attention_resolutions=[8]", "ema.start_images=80",
    ],
    "ada + r1": [R1, "augment={name: ada, initial: 0.5, every_images: 40, rampup_images: 1000}"],
    "bf16 + r1": [R1, "precision=bf16"],
    "fp16 + r1": [R1, "precision=fp16"],
    "growth": [WGAN_GP],
}  # fmt: skip


class Growing(nn.Module):
    """A network that gets one more block while it is trained, faded in by `alpha` (ProGAN)."""

    def __init__(self, network: nn.Module, is_generator: bool) -> None:
        super().__init__()
        self.network = network
        self.is_generator = is_generator
        self.block: nn.Conv2d | None = None
        self.register_buffer("alpha", torch.zeros(()))

    def init_weights(self, generator: torch.Generator) -> None:
        self.network.init_weights(generator)  # type: ignore[operator]
        self.get_buffer("alpha").zero_()

    def grow(self) -> None:
        self.block = nn.Conv2d(1, 1, 3, padding=1)
        with torch.no_grad():
            self.block.weight.copy_(torch.linspace(-0.4, 0.6, 9).view(1, 1, 3, 3))
            self.block.bias.fill_(0.1)  # type: ignore[union-attr]
        self.block.to(self.get_buffer("alpha").device)
        self.get_buffer("alpha").fill_(0.25)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.is_generator:
            return self._fade(self.network(x, labels)).tanh()
        return self.network(self._fade(x), labels)

    def _fade(self, images: Tensor) -> Tensor:
        if self.block is None:
            return images
        return torch.lerp(images, self.block(images), self.get_buffer("alpha"))


def build_growing(config: models.ModelConfig, device: str) -> tuple[nn.Module, nn.Module]:
    generator, discriminator = BUILD(config, device)
    return Growing(generator, True).to(device), Growing(discriminator, False).to(device)


BUILD = models.build


def recipe(digits: Path, place: Path, *overrides: str) -> RunConfig:
    where = [f"data.path={digits}", f"run_dir={place}"]
    return configs.load(RunConfig, SMOKE, [*where, *COMMON, *overrides])


def train_cell(config: RunConfig, cell: str) -> tuple[dict[str, float], list[str]]:
    """Three steps by the real trainer's parts; leaves checkpoints, returns losses and messages."""
    messages: list[str] = []
    build = build_growing if cell == "growth" else BUILD
    engine = Engine(config, messages.append)
    engine.memory_format = torch.contiguous_format  # as in the sharding engines: the same kernels
    with mock.patch.object(models, "build", build):
        training = Training(config, engine, CLASSES)
    training.prepare()
    for scale in training.scales.values():
        # At the edge, half the images per process (their mean: twice the gradient) overflow first.
        scale.scale.fill_(256)
    saver = Saver(config.run_dir, training.world, keep=2, echo=print)
    with open_stream(training) as stream:
        for step in range(STEPS):
            if cell == "growth" and step == 1:  # new parameters, new engines, moments from zero
                training.close()
                for network in training.networks.values():
                    network.grow()  # type: ignore[operator]
                training.prepare()
            training.step(stream)
            if step in (1 if cell == "growth" else 0, STEPS - 1):
                saver.save(training.progress, training.pieces())
            if cell == "growth":
                for network in training.networks.values():
                    network.get_buffer("alpha").mul_(2)
    means, _ = training.statistics.collect()
    saver.finish()
    assert not saver.verdict(), saver.verdict()
    assert training.engine.halted_at() == -1
    training.close()
    return means, messages


class Difference(NamedTuple):
    """How far two results are apart."""

    state: float  # after all steps: losses, gradient norms, weights, averages, buffers
    gradients: float  # of the first step of the engines: |ours - reference| / |reference|


def difference(ours: Result, reference: Result) -> Difference:
    """Weights alone would show little: a few steps hardly move them, and Adam divides a wrong
    factor out. Its first moments after one step are the gradients themselves. (Later on, rounding
    decides a ReLU otherwise here and there, which shows in a few entries.)
    """
    assert ours.losses.keys() == reference.losses.keys()
    state = max(abs(ours.losses[k] - v) / max(1.0, abs(v)) for k, v in reference.losses.items())
    a, b = ours.tensors(-1), reference.tensors(-1)
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for key, tensor in b.items():
        if key.startswith("networks/") or key.endswith(".step"):
            state = max(state, (a[key] - tensor).abs().max().item())
    a, b = ours.tensors(0), reference.tensors(0)
    gradients = 0.0
    for network in ("g", "d"):
        keys = [k for k in b if k.startswith(f"optimizers/{network}.") and k.endswith(".exp_avg")]
        apart = torch.stack([(a[k] - b[k]).square().sum() for k in keys]).sum()
        size = torch.stack([b[k].square().sum() for k in keys]).sum()
        gradients = max(gradients, (apart / size).sqrt().item())
    return Difference(state, gradients)


class Result:
    """Losses and the two checkpoints of a cell."""

    def __init__(self, losses: dict[str, float], place: Path) -> None:
        self.losses = losses
        self._folders = numbered_folders(place / "checkpoints")

    def tensors(self, which: int) -> dict[str, Tensor]:
        """Of the first step of the engines (0), or of the last (-1)."""
        reader = Reader(self._folders[which])
        return {name: reader.read(name).double() for name in reader.shapes()}


def run_dir(folder: Path, engine: str, cell: str) -> Path:
    return folder / engine / cell.replace(" ", "-")


def main() -> None:
    faulthandler.dump_traceback_later(560, exit=True)
    torch.set_num_threads(1)
    digits, folder = Path(sys.argv[1]), Path(sys.argv[2])
    losses: dict[str, dict[str, Any]] = {}
    for engine in sys.argv[3].split(","):
        losses[engine] = {}
        for cell in sys.argv[4].split(","):
            overrides = [*CELLS[cell], f"engine={engine}", "compile=eager"]
            config = recipe(digits, run_dir(folder, engine, cell), *overrides)
            losses[engine][cell], _ = train_cell(config, cell)
    last = Engine(config, print)
    if last.world.is_main:
        (folder / "losses.json").write_text(json.dumps(losses))
    disconnect(last.world)


if __name__ == "__main__":
    main()

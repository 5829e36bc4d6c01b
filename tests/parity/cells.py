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

import torch
from torch import Tensor

from bigan import config as configs
from bigan.atomic_files import numbered_folders
from bigan.checkpoint import Reader, Saver
from bigan.distributed.launch import disconnect
from bigan.engine import Engine
from bigan.run.state import TrainState
from bigan.run.streams import open_streams
from bigan.run.trainer import enter_stage
from bigan.run_config import RunConfig

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke" / "digits.yaml"
CLASSES = {str(digit): 1 for digit in range(10)}
STEPS = 3

R1 = "objective.penalties=[{name: r1, weight: 10.0}]"
WGAN_GP = "objective.penalties=[{name: wgan_gp, weight: 10.0}]"
MICRO = "train.micro_batch=10"  # per process, of two
# With momentum, so that Adam's first moment depends on all three gradients. A cell may replace a
# section of these and of the smoke config: `model`, `objective`, `optimizer`.
COMMON = ["optimizer.generator.beta1=0.5", "optimizer.discriminator.beta1=0.5", "train.batch=40"]
R3GAN = (
    "model={name: r3gan, resolution: 16, num_classes: 10, conditional: true, image_channels: 1, "
    "z_dim: 16, widths: [16, 16, 8], group_size: 8, embedding_dim: 8}"
)
CLIP = 0.05  # of the weights in the cell "wgan"
CELLS: dict[str, list[str]] = {
    "no penalty": [],
    "r1": [R1],
    "wgan-gp": [WGAN_GP],
    "lazy r1": ["objective.penalties=[{name: r1, weight: 10.0, every: 2}]"],
    "r1 + accumulation": [R1, MICRO],
    "wgan-gp + accumulation": [WGAN_GP, MICRO],
    "lanes + mirror": [WGAN_GP, MICRO, "data.lanes=8", "data.mirror=true"],
    # The same groups of images at any world size: the reference has this micro_batch too.
    "local batchnorm": ["train.batchnorm=local", "train.micro_batch=5", "train.power_iterations=2"],
    "two d steps": [R1, "objective.discriminator_steps=2"],
    "attention + orthogonal": [
        "objective.orthogonal_weight=0.01", "model.attention_resolutions=[8]",
        "ema.start_images=80",
    ],
    "ada + r1": [R1, "augment={name: ada, initial: 0.5, every_images: 40, rampup_images: 1000}"],
    "bf16 + r1": [R1, "precision=bf16"],
    "fp16 + r1": [R1, "precision=fp16"],
    "r1 in a separate step": [
        "objective.penalties=[{name: r1, weight: 10.0, every: 2, separate_step: true}]"
    ],
    "growth": [
        "model={name: progan, resolution: 16, num_classes: 10, image_channels: 1, z_dim: 16, "
        "base_channels: 64, max_channels: 8}",
        "growth={start_resolution: 8, stable_images: 40, fade_images: 120}",
        "objective.loss=wasserstein", "objective.penalties=[{name: wgan_gp}]",
        "objective.drift_weight=0.001",
    ],
    "stylegan2": [
        "model={name: stylegan2, resolution: 16, num_classes: 10, image_channels: 1, z_dim: 16, "
        "w_dim: 16, channel_base: 128, max_channels: 8, mapping_layers: 2}",
        "objective.loss=non_saturating",
        "objective.penalties=[{name: r1, every: 2, separate_step: true}]",
        "objective.path_length={every: 2}",
    ],
    "r3gan": [
        R3GAN, "objective.loss=relativistic", "anneal_images=120",
        "optimizer.discriminator.beta2_end=0.9999",
        "objective.penalties=[{name: r1, weight: 1.0, weight_end: 0.1}, {name: r2, weight: 1.0}]",
    ],
    "vae": [
        # Two channels in each group of a normalization: with one, the gradients of biases before
        # it are rounding.
        "model={name: autoencoder, resolution: 16, num_classes: 10, conditional: true, "
        "image_channels: 1, z_dim: 8, channels: 16}",
        "objective={name: vae}", "optimizer={vae: {lr: 1.0e-3, beta1: 0.5}}",
    ],
    "wgan": [
        R3GAN, f"objective={{loss: wasserstein, weight_clip: {CLIP}, discriminator_steps: 2}}",
        "optimizer.generator={name: rmsprop, lr: 0.01, eps: 1.0e-3}",
        "optimizer.discriminator={name: rmsprop, lr: 0.01, eps: 1.0e-3}",
    ],
    "sgd + clip": [
        R1,
        "optimizer.generator={name: sgd, lr: 0.01, momentum: 0.9, clip_grad_norm: 0.01}",
        "optimizer.discriminator={name: sgd, lr: 0.01, momentum: 0.9, clip_grad_norm: 0.1}",
    ],
    "adamw + frozen layers": [
        R1,
        "optimizer.generator={name: adamw, lr: 1.0e-3, beta1: 0.5, weight_decay: 0.1}",
        "optimizer.discriminator={name: adamw, lr: 1.0e-3, beta1: 0.5, weight_decay: 0.1}",
        "trainable=['generator.blocks.1.*.weight', 'discriminator.blocks.*']",
    ],
}  # fmt: skip
# Optimizer state that the gradient of the first step is seen in: Adam, SGD, RMSprop.
MOMENTS = (".exp_avg", ".momentum_buffer", ".square_avg")
AFTER_FIRST = {"growth": 1}  # the step after which the engines have made one; else 0


def cell_config(digits: Path, place: Path, *overrides: str) -> RunConfig:
    where = [f"data.path={digits}", f"run_dir={place}"]
    return configs.load(RunConfig, SMOKE, [*where, *COMMON, *overrides])


def train_cell(config: RunConfig, cell: str) -> tuple[dict[str, float], list[str]]:
    """Three steps by the real trainer's parts; leaves checkpoints, returns losses and messages."""
    messages: list[str] = []
    engine = Engine(config, messages.append)
    engine.memory_format = torch.contiguous_format  # as in the sharding engines: the same kernels
    state = TrainState(config, engine, CLASSES)
    state.prepare()
    for scale in state.scales.values():
        # At the edge, half the images per process (their mean: twice the gradient) overflow first.
        scale.scale.fill_(256)
    saver = Saver(config.run_dir, state.world, keep=2, echo=print)
    streams = open_streams(state)
    for step in range(STEPS):
        state.advance(streams)
        if step in (AFTER_FIRST.get(cell, 0), STEPS - 1):
            saver.save(state.progress, state.shards())
        stage = state.stage
        enter_stage(state)
        if state.stage is not stage:  # new networks and engines, optimizers without state
            with streams:
                pass
            streams = open_streams(state)
            state.prepare()
    with streams:
        means, _ = state.statistics.collect()
    saver.finish()
    assert not saver.final_error(), saver.final_error()
    assert engine.halted_at() == -1
    state.close()
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
        if key.startswith(("networks/", "state/")) or key.endswith(".step"):
            state = max(state, (a[key] - tensor).abs().max().item())
    a, b = ours.tensors(0), reference.tensors(0)
    gradients = 0.0
    for network in {key.split("/")[1].partition(".")[0] for key in b if "optimizers/" in key}:
        keys = [k for k in b if k.startswith(f"optimizers/{network}.") and k.endswith(MOMENTS)]
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
            config = cell_config(digits, run_dir(folder, engine, cell), *overrides)
            losses[engine][cell], _ = train_cell(config, cell)
    last = Engine(config, print)
    if last.world.is_rank_0:
        (folder / "losses.json").write_text(json.dumps(losses))
    disconnect(last.world)


if __name__ == "__main__":
    main()

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
from bigan.run.state import Training
from bigan.run.streams import open_stream
from bigan.run.trainer import enter_stage
from bigan.run_config import RunConfig

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
    "r1 in its own step": ["penalties=[{name: r1, weight: 10.0, every: 2, own_step: true}]"],
    "growth": [
        "model={name: progan, resolution: 16, num_classes: 10, image_channels: 1, z_dim: 16, "
        "base_channels: 64, max_channels: 8}",
        "growth={start_resolution: 8, stable_images: 40, fade_images: 120}",
        "loss=wasserstein", "penalties=[{name: wgan_gp}]", "drift_weight=0.001",
    ],
    "stylegan2": [
        "model={name: stylegan2, resolution: 16, num_classes: 10, image_channels: 1, z_dim: 16, "
        "w_dim: 16, channel_base: 128, max_channels: 8, mapping_layers: 2}",
        "loss=non_saturating", "penalties=[{name: r1, every: 2, own_step: true}]",
        "path_length={every: 2}",
    ],
    "r3gan": [
        "model={name: r3gan, resolution: 16, num_classes: 10, conditional: true, "
        "image_channels: 1, z_dim: 16, widths: [16, 16, 8], group_size: 8, embedding_dim: 8}",
        "loss=relativistic", "anneal_images=120", "optimizer.d.beta2_end=0.9999",
        "penalties=[{name: r1, weight: 1.0, weight_end: 0.1}, {name: r2, weight: 1.0}]",
    ],
}  # fmt: skip
AFTER_FIRST = {"growth": 1}  # the step after which the engines have made one; else 0


def recipe(digits: Path, place: Path, *overrides: str) -> RunConfig:
    where = [f"data.path={digits}", f"run_dir={place}"]
    return configs.load(RunConfig, SMOKE, [*where, *COMMON, *overrides])


def train_cell(config: RunConfig, cell: str) -> tuple[dict[str, float], list[str]]:
    """Three steps by the real trainer's parts; leaves checkpoints, returns losses and messages."""
    messages: list[str] = []
    engine = Engine(config, messages.append)
    engine.memory_format = torch.contiguous_format  # as in the sharding engines: the same kernels
    training = Training(config, engine, CLASSES)
    training.prepare()
    for scale in training.scales.values():
        # At the edge, half the images per process (their mean: twice the gradient) overflow first.
        scale.scale.fill_(256)
    saver = Saver(config.run_dir, training.world, keep=2, echo=print)
    stream = open_stream(training)
    for step in range(STEPS):
        training.step(stream)
        if step in (AFTER_FIRST.get(cell, 0), STEPS - 1):
            saver.save(training.progress, training.shards())
        stage = training.stage
        enter_stage(training)
        if training.stage is not stage:  # new networks and engines, moments from zero
            stream.close()
            stream = open_stream(training)
            training.prepare()
    stream.close()
    means, _ = training.statistics.collect()
    saver.finish()
    assert not saver.final_error(), saver.final_error()
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
    if last.world.is_rank_0:
        (folder / "losses.json").write_text(json.dumps(losses))
    disconnect(last.world)


if __name__ == "__main__":
    main()

"""Progressive growing as a sequence of stages (Karras et al. 2018, arXiv:1710.10196).

A stage is a stretch of the run in which nothing about the networks changes but `alpha`. Its recipe
is complete: networks of its resolution, its images, batch and learning rate. A run that does not
grow is one stage. Whoever trains enters one stage after the other: new networks take over all
weights of the same name from the last ones, and Adam begins anew (the published code, too, resets
it at the start and at the end of each fade-in).

Stages follow from the recipe alone, so a resumed run finds itself where it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from bigan.run_config import GrowthConfig, LevelConfig, RunConfig, fades


@dataclass(frozen=True)
class Stage:
    """From `start` to before `end`, in real images; both are step boundaries."""

    index: int
    start: int
    end: float  # infinity: until the run ends
    config: RunConfig
    born: int = 0  # images_seen at which its newest layers began to learn

    @property
    def resolution(self) -> int:
        return self.config.model.resolution

    @property
    def fading(self) -> bool:
        """Whether its resolution fades in."""
        return fades(self.config)

    def alpha(self, images_seen: int) -> float:
        """Share of the new resolution in the step that begins at `images_seen`, 0 to 1."""
        if not self.fading:
            return 1.0
        return min(1.0, (images_seen - self.start) / (self.end - self.start))

    def __str__(self) -> str:
        return f"{self.resolution} px{', fading in' if self.fading else ''}"


def stages(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run, in order; the last one has no end."""
    growth = config.growth
    if growth is None:
        return (Stage(0, 0, math.inf, config),)
    found: list[Stage] = []
    resolution, start, nominal = growth.start_resolution, 0, 0
    while True:
        born = start
        for fading in (False,) if not found else (True, False):
            recipe = _at(config, growth, resolution, fading)
            nominal += growth.fade_images if fading else growth.stable_images
            step = recipe.train.batch * recipe.train.num_d_steps
            end = start + math.ceil((nominal - start) / step) * step
            last = resolution == config.model.resolution and not fading
            found.append(Stage(len(found), start, math.inf if last else end, recipe, born))
            start = end
        if last:
            return tuple(found)
        resolution *= 2


def grown(config: RunConfig) -> RunConfig:
    """The recipe of the last stage, which is one that does not grow."""
    return stages(config)[-1].config


def stage_at(stages: tuple[Stage, ...], images_seen: int) -> Stage:
    """The stage of the step that begins at `images_seen`."""
    return next(stage for stage in stages if images_seen < stage.end)


def _at(config: RunConfig, growth: GrowthConfig, resolution: int, fading: bool) -> RunConfig:
    """The recipe of one stage."""
    level = next(
        (level for level in growth.levels if level.resolution == resolution),
        LevelConfig(resolution=resolution),
    )
    train, optimizer = {}, {}
    if level.batch is not None:
        train = {"batch": level.batch, "micro_batch": level.micro_batch}
    elif level.micro_batch is not None:
        train = {"micro_batch": level.micro_batch}
    if level.lr is not None:
        optimizer = {
            name: getattr(config.optimizer, name).model_copy(update={"lr": level.lr})
            for name in ("g", "d")
        }
    return config.model_copy(
        update={
            "growth": None,
            "model": config.model.model_copy(update={"resolution": resolution, "fading": fading}),
            "train": config.train.model_copy(update=train),
            "optimizer": config.optimizer.model_copy(update=optimizer),
        }
    )


@torch.no_grad()
def inherit(new: nn.Module, former: nn.Module) -> None:
    """Copy every weight and buffer of the same name and shape, in place; alpha stays `new`'s."""
    known = former.state_dict()
    for name, tensor in new.state_dict().items():
        if name != "alpha" and name in known and known[name].shape == tensor.shape:
            tensor.copy_(known[name])


@torch.no_grad()
def set_alpha(network: nn.Module, alpha: float) -> None:
    """What `network` is to show of its new resolution, in place; it keeps its compiled graph."""
    network.get_buffer("alpha").fill_(alpha)

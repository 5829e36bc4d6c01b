"""Progressive growing as a sequence of stages (Karras et al. 2018, arXiv:1710.10196).

Within a stage only `alpha` changes the networks. At a stage boundary new networks inherit all
weights of the same name and shape, and the optimizers start from zero state, as in the published
code at the start and at the end of each fade-in. Stages are a function of the config, so a resumed
run finds its stage from `images_seen`.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import nn

from bigan.config import Frozen, Positive
from bigan.image_size import ImageSize, Resolution, plain, sizes_up_to


class LevelConfig(Frozen):
    """Settings of one resolution of a growing model; None: as in `train` and `optimizer`.

    With a `batch` and no `micro_batch`, there is no gradient accumulation.
    """

    resolution: Resolution
    batch: Positive | None = None
    micro_batch: Positive | None = None
    lr: Annotated[float, Field(gt=0)] | None = None  # of all phases


class GrowthConfig(Frozen):
    """Progressive growing: the resolution doubles up to that of the model.

    The start is a resolution of the model, halved a number of times; 4 stands for the smallest one,
    also where that is larger (6 px of a model of 96 px). Lengths are in real images. A resolution
    fades in over `fade_images`, then stays for `stable_images`; the last one stays until
    `train.total_images`.
    """

    start_resolution: Resolution = 4
    stable_images: Positive = 600_000
    fade_images: Positive = 600_000
    levels: tuple[LevelConfig, ...] = ()

    def sizes(self, resolution: ImageSize) -> list[ImageSize]:
        """The resolutions of a model that grows to `resolution`, smallest first."""
        possible = sizes_up_to(resolution)
        if self.start_resolution == 4:
            return possible
        return possible[possible.index(self.start_resolution) :]

    def level(self, resolution: ImageSize) -> LevelConfig:
        """Settings of a resolution."""
        found = (level for level in self.levels if level.resolution == resolution)
        return next(found, LevelConfig(resolution=resolution))

    def check(self, resolution: ImageSize) -> None:
        """Raises ValueError unless a model of `resolution` can grow like this."""
        *smaller, _ = sizes_up_to(resolution)
        if not smaller:
            raise ValueError(
                f"growth: model.resolution = {plain(resolution)} has no smaller resolution; leave "
                "growth out"
            )
        if self.start_resolution not in (4, *smaller):
            raise ValueError(
                f"growth.start_resolution = {plain(self.start_resolution)}: use one of "
                f"{', '.join(map(str, map(plain, smaller)))}, below model.resolution = "
                f"{plain(resolution)}"
            )
        possible, named = self.sizes(resolution), [level.resolution for level in self.levels]
        for size in named:
            if size not in possible:
                raise ValueError(
                    f"growth.levels: {plain(size)} is none of the resolutions "
                    f"{', '.join(map(str, map(plain, possible)))}"
                )
        if len(set(named)) != len(named):
            raise ValueError("growth.levels: each resolution may be given once")


class Span(NamedTuple):
    """A stage: from `start` to before `end`, in real images; both are step boundaries."""

    resolution: ImageSize
    fading: bool
    start: int
    end: float  # infinity: until the run ends
    born: int  # images_seen at which its newest layers were added


def spans(
    growth: GrowthConfig, resolution: ImageSize, step_images: dict[ImageSize, int]
) -> list[Span]:
    """The stages up to `resolution`; `step_images`: resolution -> images per training step.

    A stage ends with the step in which its length is reached.
    """
    found: list[Span] = []
    start, nominal = 0, 0
    for size in growth.sizes(resolution):
        born = start
        for fading in (True, False) if found else (False,):
            nominal += growth.fade_images if fading else growth.stable_images
            step = step_images[size]
            end = start + math.ceil((nominal - start) / step) * step
            last = size == resolution and not fading
            found.append(Span(size, fading, start, math.inf if last else end, born))
            start = end
    return found


@torch.no_grad()
def inherit(new: nn.Module, former: nn.Module) -> None:
    """Copy every weight and buffer of the same name and shape, in place, except `alpha`."""
    known = former.state_dict()
    for name, tensor in new.state_dict().items():
        if name != "alpha" and name in known and known[name].shape == tensor.shape:
            tensor.copy_(known[name])


@torch.no_grad()
def set_alpha(network: nn.Module, alpha: float) -> None:
    """Set the weight of the new resolution in place, so that the compiled graph stays valid."""
    network.get_buffer("alpha").fill_(alpha)

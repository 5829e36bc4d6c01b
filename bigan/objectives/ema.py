"""Exponential moving averages (EMA) of networks: half-life in images, ramp-up, start."""

from __future__ import annotations

import copy
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from bigan.config import Frozen
from bigan.schedules import annealed, ema_decay


class EmaConfig(Frozen):
    """EMA of the networks that generate samples, for example `generator_ema`."""

    halflife_images: Annotated[float, Field(gt=0)]
    rampup: Annotated[float, Field(gt=0)] | None = None  # half-life <= rampup * images_seen
    start_images: Annotated[int, Field(ge=0)] = 0  # until then a copy of the network (BigGAN)
    # Reached along half a cosine over `anneal_images`.
    halflife_end_images: Annotated[float, Field(gt=0)] | None = None


def ema_copy(network: nn.Module) -> nn.Module:
    """A frozen copy of `network` in evaluation mode, from which the EMA starts."""
    return copy.deepcopy(network).eval().requires_grad_(False)


@torch.no_grad()
def update(
    average: nn.Module,
    network: nn.Module,
    config: EmaConfig,
    images_seen: int,
    step_images: int,
    anneal_images: int | None = None,
    born: int = 0,
) -> None:
    """Move `average` towards `network` in place; call once per training step.

    The ramp-up counts from `born`, at which the newest layers of a growing network were added:
    otherwise their random initial values would stay in the EMA for long.

    Parameters are averaged. Buffers of the same name (singular vectors) are copied: the mean of
    unit vectors is not a unit vector. Copied BatchNorm statistics are not used: standing statistics
    of the EMA are collected for every snapshot.
    """
    halflife = annealed(
        images_seen, config.halflife_images, config.halflife_end_images, anneal_images
    )
    decay = ema_decay(images_seen, step_images, halflife, config.rampup, config.start_images, born)
    averaged: list[Tensor] = list(average.parameters())
    current: list[Tensor] = list(network.parameters())
    torch._foreach_lerp_(averaged, current, 1.0 - decay)
    for mine, live in zip(average.buffers(), network.buffers(), strict=True):
        mine.copy_(live)

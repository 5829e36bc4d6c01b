"""The averaged generator: half-life in images, ramp-up, hard copy until its start."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bigan.run_config import EmaConfig
from bigan.schedules import annealed, ema_decay


def averaged_copy(generator: nn.Module) -> nn.Module:
    """A frozen copy of `generator`, the starting point of the average."""
    return copy.deepcopy(generator).eval().requires_grad_(False)


@torch.no_grad()
def update(
    average: nn.Module,
    generator: nn.Module,
    config: EmaConfig,
    images_seen: int,
    step_images: int,
    anneal_images: int | None = None,
    born: int = 0,
) -> None:
    """Move `average` towards `generator` in place; call once per generator step.

    The ramp-up counts from `born`, where the network's newest layers began to learn: their first
    values are noise, and would stay in the average for long.

    Parameters are averaged. Buffers of the same name (singular vectors) are copied: averaging
    unit vectors would not give unit vectors. The average's own standing statistics are collected
    anew for every snapshot, so what is copied over them does not matter.
    """
    halflife = annealed(
        images_seen, config.halflife_images, config.halflife_end_images, anneal_images
    )
    decay = ema_decay(images_seen, step_images, halflife, config.rampup, config.start_images, born)
    averaged: list[Tensor] = list(average.parameters())
    current: list[Tensor] = list(generator.parameters())
    torch._foreach_lerp_(averaged, current, 1.0 - decay)
    for mine, live in zip(average.buffers(), generator.buffers(), strict=True):
        mine.copy_(live)

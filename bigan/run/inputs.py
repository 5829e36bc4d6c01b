"""Draws of an optimizer step: which of their rows belong to a micro-batch of this rank."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigan import rng
from bigan.distributed.world import World
from bigan.objectives.base import Step, Tensors
from bigan.run_config import IMAGES

Rows = slice | Tensor  # of draws for all images of an optimizer step


def rows_in_order(world: World, num: int, accumulation: int) -> list[Rows]:
    """This rank's slice of each of `accumulation` micro-batches of `num` images."""
    each = num // accumulation
    share = world.share(each)
    starts = range(0, accumulation * each, each)
    return [slice(start + share.start, start + share.stop) for start in starts]


def rows_at(positions: NDArray[np.int64], start: int) -> Tensor:
    """The rows of the images at `positions` [m] of a stream whose batch begins at `start`.

    The draws of an image thus depend on its position, not on the rank that reads it.
    """
    return torch.from_numpy(positions - start)


def taken(draws: Tensors, rows: Rows) -> Tensors:
    """The rows of each draw."""
    return {name: tensor[rows] for name, tensor in draws.items()}


def mirror(seed: int, stream: str, step: Step) -> Tensors:
    """Which images of a batch of a stream are flipped horizontally: bool [num_images]."""
    key = "d/mirror" if stream == IMAGES else f"{stream}/mirror"
    return {"mirror": rng.uniform(seed, key, step.at, (step.num_images,)) < 0.5}

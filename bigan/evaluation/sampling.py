"""Images from a generator for evaluation: the same ones on any number of processes.

Latents and labels are drawn block by block from (seed, stream, block number), so which rank makes
a block does not matter. The law of the labels is that of the data set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bigan import models, rng
from bigan.errors import RunError
from bigan.recipe import RunConfig
from bigan.world import World

QUANTISATION = "clamp(round(127.5 x + 127.5), 0, 255)"


def latents(
    seed: int, stream: str, counter: int, shape: Sequence[int], truncation: float | None
) -> Tensor:
    """Standard normal float32 z of `shape`; values with |z| > truncation are drawn again.

    That is BigGAN's truncation trick (Brock et al. 2019, sec. 3.1); with None nothing is redrawn.
    """
    generator = rng.numpy_generator(seed, stream, counter)
    z = generator.standard_normal(shape, dtype=np.float32)
    if truncation is not None:
        while (outside := np.abs(z) > truncation).any():
            z[outside] = generator.standard_normal(int(outside.sum()), dtype=np.float32)
    return torch.from_numpy(z)


@torch.no_grad()
def generate(
    generator: nn.Module,
    config: RunConfig,
    class_counts: Sequence[int],
    world: World,
    device: torch.device | str | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """This rank's part of `evaluation.num_samples` images: (position of the first, images).

    Images are uint8 [m, C, R, R] on `device` (default: the world's), m = `evaluation.batch` but
    for the last block; block b belongs to rank b modulo the world's size. The generator must be
    in evaluation mode. Raises `RunError` if it returns values that are not finite.
    """
    if generator.training:
        raise ValueError("the generator must be in evaluation mode (standing statistics)")
    device = world.device if device is None else torch.device(device)
    settings, batch = config.evaluation, config.evaluation.batch
    num_blocks = -(-settings.num_samples // batch)
    for block in range(world.rank, num_blocks, world.size):
        start = block * batch
        shape = (batch, config.model.z_dim)
        z = latents(settings.seed, "evaluation/z", block, shape, settings.truncation)
        labels = rng.labels(settings.seed, "evaluation/labels", block, batch, class_counts)
        num = min(batch, settings.num_samples - start)
        images = generator(z[:num].to(device), labels[:num].to(device))
        if not bool(images.isfinite().all()):
            raise RunError("the generator's images are not finite: nothing can be measured")
        yield start, models.to_uint8(images)

"""Images from a generator for evaluation: the same ones on any number of processes.

Latents and labels are drawn block by block from (seed, stream, block number), so which rank makes
a block does not matter. The law of the labels is that of the data set.

Truncation buys fidelity with variety. For most generators it bounds z (Brock et al. 2019, section
3.1); for one with a mean latent it is psi (Karras et al. 2019, appendix B), its own network's part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bigan import models, rng
from bigan.distributed.world import World, on_all_ranks, sum_over_ranks
from bigan.errors import RunError
from bigan.layers.batchnorm import collecting_statistics, normalisation_layers
from bigan.layers.mapping import has_latent_average
from bigan.run_config import RunConfig

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


def applied(generator: nn.Module, truncation: float | None) -> tuple[float | None, dict[str, Any]]:
    """What `truncation` means: (bound on |z| or None, arguments of the generator's forward)."""
    if truncation is not None and has_latent_average(generator):
        return None, {"truncation_psi": truncation}
    return truncation, {}


def standing_batch(config: RunConfig) -> int:
    """Images that BatchNorm sees at a time when statistics are accumulated for a truncation."""
    return config.evaluation.standing_batch or config.train.micro_batch or config.train.batch


def accumulate_statistics(
    generator: nn.Module,
    config: RunConfig,
    class_counts: Sequence[int],
    images_seen: int,
    world: World,
    device: torch.device,
) -> None:
    """Replace the standing BatchNorm statistics by those of `evaluation.truncation`, in place.

    The activations of truncated latents have other means and variances, so the statistics of one
    truncation do not serve another (Brock et al. 2019). The draws are those behind the snapshot,
    drawn again where they lie outside. All ranks take part, each with whole batches: how many
    there are does not matter. Nothing happens without BatchNorm.
    """
    if not normalisation_layers(generator):
        return
    train, num = config.train, standing_batch(config)
    bound, arguments = applied(generator, config.evaluation.truncation)

    def own_part() -> None:
        for index in range(world.rank, train.standing_batches, world.size):
            stream = f"standing/{index}"  # as in training
            shape = (num, config.model.z_dim)
            z = latents(train.seed, f"{stream}/z", images_seen, shape, bound)
            labels = rng.labels(train.seed, f"{stream}/labels", images_seen, num, class_counts)
            generator(z.to(device), labels.to(device), **arguments)

    with collecting_statistics(generator, partial(sum_over_ranks, world)):
        on_all_ranks(world, own_part)


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
    bound, arguments = applied(generator, settings.truncation)
    for block in range(world.rank, num_blocks, world.size):
        start = block * batch
        shape = (batch, config.model.z_dim)
        z = latents(settings.seed, "evaluation/z", block, shape, bound)
        labels = rng.labels(settings.seed, "evaluation/labels", block, batch, class_counts)
        num = min(batch, settings.num_samples - start)
        images = generator(z[:num].to(device), labels[:num].to(device), **arguments)
        if not bool(images.isfinite().all()):
            raise RunError("the generator's images are not finite: nothing can be measured")
        yield start, models.to_uint8(images)

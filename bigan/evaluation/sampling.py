"""Images of a sampler for evaluation: the same ones on any number of processes.

Random inputs are drawn block by block from (seed, stream, block number), so it does not matter
which rank samples a block. Labels follow the class frequencies of the data set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from bigan import models
from bigan.data.format.manifest import Manifest
from bigan.data.streaming.stream import sequential
from bigan.distributed.world import World, on_all_ranks, sum_over_ranks
from bigan.errors import RunError
from bigan.layers.batchnorm import collecting_statistics, normalisation_layers
from bigan.objectives.samplers import Sampler
from bigan.run_config import EvaluationConfig, RunConfig, TrainConfig

QUANTISATION = "clamp(round(127.5 x + 127.5), 0, 255)"
Networks = Mapping[str, nn.Module]


def standing_batch(config: RunConfig) -> int:
    """Images that BatchNorm sees at a time when statistics are accumulated for a truncation."""
    return config.evaluation.standing_batch or config.train.micro_batch or config.train.batch


def has_batchnorm(networks: Networks) -> bool:
    """Whether any of the networks has BatchNorm layers."""
    return any(normalisation_layers(network) for network in networks.values())


def accumulate_statistics(
    networks: Networks,
    sampler: Sampler,
    train: TrainConfig,
    images_seen: int,
    truncation: float | None,
    batch: int,
    world: World,
) -> None:
    """Replace the standing BatchNorm statistics by those of a truncation, in place.

    The activations of truncated latents have other means and variances, so the statistics of one
    truncation do not serve another (Brock et al. 2019). The draws are those of the snapshot,
    truncated. All ranks take part, each with complete batches of `batch` images: how many there
    are does not matter. Without BatchNorm nothing happens.
    """
    if not has_batchnorm(networks):
        return

    def own_part() -> None:
        for index in range(world.rank, train.standing_batches, world.size):
            stream = f"standing/{index}"  # as in training
            draws = sampler.draws(train.seed, stream, images_seen, batch, truncation)
            sampler(networks, _on(world.device, draws))

    normalizing = nn.ModuleList(n for n in networks.values() if normalisation_layers(n))
    with collecting_statistics(normalizing, partial(sum_over_ranks, world)):
        on_all_ranks(world, own_part)


@torch.no_grad()
def generate(
    networks: Networks,
    sampler: Sampler,
    settings: EvaluationConfig,
    truncation: float | None,
    world: World,
    device: torch.device,
    inputs: Manifest | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """This rank's part of `settings.num_samples` images: (position of the first, images).

    Images are uint8 [m, C, R, R] on `device`, m = `settings.batch` but for the last block; block b
    belongs to rank b modulo the world size. A sampler with an input stream gets the images of
    `inputs`, in the order of `settings.split`. The networks must be in evaluation mode. Raises
    `RunError` if an image is not finite.
    """
    if any(network.training for network in networks.values()):
        raise ValueError("the networks must be in evaluation mode (standing statistics)")
    for start, tensors in _inputs(sampler, settings, truncation, world, inputs):
        images = sampler(networks, _on(device, tensors))
        if not bool(images.isfinite().all()):
            raise RunError("the sampled images are not finite: nothing can be measured")
        yield start, models.to_uint8(images)


def _inputs(
    sampler: Sampler,
    settings: EvaluationConfig,
    truncation: float | None,
    world: World,
    manifest: Manifest | None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(position of the first image, inputs of a block) of this rank's blocks."""
    seed, batch, total = settings.seed, settings.batch, settings.num_samples
    if sampler.inputs is None or manifest is None:
        for block in range(world.rank, -(-total // batch), world.size):
            start = block * batch
            num = min(batch, total - start)
            draws = sampler.draws(seed, "evaluation", block, batch, truncation)
            yield start, {key: tensor[:num] for key, tensor in draws.items()}
        return
    for images in sequential(manifest, settings.split, world, batch):
        start = int(images.positions[0])
        num = min(len(images.labels), total - start)
        if num <= 0:
            continue
        draws = sampler.draws(seed, "evaluation", start, num, truncation)
        yield (
            start,
            draws
            | {
                f"{sampler.inputs}.pixels": images.pixels[:num],
                f"{sampler.inputs}.labels": images.labels[:num],
            },
        )


def _on(device: torch.device, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.to(device) for key, tensor in tensors.items()}

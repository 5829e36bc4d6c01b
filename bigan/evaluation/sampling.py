"""Images of a sampler for evaluation, identical for any number of processes.

Random inputs are drawn in blocks of `evaluation.batch` images from (seed, stream, block number),
so an image does not depend on the rank that samples it. Labels follow the class frequencies of the
data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from bigan import models
from bigan.data.format.manifest import Manifest
from bigan.data.settings import Fetch
from bigan.data.streaming.stream import sequential
from bigan.distributed.world import World, on_all_ranks, sum_over_ranks
from bigan.errors import RunError
from bigan.layers.batchnorm import collecting_statistics, normalization_layers
from bigan.objectives.samplers import Sampler, Tensors
from bigan.run_config import EvaluationConfig, RunConfig, TrainConfig

QUANTIZATION = "clamp(round(127.5 x + 127.5), 0, 255)"
Networks = Mapping[str, nn.Module]


def standing_batch(config: RunConfig) -> int:
    """Images per forward when BatchNorm statistics of truncated latents are accumulated."""
    return config.evaluation.standing_batch or config.train.micro_batch or config.train.batch


def has_batchnorm(networks: Networks) -> bool:
    """Whether any of the networks has BatchNorm layers."""
    return any(normalization_layers(network) for network in networks.values())


def accumulate_statistics(
    networks: Networks,
    sampler: Sampler,
    train: TrainConfig,
    images_seen: int,
    truncation: float | None,
    batch: int,
    world: World,
) -> None:
    """Replace the standing BatchNorm statistics by those of truncated latents, in place.

    Activations of truncated latents have other means and variances, so each truncation needs its
    own statistics (Brock et al. 2019, arXiv:1809.11096). The latents are those of the
    snapshot's statistics, truncated, in `train.standing_batches` batches of `batch` images. Every
    batch is computed by one rank, so the result does not depend on the number of ranks. All ranks
    call it. Networks without BatchNorm are left as they are.
    """
    normalizing = [n for n in networks.values() if normalization_layers(n)]
    if not normalizing:
        return

    def local_batches() -> None:
        for index in range(world.rank, train.standing_batches, world.size):
            stream = f"standing/{index}"  # as in training
            draws = sampler.draws(train.seed, stream, images_seen, batch, truncation)
            sampler(networks, _to(world.device, draws))

    # In evaluation mode, which is what `collecting_statistics` restores.
    with collecting_statistics(nn.ModuleList(normalizing).eval(), partial(sum_over_ranks, world)):
        on_all_ranks(world, local_batches)


@torch.no_grad()
def generate(
    networks: Networks,
    sampler: Sampler,
    settings: EvaluationConfig,
    truncation: float | None,
    world: World,
    device: torch.device,
    inputs: Manifest | None = None,
    fetch: Fetch | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """This rank's part of `settings.num_samples` images: (position of the first, images).

    Images are uint8 [m, C, H, W] on `device`, m <= `settings.batch`. For a sampler with an input
    stream, `inputs` is its manifest: image i is made from image i of `settings.split`, and each
    rank has a contiguous part. Otherwise rank r has the blocks r, r + world size, ...

    Raises ValueError unless the networks are in evaluation mode, `RunError` for an image that is
    not finite.
    """
    if any(network.training for network in networks.values()):
        raise ValueError("the networks must be in evaluation mode (standing statistics)")
    if sampler.inputs is None:
        blocks = _latents(sampler, settings, truncation, world)
    elif inputs is not None:
        blocks = _translations(sampler, settings, truncation, world, inputs, fetch)
    else:
        raise ValueError(f"the sampler needs the manifest of stream {sampler.inputs}")
    for start, tensors in blocks:
        images = sampler(networks, _to(device, tensors))
        if not bool(images.isfinite().all()):
            raise RunError("a generated image is not finite; metrics cannot be computed")
        yield start, models.to_uint8(images)


def draws_at(
    sampler: Sampler, settings: EvaluationConfig, truncation: float | None, start: int, num: int
) -> Tensors:
    """Random inputs of the images start ... start + num, whatever blocks they lie in."""
    batch, end = settings.batch, start + num
    parts = []
    for block in range(start // batch, -(-end // batch)):
        draws = sampler.draws(settings.seed, "evaluation", block, batch, truncation)
        first = block * batch
        span = slice(max(start - first, 0), min(end - first, batch))
        parts.append({key: tensor[span] for key, tensor in draws.items()})
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _latents(
    sampler: Sampler, settings: EvaluationConfig, truncation: float | None, world: World
) -> Iterator[tuple[int, Tensors]]:
    """(position of the first image, inputs) of this rank's blocks of random inputs."""
    batch, total = settings.batch, settings.num_samples
    for start in range(world.rank * batch, total, world.size * batch):
        num = min(batch, total - start)
        yield start, draws_at(sampler, settings, truncation, start, num)


def _translations(
    sampler: Sampler,
    settings: EvaluationConfig,
    truncation: float | None,
    world: World,
    manifest: Manifest,
    fetch: Fetch | None,
) -> Iterator[tuple[int, Tensors]]:
    """(position of the first image, inputs) of this rank's images of the input stream."""
    total = settings.num_samples
    for images in sequential(manifest, settings.split, world, settings.batch, fetch):
        start = int(images.positions[0])
        num = min(len(images.labels), total - start)
        if num <= 0:
            return
        pixels = {
            f"{sampler.inputs}.pixels": images.pixels[:num],
            f"{sampler.inputs}.labels": images.labels[:num],
        }
        yield start, draws_at(sampler, settings, truncation, start, num) | pixels


def _to(device: torch.device, tensors: Tensors) -> Tensors:
    return {key: tensor.to(device) for key, tensor in tensors.items()}

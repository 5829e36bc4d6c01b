"""Standing BatchNorm statistics of the networks that a snapshot stores."""

from __future__ import annotations

from functools import partial

from torch import nn

from bigan.distributed.world import sum_over_ranks
from bigan.layers.batchnorm import collecting_statistics, normalization_layers
from bigan.run.state import TrainState
from bigan.run_config import batchnorm_images


def collect_standing_statistics(state: TrainState) -> None:
    """Accumulate the BatchNorm statistics of the EMAs over new samples; all ranks take part.

    Brock et al. 2019, section 4.1, "standing statistics": statistics of training batches belong to
    the weights of the network, not of its EMA. As in training, a forward has the joined micro-batch
    of all ranks, or with `train.batchnorm` local a micro-batch of one rank. The number of forwards
    is the same at any world size.
    """
    train, seen, world = state.config.train, state.progress.images_seen, state.world
    num, indices = batchnorm_images(train, world.size), range(train.standing_batches)
    if train.batchnorm == "local":
        share, indices = slice(num), indices[world.rank :: world.size]
    else:
        share = world.share(num)
    for sampler in state.objective.samplers.values():
        networks = state.sampling_networks(sampler)
        normalizing = nn.ModuleList(n for n in networks.values() if normalization_layers(n))
        if sampler.inputs is not None or not len(normalizing):
            continue
        with collecting_statistics(normalizing, partial(sum_over_ranks, world)):
            for index in indices:
                draws = sampler.draws(train.seed, f"standing/{index}", seen, num, None)
                mine = {k: t[share].to(world.device) for k, t in draws.items()}
                sampler(networks, mine)

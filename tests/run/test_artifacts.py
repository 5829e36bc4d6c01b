"""What a run writes at its ticks leaves the networks as they were."""

from __future__ import annotations

from collections.abc import Callable

from parts import make
from torch import nn

from bigan.layers.batchnorm import normalization_layers
from bigan.run.artifacts import Artifacts
from bigan.run.standing_statistics import collect_standing_statistics
from bigan.run_config import RunConfig


def in_training(network: nn.Module) -> set[bool]:
    return {module.training for module in network.modules()}


def test_sampling_networks_stay_in_evaluation_mode(make_config: Callable[..., RunConfig]) -> None:
    """In training mode rank 0 would reduce BatchNorm's statistics over ranks, alone, for a grid."""
    state, streams = make(make_config())
    artifacts = Artifacts(state, None)
    average = state.averages["generator"]
    assert normalization_layers(average)
    with streams:
        collect_standing_statistics(state)
        assert in_training(average) == {False}
        artifacts.snapshot()
        assert in_training(average) == {False}
    for network in state.networks.values():
        assert in_training(network) == {True}
    state.close()

"""Is a checkpoint of this model? From headers only; then fill the networks."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from bigan.checkpoint.progress import CheckpointError, deletion_hint
from bigan.checkpoint.reader import Reader

Shapes = dict[str, tuple[int, ...]]


def check_fit(reader: Reader, networks: Mapping[str, nn.Module], trained: Collection[str]) -> None:
    """Every network tensor must be there in its shape, and Adam's state of the `trained` ones.

    Raises `CheckpointError`; reads headers only and changes nothing.
    """
    shapes = reader.shapes()
    for name, network in networks.items():
        expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        found = _below(shapes, f"networks/{name}.")
        if found != expected:
            key = next(k for k in [*expected, *found] if expected.get(k) != found.get(k))
            raise CheckpointError(
                f"{reader.folder}: checkpoint of another model: {name}.{key} is "
                f"{found.get(key, 'absent')} there and {expected.get(key, 'absent')} in the "
                "config; use another run_dir, or that model"
            )
    for name in trained:
        expected = {}
        for key, parameter in networks[name].named_parameters():
            shape = tuple(parameter.shape)
            expected |= {f"{key}.step": (), f"{key}.exp_avg": shape, f"{key}.exp_avg_sq": shape}
        if _below(shapes, f"optimizers/{name}.") != expected:
            raise CheckpointError(
                f"{reader.folder}: the optimiser state of {name} is not that of this model; "
                f"{deletion_hint(reader.folder)}"
            )


def load_networks(reader: Reader, networks: Mapping[str, nn.Module]) -> None:
    """Fill the networks, one at a time; call after `check_fit`."""
    for name, network in networks.items():
        state = {key: reader.read(f"networks/{name}.{key}") for key in network.state_dict()}
        network.load_state_dict(state)


def _below(shapes: Shapes, prefix: str) -> Shapes:
    return {k.removeprefix(prefix): s for k, s in shapes.items() if k.startswith(prefix)}

"""Check from the headers that a checkpoint fits the networks of a run, and load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from bigan.checkpoint.progress import CheckpointError
from bigan.checkpoint.reader import Reader

Shapes = dict[str, tuple[int, ...]]
Modules = Mapping[str, nn.Module]


def check_fit(reader: Reader, networks: Modules, state: Modules) -> None:
    """Check that the checkpoint has every tensor of the networks and state, in its shape.

    Raises `CheckpointError` if not; reads headers only and changes nothing.
    """
    shapes = reader.shapes()
    for group, modules in (("networks", networks), ("state", state)):
        for name, module in modules.items():
            expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
            found = _below(shapes, f"{group}/{name}.")
            if found != expected:
                key = next(k for k in [*expected, *found] if expected.get(k) != found.get(k))
                raise CheckpointError(
                    f"{reader.folder}: checkpoint of another model: {name}.{key} is "
                    f"{found.get(key, 'absent')} there and {expected.get(key, 'absent')} in the "
                    "config; use another run_dir, or that model"
                )


def load(reader: Reader, networks: Modules, state: Modules) -> None:
    """Fill the modules, one at a time; call after `check_fit`."""
    for group, modules in (("networks", networks), ("state", state)):
        for name, module in modules.items():
            tensors = {key: reader.read(f"{group}/{name}.{key}") for key in module.state_dict()}
            module.load_state_dict(tensors)


def optimizer_shapes(
    reader: Reader, parameters: Sequence[str], required: bool = False
) -> dict[str, Shapes]:
    """Parameter ("generator.linear.weight") -> optimizer state in the checkpoint, name -> shape.

    Raises `CheckpointError` unless all parameters have the same state, each tensor of it a scalar
    or of the parameter's shape; also if there is none although it is `required`.
    """
    shapes = reader.shapes()
    stored: dict[str, Shapes] = {name: {} for name in parameters}
    for key, shape in shapes.items():
        name, _, state = key.removeprefix("optimizers/").rpartition(".")
        if key.startswith("optimizers/") and name in stored:
            stored[name][state] = shape
    for name, found in stored.items():
        wrong = [s for s, shape in found.items() if shape not in ((), shapes[f"networks/{name}"])]
        missing = required and not found
        if wrong or missing or found.keys() != stored[parameters[0]].keys():
            raise CheckpointError(
                f"{reader.folder}: the optimizer state of {name} ({', '.join(found) or 'none'}) is "
                "not that of this run; use another run_dir, or those settings of the optimizer"
            )
    return stored


def _below(shapes: Shapes, prefix: str) -> Shapes:
    return {k.removeprefix(prefix): s for k, s in shapes.items() if k.startswith(prefix)}

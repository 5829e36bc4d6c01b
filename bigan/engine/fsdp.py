"""FSDP2 (`fully_shard`): every rank holds a slice of each parameter, gradient and optimizer state.

The phase is one unit that is gathered before the forward and resharded after the backward.
Resharding layer by layer would free weights that the second backward of a gradient penalty still
needs; so memory is saved between the steps and in the optimizer, not within a backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from bigan.checkpoint import TensorShard
from bigan.distributed.world import World
from bigan.engine.unit import Unit
from bigan.engine.wrapped import Networks, NewOptimizer, ReadRange, StateShapes
from bigan.objectives.base import Phase, Result, Tensors, Terms


class _Slice(NamedTuple):
    """This rank's rows of one parameter."""

    name: str  # of the parameter in the phase
    shape: tuple[int, ...]  # of the unsharded parameter
    start: int  # first element of the slice in the flattened parameter
    values: nn.Parameter  # what the optimizer updates: the memory that FSDP gathers from
    gathered: nn.Parameter | None  # FSDP's parameter, which receives the gradient; None: a scalar


class FullySharded:
    """A phase under FSDP2, each trainable parameter sharded along its first axis.

    The optimizer gets the slices as plain tensors. FSDP2 does not support scalars (the gain of an
    attention layer): all ranks hold them, rank 0's optimizer updates them, and rank 0 broadcasts
    them. Parameters that are not trained stay unsharded. Weights must be final when this is built;
    they are row-major from then on.
    """

    sharded = True

    def __init__(
        self,
        phase: Phase,
        trainable: tuple[str, ...],
        new_optimizer: NewOptimizer,
        world: World,
    ) -> None:
        self.phase, self.trainable = phase, trainable
        phase.to(memory_format=torch.contiguous_format)  # FSDP2 requires it
        self._world = world
        parameters = dict(phase.named_parameters())
        for name in trainable:
            parameters[name].requires_grad_(True)
        self._named = [(name, tuple(parameters[name].shape)) for name in trainable]
        self._scalars = [parameters[name] for name in trainable if parameters[name].ndim == 0]
        kept = set(self._scalars) | {p for n, p in parameters.items() if n not in trainable}
        mesh = init_device_mesh(world.device.type, (world.size,))
        unit = Unit(phase)
        fully_shard(unit, mesh=mesh, ignored_params=kept)
        assert isinstance(unit, FSDPModule)
        self._unit, self._call = unit, unit.__call__
        # Micro-batches share one gathering; `step` and the end of `unsharded` undo it.
        unit.set_reshard_after_backward(False)
        self._sharded = [p for p in phase.parameters() if isinstance(p, DTensor)]
        self._slices = list(self._own_slices())
        self.optimizer = new_optimizer(s.values for s in self._slices)
        self._uses = 0  # of `unsharded`, nested

    def _own_slices(self) -> Iterator[_Slice]:
        parameters = dict(self.phase.named_parameters())
        for name, shape in self._named:
            parameter = parameters[name]
            if isinstance(parameter, DTensor):
                rows = -(-shape[0] // self._world.size)  # of all ranks but the last ones
                first = min(self._world.rank * rows, shape[0])
                start = first * (parameter.numel() // shape[0])
                local = nn.Parameter(parameter.to_local().detach())
                yield _Slice(name, shape, start, local, parameter)
            elif self._world.is_rank_0:
                yield _Slice(name, shape, 0, parameter, None)

    def __call__(self, networks: Networks, inputs: Tensors, terms: Terms) -> Result:
        result: Result = self._call(networks, inputs, terms)
        return result

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self._unit.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in [*self._sharded, *self._scalars]:
            parameter.grad = None

    def step(self) -> None:
        """The optimizer's step; the parameters are sharded afterwards."""
        self._unit.reshard()  # otherwise the next all-gather would keep the old weights
        for part in self._slices:
            if part.gathered is not None:
                gradient = part.gathered.grad
                part.values.grad = gradient.to_local() if isinstance(gradient, DTensor) else None
        self._average_scalar_gradients()
        self.optimizer.step()
        self._broadcast_scalars()

    def _average_scalar_gradients(self) -> None:
        if self._scalars and self._world.size > 1:
            joined = torch.stack([_gradient(p) for p in self._scalars]) / self._world.size
            dist.all_reduce(joined)
            for parameter, gradient in zip(self._scalars, joined, strict=True):
                parameter.grad = gradient

    @torch.no_grad()
    def _broadcast_scalars(self) -> None:
        if self._scalars and self._world.size > 1:
            joined = torch.stack([p.detach() for p in self._scalars])
            dist.broadcast(joined, src=0)
            for parameter, value in zip(self._scalars, joined, strict=True):
                parameter.copy_(value)

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[None]:
        """Context in which parameters are gathered; may be nested; writes to them are lost."""
        self._uses += 1
        self._unit.unshard()
        try:
            yield
        finally:
            self._uses -= 1
            if self._uses == 0:
                self._unit.reshard()

    def freeze(self, frozen: bool) -> None:
        # FSDP copies `requires_grad` from shards to gathered weights only when it gathers.
        parameters = dict(self.phase.named_parameters())
        for parameter in [*self._sharded, *(parameters[name] for name in self.trainable)]:
            parameter.requires_grad_(not frozen)

    def shards(self) -> Iterator[TensorShard]:
        for part in self._slices:
            tensors = {}
            if part.values.numel():  # none: fewer rows than processes
                tensors[f"networks/{part.name}"] = part.values.detach()
            for key, value in self.optimizer.state.get(part.values, {}).items():
                name = f"optimizers/{part.name}.{key}"
                if not isinstance(value, Tensor):
                    continue
                if value.ndim == 0:  # a number of steps; of a scalar parameter on rank 0 alone
                    yield TensorShard(name, (), 0, value, replicated=part.gathered is not None)
                elif value.numel():
                    tensors[name] = value
            for name, tensor in tensors.items():
                yield TensorShard(
                    name, part.shape, part.start, tensor.reshape(-1), replicated=False
                )

    def load_state(self, shapes: Mapping[str, StateShapes], read: ReadRange) -> None:
        for part in self._slices:
            state, values = self.optimizer.state[part.values], part.values
            for key, shape in shapes[part.name].items():
                stored = f"optimizers/{part.name}.{key}"
                if shape == ():
                    state[key] = read(stored, 0, 1).reshape(()).to(values.device)
                elif values.numel() == 0:
                    state[key] = torch.zeros_like(values).detach()
                else:
                    found = read(stored, part.start, part.start + values.numel())
                    state[key] = found.reshape(values.shape).to(values.device, values.dtype)

    def close(self) -> None:
        """Give the networks unsharded parameters again, so that another engine can wrap them."""
        for module in self.phase.modules():
            for key, parameter in module.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    module.register_parameter(key, nn.Parameter(parameter.full_tensor().detach()))


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

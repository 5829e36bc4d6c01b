"""Every process holds a slice of each weight, its gradient and its moments: torch's `fully_shard`.

The whole phase is one unit that is gathered before the forward and sliced again after the backward.
Slicing layer by layer would free weights that the second backward of a gradient penalty still
needs; so memory is saved between the steps and in Adam's state, not within a backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
from bigan.engine.wrapped import MOMENTS, Batch, NewOptimizer, ReadRange
from bigan.objectives.gan import Phase, Scalars


class _Slice(NamedTuple):
    """This process's rows of one parameter."""

    key: str  # the parameter's name in the network
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # the slice's first entry in the flattened parameter
    values: nn.Parameter  # what the optimiser steps: the memory that FSDP gathers from
    gathered: nn.Parameter | None  # FSDP's parameter, which receives the gradient; None: a scalar


class FullySharded:
    """A phase under FSDP2, its network cut along the first axis of each parameter.

    The optimiser gets the slices as plain tensors. FSDP2 does not take scalars (an attention's
    gain): they are whole on all processes and belong to rank 0's optimiser, which tells the others.
    Weights must be final when this is built; they are laid out row by row from then on.
    """

    sharded = True

    def __init__(self, phase: Phase, new_optimizer: NewOptimizer, world: World) -> None:
        self.phase = phase
        phase.requires_grad_(True)
        phase.network.to(memory_format=torch.contiguous_format)  # FSDP2 takes no channels-last
        self._world = world
        self._named = [(k, tuple(p.shape)) for k, p in phase.network.named_parameters()]
        self._scalars = [p for p in phase.network.parameters() if p.ndim == 0]
        mesh = init_device_mesh(world.device.type, (world.size,))
        unit = Unit(phase)
        fully_shard(unit, mesh=mesh, ignored_params=set(self._scalars))
        assert isinstance(unit, FSDPModule)
        self._unit, self._call = unit, unit.__call__
        # Micro-batches share one gathering; `step` and the end of `whole` undo it.
        unit.set_reshard_after_backward(False)
        self._sliced = [p for p in phase.network.parameters() if isinstance(p, DTensor)]
        self._slices = list(self._own_slices())
        self.optimizer = new_optimizer(s.values for s in self._slices)
        self._uses = 0  # of `whole`, nested

    def _own_slices(self) -> Iterator[_Slice]:
        parameters = dict(self.phase.network.named_parameters())
        for key, shape in self._named:
            parameter = parameters[key]
            if isinstance(parameter, DTensor):
                rows = -(-shape[0] // self._world.size)  # of all ranks but the last ones
                first = min(self._world.rank * rows, shape[0])
                start = first * (parameter.numel() // shape[0])
                local = nn.Parameter(parameter.to_local().detach())
                yield _Slice(key, shape, start, local, parameter)
            elif self._world.is_rank_0:
                yield _Slice(key, shape, 0, parameter, None)

    def __call__(self, other: nn.Module, batch: Batch, terms: tuple) -> tuple[Tensor, Scalars]:
        return self._call(other, batch, terms)

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self._unit.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in [*self._sliced, *self._scalars]:
            parameter.grad = None

    def step(self) -> None:
        """The optimiser's step; the weights are no longer whole afterwards, until asked for."""
        self._unit.reshard()  # or the next gathering would find the old weights still there
        for part in self._slices:
            if part.gathered is not None:
                gradient = part.gathered.grad
                part.values.grad = gradient.to_local() if isinstance(gradient, DTensor) else None
        self._average_scalar_gradients()
        self.optimizer.step()
        self._share_scalars()

    def _average_scalar_gradients(self) -> None:
        if self._scalars and self._world.size > 1:
            joined = torch.stack([_gradient(p) for p in self._scalars]) / self._world.size
            dist.all_reduce(joined)
            for parameter, gradient in zip(self._scalars, joined, strict=True):
                parameter.grad = gradient

    @torch.no_grad()
    def _share_scalars(self) -> None:
        if self._scalars and self._world.size > 1:
            joined = torch.stack([p.detach() for p in self._scalars])
            dist.broadcast(joined, src=0)
            for parameter, value in zip(self._scalars, joined, strict=True):
                parameter.copy_(value)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Gathered inside, at most once however deep; what is written to a parameter is lost."""
        self._uses += 1
        self._unit.unshard()
        try:
            yield
        finally:
            self._uses -= 1
            if self._uses == 0:
                self._unit.reshard()

    def freeze(self, frozen: bool) -> None:
        # FSDP copies the slices' flags to the gathered weights, and only when it gathers them.
        for parameter in [*self._sliced, *self.phase.network.parameters()]:
            parameter.requires_grad_(not frozen)

    def shards(self, name: str) -> Iterator[TensorShard]:
        for part in self._slices:
            state = self.optimizer.state.get(part.values, {})
            if "step" in state:
                key = f"optimizers/{name}.{part.key}.step"
                everywhere = part.gathered is not None  # a scalar is stepped on rank 0 alone
                yield TensorShard(key, (), 0, state["step"], replicated=everywhere)
            if part.values.numel() == 0:  # fewer rows than processes
                continue
            tensors = {f"networks/{name}.{part.key}": part.values.detach()}
            for moment in MOMENTS:
                if moment in state:
                    tensors[f"optimizers/{name}.{part.key}.{moment}"] = state[moment]
            for key, tensor in tensors.items():
                yield TensorShard(key, part.shape, part.start, tensor.reshape(-1), replicated=False)

    def load_moments(self, name: str, read: ReadRange) -> None:
        for part in self._slices:
            state, values = self.optimizer.state[part.values], part.values
            stem = f"optimizers/{name}.{part.key}"
            state["step"] = read(f"{stem}.step", 0, 1).reshape(()).to(values.device)
            for moment in MOMENTS:
                if values.numel() == 0:
                    state[moment] = torch.zeros_like(values).detach()
                    continue
                found = read(f"{stem}.{moment}", part.start, part.start + values.numel())
                state[moment] = found.reshape(values.shape).to(values.device, values.dtype)

    def close(self) -> None:
        """Give the network whole weights of its own again, so that another engine may take it."""
        for module in self.phase.network.modules():
            for key, parameter in module.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    module.register_parameter(key, nn.Parameter(parameter.full_tensor().detach()))


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

"""Unsharded weights, gradients and optimizer state on every rank: one process, or DDP."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bigan.checkpoint import TensorShard
from bigan.engine.wrapped import Networks, NewOptimizer, ReadRange, StateShapes
from bigan.objectives.base import Phase, Result, Tensors, Terms


class Replicated:
    """A phase on one process, or under DistributedDataParallel on several."""

    sharded = False

    def __init__(
        self,
        phase: Phase,
        trainable: tuple[str, ...],
        new_optimizer: NewOptimizer,
        accelerator: Accelerator,
    ) -> None:
        self.phase, self.trainable = phase, trainable
        parameters = dict(phase.named_parameters())
        self._parameters = {name: parameters[name] for name in trainable}
        self.optimizer = new_optimizer(self._parameters.values())
        self._accelerator = accelerator
        self.freeze(False)  # DDP ignores parameters that are frozen when it is constructed
        with warnings.catch_warnings():  # the new name of broadcast_buffers needs a newer torch
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            self._module: nn.Module = accelerator.prepare_model(phase)

    def __call__(self, networks: Networks, inputs: Tensors, terms: Terms) -> Result:
        result: Result = self._module(networks, inputs, terms)
        return result

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if last else self._accelerator.no_sync(self._module)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.optimizer.step()

    def unsharded(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def freeze(self, frozen: bool) -> None:
        for parameter in self._parameters.values():
            parameter.requires_grad_(not frozen)

    def shards(self) -> Iterator[TensorShard]:
        for name, parameter in self._parameters.items():
            yield _complete(f"networks/{name}", parameter.detach())
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield _complete(f"optimizers/{name}.{key}", value)

    def load_state(self, shapes: Mapping[str, StateShapes], read: ReadRange) -> None:
        for name, parameter in self._parameters.items():
            state = self.optimizer.state[parameter]
            for key, shape in shapes[name].items():
                stored = f"optimizers/{name}.{key}"
                if shape == ():
                    state[key] = read(stored, 0, 1).reshape(()).to(parameter.device)
                else:  # it lies in memory as its parameter does (channels-last)
                    values = read(stored, 0, parameter.numel()).view(parameter.shape)
                    state[key] = torch.empty_like(parameter).copy_(values).detach()

    def close(self) -> None:
        del self._module  # DDP refers to the process group


def _complete(name: str, tensor: Tensor) -> TensorShard:
    return TensorShard(name, tuple(tensor.shape), 0, tensor, replicated=True)

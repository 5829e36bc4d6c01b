"""Every process holds everything: one process, or DDP."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bigan.checkpoint import TensorShard
from bigan.engine.wrapped import MOMENTS, Batch, NewOptimizer, ReadRange
from bigan.objectives.gan import Phase, Scalars


class Replicated:
    """A phase as it is, or under DistributedDataParallel where there are several processes."""

    sharded = False

    def __init__(self, phase: Phase, new_optimizer: NewOptimizer, accelerator: Accelerator) -> None:
        self.phase = phase
        self.optimizer = new_optimizer(phase.network.parameters())
        self._accelerator = accelerator
        phase.requires_grad_(True)  # DDP never reduces what is frozen when it is wrapped
        with warnings.catch_warnings():  # its newer name for broadcast_buffers is too new for us
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            self._module: nn.Module = accelerator.prepare_model(phase)

    def __call__(self, other: nn.Module, batch: Batch, terms: tuple) -> tuple[Tensor, Scalars]:
        return self._module(other, batch, terms)

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if last else self._accelerator.no_sync(self._module)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.optimizer.step()

    def whole(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def freeze(self, frozen: bool) -> None:
        self.phase.network.requires_grad_(not frozen)

    def shards(self, name: str) -> Iterator[TensorShard]:
        for key, parameter in self.phase.network.named_parameters():
            yield _whole(f"networks/{name}.{key}", parameter.detach())
            for moment, tensor in self.optimizer.state.get(parameter, {}).items():
                yield _whole(f"optimizers/{name}.{key}.{moment}", tensor)

    def load_moments(self, name: str, read: ReadRange) -> None:
        for key, parameter in self.phase.network.named_parameters():
            state = self.optimizer.state[parameter]
            stem = f"optimizers/{name}.{key}"
            state["step"] = read(f"{stem}.step", 0, 1).reshape(()).to(parameter.device)
            for moment in MOMENTS:  # they lie in memory as their parameter does (channels-last)
                values = read(f"{stem}.{moment}", 0, parameter.numel()).view(parameter.shape)
                state[moment] = torch.empty_like(parameter).copy_(values).detach()

    def close(self) -> None:
        pass


def _whole(name: str, tensor: Tensor) -> TensorShard:
    return TensorShard(name, tuple(tensor.shape), 0, tensor, replicated=True)

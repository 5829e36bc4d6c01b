"""What every engine makes of a phase: the interface behind which their differences end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from bigan.checkpoint import TensorShard
from bigan.objectives.gan import Phase, Scalars

Batch = tuple[Tensor | None, ...]
NewOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Adam]
ReadRange = Callable[[str, int, int], Tensor]  # (key, start, stop) -> float32 [stop - start], CPU
MOMENTS = ("exp_avg", "exp_avg_sq")


class Wrapped(Protocol):
    """One phase, the network it trains and its optimiser under one engine.

    A step is `zero_grad`; for each micro-batch, inside `micro_step`, a call and `backward`; `step`.
    The gradients are then means over the processes, and the optimiser holds them all or, if
    `sharded`, this process's part.
    """

    phase: Phase
    optimizer: torch.optim.Adam  # its learning rate may be set at any time between two steps
    sharded: bool

    def __call__(self, other: nn.Module, batch: Batch, terms: tuple) -> tuple[Tensor, Scalars]:
        """The phase's forward; the gradients of the last micro-batch's backward are reduced."""

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[object]:
        """Around forward and backward of one micro-batch; only the `last` is communicated."""

    def backward(self, loss: Tensor) -> None:
        """`loss` is divided by the number of micro-batches already."""

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""

    def step(self) -> None:
        """Exactly one `optimizer.step()`, with its hooks."""

    def whole(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the network's parameters are complete plain tensors; may be nested.

        For power iterations, the average, and for the other player's phase.
        """

    def freeze(self, frozen: bool) -> None:
        """Whether the network's parameters get no gradients; called inside `whole`."""

    def shards(self, name: str) -> Iterator[TensorShard]:
        """This process's part of the parameters and of Adam's state of network `name`.

        Named "networks/<name>.<parameter>" and "optimizers/<name>.<parameter>.exp_avg",
        ".exp_avg_sq" (float32) and ".step" (a number of steps).
        """

    def load_moments(self, name: str, read: ReadRange) -> None:
        """Set Adam's state from the tensors that `shards` would name so."""

    def close(self) -> None:
        """Let go of what the engine holds beside the networks."""

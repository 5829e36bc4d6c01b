"""The interface of a phase under an engine, which hides the differences between engines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from bigan.checkpoint import TensorShard
from bigan.objectives.base import Phase, Result, Tensors, Terms

Networks = Mapping[str, nn.Module]
NewOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
ReadRange = Callable[[str, int, int], Tensor]  # (key, start, stop) -> [stop - start], CPU
# Optimizer state of one parameter in a checkpoint: name -> shape, () or that of the parameter.
StateShapes = Mapping[str, tuple[int, ...]]


class Wrapped(Protocol):
    """One phase and its optimizer under one engine.

    A step is `zero_grad`; for each micro-batch, inside `micro_step`, a call and `backward`; `step`.
    The gradients are then means over the ranks, and the optimizer holds all of them or, if
    `sharded`, the shards of this rank. Only `trainable` parameters have gradients and state.
    """

    phase: Phase
    optimizer: torch.optim.Optimizer
    sharded: bool
    trainable: tuple[str, ...]  # names in the phase: "generator.linear.weight"

    def __call__(self, networks: Networks, inputs: Tensors, terms: Terms) -> Result:
        """The phase's forward; the gradients of the last micro-batch's backward are reduced."""

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[object]:
        """Context of the forward and backward of a micro-batch; only the `last` communicates."""

    def backward(self, loss: Tensor) -> None:
        """Backward of `loss`, which is already divided by the number of micro-batches."""

    def zero_grad(self) -> None:
        """Drop the gradients of the previous step."""

    def step(self) -> None:
        """Exactly one `optimizer.step()`, with its hooks."""

    def unsharded(self) -> contextlib.AbstractContextManager[object]:
        """Context in which the phase's parameters are unsharded plain tensors; may be nested.

        For power iterations, the EMA, and phases that read these networks.
        """

    def freeze(self, frozen: bool) -> None:
        """Set whether the trainable parameters are frozen; called inside `unsharded`."""

    def shards(self) -> Iterator[TensorShard]:
        """This rank's shards of the trainable parameters and of the optimizer's state.

        Named "networks/<name>" and "optimizers/<name>.<state>", <name> as in `trainable` and
        <state> as the optimizer calls it ("exp_avg", "square_avg", "step").
        """

    def load_state(self, shapes: Mapping[str, StateShapes], read: ReadRange) -> None:
        """Set the optimizer's state from the tensors with the names that `shards` returns.

        `shapes`: parameter name -> its state in the checkpoint.
        """

    def close(self) -> None:
        """Release the engine's resources; the networks remain."""


def trainable_names(phase: Phase, is_trainable: Callable[[str], bool]) -> tuple[str, ...]:
    """Names of the trained parameters; sets `requires_grad` of all others to False."""
    names = []
    for name, parameter in phase.named_parameters():
        parameter.requires_grad_(is_trainable(name))
        if parameter.requires_grad:
            names.append(name)
    return tuple(names)

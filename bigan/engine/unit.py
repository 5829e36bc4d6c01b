"""A shell around a phase, for engines that hang hooks on the module they are given."""

from __future__ import annotations

from torch import Tensor, nn

from bigan.engine.wrapped import Batch
from bigan.objectives.gan import Phase, Scalars


class Unit(nn.Module):
    """Keeps the hooks out of the phase: the compiled graph begins below them.

    `phase.compile()` compiles the hooks of the phase too, and those of FSDP2 and DeepSpeed (which
    read the clock) cannot be traced.
    """

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.phase = phase

    def forward(self, other: nn.Module, batch: Batch, terms: tuple) -> tuple[Tensor, Scalars]:
        return self.phase(other, batch, terms)

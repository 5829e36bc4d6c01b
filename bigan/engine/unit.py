"""A module around a phase, for engines that register hooks on the module they are given."""

from __future__ import annotations

from torch import nn

from bigan.engine.wrapped import Networks
from bigan.objectives.base import Phase, Result, Tensors, Terms


class Unit(nn.Module):
    """Holds the hooks of an engine, so that the compiled phase inside contains none of them.

    `phase.compile()` compiles the hooks of the phase too, and those of FSDP2 and DeepSpeed (which
    read the clock) cannot be traced.
    """

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.phase = phase

    def forward(self, networks: Networks, inputs: Tensors, terms: Terms) -> Result:
        result: Result = self.phase(networks, inputs, terms)
        return result

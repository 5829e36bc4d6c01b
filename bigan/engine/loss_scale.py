"""Loss scaling for float16 (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

Like `torch.amp.GradScaler`, for gradients that may be sharded: the decision is made from the global
norm, on the device, and the state is part of every checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

INITIAL = 2.0**16
GROWTH_STEPS = 2000  # finite steps in a row, after which the scale is doubled
SMALLEST = 1.0  # gradients that overflow at this scale would overflow without scaling, too


class LossScale(nn.Module):
    """`scale` multiplies a loss; halved on overflow, doubled after 2,000 finite steps."""

    scale: Tensor
    good_steps: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(INITIAL, device=device))
        self.register_buffer("good_steps", torch.zeros((), device=device))

    @torch.no_grad()
    def update(self, overflow: Tensor) -> None:
        """After a step; `overflow` is 1.0 if its gradients were not finite, else 0.0 (0-d)."""
        good = torch.where(overflow > 0, 0.0, self.good_steps + 1)
        grow = good >= GROWTH_STEPS
        factor = torch.where(overflow > 0, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale.mul_(factor).clamp_min_(SMALLEST)
        self.good_steps.copy_(torch.where(grow, 0.0, good))

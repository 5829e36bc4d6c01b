"""The adaptive strength of ADA: how often images are augmented, by the signs of the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigan.distributed.world import World, sum_over_ranks


class AdaptiveStrength(nn.Module):
    """p in [0, 1] and what it is steered by, all 0-d tensors on the device (Karras et al. 2020).

    r_t, the mean sign of D's logits on the real images since the last adaptation, tells
    overfitting: above `target` p grows, below it shrinks, by images / rampup_images. The sums are
    of the global batch and whole numbers, hence the same on any number of processes; they are part
    of the state (`state_dict`), so a run may stop between two adaptations.
    """

    p: Tensor
    signs: Tensor
    num: Tensor

    def __init__(self, p: Tensor, target: float, rampup_images: int) -> None:
        super().__init__()
        self.target = target
        self.rampup_images = rampup_images
        self.register_buffer("p", p)  # changed in place: whoever holds it sees it move
        for name in ("signs", "num"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64, device=p.device))

    @torch.no_grad()
    def observe(self, sign_real: Tensor, batch: int, world: World) -> None:
        """Add one discriminator step: `sign_real` is the mean sign over this rank's real images.

        `batch` is the global number of images. All ranks must call it; never waits for the device.
        """
        # Back to a whole number: sums in another order must not differ where r_t is the target.
        signs = (sign_real.double() * (batch // world.size)).round()
        sum_over_ranks(world, signs)
        self.signs += signs
        self.num += batch

    @torch.no_grad()
    def adapt(self) -> None:
        """Move p by the images observed since the last time, then forget them."""
        direction = torch.sign(self.signs / self.num - self.target)
        self.p.add_(direction * self.num / self.rampup_images).clamp_(0, 1)
        self.signs.zero_()
        self.num.zero_()

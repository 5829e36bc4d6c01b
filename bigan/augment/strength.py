"""The adaptive strength p of ADA: the probability of each augmentation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigan.distributed.world import World, sum_over_ranks


class AdaptiveStrength(nn.Module):
    """p in [0, 1] and the statistics it is adapted to, all 0-d tensors on the device.

    r_t, the mean sign of the discriminator's logits on the real images since the last adaptation,
    measures overfitting (Karras et al. 2020, arXiv:2006.06676, equation 1). p is increased by
    images / rampup_images if r_t is above `target` and decreased if it is below. The sums are
    integers over the global batch, hence equal for any world size. They are in the `state_dict`, so
    that a run can resume between two adaptations.
    """

    p: Tensor
    signs: Tensor
    num: Tensor

    def __init__(self, p: Tensor, target: float, rampup_images: int) -> None:
        super().__init__()
        self.target = target
        self.rampup_images = rampup_images
        self.register_buffer("p", p)  # updated in place: other modules keep a reference to it
        for name in ("signs", "num"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64, device=p.device))

    @torch.no_grad()
    def observe(self, sign_real: Tensor, batch: int, world: World) -> None:
        """Add one discriminator step: `sign_real` is the mean sign over this rank's real images.

        `batch` is the number of images over all ranks. All ranks must call it. It does not
        synchronise with the device.
        """
        # Rounded to integers: sums in another order must not differ where r_t equals the target.
        signs = (sign_real.double() * (batch // world.size)).round()
        sum_over_ranks(world, signs)
        self.signs += signs
        self.num += batch

    @torch.no_grad()
    def adapt(self) -> None:
        """Update p for the images observed since the last call, then reset the statistics."""
        direction = torch.sign(self.signs / self.num - self.target)
        self.p.add_(direction * self.num / self.rampup_images).clamp_(0, 1)
        self.signs.zero_()
        self.num.zero_()

"""ADA's strength p, the probability of each augmentation: fixed, annealed, or adaptive."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigan.augment.ada import Config
from bigan.distributed.world import World, sum_over_ranks
from bigan.schedules import annealed, due


class Strength:
    """The strength `p`, a 0-d tensor in [0, 1] on the device, of an augmentation config.

    `adaptive` updates it; if that is None, p is a function of `images_seen` without state.
    """

    def __init__(self, config: Config, anneal_images: int | None, world: World) -> None:
        self.config = config
        self.anneal_images = anneal_images
        self.world = world
        start = config.initial if config.fixed is None else config.fixed
        self.p = torch.tensor(start, device=world.device)
        self.adaptive: AdaptiveStrength | None = None
        if config.fixed is None:
            self.adaptive = AdaptiveStrength(self.p, config.target, config.rampup_images)

    def schedule(self, images_seen: int) -> None:
        """Set the value of an annealed strength for the step at `images_seen`; call before it."""
        start, end = self.config.fixed, self.config.fixed_end
        if start is not None and end is not None:
            self.p.fill_(annealed(images_seen, start, end, self.anneal_images))

    def follow(self, scalars: dict[str, Tensor], images_seen: int, batch: int) -> dict[str, Tensor]:
        """Adapt the strength after the discriminator step at `images_seen`; returns what to log.

        `scalars` are those of the step, `batch` is its number of images over all ranks. All ranks
        must call it. It does not synchronise with the device.
        """
        if self.config.fixed is not None and self.config.fixed_end is None:
            return {}
        used = {"augment_p": self.p.clone()}
        if self.adaptive is not None:
            self.adaptive.observe(scalars["sign_real"], batch, self.world)
            every = self.config.images_between(batch)
            if due(images_seen, images_seen + batch, every):
                self.adaptive.adapt()
        return used


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

"""ADA's strength: how often images are augmented. Fixed, scheduled, or steered by D's signs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigan.augment.ada import Config
from bigan.distributed.world import World, sum_over_ranks
from bigan.schedules import annealed, due


class Strength:
    """The strength `p`, a 0-d tensor in [0, 1] on the device, as a recipe says.

    `adaptive` steers it, or is None: then it is a function of `images_seen`, and no state.
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
        """Before a step: the strength that a recipe's schedule prescribes for it, if it has one."""
        start, end = self.config.fixed, self.config.fixed_end
        if start is not None and end is not None:
            self.p.fill_(annealed(images_seen, start, end, self.anneal_images))

    def follow(self, scalars: dict[str, Tensor], images_seen: int, batch: int) -> dict[str, Tensor]:
        """After a discriminator step that began at `images_seen`: steer; what is to be logged.

        `scalars` are the step's, `batch` its images over all ranks. All ranks must call it; it
        never waits for the device.
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

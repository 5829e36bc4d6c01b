"""Gradient penalties: pure functions of the discriminator, averaged (never summed) over the batch.

The inner derivative is `torch.func.grad`: unlike `autograd.grad(create_graph=True)` it can be
traced by torch.compile as one full graph, and it stays right under DDP and ZeRO-1/2 when the
whole penalty is computed inside the wrapped module. Call them in float32, outside autocast:
half-precision norms of gradients overflow.

Each takes (discriminator, real, real_labels, fake, fake_labels, mix): images [B, C, R, R] in
[-1, 1], labels int64 [B], mix [B] uniform in [0, 1) or None where it is not used; each returns a
scalar without its weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Discriminator = Callable[[Tensor, Tensor], Tensor]
Penalty = Callable[[Discriminator, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def squared_gradient_norms(discriminator: Discriminator, images: Tensor, labels: Tensor) -> Tensor:
    """||dD/dx||^2 of every image, [B]."""

    def total(x: Tensor) -> Tensor:
        # Without BatchNorm each logit depends on its own image alone, so the gradient of the sum
        # holds every image's own gradient.
        return discriminator(x, labels).sum()

    gradient = torch.func.grad(total)(images)
    return gradient.square().flatten(1).sum(1)


def r1(
    discriminator: Discriminator,
    real: Tensor,
    real_labels: Tensor,
    fake: Tensor,
    fake_labels: Tensor,
    mix: Tensor | None,
) -> Tensor:
    """1/2 E[||dD/dx||^2] on real images (Mescheder et al. 2018, eq. 9); weight it by gamma."""
    return 0.5 * squared_gradient_norms(discriminator, real, real_labels).mean()


def r2(
    discriminator: Discriminator,
    real: Tensor,
    real_labels: Tensor,
    fake: Tensor,
    fake_labels: Tensor,
    mix: Tensor | None,
) -> Tensor:
    """The same on generated images (Mescheder et al. 2018, eq. 10)."""
    return 0.5 * squared_gradient_norms(discriminator, fake, fake_labels).mean()


def wgan_gp(
    discriminator: Discriminator,
    real: Tensor,
    real_labels: Tensor,
    fake: Tensor,
    fake_labels: Tensor,
    mix: Tensor | None,
) -> Tensor:
    """E[(||dD/dx^|| - 1)^2] on random mixtures x^ (Gulrajani et al. 2017, eq. 3).

    A mixture is judged as a member of its real image's class.
    """
    assert mix is not None
    mixed = torch.lerp(fake, real, mix.view(-1, 1, 1, 1))
    # The root's slope is infinite at zero: an epsilon inside keeps a flat discriminator finite.
    norms = (squared_gradient_norms(discriminator, mixed, real_labels) + 1e-12).sqrt()
    return (norms - 1).square().mean()


PENALTIES: dict[str, Penalty] = {"r1": r1, "r2": r2, "wgan_gp": wgan_gp}

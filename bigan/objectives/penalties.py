"""Gradient penalties: pure functions of the discriminator, averaged (never summed) over the batch.

The inner derivative is `torch.func.grad`: unlike `autograd.grad(create_graph=True)` it can be
traced by torch.compile as one full graph, and it stays right under DDP and ZeRO-1/2 when the
whole penalty is computed inside the wrapped module. Call them in float32, outside autocast:
half-precision norms of gradients overflow.

Each of `PENALTIES` takes (discriminator, real, real_labels, fake, fake_labels, mix, target): images
[B, C, R, R] in [-1, 1], labels int64 [B], mix [B] uniform in [0, 1) and the norm to be reached
where they are used; each returns a scalar without its weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bigan.config import ConfigError
from bigan.layers.batchnorm import normalisation_layers

Discriminator = Callable[[Tensor, Tensor], Tensor]
Penalty = Callable[[Discriminator, Tensor, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def refuse_batchnorm(key: str, network: nn.Module) -> None:
    """Raises `ConfigError` if `network`, which the penalty of that key differentiates, has any.

    A penalty needs each image's own gradient and takes it from that of the batch's sum. BatchNorm
    lets every image enter the outputs of all others: the numbers would be wrong without a sign of
    it (Gulrajani et al. 2017, section 4). Minibatch standard deviation joins images too, in groups;
    the published recipes penalise through it.
    """
    if normalisation_layers(network):
        raise ConfigError(
            f"{key}: a gradient penalty needs outputs that depend on one image each, and the "
            f"BatchNorm in {type(network).__name__} makes them depend on the whole batch; use "
            "spectral normalisation (layers/spectral.py) or none there, or leave the penalty out"
        )


def squared_gradient_norms(discriminator: Discriminator, images: Tensor, labels: Tensor) -> Tensor:
    """||dD/dx||^2 of every image, [B]."""

    def total(x: Tensor) -> Tensor:
        # Without BatchNorm each logit depends on its own image alone, so the gradient of the sum
        # holds every image's own gradient. (With minibatch standard deviation it depends on its
        # group, too: as in published code, the gradient is then that of the group's logits.)
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
    target: float = 1.0,
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
    target: float = 1.0,
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
    target: float = 1.0,
) -> Tensor:
    """E[(||dD/dx^|| - t)^2] / t^2 on random mixtures x^ (Gulrajani et al. 2017, eq. 3, with t = 1).

    A mixture is judged as a member of its real image's class. ProGAN's `target` t of 750 for CIFAR
    lets a discriminator be steep (Karras et al. 2018, appendix A).
    """
    assert mix is not None
    mixed = torch.lerp(fake, real, mix.view(-1, 1, 1, 1))
    # The root's slope is infinite at zero: an epsilon inside keeps a flat discriminator finite.
    norms = (squared_gradient_norms(discriminator, mixed, real_labels) + 1e-12).sqrt()
    return (norms - target).square().mean() / target**2


def path_lengths(synthesis: Callable[[Tensor], Tensor], ws: Tensor, noise: Tensor) -> Tensor:
    """How far a random direction in image space is from each image's latents, [B].

    ||J_w^T y||, the root of the mean over layers of the squared lengths (Karras et al. 2020,
    arXiv:1912.04958, section 3.2): `ws` [B, layers, w_dim], `synthesis` maps it to images
    [B, C, R, R], `noise` y of that shape is standard normal over the root of the number of pixels.
    """
    gradient = torch.func.grad(lambda w: (synthesis(w) * noise).sum())(ws)
    return (gradient.square().sum(2).mean(1) + 1e-12).sqrt()


def path_length_penalty(lengths: Tensor, mean: Tensor) -> Tensor:
    """E[(length - a)^2], a the running mean of lengths: a scalar without its weight.

    `mean` is that of the steps before, so that neither micro-batches nor processes change it; the
    published code moves it by a hundredth towards this batch's first.
    """
    return (lengths - mean).square().mean()


PENALTIES: dict[str, Penalty] = {"r1": r1, "r2": r2, "wgan_gp": wgan_gp}

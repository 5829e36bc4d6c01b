"""Gradient penalties: pure functions of the discriminator, averaged (never summed) over the batch.

The inner derivative is `torch.func.grad`: unlike `autograd.grad(create_graph=True)` it can be
traced by torch.compile as one full graph, and it is correct under DDP and ZeRO-1/2 if the penalty
is computed completely inside the wrapped module. Call them in float32, outside autocast: norms of
gradients overflow in half precision.

Each of `PENALTIES` takes the function whose gradient is penalized and a `PenaltyBatch`, and returns
a 0-d tensor that is not multiplied by its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from bigan.config import ConfigError, Frozen, NonNegative, Positive
from bigan.image_size import ImageSize, num_pixels
from bigan.layers.batchnorm import normalization_layers

Discriminator = Callable[[Tensor, Tensor], Tensor]


class PenaltyConfig(Frozen):
    """One gradient penalty of the discriminator, always computed in float32."""

    name: Literal["r1", "r2", "wgan_gp"]
    # r1, r2: gamma (gamma / 2 in the loss); wgan_gp: lambda; None: `initial_weight`
    weight: NonNegative | None = None
    weight_end: NonNegative | None = None  # reached along half a cosine over `anneal_images`
    every: Positive = 1  # lazy regularization: at every k-th discriminator step, times k
    separate_step: bool = False  # lazy, in an optimizer step after the main one (StyleGAN2)
    target: Annotated[float, Field(gt=0)] = 1.0  # wgan_gp: target norm (ProGAN, CIFAR-10: 750)

    def initial_weight(self, resolution: ImageSize, batch: int) -> float:
        """`weight`, or the default where it is None.

        r1 and r2: gamma = 0.0002 * height * width / batch (Karras et al. 2020, arXiv:2006.06676,
        appendix C, the heuristic of its "auto" configuration); wgan_gp: 10 (Gulrajani et al. 2017).
        """
        if self.weight is not None:
            return self.weight
        return 10.0 if self.name == "wgan_gp" else 0.0002 * num_pixels(resolution) / batch


class PenaltyBatch(NamedTuple):
    """Images that a penalty is computed on."""

    real: Tensor  # float32 [B, C, H, W] in [-1, 1]
    real_labels: Tensor  # int64 [B]
    fake: Tensor  # float32 [B, C, H, W]; `real` where the penalty does not use it
    fake_labels: Tensor  # int64 [B]
    mix: Tensor | None = None  # float32 [B], uniform in [0, 1), for wgan_gp
    target: float = 1.0  # norm of the gradient, for wgan_gp


Penalty = Callable[[Discriminator, PenaltyBatch], Tensor]


def refuse_batchnorm(key: str, network: nn.Module) -> None:
    """Raises `ConfigError` if `network`, which the penalty of that key differentiates, has any.

    A penalty needs the gradient of each image, which is taken from the gradient of the sum over the
    batch. With BatchNorm the output of an image depends on all other images, so the penalty would
    be silently wrong (Gulrajani et al. 2017, section 4). Minibatch standard deviation also couples
    images, in groups; the published methods penalize through it.
    """
    if normalization_layers(network):
        raise ConfigError(
            f"{key}: a gradient penalty needs outputs that depend on one image each, and the "
            f"BatchNorm in {type(network).__name__} makes them depend on the batch; use spectral "
            "normalization (layers/spectral.py) or none there, or leave the penalty out"
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


def r1(discriminator: Discriminator, batch: PenaltyBatch) -> Tensor:
    """1/2 E[||dD/dx||^2] on real images (Mescheder et al. 2018, eq. 9); weight it by gamma."""
    return 0.5 * squared_gradient_norms(discriminator, batch.real, batch.real_labels).mean()


def r2(discriminator: Discriminator, batch: PenaltyBatch) -> Tensor:
    """The same on generated images (Mescheder et al. 2018, eq. 10)."""
    return 0.5 * squared_gradient_norms(discriminator, batch.fake, batch.fake_labels).mean()


def wgan_gp(discriminator: Discriminator, batch: PenaltyBatch) -> Tensor:
    """E[(||dD/dx^|| - t)^2] / t^2 on random mixtures x^ (Gulrajani et al. 2017, eq. 3, with t = 1).

    A mixture has the label of its real image. ProGAN's `target` t of 750 for CIFAR allows a steep
    discriminator (Karras et al. 2018, appendix A).
    """
    assert batch.mix is not None
    mixed = torch.lerp(batch.fake, batch.real, batch.mix.view(-1, 1, 1, 1))
    # The derivative of the root is infinite at 0: epsilon keeps it finite if D is constant.
    norms = (squared_gradient_norms(discriminator, mixed, batch.real_labels) + 1e-12).sqrt()
    return (norms - batch.target).square().mean() / batch.target**2


def path_lengths(synthesis: Callable[[Tensor], Tensor], ws: Tensor, noise: Tensor) -> Tensor:
    """Path length of each image, in a random direction of image space, [B].

    ||J_w^T y||, the root of the mean over layers of the squared lengths (Karras et al. 2020,
    arXiv:1912.04958, section 3.2): `ws` [B, layers, w_dim], `synthesis` maps it to images
    [B, C, H, W], `noise` y of that shape is standard normal over the root of the number of pixels.
    """
    gradient = torch.func.grad(lambda w: (synthesis(w) * noise).sum())(ws)
    return (gradient.square().sum(2).mean(1) + 1e-12).sqrt()


def path_length_penalty(lengths: Tensor, mean: Tensor) -> Tensor:
    """E[(length - a)^2], a the running mean of lengths: a scalar without its weight.

    `mean` is from before this step, so that it does not depend on micro-batches or ranks; published
    code first moves it by a hundredth towards the mean of this batch.
    """
    return (lengths - mean).square().mean()


PENALTIES: dict[str, Penalty] = {"r1": r1, "r2": r2, "wgan_gp": wgan_gp}

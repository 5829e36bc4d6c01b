"""Images as the inputs of a discriminator: decoded from bytes, mirrored, faded, augmented."""

from __future__ import annotations

import torch
from torch import Tensor

from bigan import augment
from bigan.augment import AugmentConfig
from bigan.layers.resampling import coarsened


def as_images(pixels: Tensor, mirror: Tensor | None = None) -> Tensor:
    """uint8 [m, H, W, C] -> float32 [m, C, H, W] in [-1, 1] (channels-last without a copy).

    `mirror` bool [m]: the images to flip horizontally.
    """
    images = pixels.permute(0, 3, 1, 2).to(torch.float32) * (1 / 127.5) - 1
    if mirror is not None:
        images = torch.where(mirror.view(-1, 1, 1, 1), images.flip(3), images)
    return images


def real_images(pixels: Tensor, mirror: Tensor | None, alpha: Tensor | None) -> Tensor:
    """As `as_images`; with `alpha` (0-d) as detailed as a resolution that fades in."""
    images = as_images(pixels, mirror)
    return images if alpha is None else coarsened(images, alpha)


def augmented(
    config: AugmentConfig, images: Tensor, draws: Tensor | None, strength: Tensor | None
) -> Tensor:
    """Augmented images [m, C, H, W] in float32; without `draws` the images unchanged."""
    if draws is None:
        return images
    seen = augment.apply(config, images.float(), draws, strength)
    return seen.contiguous(memory_format=torch.channels_last)

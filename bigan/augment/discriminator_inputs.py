"""The inputs of the discriminator: real images from bytes, and augmentation of all images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigan import augment
from bigan.layers.resampling import coarsened
from bigan.run_config import RunConfig


def as_images(real: Tensor, mirror: Tensor | None) -> Tensor:
    """uint8 [m, H, W, C] -> float32 [m, C, H, W] in [-1, 1], in channels-last format.

    Images where `mirror` bool [m] is true are flipped horizontally.
    """
    images = real.permute(0, 3, 1, 2).to(torch.float32) * (1 / 127.5) - 1
    if mirror is not None:
        images = torch.where(mirror.view(-1, 1, 1, 1), images.flip(3), images)
    return images


def augmented(
    config: RunConfig, images: Tensor, draws: Tensor | None, strength: Tensor | None
) -> Tensor:
    """Augmented images [m, C, H, W] in float32; without `draws` the images unchanged."""
    if draws is None:
        return images
    seen = augment.apply(config.augment, images.float(), draws, strength)
    return seen.contiguous(memory_format=torch.channels_last)


def real_images(
    fading: bool, discriminator: nn.Module, real: Tensor, mirror: Tensor | None
) -> Tensor:
    """float32 real images [m, C, H, W], blended with their lower resolution while it fades in."""
    images = as_images(real, mirror)
    if fading:
        images = coarsened(images, discriminator.get_buffer("alpha"))
    return images

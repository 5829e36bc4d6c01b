"""DiffAugment (Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training").

Every image is augmented at full strength every time, by any subset of these operations:

    color        brightness +-0.5 (in units of [-1, 1]), saturation x [0, 2], contrast x [0.5, 1.5]
    translation  by up to 1/8 of the size along each axis, padded with zeros (grey)
    cutout       a rectangle of half the size along each axis, at a random position, becomes zero

Alpha is translated and cut like the colors, and has no color operations.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import field_validator
from torch import Tensor

from bigan import rng
from bigan.augment.sampling import integers, on_colors, take
from bigan.config import Frozen

Operation = Literal["color", "translation", "cutout"]
ORDER: tuple[Operation, ...] = ("color", "translation", "cutout")
COLUMNS = ("brightness", "saturation", "contrast", "shift_y", "shift_x", "cut_y", "cut_x")


class Config(Frozen):
    """The operations to apply."""

    name: Literal["diffaugment"]
    policy: tuple[Operation, ...] = ORDER  # a subset; always applied in this order

    @field_validator("policy")
    @classmethod
    def _some_once(cls, policy: tuple[Operation, ...]) -> tuple[Operation, ...]:
        if not policy or len(set(policy)) != len(policy):
            raise ValueError(f"expected one or more of {', '.join(ORDER)}, each at most once")
        return tuple(name for name in ORDER if name in policy)


def draws(seed: int, stream: str, images_seen: int, num: int) -> Tensor:
    """Uniform float32 [num, K] in [0, 1); they do not depend on the policy."""
    return rng.uniform(seed, stream, images_seen, (num, len(COLUMNS)))


def apply(images: Tensor, draws: Tensor, policy: tuple[Operation, ...]) -> Tensor:
    """Augmented float32 images [m, C, H, W]; `draws` [m, K] from `draws`."""
    brightness, saturation, contrast, shift_y, shift_x, cut_y, cut_x = draws.unbind(1)
    if "color" in policy:
        images = on_colors(images, lambda colors: color(colors, brightness, saturation, contrast))
    if "translation" in policy:
        images = translate(images, shift_y, shift_x)
    if "cutout" in policy:
        images = cutout(images, cut_y, cut_x)
    return images


def color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Change brightness, saturation and contrast, in this order, by uniform numbers [m]."""
    brightness, saturation, contrast = (
        u.view(-1, 1, 1, 1) for u in (brightness, saturation, contrast)
    )
    images = images + (brightness - 0.5)
    if images.shape[1] > 1:  # grey has no saturation
        grey = images.mean(1, keepdim=True)
        images = (images - grey) * (2 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def translate(images: Tensor, shift_y: Tensor, shift_x: Tensor) -> Tensor:
    """Shift by integer numbers of pixels; `shift_*` are uniform numbers [m]."""
    sources, inside = [], []
    for shift, size in zip((shift_y, shift_x), images.shape[2:], strict=True):
        largest = int(size / 8 + 0.5)
        places = torch.arange(size, device=images.device)
        source = places + (integers(shift, 2 * largest + 1) - largest)[:, None]
        sources.append(source.clamp(0, size - 1))
        inside.append((source >= 0) & (source < size))
    keep = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(keep, take(images, *sources), 0.0)


def cutout(images: Tensor, cut_y: Tensor, cut_x: Tensor) -> Tensor:
    """Set a rectangle to 0; its centre is uniform over the image, so part of it may lie outside."""
    hit = []
    for cut, size in zip((cut_y, cut_x), images.shape[2:], strict=True):
        length = int(size / 2 + 0.5)
        places = torch.arange(size, device=images.device)
        first = integers(cut, size + 1 - length % 2)[:, None] - length // 2
        hit.append((places >= first) & (places < first + length))
    removed = hit[0][:, None, :, None] & hit[1][:, None, None, :]
    return torch.where(removed, 0.0, images)

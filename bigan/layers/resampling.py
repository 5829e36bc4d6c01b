"""Doubling and halving of images and feature maps, and the blending of a growing network.

Source: Karras et al. 2018 (arXiv:1710.10196), figure 2. `alpha`, the weight of the finer
resolution, is a 0-d tensor on the device of the images. A Python number would become a constant of
the compiled graph, which would then be recompiled at every step of a fade-in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigan.image_size import ImageSize, sides
from bigan.layers.precision import at_least_float32


def enlarge(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 2H, 2W]: every pixel becomes 2 x 2 (nearest neighbour)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def repeated(images: Tensor, resolution: ImageSize) -> Tensor:
    """[B, C, H, W] of any dtype -> images of the size `resolution`: every pixel becomes a block.

    `resolution` is [H, W] times an integer. Used to display and evaluate images of a stage below
    full resolution.
    """
    repeats = sides(resolution)[1] // images.shape[-1]
    if repeats == 1:
        return images
    return images.repeat_interleave(repeats, 2).repeat_interleave(repeats, 3)


def shrink(x: Tensor) -> Tensor:
    """[B, C, H, W], H and W even -> [B, C, H/2, W/2]: the mean of every 2 x 2 pixels."""
    return F.avg_pool2d(x, 2)


def fade(coarse: Tensor, fine: Tensor, alpha: Tensor) -> Tensor:
    """(1 - alpha) * coarse + alpha * fine, both of one shape and dtype; exact at alpha 0 and 1.

    Computed in float32 at least: in bfloat16 alpha would have steps of 1/256.
    """
    wide = at_least_float32(fine)
    return torch.lerp(at_least_float32(coarse), wide, alpha.to(wide.dtype)).to(fine.dtype)


def coarsened(images: Tensor, alpha: Tensor) -> Tensor:
    """Real images [B, C, H, W] as the discriminator receives them while this resolution fades in.

    At alpha 0 they have the detail of half of it, at alpha 1 they are unchanged: always the same
    level of detail as the generated images.
    """
    return fade(enlarge(shrink(images)), images, alpha)

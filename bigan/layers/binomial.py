"""Resampling by two with the binomial filter [1, 2, 1] / 4 along each axis; zeros lie outside.

Combined with repeating or averaging pairs of pixels it gives [1, 3, 3, 1] / 8, the bilinear filter
of StyleGAN2 and R3GAN (R3GAN's setting "[1, 2, 1]" is convolved with [1, 1]). The filter is
symmetric: resampling does not shift the image and commutes with flips. As in the published networks
zeros are added at the borders, so a constant image keeps its value except in the outermost rows and
columns, where blurring and up-sampling multiply it by 3/4 and down-sampling by 7/8.

Implemented by average pooling, since [1, 2, 1] = [1, 1] * [1, 1]. It has a second derivative,
preserves the memory format (on CPUs channels-last is ten times faster), can be fused by the
compiler, and is deterministic on GPUs, where the gradient of bilinear interpolation is not.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def blur(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, H, W], y[i] = (x[i-1] + 2 x[i] + x[i+1]) / 4 along each axis."""
    between = F.avg_pool2d(x, 2, stride=1, padding=1)  # [B, C, H+1, W+1]
    return F.avg_pool2d(between, 2, stride=1)


def upsample(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 2H, 2W], y[2i] = (x[i-1] + 3 x[i]) / 4, y[2i+1] the mirror image."""
    return blur(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def downsample(x: Tensor) -> Tensor:
    """[B, C, H, W], H and W even -> [B, C, H/2, W/2], the transpose of `upsample` over 4.

    y[i] = (x[2i-1] + 3 x[2i] + 3 x[2i+1] + x[2i+2]) / 8 along each axis.
    """
    return F.avg_pool2d(blur(x), 2)

"""Resampling by two with the binomial filter [1, 2, 1] / 4 along each axis; zeros lie outside.

Together with the repetition or the averaging of pixel pairs it makes [1, 3, 3, 1] / 8, the bilinear
filter of StyleGAN2 and R3GAN (whose setting "[1, 2, 1]" is convolved with [1, 1]). It is symmetric:
neither direction shifts the image, and both commute with flips. As with the zero padding of
convolutions (and in the published networks) a border pixel misses its outer neighbour's share: a
constant keeps its value but on the outermost rows and columns, where blurring and up-sampling leave
3/4 of it, down-sampling 7/8.

Written with average pooling: [1, 2, 1] = [1, 1] * [1, 1]. That has a second derivative, keeps the
memory format (on the CPU channels-last is ten times faster), a compiler fuses it, and it is
deterministic on GPUs, where the gradient of bilinear interpolation is not.
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

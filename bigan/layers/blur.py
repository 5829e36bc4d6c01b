"""The low-pass filter [1, 3, 3, 1] / 8 along each axis, around strided convolutions (StyleGAN2).

Zhang 2019 (arXiv:1904.11486): filtering before every second pixel is dropped, or after zeros were
put between pixels, keeps a network (nearly) free of aliasing. The filter is [1, 1] / 2 convolved
three times with itself, hence three means of 2 x 2 pixels: pooling, which has a second derivative,
keeps the memory format and is deterministic on GPUs. Images and shortcuts, without a convolution in
between, are resampled by the same filter in `bigan.layers.binomial`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def blur(x: Tensor, padding: int) -> Tensor:
    """[B, C, H, W] -> [B, C, H + 2p - 3, W + 2p - 3], after p = 0 .. 3 zeros on every side."""
    # A mean that reaches one pixel beyond the map finds all of it that is not zero: the zeros may
    # as well be added between the means.
    for i in range(3):
        x = F.avg_pool2d(x, 2, stride=1, padding=int(i < padding))
    return x

"""The low-pass filter [1, 3, 3, 1] / 8 along each axis, for strided convolutions (StyleGAN2).

Filtering before a convolution of stride 2, or after a transposed one, reduces aliasing (Zhang 2019,
arXiv:1904.11486). The filter is the convolution of three [1, 1] / 2, so it is implemented as three
average poolings of 2 x 2, which have a second derivative, preserve the memory format and are
deterministic on GPUs. Images and shortcuts, which are resampled without a convolution, use the same
filter in `bigan.layers.binomial`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def blur(x: Tensor, padding: int) -> Tensor:
    """[B, C, H, W] -> [B, C, H + 2p - 3, W + 2p - 3], with p = 0 .. 3 zeros on every side."""
    # Padding by one before each of p poolings equals padding by p before the first one.
    for i in range(3):
        x = F.avg_pool2d(x, 2, stride=1, padding=int(i < padding))
    return x

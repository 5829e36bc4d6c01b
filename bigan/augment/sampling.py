"""Resampling of images that is differentiable to any order.

`grid_sample` has no double backward, which gradient penalties need. Here images are resampled by
gathers, which are linear in the images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bigan.transparency import has_alpha


def integers(uniform: Tensor, num: int) -> Tensor:
    """Uniform int64 in [0, num), num < 2**24, from uniform float32 in [0, 1).

    The product of num and the largest float32 below 1 is not rounded up to num.
    """
    return (uniform * num).long()


def on_colors(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of the color channels of images [m, C, H, W]; alpha, if there is one, is kept."""
    if not has_alpha(images.shape[1]):
        return change(images)
    return torch.cat([change(images[:, :-1]), images[:, -1:]], dim=1)


def reflect(positions: Tensor, size: int) -> Tensor:
    """Positions (int or float, any value) reflected into [0, size - 1].

    The edge pixel is not repeated: -1 becomes 1, and `size` becomes size - 2.
    """
    return (size - 1) - ((positions % (2 * (size - 1))) - (size - 1)).abs()


def take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """out[m, c, i, j] = images[m, c, rows[m, i], columns[m, j]], of shape [m, C, I, J].

    `rows` is int64 [m, I], `columns` int64 [m, J]. If an index occurs at most twice per axis, as in
    every use here but quarter turns of images more than about 1.5 times as long as wide, the
    gradient sums at most two numbers and is deterministic on CUDA.
    """
    num_channels, width = images.shape[1], images.shape[3]
    picked = images.gather(2, rows[:, None, :, None].expand(-1, num_channels, -1, width))
    height = picked.shape[2]
    return picked.gather(3, columns[:, None, None, :].expand(-1, num_channels, height, -1))


def bilinear(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Images [m, C, H, W] at positions `y`, `x` [m, I, J] in pixels: [m, C, I, J].

    0 is the centre of the first pixel; positions must lie in [0, H - 1) and [0, W - 1). The
    gradient sums many numbers into one pixel, so on CUDA it is only deterministic with
    `torch.use_deterministic_algorithms(True)`.
    """
    num_channels, width = images.shape[1], images.shape[3]
    top, left = y.floor(), x.floor()
    below, right = (rest[:, None].flatten(2).to(images.dtype) for rest in (y - top, x - left))
    corner = (top.long() * width + left.long())[:, None].flatten(2).expand(-1, num_channels, -1)
    flat = images.flatten(2)
    upper = torch.lerp(flat.gather(2, corner), flat.gather(2, corner + 1), right)
    corner = corner + width
    lower = torch.lerp(flat.gather(2, corner), flat.gather(2, corner + 1), right)
    return torch.lerp(upper, lower, below).unflatten(2, y.shape[1:])

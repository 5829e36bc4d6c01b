"""Minibatch standard deviation (Karras et al. 2018, arXiv:1710.10196, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigan.layers.precision import at_least_float32


class MinibatchStdDev(nn.Module):
    """x [B, C, H, W] -> [B, C + num_channels, H, W]: how much a group of images varies.

    The standard deviation over a group's images, of each channel at each position, is averaged
    over positions and channels, and appended as a constant map to every image of the group. With
    `num_channels` F the channels are split into F runs of C / F that are averaged apart
    (StyleGAN2). The discriminator sees a lack of variety that no single image shows.

    A group is `group` *consecutive* images (published code takes every (B / group)-th). So a slice
    of the global batch, which is what a process or a micro-batch receives, makes the same groups
    as the whole, and a batch that joins real and generated images compares like with like, as long
    as each part holds a multiple of `group` images: whoever sets batch sizes has to see to it. A
    batch smaller than `group` is one group; any other must be a multiple of it.
    """

    EPS = 1e-8  # added to the variance

    def __init__(self, group: int, num_channels: int = 1) -> None:
        super().__init__()
        self.group = group
        self.num_channels = num_channels

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        group = min(self.group, batch)
        if batch % group:
            raise ValueError(
                f"minibatch standard deviation: {batch} images cannot be split into groups of "
                f"{group}; use a batch (micro-batch) that is a multiple of {group}"
            )
        if channels % self.num_channels:
            raise ValueError(
                f"minibatch standard deviation: {channels} channels cannot be split into "
                f"{self.num_channels} equal parts; use num_channels=1"
            )
        # [B / group, group, F, C / F, H, W]; float32, as squares of half precision overflow.
        y = at_least_float32(x).unflatten(1, (self.num_channels, -1)).unflatten(0, (-1, group))
        variance = (y - y.mean(dim=1, keepdim=True)).square().mean(dim=1)
        # The root's slope is infinite at zero: the epsilon keeps a group of equal images finite,
        # also in a second derivative.
        deviation = (variance + self.EPS).sqrt().mean(dim=(2, 3, 4))  # [B / group, F]
        # expand and flatten rather than repeat_interleave, whose output size the compiler and the
        # host would have to be told.
        extra = deviation[:, None, :].expand(-1, group, -1).flatten(0, 1)[..., None, None]
        return torch.cat([x, extra.to(x.dtype).expand(-1, -1, height, width)], dim=1)

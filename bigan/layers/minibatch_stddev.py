"""Minibatch standard deviation (Karras et al. 2018, arXiv:1710.10196, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigan.layers.precision import at_least_float32


class MinibatchStdDev(nn.Module):
    """x [B, C, H, W] -> [B, C + num_channels, H, W]: append the deviation within groups of images.

    The standard deviation over the images of a group, of each channel at each position, is averaged
    over positions and channels, and appended as a constant map to every image of the group. With
    `num_channels` F the channels are split into F runs of C / F that are averaged separately
    (StyleGAN2). It lets the discriminator detect a lack of variation between images.

    A group is `group` *consecutive* images (in published code every (B / group)-th image). A slice
    of the global batch, such as a rank's or a micro-batch, then has the same groups as the global
    batch, and concatenated real and generated images are not mixed in a group, if each part is a
    multiple of `group`; the config is checked for that. A batch smaller than `group` is one group.

    Raises ValueError if any other batch is not a multiple of `group`.
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
                f"{group}; use a batch and a micro-batch that are multiples of {group}"
            )
        if channels % self.num_channels:
            raise ValueError(
                f"minibatch standard deviation: {channels} channels cannot be split into "
                f"{self.num_channels} equal parts; use num_channels=1"
            )
        # [B / group, group, F, C / F, H, W]; float32, as squares of half precision overflow.
        y = at_least_float32(x).unflatten(1, (self.num_channels, -1)).unflatten(0, (-1, group))
        variance = (y - y.mean(dim=1, keepdim=True)).square().mean(dim=1)
        # The derivative of the root is infinite at zero: the epsilon keeps it, and the second
        # derivative, finite for a group of equal images.
        deviation = (variance + self.EPS).sqrt().mean(dim=(2, 3, 4))  # [B / group, F]
        # Not repeat_interleave, which computes the size of its output on the host.
        extra = deviation[:, None, :].expand(-1, group, -1).flatten(0, 1)[..., None, None]
        return torch.cat([x, extra.to(x.dtype).expand(-1, -1, height, width)], dim=1)

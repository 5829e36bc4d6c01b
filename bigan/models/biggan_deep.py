"""BigGAN-deep (Brock, Donahue & Simonyan 2019, arXiv:1809.11096, appendix B, tables 7 to 9).

BigGAN with four times the depth and fewer parameters: two bottleneck blocks per resolution, with
shortcuts that are the identity on the channels common to both ends. Each conditional BatchNorm
receives all of z. The widths of the discriminator mirror those of the generator. Parameter counts
are exactly those of the published implementations.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from bigan.config import Positive
from bigan.image_size import shown
from bigan.layers import init
from bigan.layers.attention import SelfAttention
from bigan.layers.batchnorm import BatchNorm2d, ConditionalBatchNorm2d
from bigan.layers.spectral import SNConv2d, SNEmbedding, SNLinear
from bigan.models.biggan import WIDTHS, SharedConfig

# Ratio of the channels at a block's wider end to those of its 3 x 3 convolutions.
BOTTLENECK = 4


class Config(SharedConfig):
    """The shape and the initial values of both networks.

    No network is published for 16 px, and no definite one for 32 px: those two are ours, with a
    constant width like BigGAN's for CIFAR. So is the discriminator at 64 px, which mirrors the
    generator: public implementations differ, and the paper begins at 128 px.
    """

    name: Literal["biggan_deep"]
    z_dim: Positive = 128  # never split: the first layer and every block receive all of z
    channels: Positive = 128

    @model_validator(mode="after")
    def _shapes(self) -> Config:
        # No block has the last width at its wider end.
        units = min(WIDTHS[self.nominal_resolution][:-1])
        if self.channels * units % BOTTLENECK:
            multiple = BOTTLENECK // units  # units is 1, 2 or 4
            nearest = max(multiple, round(self.channels / multiple) * multiple)
            raise ValueError(
                f"channels = {self.channels} gives blocks of {self.channels * units} channels at "
                f"{shown(self.resolution)} px, and a bottleneck needs a multiple of {BOTTLENECK}; "
                f"use channels={nearest}"
            )
        layers = ((4 * 2**i, width) for i, width in enumerate(self.generator_widths))
        self.check_attention(layers, "channels")
        return self


class GeneratorBlock(nn.Module):
    """x [B, in, H, W], cond [B, cond_dim] -> [B, out, H, W], or [B, out, 2H, 2W] with `upsample`.

    out <= in: the shortcut keeps the first `out` channels and drops the others.
    """

    def __init__(
        self, in_channels: int, out_channels: int, cond_dim: int, upsample: bool, config: Config
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.upsample = upsample
        hidden = in_channels // BOTTLENECK
        eps = {"eps": config.bn_eps, "sn_eps": config.sn_eps}
        self.bn1 = ConditionalBatchNorm2d(in_channels, cond_dim, **eps)
        self.conv1 = SNConv2d(in_channels, hidden, 1, eps=config.sn_eps)
        self.bn2 = ConditionalBatchNorm2d(hidden, cond_dim, **eps)
        self.conv2 = SNConv2d(hidden, hidden, 3, eps=config.sn_eps)
        self.bn3 = ConditionalBatchNorm2d(hidden, cond_dim, **eps)
        self.conv3 = SNConv2d(hidden, hidden, 3, eps=config.sn_eps)
        self.bn4 = ConditionalBatchNorm2d(hidden, cond_dim, **eps)
        self.conv4 = SNConv2d(hidden, out_channels, 1, eps=config.sn_eps)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.bn1(x, cond)))
        h = F.relu(self.bn2(h, cond))
        x = x[:, : self.out_channels]
        if self.upsample:
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        h = self.conv2(h)
        h = self.conv3(F.relu(self.bn3(h, cond)))
        return self.conv4(F.relu(self.bn4(h, cond))) + x


class Generator(nn.Module):
    """z [B, z_dim], labels int64 [B] -> images [B, C, H, W] in [-1, 1].

    The shared class embedding concatenated with z determines the base map and conditions all
    blocks. The second of the two blocks per resolution reduces the channels and upsamples.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        widths, eps = config.generator_widths, config.sn_eps
        cond_dim = config.shared_dim + config.z_dim
        # As published, neither spectrally normalized nor orthogonally regularized.
        self.shared = nn.Embedding(config.num_classes, config.shared_dim)
        self.first = SNLinear(cond_dim, math.prod(config.base) * widths[0], eps=eps)
        self.blocks = nn.ModuleList()
        self.attention = nn.ModuleDict()  # index of the block before it -> layer
        resolution = 4  # nominal
        for before, after in pairwise(widths):
            self.blocks.append(GeneratorBlock(before, before, cond_dim, False, config))
            self.blocks.append(GeneratorBlock(before, after, cond_dim, True, config))
            resolution *= 2
            if resolution in config.attention_resolutions:
                self.attention[str(len(self.blocks) - 1)] = SelfAttention(after, eps)
        self.bn = BatchNorm2d(widths[-1], config.bn_eps)
        self.to_image = SNConv2d(widths[-1], config.image_channels, 3, eps=eps)

    def init_weights(self, generator: torch.Generator) -> None:
        """Set all parameters and buffers, from `generator` alone."""
        init.init_weights(self, generator, self.config.init)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        cond = torch.cat([self.shared(labels), z], dim=1)
        h = self.first(cond).unflatten(1, (-1, *self.config.base))
        for i, block in enumerate(self.blocks):
            h = block(h, cond)
            if str(i) in self.attention:
                h = self.attention[str(i)](h)
        return torch.tanh(self.to_image(F.relu(self.bn(h))))


class DiscriminatorBlock(nn.Module):
    """[B, in, H, W] -> [B, out, H, W], or [B, out, H/2, W/2] with `downsample`.

    out >= in: the shortcut keeps all channels and appends a 1 x 1 convolution of them.
    """

    def __init__(self, in_channels: int, out_channels: int, downsample: bool, eps: float) -> None:
        super().__init__()
        self.downsample = downsample
        hidden = out_channels // BOTTLENECK
        self.conv1 = SNConv2d(in_channels, hidden, 1, eps=eps)
        self.conv2 = SNConv2d(hidden, hidden, 3, eps=eps)
        self.conv3 = SNConv2d(hidden, hidden, 3, eps=eps)
        self.conv4 = SNConv2d(hidden, out_channels, 1, eps=eps)
        missing = out_channels - in_channels
        self.shortcut = SNConv2d(in_channels, missing, 1, eps=eps) if missing else None

    def forward(self, x: Tensor) -> Tensor:
        # Not in place: the shortcut needs x before the activation.
        h = self.conv1(F.relu(x))
        h = self.conv2(F.relu(h))
        h = F.relu(self.conv3(F.relu(h)))
        if self.downsample:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        if self.shortcut is not None:
            x = torch.cat([x, self.shortcut(x)], dim=1)
        return self.conv4(h) + x


class Discriminator(nn.Module):
    """images [B, C, H, W] in [-1, 1], labels int64 [B] -> logits [B], by projection.

    A 3 x 3 convolution of the image, then per resolution one block that downsamples and adds
    channels, and one that does neither. logit = w . h + b + embedding(label) . h with h the sum
    over positions of the last features (Miyato & Koyama 2018, arXiv:1802.05637).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        eps = config.sn_eps
        widths = config.generator_widths[::-1]
        self.from_image = SNConv2d(config.image_channels, widths[0], 3, eps=eps)
        self.blocks = nn.ModuleList()
        self.attention = nn.ModuleDict()  # index of the block before it -> layer
        resolution = config.nominal_resolution
        for before, after in pairwise(widths):
            self.blocks.append(DiscriminatorBlock(before, after, True, eps))
            self.blocks.append(DiscriminatorBlock(after, after, False, eps))
            resolution //= 2
            if resolution in config.attention_resolutions:
                self.attention[str(len(self.blocks) - 1)] = SelfAttention(after, eps)
        self.linear = SNLinear(widths[-1], 1, eps=eps)
        self.embedding = SNEmbedding(config.num_classes, widths[-1], eps=eps)

    def init_weights(self, generator: torch.Generator) -> None:
        """Set all parameters and buffers, from `generator` alone."""
        init.init_weights(self, generator, self.config.init)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        h = self.from_image(images)
        for i, block in enumerate(self.blocks):
            h = block(h)
            if str(i) in self.attention:
                h = self.attention[str(i)](h)
        h = F.relu(h).sum(dim=(2, 3))
        return self.linear(h).squeeze(1) + (self.embedding(labels) * h).sum(dim=1)

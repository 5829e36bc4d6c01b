"""BigGAN (Brock, Donahue & Simonyan 2019, arXiv:1809.11096): generator and discriminator.

Residual networks with spectral normalization everywhere, a class-conditional BatchNorm generator
whose latent is split over the blocks (hierarchical z), one self-attention layer and a projection
discriminator. Widths and parameter counts are exactly those of the published implementations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from bigan.config import Positive, PositiveFloat
from bigan.image_size import shown
from bigan.layers import init
from bigan.layers.attention import SelfAttention, check_resolutions
from bigan.layers.batchnorm import BatchNorm2d, ConditionalBatchNorm2d
from bigan.layers.spectral import SNConv2d, SNEmbedding, SNLinear
from bigan.models.base import ModelConfig

# Channels of the generator's maps in units of `channels`, from the base up, by nominal resolution.
# BigGAN-deep has the same; its discriminator mirrors them.
WIDTHS: dict[int, tuple[int, ...]] = {
    16: (4, 4, 4),
    32: (4, 4, 4, 4),
    64: (16, 16, 8, 4, 2),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
    512: (16, 16, 8, 8, 4, 2, 1, 1),
}
# Output widths of the blocks of BigGAN's discriminator, of which the first NUM_HALVINGS halve the
# image.
DISCRIMINATOR_WIDTHS: dict[int, tuple[int, ...]] = {
    16: (4, 4, 4),
    32: (4, 4, 4, 4),
    64: (1, 2, 4, 8, 16),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
    512: (1, 1, 2, 4, 8, 8, 16, 16),
}
NUM_HALVINGS = {16: 2, 32: 2, 64: 4, 128: 5, 256: 6, 512: 7}


class SharedConfig(ModelConfig):
    """What the configs of BigGAN and of BigGAN-deep have in common.

    The epsilons are the paper's, 1e-4 for low precision (appendix C). The authors' PyTorch code
    uses 1e-6 and 1e-5.
    """

    doublings: ClassVar[tuple[int, int]] = (2, 7)

    num_classes: Positive
    z_dim: Positive
    image_channels: Literal[1, 2, 3, 4] = 3
    channels: Positive  # width multiplier "ch"
    shared_dim: Positive = 128  # class embedding shared by all layers that are given the class
    # Nominal resolutions of maps; no effect where a network has no such map.
    attention_resolutions: tuple[Positive, ...] = (64,)
    init: Literal["orthogonal", "normal"] = "orthogonal"  # normal: N(0, 0.02^2), used for CIFAR
    sn_eps: PositiveFloat = 1e-4
    bn_eps: PositiveFloat = 1e-4

    @property
    def generator_widths(self) -> tuple[int, ...]:
        """Channels of the generator's maps from the base up to the resolution."""
        return tuple(self.channels * width for width in WIDTHS[self.nominal_resolution])

    @field_validator("attention_resolutions")
    @classmethod
    def _reachable(cls, resolutions: tuple[int, ...]) -> tuple[int, ...]:
        return check_resolutions(resolutions)

    def check_attention(self, layers: Iterable[tuple[int, int]], keys: str) -> None:
        """ValueError if attention is impossible at one of the (resolution, channels) `layers`.

        Resolutions are nominal. `keys` names the config keys that decide the channels.
        """
        for resolution, channels in layers:
            if resolution in self.attention_resolutions and channels % 8:
                raise ValueError(
                    f"attention_resolutions: {resolution} has {channels} channels, and attention "
                    "needs a multiple of 8; leave it out (attention_resolutions=[]) or use a "
                    f"multiple of 8 for {keys}"
                )


class Config(SharedConfig):
    """The shape and the initial values of both networks."""

    name: Literal["biggan"]
    z_dim: Positive  # of the complete latent; with hierarchical=true a multiple of blocks + 1
    channels: Positive = 96
    discriminator_channels: Positive | None = None  # its own multiplier; none: `channels`
    hierarchical: bool = True  # a slice of z for the first layer and for each block

    @property
    def num_blocks(self) -> int:
        """Residual blocks of the generator, each doubling the resolution."""
        return self.num_doublings

    @property
    def z_chunk(self) -> int:
        """Entries of z for the first layer (and for each block, if hierarchical)."""
        return self.z_dim // (self.num_blocks + 1) if self.hierarchical else self.z_dim

    @property
    def discriminator_widths(self) -> tuple[int, ...]:
        """Channels leaving each discriminator block."""
        channels = self.discriminator_channels or self.channels
        return tuple(channels * width for width in DISCRIMINATOR_WIDTHS[self.nominal_resolution])

    @model_validator(mode="after")
    def _shapes(self) -> Config:
        slots = self.num_blocks + 1
        if self.hierarchical and self.z_dim % slots:
            nearest = max(slots, round(self.z_dim / slots) * slots)
            raise ValueError(
                f"z_dim = {self.z_dim} cannot be split evenly over the {slots} slots (first layer "
                f"and {self.num_blocks} blocks) of a {shown(self.resolution)} px hierarchical "
                f"generator; use z_dim={nearest}, or hierarchical=false"
            )
        size = self.nominal_resolution
        halving = self.discriminator_widths[: NUM_HALVINGS[size]]
        layers = [(8 * 2**i, width) for i, width in enumerate(self.generator_widths[1:])]
        layers += [(size // 2**i, width) for i, width in enumerate(halving, start=1)]
        self.check_attention(layers, "channels and discriminator_channels")
        return self


class GeneratorBlock(nn.Module):
    """[B, in, H, W], cond [B, cond_dim] -> [B, out, 2H, 2W]."""

    def __init__(self, in_channels: int, out_channels: int, cond_dim: int, config: Config) -> None:
        super().__init__()
        eps = {"eps": config.bn_eps, "sn_eps": config.sn_eps}
        self.bn1 = ConditionalBatchNorm2d(in_channels, cond_dim, **eps)
        self.conv1 = SNConv2d(in_channels, out_channels, 3, eps=config.sn_eps)
        self.bn2 = ConditionalBatchNorm2d(out_channels, cond_dim, **eps)
        self.conv2 = SNConv2d(out_channels, out_channels, 3, eps=config.sn_eps)
        self.shortcut = SNConv2d(in_channels, out_channels, 1, eps=config.sn_eps)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h = F.relu(self.bn1(x, cond))
        h = self.conv1(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = self.conv2(F.relu(self.bn2(h, cond)))
        # A 1x1 convolution commutes with nearest-neighbour upsampling and is cheaper before it.
        return h + F.interpolate(self.shortcut(x), scale_factor=2.0, mode="nearest")


class Generator(nn.Module):
    """z [B, z_dim], labels int64 [B] -> images [B, C, H, W] in [-1, 1].

    The base map is computed from the first slice of z. Each block is conditioned on the shared
    class embedding concatenated with its own slice. With `hierarchical=False` the map is computed
    from all of z, and blocks are conditioned on the class alone.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        widths = config.generator_widths
        cond_dim = config.shared_dim + (config.z_chunk if config.hierarchical else 0)
        # As published, neither spectrally normalized nor orthogonally regularized.
        self.shared = nn.Embedding(config.num_classes, config.shared_dim)
        self.first = SNLinear(config.z_chunk, math.prod(config.base) * widths[0], eps=config.sn_eps)
        self.blocks = nn.ModuleList()
        self.attention = nn.ModuleDict()  # index of the block before it -> layer
        for i, (before, after) in enumerate(pairwise(widths)):
            self.blocks.append(GeneratorBlock(before, after, cond_dim, config))
            if 8 * 2**i in config.attention_resolutions:
                self.attention[str(i)] = SelfAttention(after, config.sn_eps)
        self.bn = BatchNorm2d(widths[-1], config.bn_eps)
        self.to_image = SNConv2d(widths[-1], config.image_channels, 3, eps=config.sn_eps)

    def init_weights(self, generator: torch.Generator) -> None:
        """Set all parameters and buffers, from `generator` alone."""
        init.init_weights(self, generator, self.config.init)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        shared = self.shared(labels)
        if self.config.hierarchical:
            first, *chunks = z.split(self.config.z_chunk, dim=1)
            conds = [torch.cat([shared, chunk], dim=1) for chunk in chunks]
        else:
            first, conds = z, [shared] * len(self.blocks)
        h = self.first(first).unflatten(1, (-1, *self.config.base))
        for i, (block, cond) in enumerate(zip(self.blocks, conds, strict=True)):
            h = block(h, cond)
            if str(i) in self.attention:
                h = self.attention[str(i)](h)
        return torch.tanh(self.to_image(F.relu(self.bn(h))))


class DiscriminatorBlock(nn.Module):
    """[B, in, H, W] -> [B, out, H/2, W/2], or [B, out, H, W] without `halve`.

    The block that receives the image (`first`) has no activation before its first convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, first: bool, halve: bool, eps: float
    ) -> None:
        super().__init__()
        self.first = first
        self.halve = halve
        self.conv1 = SNConv2d(in_channels, out_channels, 3, eps=eps)
        self.conv2 = SNConv2d(out_channels, out_channels, 3, eps=eps)
        learned = halve or in_channels != out_channels
        self.shortcut = SNConv2d(in_channels, out_channels, 1, eps=eps) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        # Not in place: the shortcut needs x before the activation.
        h = self.conv1(x if self.first else F.relu(x))
        h = self.conv2(F.relu(h))
        if self.halve:
            # Average pooling commutes with the 1x1 shortcut, which is cheaper after it.
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return h + (x if self.shortcut is None else self.shortcut(x))


class Discriminator(nn.Module):
    """images [B, C, H, W] in [-1, 1], labels int64 [B] -> logits [B], by projection.

    logit = w . h + b + embedding(label) . h with h the sum over positions of the last features
    (Miyato & Koyama 2018, arXiv:1802.05637).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        eps = config.sn_eps
        widths = (config.image_channels, *config.discriminator_widths)
        self.blocks = nn.ModuleList()
        self.attention = nn.ModuleDict()  # index of the block before it -> layer
        resolution = config.nominal_resolution
        for i, (before, after) in enumerate(pairwise(widths)):
            halve = i < NUM_HALVINGS[config.nominal_resolution]
            self.blocks.append(DiscriminatorBlock(before, after, i == 0, halve, eps))
            if halve:
                resolution //= 2
                if resolution in config.attention_resolutions:
                    self.attention[str(i)] = SelfAttention(after, eps)
        self.linear = SNLinear(widths[-1], 1, eps=eps)
        self.embedding = SNEmbedding(config.num_classes, widths[-1], eps=eps)

    def init_weights(self, generator: torch.Generator) -> None:
        """Set all parameters and buffers, from `generator` alone."""
        init.init_weights(self, generator, self.config.init)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        h = images
        for i, block in enumerate(self.blocks):
            h = block(h)
            if str(i) in self.attention:
                h = self.attention[str(i)](h)
        h = F.relu(h).sum(dim=(2, 3))
        return self.linear(h).squeeze(1) + (self.embedding(labels) * h).sum(dim=1)

"""R3GAN (Huang et al. 2024, "The GAN is dead; long live the GAN!", arXiv:2501.05441).

Two residual networks that mirror each other, of inverted bottlenecks with grouped convolutions.
They have no normalization, attention, style modulation, minibatch statistics or tanh. Stable
training depends on the initial values (Fixup, Zhang et al. 2019, arXiv:1901.09321) and on the
relativistic loss with R1 and R2 penalties at every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from bigan.config import Positive
from bigan.image_size import shown, sizes_up_to
from bigan.layers import binomial, init
from bigan.layers.precision import without_autocast
from bigan.models.base import ModelConfig

SLOPE = 0.2  # of the leaky ReLU below zero
LRELU_GAIN = math.sqrt(2 / (1 + SLOPE**2))  # keeps the second moment (He et al. 2015, eq. 15)
MAX_WIDTH = 768
WIDEST_RESOLUTION = 32  # highest one with MAX_WIDTH; each doubling above it halves the width


class Config(ModelConfig):
    """The shape and the initial values of both networks.

    The defaults are those of the published FFHQ and CIFAR-10 networks. The published ImageNet
    networks have `conditional: true`, `group_size: 32` and 1536 channels in each of their 4 (32 px)
    or 5 stages (64 px).
    """

    doublings: ClassVar[tuple[int, int]] = (0, 8)

    name: Literal["r3gan"]
    num_classes: Positive
    conditional: bool = False  # false: labels have no effect
    z_dim: Positive = 64
    image_channels: Literal[1, 2, 3, 4] = 3
    # By stage from the base up; none: 768, halved above the nominal resolution 32.
    widths: tuple[Positive, ...] | None = None
    blocks_per_stage: Positive = 2
    expansion: Positive = 2  # hidden channels of a block, in units of its width
    group_size: Positive = 16  # channels in a group of the 3 x 3 convolutions
    embedding_dim: Positive = 64  # class embedding of the generator; the discriminator's: widths[0]

    @property
    def is_conditional(self) -> bool:
        return self.conditional

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Channels of each stage, from the base up to the resolution."""
        if self.widths is not None:
            return self.widths
        sizes = [4 * 2**i for i in range(self.num_stages)]
        return tuple(MAX_WIDTH * WIDEST_RESOLUTION // max(r, WIDEST_RESOLUTION) for r in sizes)

    @property
    def num_stages(self) -> int:
        """Resolutions at which each network has residual blocks."""
        return self.num_doublings + 1

    @property
    def num_blocks(self) -> int:
        """Residual blocks of each network."""
        return self.num_stages * self.blocks_per_stage

    @model_validator(mode="after")
    def _shapes(self) -> Config:
        if self.conditional and self.num_classes == 1:
            raise ValueError(
                "conditional: there are no labels to condition on, num_classes = 1; "
                "use conditional=false"
            )
        if len(self.stage_widths) != self.num_stages:
            stages = ", ".join(map(shown, sizes_up_to(self.resolution)))
            default = list(self.model_copy(update={"widths": None}).stage_widths)
            raise ValueError(
                f"widths has {len(self.stage_widths)} entries, and a "
                f"{shown(self.resolution)} px network has {self.num_stages} stages ({stages} px); "
                f"use one width per stage, for example widths={default}"
            )
        step = self.group_size // math.gcd(self.group_size, self.expansion)
        for width in self.stage_widths:
            if width % step:
                nearest = max(step, round(width / step) * step)
                raise ValueError(
                    f"widths: the {self.expansion} x {width} hidden channels of a block cannot be "
                    f"split into groups of group_size = {self.group_size}; use {nearest} for "
                    f"{width}, or another group_size"
                )
        return self


class Drawn(init.Layer):
    """A `weight` with initial values N(0, std^2), and a `bias` with initial value 0.

    Built with zeros: call `reset_parameters`.
    """

    bias: nn.Parameter | None

    def __init__(self, shape: Sequence[int], std: float, bias: bool = False) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.zeros(tuple(shape)))
        self.register_parameter("bias", nn.Parameter(torch.zeros(shape[0])) if bias else None)

    @torch.no_grad()
    def reset_parameters(
        self, generator: torch.Generator, scheme: init.Scheme = "orthogonal"
    ) -> None:
        """Weight N(0, std^2) whatever the scheme, bias 0."""
        draws = torch.empty(self.weight.shape).normal_(generator=generator)
        self.weight.copy_(draws * self.std)
        if self.bias is not None:
            self.bias.zero_()


class Linear(Drawn):
    """[B, in] -> [B, out]; std = 1 / sqrt(in), no bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__((out_features, in_features), 1 / math.sqrt(in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Embedding(Drawn):
    """labels int64 [B] -> [B, dim], a linear map of one-hot labels: std = gain / sqrt(classes)."""

    def __init__(self, num_classes: int, dim: int, gain: float = 1.0) -> None:
        super().__init__((num_classes, dim), gain / math.sqrt(num_classes))

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(labels, self.weight)


class Conv2d(Drawn):
    """[B, in, H, W] -> [B, out, H, W]: odd kernel, zero padding; std = gain / sqrt(fan-in)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        groups: int = 1,
        bias: bool = False,
        gain: float = 1.0,
    ) -> None:
        shape = (out_channels, in_channels // groups, kernel_size, kernel_size)
        super().__init__(shape, gain / math.sqrt(math.prod(shape[1:])), bias)
        self.padding = kernel_size // 2
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding, groups=self.groups)


class ResidualBlock(nn.Module):
    """[B, width, H, W] -> the same: x + 1x1(lrelu(grouped 3x3(lrelu(1x1(x)) + b)) + b)).

    The last convolution is initially 0, so that every block is initially the identity. Fixup scales
    the initial values of the other m - 1 = 2 by L^(-1 / (2m - 2)) = L^(-1/4) with L the number of
    blocks, so that one optimizer step changes the output equally at any depth.
    """

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        hidden = width * config.expansion
        groups = hidden // config.group_size
        gain = LRELU_GAIN * config.num_blocks**-0.25
        self.conv1 = Conv2d(width, hidden, 1, bias=True, gain=gain)
        self.conv2 = Conv2d(hidden, hidden, 3, groups=groups, bias=True, gain=gain)
        self.conv3 = Conv2d(hidden, width, 1, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv1(x), SLOPE)
        h = F.leaky_relu(self.conv2(h), SLOPE)
        return x + self.conv3(h)


class Upsample(nn.Module):
    """[B, in, H, W] -> [B, out, 2H, 2W]: 1 x 1 convolution, then upsampling (they commute)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        same = in_channels == out_channels
        self.conv = nn.Identity() if same else Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return binomial.upsample(self.conv(x))


class Downsample(nn.Module):
    """[B, in, H, W] -> [B, out, H/2, W/2]: downsampling, then 1 x 1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        same = in_channels == out_channels
        self.conv = nn.Identity() if same else Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(binomial.downsample(x))


class Basis(Drawn):
    """[B, in] -> [B, width, *base]: a learned map per channel, scaled by a linear layer."""

    def __init__(self, in_features: int, width: int, base: tuple[int, int]) -> None:
        super().__init__((width, *base), std=1.0)
        self.linear = Linear(in_features, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.linear(x)[:, :, None, None]


class Readout(Drawn):
    """[B, width, *base] -> [B, out]: dot product with a learned map per channel, then linear.

    Equal to a depth-wise convolution of the size of the base without padding. There are no biases
    because the relativistic loss depends only on differences of logits.
    """

    def __init__(self, width: int, out_features: int, base: tuple[int, int]) -> None:
        super().__init__((width, *base), std=1 / math.sqrt(math.prod(base)))
        self.linear = Linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((x * self.weight).sum(dim=(2, 3)))


def stage(width: int, config: Config) -> nn.Sequential:
    """The residual blocks of one resolution."""
    return nn.Sequential(*(ResidualBlock(width, config) for _ in range(config.blocks_per_stage)))


class Generator(nn.Module):
    """z [B, z_dim], labels int64 [B] -> images [B, C, H, W], unbounded (meant for [-1, 1])."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        widths = config.stage_widths
        self.embedding: Embedding | None = None
        latent_dim = config.z_dim
        if config.conditional:
            self.embedding = Embedding(config.num_classes, config.embedding_dim)
            latent_dim += config.embedding_dim
        self.basis = Basis(latent_dim, widths[0], config.base)
        self.stages = nn.ModuleList(stage(width, config) for width in widths)
        self.upsamples = nn.ModuleList(Upsample(*pair) for pair in pairwise(widths))
        self.to_image = Conv2d(widths[-1], config.image_channels, 1)

    def init_weights(self, generator: torch.Generator) -> None:
        """Set all parameters, from `generator` alone."""
        init.init_weights(self, generator)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        if self.embedding is not None:
            z = torch.cat([z, self.embedding(labels)], dim=1)
        first, *others = self.stages
        h = first(self.basis(z))
        for upsample, blocks in zip(self.upsamples, others, strict=True):
            h = blocks(upsample(h))
        return self.to_image(h)


class Discriminator(nn.Module):
    """images [B, C, H, W], labels int64 [B] -> logits [B], in float32 also under autocast.

    A conditional logit is the dot product of the readout with the class embedding. The initial
    values of the embedding are divided by the root of its length, so that the sum over its entries
    has the scale of one entry.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        widths = config.stage_widths[::-1]
        self.embedding: Embedding | None = None
        if config.conditional:
            gain = 1 / math.sqrt(widths[-1])
            self.embedding = Embedding(config.num_classes, widths[-1], gain)
        self.from_image = Conv2d(config.image_channels, widths[0], 1)
        self.stages = nn.ModuleList(stage(width, config) for width in widths)
        self.downsamples = nn.ModuleList(Downsample(*pair) for pair in pairwise(widths))
        features = widths[-1] if config.conditional else 1
        self.readout = Readout(widths[-1], features, config.base)

    def init_weights(self, generator: torch.Generator) -> None:
        """Set all parameters, from `generator` alone."""
        init.init_weights(self, generator)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        h = self.from_image(images)
        *others, last = self.stages
        for blocks, downsample in zip(others, self.downsamples, strict=True):
            h = downsample(blocks(h))
        h = last(h)
        # The loss depends on differences of logits, which half precision would round away.
        with without_autocast(h):
            features = self.readout(h)
            if self.embedding is None:
                return features.squeeze(1)
            return (features * self.embedding(labels)).sum(dim=1)

"""ProGAN (Karras et al. 2018, arXiv:1710.10196): progressive growing of both networks.

Equalized learning rate in all layers; pixelwise normalization in the generator, minibatch standard
deviation in the discriminator. Widths and structure are those of the paper's table 2.

Growth is done by the caller. The networks of a stage are those of `Config(resolution=R,
fading=...)`, and stages follow each other as R/2 stable, R fading, R stable. The width of a layer
depends only on its resolution, and layers are named by resolution (`blocks.8.conv1.weight`,
`to_image.8.weight`), so every parameter of the networks of R/2 has the same name and shape in those
of R. The exceptions are the image layers: a fading network has those of R/2 and R, a stable one
only that of R. To grow, build the networks of the next stage, initialise them, copy all
*parameters* that exist in both, and set `alpha`, a buffer of both networks that the schedule
determines. Resolutions in names are nominal: 4 is the base.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from bigan.config import Positive
from bigan.image_size import plain, scaled, shown
from bigan.layers import init
from bigan.layers.equalized import Equalized, EqualizedConv2d, EqualizedLinear
from bigan.layers.minibatch_stddev import MinibatchStdDev
from bigan.layers.pixelnorm import pixel_norm
from bigan.layers.resampling import enlarge, fade, shrink
from bigan.models.base import ModelConfig

GAIN = math.sqrt(2)  # of He et al. 2015, for layers that are followed by an activation


class Config(ModelConfig):
    """The shape and the initial values of both networks of one stage."""

    can_grow: ClassVar[bool] = True

    doublings: ClassVar[tuple[int, int]] = (0, 8)

    name: Literal["progan"]
    fading: bool = False  # blend resolution/2 and resolution with the networks' `alpha`
    num_classes: Positive
    conditional: bool = False
    z_dim: Positive = 512
    image_channels: Literal[1, 2, 3, 4] = 3
    # Layers at the nominal resolution R have base_channels / (R/2) channels,
    base_channels: Positive = 8192
    max_channels: Positive = 512  # up to this maximum
    minibatch_group: Annotated[int, Field(ge=2)] = 4  # of the minibatch standard deviation
    # Discriminator blocks pool before the bias and the activation of their second convolution, as
    # the authors' TensorFlow code does by default; their Theano code pools after them.
    fused_scale: bool = False

    @property
    def is_fading(self) -> bool:
        return self.fading

    @property
    def is_conditional(self) -> bool:
        return self.conditional

    @property
    def group(self) -> int:
        return self.minibatch_group

    def channels_at(self, resolution: int) -> int:
        """Channels at a nominal resolution: the published nf(stage) for 2**(stage + 1) px."""
        return min(self.base_channels // (resolution // 2), self.max_channels)

    @property
    def resolutions(self) -> list[int]:
        """4, 8, ..., nominal resolution: each network has one block per resolution."""
        return [4 * 2**i for i in range(self.num_doublings + 1)]

    @property
    def image_resolutions(self) -> list[int]:
        """Nominal resolutions with a layer between features and images, the lower one first."""
        return self.resolutions[-2:] if self.fading else self.resolutions[-1:]

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if self.fading and self.num_doublings == 0:
            larger = plain(scaled(self.resolution, 2))
            raise ValueError(
                f"fading: no network is smaller than resolution = {plain(self.resolution)}, which "
                f"would fade in; use fading=false, or resolution={larger}"
            )
        if self.conditional and self.num_classes == 1:
            raise ValueError(
                "conditional: there are no labels to condition on, num_classes = 1; "
                "use conditional=false"
            )
        if self.channels_at(self.nominal_resolution) == 0:
            raise ValueError(
                f"base_channels = {self.base_channels} leaves no channel at "
                f"{shown(self.resolution)} px; use base_channels={self.nominal_resolution // 2} or "
                "more"
            )
        return self


def _activated(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


class FirstBlock(init.Layer):
    """Latents [B, in] -> [B, out, *base]. The positions of a channel share one bias."""

    def __init__(self, in_features: int, out_channels: int, base: tuple[int, int]) -> None:
        super().__init__()
        self.base = base
        # In the paper this is a 4 x 4 convolution of z as a 1 x 1 map, whose fan-in includes 15
        # positions of padding: a quarter of the usual gain.
        area = math.prod(base)
        self.linear = EqualizedLinear(
            in_features, area * out_channels, bias=False, gain=GAIN / math.sqrt(area)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.conv = EqualizedConv2d(out_channels, out_channels, 3, gain=GAIN)

    @torch.no_grad()
    def reset_parameters(
        self, generator: torch.Generator, scheme: init.Scheme = "orthogonal"
    ) -> None:
        """Bias 0; nothing is drawn."""
        self.bias.zero_()

    def forward(self, z: Tensor) -> Tensor:
        h = self.linear(z).unflatten(1, (-1, *self.base)) + self.bias[:, None, None]
        h = pixel_norm(_activated(h))
        return pixel_norm(_activated(self.conv(h)))


class GeneratorBlock(nn.Module):
    """[B, in, H, W] -> [B, out, 2H, 2W]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualizedConv2d(in_channels, out_channels, 3, gain=GAIN)
        self.conv2 = EqualizedConv2d(out_channels, out_channels, 3, gain=GAIN)

    def forward(self, x: Tensor) -> Tensor:
        h = pixel_norm(_activated(self.conv1(enlarge(x))))
        return pixel_norm(_activated(self.conv2(h)))


class Generator(nn.Module):
    """z [B, z_dim], labels int64 [B] -> images [B, C, H, W], nominally in [-1, 1].

    The image layer is linear, so images are not bounded. z is normalized to a root mean square of
    1. With `conditional` the one-hot label is concatenated (published code does so before
    normalising; the difference is small, as a label adds 1 to a squared norm of z_dim). Otherwise
    labels have no effect.
    """

    alpha: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        in_features = config.z_dim + (config.num_classes if config.conditional else 0)
        self.blocks = nn.ModuleDict(
            {"4": FirstBlock(in_features, config.channels_at(4), config.base)}
        )
        for resolution in config.resolutions[1:]:
            before, after = config.channels_at(resolution // 2), config.channels_at(resolution)
            self.blocks[str(resolution)] = GeneratorBlock(before, after)
        self.to_image = nn.ModuleDict()
        for resolution in config.image_resolutions:
            channels = config.channels_at(resolution)
            self.to_image[str(resolution)] = EqualizedConv2d(channels, config.image_channels, 1)
        self.register_buffer("alpha", torch.zeros(()))

    def init_weights(self, generator: torch.Generator) -> None:
        """Set all parameters, from `generator` alone; alpha is 0 when fading, otherwise 1."""
        init.init_weights(self, generator)
        self.alpha.fill_(0.0 if self.config.fading else 1.0)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        h = pixel_norm(z)
        if self.config.conditional:
            classes = torch.arange(self.config.num_classes, device=labels.device)
            h = torch.cat([h, (labels[:, None] == classes).to(h.dtype)], dim=1)
        for block in self.blocks.values():
            below, h = h, block(h)
        images: Tensor = self.to_image[str(self.config.nominal_resolution)](h)
        if self.config.fading:
            coarse = self.to_image[str(self.config.nominal_resolution // 2)](below)
            images = fade(enlarge(coarse), images, self.alpha)
        return images


class PooledConv2d(EqualizedConv2d):
    """[B, in, H, W], H and W even -> [B, out, H/2, W/2]: 3 x 3 convolution, 2 x 2 mean, then bias.

    Computed as one convolution of stride 2, whose 4 x 4 kernel is the mean of the 3 x 3 kernel at
    the four positions that are pooled.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = F.avg_pool2d(self.effective_weight(), 2, stride=1, padding=1)
        return F.conv2d(x, weight, self.effective_bias(), stride=2, padding=1)


class DiscriminatorBlock(nn.Module):
    """[B, in, H, W] -> [B, out, H/2, W/2]."""

    def __init__(self, in_channels: int, out_channels: int, fused_scale: bool) -> None:
        super().__init__()
        self.fused_scale = fused_scale
        self.conv1 = EqualizedConv2d(in_channels, in_channels, 3, gain=GAIN)
        last = PooledConv2d if fused_scale else EqualizedConv2d
        self.conv2 = last(in_channels, out_channels, 3, gain=GAIN)

    def forward(self, x: Tensor) -> Tensor:
        h = _activated(self.conv2(_activated(self.conv1(x))))
        return h if self.fused_scale else shrink(h)


class LastBlock(nn.Module):
    """[B, in, *base] -> features [B, out]."""

    def __init__(
        self, in_channels: int, out_features: int, base: tuple[int, int], minibatch_group: int
    ) -> None:
        super().__init__()
        self.minibatch_stddev = MinibatchStdDev(minibatch_group)
        self.conv = EqualizedConv2d(in_channels + 1, in_channels, 3, gain=GAIN)
        self.linear = EqualizedLinear(math.prod(base) * in_channels, out_features, gain=GAIN)

    def forward(self, x: Tensor) -> Tensor:
        h = _activated(self.conv(self.minibatch_stddev(x)))
        return _activated(self.linear(h.flatten(1)))


class Discriminator(nn.Module):
    """images [B, C, H, W], labels int64 [B] -> logits [B].

    With `conditional` the logit is w . h + b + embedding(label) . h with h the last features. This
    projection (Miyato & Koyama 2018, arXiv:1802.05637) with an equalized embedding is ours; in the
    published code the discriminator predicts the class instead (AC-GAN).
    """

    alpha: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.from_image = nn.ModuleDict()
        for resolution in config.image_resolutions:
            channels = config.channels_at(resolution)
            self.from_image[str(resolution)] = EqualizedConv2d(
                config.image_channels, channels, 1, gain=GAIN
            )
        self.blocks = nn.ModuleDict()
        for resolution in reversed(config.resolutions[1:]):
            before, after = config.channels_at(resolution), config.channels_at(resolution // 2)
            self.blocks[str(resolution)] = DiscriminatorBlock(before, after, config.fused_scale)
        features = config.channels_at(2)
        self.blocks["4"] = LastBlock(
            config.channels_at(4), features, config.base, config.minibatch_group
        )
        self.linear = EqualizedLinear(features, 1)
        self.embedding = (
            Equalized((config.num_classes, features), bias=False) if config.conditional else None
        )
        self.register_buffer("alpha", torch.zeros(()))

    def init_weights(self, generator: torch.Generator) -> None:
        """Set all parameters, from `generator` alone; alpha is 0 when fading, otherwise 1."""
        init.init_weights(self, generator)
        self.alpha.fill_(0.0 if self.config.fading else 1.0)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        first, *others = self.blocks.values()
        h = first(_activated(self.from_image[str(self.config.nominal_resolution)](images)))
        if self.config.fading:
            coarse = self.from_image[str(self.config.nominal_resolution // 2)](shrink(images))
            h = fade(_activated(coarse), h, self.alpha)
        for block in others:
            h = block(h)
        logits: Tensor = self.linear(h).squeeze(1)
        if self.embedding is not None:
            # Scaling the selected rows instead of the table gives equal numbers with less memory.
            rows = F.embedding(labels, self.embedding.weight) * self.embedding.scale
            logits = logits + (rows * h).sum(dim=1)
        return logits

"""The encoder and decoder of a variational autoencoder (Kingma & Welling 2014, arXiv:1312.6114).

The encoder is their recognition model q(z | x), a normal distribution with diagonal covariance, and
the decoder the mean of their p(x | z) (section 3 and appendix C). With `conditional` both are also
given the label. The paper has one hidden layer of 500 units; the convolutional shape is ours.
Normalization is by image (Wu & He 2018, arXiv:1803.08494), so that an output depends on its own
image or latent alone.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from bigan.config import Positive
from bigan.layers import init
from bigan.layers.precision import at_least_float32, without_autocast
from bigan.models.base import ModelConfig

MAX_MULTIPLE = 8  # the widest map has this many times `channels`


class Config(ModelConfig):
    """The shape and the initial values of both networks."""

    networks: ClassVar[tuple[str, ...]] = ("encoder", "decoder")

    doublings: ClassVar[tuple[int, int]] = (1, 8)

    name: Literal["autoencoder"]
    num_classes: Positive
    conditional: bool = False  # false: labels have no effect
    z_dim: Positive = 32
    image_channels: Literal[1, 2, 3, 4] = 3
    channels: Positive = 32  # of the map at `resolution`; doubled at each halving, up to 8 times

    @property
    def is_conditional(self) -> bool:
        return self.conditional

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the maps at `resolution`, `resolution` / 2, ..., the base."""
        maps = range(self.num_doublings + 1)
        return tuple(self.channels * min(2**i, MAX_MULTIPLE) for i in maps)

    @model_validator(mode="after")
    def _labels(self) -> Config:
        if self.conditional and self.num_classes == 1:
            raise ValueError(
                "conditional: there are no labels to condition on, num_classes = 1; "
                "use conditional=false"
            )
        return self


class Block(nn.Module):
    """[B, in, H, W] -> [B, out, H', W']: 3 x 3 convolution, normalization by image, SiLU.

    H' = H, or H / 2 by a stride of 2 with `resize="down"`, or 2H from nearest neighbours with "up".
    """

    def __init__(
        self, in_channels: int, out_channels: int, resize: Literal["down", "up"] | None = None
    ) -> None:
        super().__init__()
        self.upsample = resize == "up"
        stride = 2 if resize == "down" else 1
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)
        self.norm = nn.GroupNorm(math.gcd(8, out_channels), out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.upsample:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.silu(self.norm(self.conv(x)))


class Encoder(nn.Module):
    """images [B, C, H, W] in [-1, 1], labels int64 [B] -> (mean, log_variance), each [B, z_dim].

    Both outputs are in float32 at least, also under autocast.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        last = widths[-1]
        self.from_image = Block(config.image_channels, widths[0])
        self.blocks = nn.ModuleList(Block(*pair, resize="down") for pair in pairwise(widths))
        self.embedding = nn.Embedding(config.num_classes, last) if config.conditional else None
        self.last = Block(last, last)
        self.linear = nn.Linear(math.prod(config.base) * last, 2 * config.z_dim)

    def init_weights(self, generator: torch.Generator) -> None:
        """Set all parameters, from `generator` alone."""
        init.init_weights(self, generator)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        h = self.from_image(images)
        for block in self.blocks:
            h = block(h)
        if self.embedding is not None:
            h = h + self.embedding(labels)[:, :, None, None]
        h = self.last(h)
        with without_autocast(h):
            mean, log_variance = self.linear(at_least_float32(h).flatten(1)).chunk(2, dim=1)
        return mean, log_variance


class Decoder(nn.Module):
    """z [B, z_dim], labels int64 [B] -> images [B, C, H, W] in [-1, 1]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        widths = config.widths[::-1]
        first = widths[0]
        self.linear = nn.Linear(config.z_dim, math.prod(config.base) * first)
        self.embedding = nn.Embedding(config.num_classes, first) if config.conditional else None
        self.first = Block(first, first)
        self.blocks = nn.ModuleList(Block(*pair, resize="up") for pair in pairwise(widths))
        self.to_image = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)

    def init_weights(self, generator: torch.Generator) -> None:
        """Set all parameters, from `generator` alone."""
        init.init_weights(self, generator)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        h = self.linear(z).unflatten(1, (-1, *self.config.base))
        if self.embedding is not None:
            h = h + self.embedding(labels)[:, :, None, None]
        h = self.first(h)
        for block in self.blocks:
            h = block(h)
        return torch.tanh(self.to_image(h))

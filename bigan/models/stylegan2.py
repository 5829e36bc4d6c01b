"""StyleGAN2 (Karras et al. 2020, arXiv:1912.04958): style-based generator, residual discriminator.

A mapping network turns z into w, which modulates every convolution of a synthesis network. The
image is the sum of contributions of all resolutions (skip generator). All layers have an equalized
learning rate. Widths and parameter counts are exactly those of the published PyTorch code and of
its conditional form (arXiv:2006.06676).

Per-pixel noise and style mixing, which are random in published code, are functions of z here
(`bigan.layers.hashing`): the generator is a pure function of (z, labels).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from bigan.config import Fraction, Positive, PositiveFloat
from bigan.image_size import shown, sides, sizes_up_to
from bigan.layers import hashing, init
from bigan.layers.binomial import downsample, upsample
from bigan.layers.blur import blur
from bigan.layers.equalized import EqualizedConv2d, EqualizedLinear
from bigan.layers.mapping import AveragedMapping, Mapping, leaky_relu
from bigan.layers.minibatch_stddev import MinibatchStdDev
from bigan.layers.modulated import ModulatedConv2d
from bigan.layers.precision import at_least_float32, without_autocast
from bigan.models.base import ModelConfig

# Streams of `hashing`, all with one key per image; convolution i has stream NOISE + i.
MIXED_LATENT, IS_MIXED, FIRST_MIXED, NOISE = range(4)


class Config(ModelConfig):
    """The shape and the initial values of both networks, and the generator's mean latent."""

    latent_space: ClassVar[Literal["z", "w"]] = "w"

    doublings: ClassVar[tuple[int, int]] = (0, 8)

    name: Literal["stylegan2"]
    num_classes: Positive
    conditional: bool = False  # false: labels have no effect
    z_dim: Positive = 512
    w_dim: Positive = 512
    image_channels: Literal[1, 2, 3, 4] = 3
    # Layers at the nominal resolution R have channel_base / R channels,
    channel_base: Positive = 32768
    max_channels: Positive = 512  # up to this maximum
    mapping_layers: Positive = 8
    # Of a conditional discriminator; none: `mapping_layers`. The authors' code has 8 whatever the
    # generator has.
    discriminator_mapping_layers: Positive | None = None
    mapping_lr_multiplier: PositiveFloat = 0.01
    w_average_beta: Fraction = 0.995  # decay per step of the mean latent, used by truncation
    style_mixing: Fraction = 0.9  # probability that a training image has two latents
    minibatch_group: Positive = 4  # of the minibatch standard deviation
    activation_clamp: PositiveFloat | None = None  # bound of activations; published for fp16: 256

    @property
    def is_conditional(self) -> bool:
        return self.conditional

    @property
    def group(self) -> int:
        return self.minibatch_group

    def channels_at(self, resolution: int) -> int:
        """Channels of the maps at a nominal resolution."""
        return min(self.channel_base // resolution, self.max_channels)

    @property
    def resolutions(self) -> list[int]:
        """4, 8, ..., nominal resolution: the generator has one block per resolution."""
        return [4 * 2**i for i in range(self.num_doublings + 1)]

    @property
    def num_ws(self) -> int:
        """One w per convolution of the synthesis network and one for the last image layer."""
        return 2 * len(self.resolutions)

    @property
    def embedded_classes(self) -> int | None:
        """Number of embedded classes; None if labels have no effect."""
        return self.num_classes if self.conditional else None

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if self.conditional and self.num_classes == 1:
            raise ValueError(
                "conditional: there are no labels to condition on, num_classes = 1; "
                "use conditional=false"
            )
        if self.discriminator_mapping_layers is not None and not self.conditional:
            raise ValueError(
                "discriminator_mapping_layers: only a conditional discriminator has a mapping; "
                "leave it out, or use conditional=true"
            )
        if self.channels_at(self.nominal_resolution) == 0:
            raise ValueError(
                f"channel_base = {self.channel_base} leaves no channel at {shown(self.resolution)} "
                f"px; use channel_base={self.nominal_resolution} or more"
            )
        return self


class StyledConv(init.Layer):
    """Modulated 3 x 3 convolution, noise, bias and activation.

    x [B, in, H, W], w [B, w_dim], noise [B, 1, H', W'] -> [B, out, H', W']; H' = 2H with `up`. The
    strength of the noise is one learned number with initial value 0.
    """

    def __init__(self, in_channels: int, out_channels: int, up: bool, config: Config) -> None:
        super().__init__()
        self.clamp = config.activation_clamp
        self.conv = ModulatedConv2d(in_channels, out_channels, 3, config.w_dim, up=up)
        self.noise_strength = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def reset_parameters(
        self, generator: torch.Generator, scheme: init.Scheme = "orthogonal"
    ) -> None:
        """Strength 0; nothing is drawn."""
        self.noise_strength.zero_()

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        x = self.conv(x, w)
        return leaky_relu(x + (noise * self.noise_strength).to(x.dtype), self.clamp)


class Synthesis(nn.Module):
    """ws [B, num_ws, w_dim], keys int64 [B] -> images [B, C, H, W], nominally in [-1, 1].

    The noise is a function of `keys`. Convolution i is modulated by ws[:, i]. The image layer after
    the last convolution i of a resolution shares ws[:, i + 1] with the next convolution. Images are
    not bounded.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        before = config.channels_at(4)
        self.first = nn.Parameter(torch.zeros(before, *config.base))
        self.sizes = [sides(size) for size in sizes_up_to(config.resolution)]
        self.convs = nn.ModuleList()
        self.to_images = nn.ModuleList()
        for resolution in config.resolutions:
            channels = config.channels_at(resolution)
            if resolution > 4:
                self.convs.append(StyledConv(before, channels, up=True, config=config))
            self.convs.append(StyledConv(channels, channels, up=False, config=config))
            to_image = ModulatedConv2d(
                channels, config.image_channels, 1, config.w_dim, demodulate=False
            )
            self.to_images.append(to_image)
            before = channels

    def forward(self, ws: Tensor, keys: Tensor) -> Tensor:
        w = ws.unbind(dim=1)
        x = self.first.expand(ws.shape[0], -1, -1, -1)
        images: Tensor | None = None
        for i, conv in enumerate(self.convs):
            size = self.sizes[(i + 1) // 2]
            x = conv(x, w[i], hashing.normal_field(keys, NOISE + i, (1, *size)))
            if i % 2 == 0:  # the last convolution of its resolution
                y = at_least_float32(self._clamped(self.to_images[i // 2](x, w[i + 1])))
                images = y if images is None else upsample(images) + y
        assert images is not None
        return images

    def _clamped(self, y: Tensor) -> Tensor:
        clamp = self.config.activation_clamp
        return y if clamp is None else y.clamp(-clamp, clamp)


class Generator(nn.Module):
    """z [B, z_dim], labels int64 [B] -> images [B, C, H, W], nominally in [-1, 1].

    In training mode, with probability `style_mixing`, an image has a second latent from a random
    layer on (mixing regularization, Karras et al. 2019, section 3.1). This and the noise are
    functions of the key of the image: a hash of its z, or `noise_key`, int64 [B] in [0, 2^63).
    `truncation_psi` < 1, one number or a tensor [B], trades variety for quality; it needs a mean
    latent that has been kept up to date.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        network = Mapping(
            config.z_dim,
            config.w_dim,
            config.mapping_layers,
            config.mapping_lr_multiplier,
            config.embedded_classes,
        )
        self.mapping = AveragedMapping(network, config.w_dim, config.num_ws, config.w_average_beta)
        self.synthesis = Synthesis(config)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Set all parameters and buffers, from `generator` alone."""
        init.init_weights(self, generator)
        first = self.synthesis.first
        first.copy_(torch.empty(first.shape).normal_(generator=generator))

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        noise_key: Tensor | None = None,
        truncation_psi: float | Tensor = 1.0,
    ) -> Tensor:
        keys = hashing.keys(z) if noise_key is None else noise_key
        return self.synthesis(self.latents(z, labels, keys, truncation_psi), keys)

    def latents(
        self, z: Tensor, labels: Tensor, keys: Tensor, truncation_psi: float | Tensor = 1.0
    ) -> Tensor:
        """The input ws [B, num_ws, w_dim] of `synthesis`: with style mixing in training mode."""
        ws = self.mapping(z, labels, truncation_psi)
        if not self.training or self.config.style_mixing == 0:
            return ws
        other = hashing.normal_field(keys, MIXED_LATENT, (self.config.z_dim,)).to(z.dtype)
        # The other latent applies from one of the layers 1 .. num_ws - 1 on, or not at all.
        is_mixed = hashing.uniform(keys, IS_MIXED) < self.config.style_mixing
        first = 1 + (hashing.uniform(keys, FIRST_MIXED) * (self.config.num_ws - 1)).floor()
        layers = torch.arange(self.config.num_ws, device=ws.device)
        is_other = is_mixed[:, None] & (layers >= first[:, None])
        return torch.where(is_other[..., None], self.mapping(other, labels, truncation_psi), ws)


class BlurredConv2d(EqualizedConv2d):
    """[B, in, H, W], H and W even -> [B, out, H / 2, W / 2]: blur, convolution of stride 2."""

    def forward(self, x: Tensor) -> Tensor:
        x = blur(x, padding=self.padding + 1)
        return F.conv2d(x, self.effective_weight(), self.effective_bias(), stride=2)


class DiscriminatorBlock(nn.Module):
    """[B, in, H, W] -> [B, out, H / 2, W / 2]."""

    def __init__(self, in_channels: int, out_channels: int, clamp: float | None) -> None:
        super().__init__()
        self.clamp = clamp
        self.conv1 = EqualizedConv2d(in_channels, in_channels, 3)
        self.conv2 = BlurredConv2d(in_channels, out_channels, 3)
        self.shortcut = EqualizedConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = leaky_relu(self.conv1(x), self.clamp)
        h = leaky_relu(self.conv2(h), self.clamp)
        # The sum of two uncorrelated terms of equal mean square, scaled to that mean square.
        return (h + self.shortcut(downsample(x))) * math.sqrt(0.5)


class Discriminator(nn.Module):
    """images [B, C, H, W], labels int64 [B] -> logits [B].

    With `conditional` logit = features . mapping(label) / sqrt(dimension of the features), where
    the mapping network is applied to the label's embedding.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        channels = [config.channels_at(resolution) for resolution in config.resolutions[::-1]]
        self.from_image = EqualizedConv2d(config.image_channels, channels[0], 1)
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(before, after, config.activation_clamp)
            for before, after in pairwise(channels)
        )
        last = channels[-1]
        self.minibatch_stddev = MinibatchStdDev(config.minibatch_group)
        self.conv = EqualizedConv2d(last + 1, last, 3)
        self.linear = EqualizedLinear(math.prod(config.base) * last, last)
        self.output = EqualizedLinear(last, last if config.conditional else 1)
        self.mapping = (
            Mapping(
                0,
                last,
                config.discriminator_mapping_layers or config.mapping_layers,
                config.mapping_lr_multiplier,
                config.embedded_classes,
            )
            if config.conditional
            else None
        )

    def init_weights(self, generator: torch.Generator) -> None:
        """Set all parameters, from `generator` alone."""
        init.init_weights(self, generator)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        clamp = self.config.activation_clamp
        h = leaky_relu(self.from_image(images), clamp)
        for block in self.blocks:
            h = block(h)
        # The last layers are in float32, as published: cheap, and logits need the precision.
        with without_autocast(h):
            h = self.minibatch_stddev(at_least_float32(h))
            h = leaky_relu(self.conv(h), clamp)
            h = leaky_relu(self.linear(h.flatten(1)))
            h = self.output(h)
            if self.mapping is None:
                return h.squeeze(1)
            return (h * self.mapping(None, labels)).sum(dim=1) / math.sqrt(h.shape[1])

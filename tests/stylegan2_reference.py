"""A second implementation of StyleGAN2, from a state dict, with dense filters and loops."""

from __future__ import annotations

import itertools

import network_parts
import torch
import torch.nn.functional as F
from torch import Tensor

from bigan import config as configs
from bigan.layers import hashing
from bigan.models.stylegan2 import Config, Discriminator, Generator

State = dict[str, Tensor]


def tiny(**changes: object) -> Config:
    values: dict[str, object] = {
        "name": "stylegan2", "resolution": 16, "num_classes": 5, "z_dim": 6, "w_dim": 7,
        "image_channels": 1, "channel_base": 64, "max_channels": 6, "mapping_layers": 2,
    }  # fmt: skip
    return configs.validate(Config, values | changes, "test")


def networks(config: Config) -> tuple[Generator, Discriminator]:
    """With biases and noise that are not zero, so that a missing one changes the result."""
    generator, discriminator = network_parts.networks(config)
    draw = torch.Generator().manual_seed(2)
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            if name.endswith(("bias", "noise_strength")):
                size = 10 if "mapping" in name else 0.3
                parameter.data += size * torch.randn(parameter.shape, generator=draw)
    return generator, discriminator


def clamped(x: Tensor, config: Config) -> Tensor:
    bound = config.activation_clamp
    return x if bound is None else x.clamp(-bound, bound)


def lrelu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x) * 2**0.5


def linear(state: State, name: str, x: Tensor, lr: float = 1.0) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return x @ (weight * lr / weight.shape[1] ** 0.5).t() + bias * lr


def scaled(weight: Tensor) -> Tensor:
    return weight / weight[0].numel() ** 0.5


def stuffed(x: Tensor) -> Tensor:
    """Insert a zero after every pixel, along both axes."""
    wide = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    wide[:, :, ::2, ::2] = x
    return wide


def filtered(x: Tensor, padding: tuple[int, int], gain: float = 1.0) -> Tensor:
    taps = torch.tensor([1.0, 3, 3, 1], dtype=x.dtype) / 8
    kernel = (taps[:, None] * taps * gain).expand(x.shape[1], 1, 4, 4)
    before, after = padding
    return F.conv2d(F.pad(x, (before, after, before, after)), kernel, groups=x.shape[1])


def modulated(x: Tensor, weight: Tensor, styles: Tensor, demodulate: bool, up: bool) -> Tensor:
    """Equations 1 and 3 of the paper for each image; with `up` the filter comes first."""
    images = []
    for image, style in zip(x, styles, strict=True):
        own = weight * style[None, :, None, None]
        if demodulate:
            own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            wide = filtered(stuffed(image[None]), (3, 2), gain=4)
            images.append(F.conv2d(wide, own.flip(2, 3)))
        else:
            images.append(F.conv2d(image[None], own, padding=weight.shape[2] // 2))
    return torch.cat(images)


def mapped(state: State, name: str, z: Tensor | None, labels: Tensor, config: Config) -> Tensor:
    parts = [] if z is None else [z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()]
    if config.conditional:
        one_hot = F.one_hot(labels, config.num_classes).to(state[f"{name}.layers.0.weight"].dtype)
        y = linear(state, f"{name}.embedding", one_hot)
        parts.append(y / (y.square().mean(1, keepdim=True) + 1e-8).sqrt())
    x = torch.cat(parts, 1)
    num = config.mapping_layers if z is not None else config.discriminator_mapping_layers
    for i in range(num or config.mapping_layers):
        x = lrelu(linear(state, f"{name}.layers.{i}", x, config.mapping_lr_multiplier))
    return x


def synthesised(state: State, ws: Tensor, keys: Tensor, config: Config) -> Tensor:
    x = state["synthesis.first"].expand(len(ws), -1, -1, -1)
    images = x.new_zeros(())
    layer = itertools.count()
    for block, size in enumerate(config.resolutions):
        for up in (True, False) if size > 4 else (False,):
            i = next(layer)
            name = f"synthesis.convs.{i}"
            styles = linear(state, f"{name}.conv.style", ws[:, i])
            x = modulated(x, scaled(state[f"{name}.conv.weight"]), styles, True, up)
            noise = hashing.normal_field(keys, 3 + i, (1, size, size))
            x = x + state[f"{name}.noise_strength"] * noise
            x = clamped(lrelu(x + state[f"{name}.conv.bias"][:, None, None]), config)
        name = f"synthesis.to_images.{block}"
        styles = linear(state, f"{name}.style", ws[:, 2 * block + 1])
        y = modulated(x, scaled(state[f"{name}.weight"]), styles, False, False)
        y = clamped(y + state[f"{name}.bias"][:, None, None], config)
        images = y if block == 0 else y + filtered(stuffed(images), (2, 1), gain=4)
    return images


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight, bias = scaled(state[f"{name}.weight"]), state.get(f"{name}.bias")
    return F.conv2d(x, weight, bias, stride, padding=weight.shape[2] // 2 if stride == 1 else 0)


def discriminate(state: State, images: Tensor, labels: Tensor, config: Config) -> Tensor:
    x = clamped(lrelu(conv(state, "from_image", images)), config)
    for i in range(len(config.resolutions) - 1):
        h = clamped(lrelu(conv(state, f"blocks.{i}.conv1", x)), config)
        h = conv(state, f"blocks.{i}.conv2", filtered(h, (2, 2)), stride=2)
        h = clamped(lrelu(h), config)
        shortcut = filtered(x, (1, 1))[:, :, ::2, ::2]
        x = (h + conv(state, f"blocks.{i}.shortcut", shortcut)) / 2**0.5
    group = x.unflatten(0, (-1, config.minibatch_group))
    deviation = (group.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
    extra = deviation.repeat_interleave(config.minibatch_group)[:, None, None, None]
    x = torch.cat([x, extra.expand(-1, 1, 4, 4)], 1)
    x = clamped(lrelu(conv(state, "conv", x)), config)
    x = linear(state, "output", lrelu(linear(state, "linear", x.flatten(1))))
    if not config.conditional:
        return x[:, 0]
    return (x * mapped(state, "mapping", None, labels, config)).sum(1) / x.shape[1] ** 0.5

"""What the tests of networks share: networks, a batch, a penalty in one forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigan import models
from bigan.models import AnyModel


def built(config: AnyModel, device: str = "cpu") -> list[Any]:
    """The networks of `config`, not initialised, in the order of their names."""
    return list(models.build(config, device).values())


def networks(config: AnyModel) -> list[Any]:
    """The networks of `config`, initialised from the fixed seeds 0, 1, ..."""
    pair = built(config)
    for seed, network in enumerate(pair):
        network.init_weights(torch.Generator().manual_seed(seed))
    return pair


def trained(network: nn.Module) -> nn.Module:
    """`network` with biases, gains, zero weights and `alpha` moved from their initial values."""
    draw = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=draw).to(parameter)
        if parameter.ndim < 2:
            parameter.data += 0.3 * noise + (0.5 if parameter.numel() == 1 else 0)
        elif not parameter.any():
            parameter.data += 0.5 / parameter[0].numel() ** 0.5 * noise
    for name, buffer in network.named_buffers():
        if name == "alpha":
            buffer.fill_(0.3)
    return network


def batch(config: AnyModel, num: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """(z, labels, images)"""
    draw = torch.Generator().manual_seed(7)
    size = (num, config.image_channels, config.height, config.width)
    return (
        torch.randn(num, config.z_dim, generator=draw),
        torch.randint(config.num_classes, (num,), generator=draw),
        torch.rand(size, generator=draw) * 2 - 1,
    )


def inputs(config: AnyModel, name: str, num: int = 8) -> tuple[Tensor, Tensor]:
    """The inputs of the network of this name: latents or images, and labels."""
    z, labels, images = batch(config, num)
    return (z if name in ("generator", "decoder") else images), labels


class R1(nn.Module):
    """Logits and a gradient penalty in one forward, as a discriminator phase computes them."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        def total(images: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.discriminator(images, labels)
            return logits.sum(), logits

        gradient, logits = torch.func.grad(total, has_aux=True)(images)
        return gradient.square().flatten(1).sum(1).mean() + F.softplus(-logits).mean()

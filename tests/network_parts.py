"""What the tests of every family of networks need: networks, a batch, a penalty in one forward."""

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


def networks(config: AnyModel) -> tuple[Any, Any]:
    """(generator, discriminator), initialised from fixed seeds."""
    generator, discriminator = built(config)
    generator.init_weights(torch.Generator().manual_seed(0))
    discriminator.init_weights(torch.Generator().manual_seed(1))
    return generator, discriminator


def batch(config: AnyModel, num: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """(z, labels, images)"""
    draw = torch.Generator().manual_seed(7)
    size = (num, config.image_channels, config.resolution, config.resolution)
    return (
        torch.randn(num, config.z_dim, generator=draw),
        torch.randint(config.num_classes, (num,), generator=draw),
        torch.rand(size, generator=draw) * 2 - 1,
    )


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

"""The registry of networks: a tagged union of every family's frozen `Config`.

A family is one file with `Config(name: Literal[...])`, `Generator(config)` and
`Discriminator(config)`; adding its `Config` to the union below is all the registration there is.

    Generator:      forward(z [B, z_dim], labels int64 [B]) -> images [B, C, R, R] in [-1, 1]
    Discriminator:  forward(images [B, C, R, R] in [-1, 1], labels int64 [B]) -> logits [B]

Both have `init_weights(generator: torch.Generator)`; modules are built on any device, the meta
device included, and filled afterwards.
"""

from __future__ import annotations

import sys
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from bigan.models import biggan, biggan_deep, progan, r3gan, stylegan2

ModelConfig = Annotated[
    biggan.Config | biggan_deep.Config | progan.Config | stylegan2.Config | r3gan.Config,
    Field(discriminator="name"),
]


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8; values outside are clamped, not wrapped around."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def build(config: ModelConfig, device: torch.device | str = "cpu") -> tuple[nn.Module, nn.Module]:
    """(generator, discriminator) of `config` on `device`, weights not yet initialised."""
    family = sys.modules[type(config).__module__]
    with torch.device(device):
        return family.Generator(config), family.Discriminator(config)

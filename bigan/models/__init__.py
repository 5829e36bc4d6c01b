"""The networks: one file per family, and the tagged union of the families' configs.

A family is a module with a frozen `Config(name: Literal[...])`, a subclass of
`bigan.models.base.ModelConfig`, and one class for each network that the config names. To add a
family, add its `Config` to the union `AnyModel`.

    Generator:      forward(z [B, z_dim], labels int64 [B]) -> images [B, C, H, W] in [-1, 1]
    Discriminator:  forward(images [B, C, H, W] in [-1, 1], labels int64 [B]) -> logits [B]
    Encoder:        forward(images [B, C, H, W] in [-1, 1], labels int64 [B])
                    -> (mean [B, z_dim], log_variance [B, z_dim])
    Decoder:        forward(z [B, z_dim], labels int64 [B]) -> images [B, C, H, W] in [-1, 1]

Every network has `init_weights(generator: torch.Generator)`. Networks are built on any device,
including the meta device, and initialized afterwards.
"""

from __future__ import annotations

import sys
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from bigan.models import autoencoder, biggan, biggan_deep, progan, r3gan, stylegan2

AnyModel = Annotated[
    biggan.Config
    | biggan_deep.Config
    | progan.Config
    | stylegan2.Config
    | r3gan.Config
    | autoencoder.Config,
    Field(discriminator="name"),
]


def build(config: AnyModel, device: torch.device | str = "cpu") -> dict[str, nn.Module]:
    """The networks of `config` by name, in the order of `config.networks`, on `device`.

    Weights are not initialized: call `init_weights` of each network, or load a state dict.
    """
    family = sys.modules[type(config).__module__]
    with torch.device(device):
        return {name: getattr(family, name.capitalize())(config) for name in config.networks}


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8; values outside of the range are clamped."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)

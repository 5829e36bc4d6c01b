"""Equalized learning rate (Karras et al. 2018, arXiv:1710.10196, section 4.1).

Weights are drawn from N(0, 1) and multiplied by He's constant in every forward instead of once at
initialization. The size of Adam's steps does not depend on the scale of the gradient, so every
weight then changes by the same relative amount, whatever the fan-in of its layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigan.layers.init import Layer, Scheme


class Equalized(Layer):
    """Parameters whose effective values are `weight * scale` and `bias * lr_multiplier`.

    scale = gain * lr_multiplier / sqrt(fan-in); the fan-in is the product of all dimensions but the
    first. With `lr_multiplier` m the stored values are 1/m times as large, so that an optimizer
    step changes the effective values m times as much (0.01 in StyleGAN's mapping network). The
    effective bias has the initial value `initial_bias`. Built with zeros: call `reset_parameters`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        shape: Sequence[int],
        bias: bool = True,
        gain: float = 1.0,
        lr_multiplier: float = 1.0,
        initial_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(tuple(shape)))
        self.register_parameter("bias", nn.Parameter(torch.zeros(shape[0])) if bias else None)
        self.scale = gain * lr_multiplier / math.sqrt(math.prod(shape[1:]))
        self.lr_multiplier = lr_multiplier
        self.initial_bias = initial_bias

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, scheme: Scheme = "orthogonal") -> None:
        """Weights N(0, 1 / lr_multiplier^2) whatever the scheme; the bias is constant."""
        draws = torch.empty(self.weight.shape).normal_(generator=generator)
        self.weight.copy_(draws / self.lr_multiplier)
        if self.bias is not None:
            self.bias.fill_(self.initial_bias / self.lr_multiplier)

    def effective_weight(self) -> Tensor:
        return self.weight * self.scale

    def effective_bias(self) -> Tensor | None:
        if self.bias is None or self.lr_multiplier == 1:
            return self.bias
        return self.bias * self.lr_multiplier


class EqualizedLinear(Equalized):
    """[..., in] -> [..., out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gain: float = 1.0,
        lr_multiplier: float = 1.0,
        initial_bias: float = 0.0,
    ) -> None:
        super().__init__((out_features, in_features), bias, gain, lr_multiplier, initial_bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.effective_bias())


class EqualizedConv2d(Equalized):
    """[B, in, H, W] -> [B, out, H, W]: odd kernel, stride 1, zero padding that keeps the size."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__((out_channels, in_channels, kernel_size, kernel_size), bias, gain)
        self.padding = kernel_size // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.effective_weight(), self.effective_bias(), padding=self.padding)

"""Self-attention over image positions (SAGAN, Zhang et al. 2019, arXiv:1805.08318)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigan.layers.init import Layer, Scheme
from bigan.layers.spectral import SNConv2d


class SelfAttention(Layer):
    """x [B, C, H, W] -> x + gamma * attention(x); C a multiple of 8.

    BigGAN's form: queries (theta) and keys (phi) have C / 8 channels, values (g) C / 2; keys and
    values are max-pooled 2 x 2, without an odd last row or column. gamma is a learned scalar with
    initial value 0, so that the layer is the identity at first. It does not use
    scaled_dot_product_attention, whose fused kernels have no second derivative; gradient penalties
    need one. Raises ValueError for other C.
    """

    def __init__(self, channels: int, eps: float = 1e-4) -> None:
        super().__init__()
        if channels % 8:
            raise ValueError(f"SelfAttention: {channels} channels; use a multiple of 8")
        self.theta = SNConv2d(channels, channels // 8, 1, bias=False, eps=eps)
        self.phi = SNConv2d(channels, channels // 8, 1, bias=False, eps=eps)
        self.g = SNConv2d(channels, channels // 2, 1, bias=False, eps=eps)
        self.output = SNConv2d(channels // 2, channels, 1, bias=False, eps=eps)
        self.gamma = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, scheme: Scheme = "orthogonal") -> None:
        """gamma = 0; nothing is drawn."""
        self.gamma.zero_()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        theta = self.theta(x).flatten(2)  # [B, C/8, HW]
        phi = F.max_pool2d(self.phi(x), 2).flatten(2)  # [B, C/8, HW/4]
        g = F.max_pool2d(self.g(x), 2).flatten(2)  # [B, C/2, HW/4]
        # Without the 1 / sqrt(d) of transformers: spectral normalization bounds the products.
        attention = torch.softmax(torch.bmm(theta.transpose(1, 2), phi), dim=-1)  # [B, HW, HW/4]
        values = torch.bmm(g, attention.transpose(1, 2))  # [B, C/2, HW]
        return x + self.gamma * self.output(values.unflatten(2, (height, width)))


def check_resolutions(resolutions: tuple[int, ...]) -> tuple[int, ...]:
    """Return `resolutions`; ValueError unless each is the nominal one of a map of some network."""
    possible = [2**i for i in range(2, 10)]
    for resolution in resolutions:
        if resolution not in possible:
            nearest = min(possible, key=lambda p: abs(p - resolution))
            raise ValueError(
                f"no network has a map of {resolution} px, sizes are powers of two as the smallest "
                f"map counts as 4 px; use {nearest}"
            )
    return resolutions

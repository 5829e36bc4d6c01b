"""Pixelwise feature normalisation (Karras et al. 2018, arXiv:1710.10196, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from bigan.layers.precision import at_least_float32


def pixel_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    """x [B, C, ...] -> x / sqrt(mean over C of x^2 + eps): a root mean square of 1 everywhere.

    Applied to feature maps at every position, and to latents [B, z_dim]. A vector of zeros stays
    one. Computed in float32 at least: squares of half precision overflow at 256, and the paper's
    eps is below its smallest normal number (the published code had to raise it to 1e-4 there).
    """
    wide = at_least_float32(x)
    return (wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)).to(x.dtype)

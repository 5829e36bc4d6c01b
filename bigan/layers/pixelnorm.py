"""Pixelwise feature normalization (Karras et al. 2018, arXiv:1710.10196, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from bigan.layers.precision import at_least_float32


def pixel_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    """x [B, C, ...] -> x / sqrt(mean over C of x^2 + eps): root mean square 1 at every position.

    Used for feature maps and for latents [B, z_dim]. Zeros are mapped to zeros. Computed in float32
    at least: float16 squares overflow from 256 on, and the paper's eps is below the smallest normal
    float16 number (the published code uses 1e-4 there).
    """
    wide = at_least_float32(x)
    return (wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)).to(x.dtype)

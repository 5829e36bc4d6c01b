"""Pseudo-random fields that are pure functions of a key, for use inside forward passes.

A forward draws no random numbers. Per-pixel noise and style mixing of StyleGAN are computed from
one int64 key per image, which is a hash of the image's latent. They are then equal on every rank,
after a resume, and in eager and compiled code, and an image does not depend on the rest of its
batch.

The random number generator is counter-based (Salmon et al. 2011): word i of a stream is a mixture
of (key, stream, i) by the 32-bit finaliser "lowbias32" of C. Wellons' hash-prospector. 32-bit
unsigned arithmetic is done in int64 because signed overflow is undefined in compiled C++.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
# 32-bit multipliers as signed numbers: a product with a word is below 2^63 in absolute value, and
# two's complement makes its lower half the same.
FIRST_MULTIPLIER = 0x7FEB352D
SECOND_MULTIPLIER = 0x846CA68B - 2**32
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: its multiples are spread evenly over the words


def keys(z: Tensor) -> Tensor:
    """Latents [B, z_dim] -> int64 [B] in [0, 2^63): a hash of their bits in float32."""
    words = z.detach().float().view(torch.int32).to(torch.int64) & MASK
    # Each entry is mixed with its position and the results are summed, without a chain over z_dim.
    position = _mix(torch.arange(1, z.shape[1] + 1, device=z.device))
    mixed = _mix(_mix(words ^ position) ^ position)
    low = _mix(mixed.sum(1) & MASK)
    high = _mix(_mix((mixed + GOLDEN) & MASK).sum(1) & MASK)
    return (high >> 1) << 32 | low


def uniform(keys: Tensor, stream: int) -> Tensor:
    """One float32 number in [0, 1) per key, [B]."""
    return (_words(keys, stream, 1)[:, 0] >> 8).float() * 2**-24


def normal_field(keys: Tensor, stream: int, shape: Sequence[int]) -> Tensor:
    """Independent standard normal numbers, float32 [B, *shape], by Box & Muller's method."""
    num = math.prod(shape)
    half = (num + 1) // 2
    words = _words(keys, stream, 2 * half)
    # Uniform in (0, 1], so that the logarithm is finite; the largest possible result is 6.66.
    radius = ((words[:, :half] + 1).float() * 2**-32).log().mul(-2).sqrt()
    angle = (words[:, half:] >> 8).float() * (2 * math.pi * 2**-24)
    pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pairs[:, :num].reshape(-1, *shape)


def _words(keys: Tensor, stream: int, num: int) -> Tensor:
    """The first `num` words of a stream, int64 [B, num] in [0, 2^32)."""
    low, high = keys & MASK, (keys >> 32) & MASK
    # Two 32-bit subkeys: one is added to the counter, the other enters between the two mixtures, so
    # that fields with nearby offsets are not shifted copies of each other.
    first = _mix(_mix((low + GOLDEN * (2 * stream + 1) % 2**32) & MASK) ^ high)[:, None]
    second = _mix(_mix((high + GOLDEN * (2 * stream + 2) % 2**32) & MASK) ^ low)[:, None]
    counter = torch.arange(num, device=keys.device)
    return _mix(_mix((counter + first) & MASK) ^ second)


def _mix(word: Tensor) -> Tensor:
    """A bijection of [0, 2^32) in which each output bit depends on all input bits."""
    word = word ^ (word >> 16)
    word = (word * FIRST_MULTIPLIER) & MASK
    word = word ^ (word >> 15)
    word = (word * SECOND_MULTIPLIER) & MASK
    return word ^ (word >> 16)

"""Which computations stay in float32 under autocast."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, in float32 if it has less precision (float64 stays)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context in which products on `x`'s device keep the precision of their operands."""
    if x.is_meta:  # there is no autocast to switch off, and asking for it raises
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)

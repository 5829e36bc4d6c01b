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


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast if the recipe asks for it; the meta device has none and needs none."""
    if precision in ("fp32", "tf32") or device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])

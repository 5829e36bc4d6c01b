"""Autocast, and the computations that stay in float32 under it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 if it has less precision; float64 is returned unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context without autocast on the device of `x`."""
    if x.is_meta:  # torch.autocast raises for the meta device
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast context for a `precision` of the config: "fp32" and "tf32" have none.

    The meta device has none either.
    """
    if precision in ("fp32", "tf32") or device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])

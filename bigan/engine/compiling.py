"""torch.compile for phases: which backend, compiled before the first step, eager if it fails."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

import torch
from torch import nn

from bigan.engine.wrapped import Batch
from bigan.phases import Phase
from bigan.world import World, everyone


def compile_backend(choice: str, device: torch.device) -> tuple[str | None, str]:
    """(backend or None for eager, the reason when `auto` cannot compile)."""
    if choice != "auto":
        return (None if choice == "eager" else choice), ""
    if device.type == "cpu" and not any(shutil.which(c) for c in ("c++", "g++", "clang++")):
        return None, "there is no C++ compiler on the PATH"
    return "inductor", ""


def compile_now(
    phase: Phase, other: nn.Module, batches: dict[tuple, Batch], world: World
) -> tuple[float, str]:
    """Compile a phase by running each variant once; returns (seconds, why it failed or "").

    Phases are pure and gradients are asked for without being accumulated, so this leaves no trace
    and sets off no engine's hooks. If it fails on any process, the phase is eager on all.
    """
    began = time.monotonic()
    why = ""
    try:
        for variant, batch in batches.items():
            loss, _ = phase(other, batch, variant)
            parameters = [p for p in phase.parameters() if p.requires_grad]
            torch.autograd.grad(loss, parameters, allow_unused=True)
    except Exception as error:
        lines = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
    if not everyone(world, not why):
        phase._compiled_call_impl = None
        return 0.0, why or "on another process"
    return time.monotonic() - began, ""


Rehearsal = Callable[[Phase], dict[tuple, Batch]]

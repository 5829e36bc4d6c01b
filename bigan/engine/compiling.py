"""torch.compile for phases: which backend, compiled before the first step, eager if it fails."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from bigan.distributed.world import World
from bigan.engine.wrapped import Networks
from bigan.errors import LostError
from bigan.objectives.base import Phase, Tensors, Terms

OTHERS_SECONDS = 120.0  # a failure of one rank is a failure of all within this time
_num_agreements = itertools.count()  # equal on all ranks, which call `all_ranks_compiled` together


def compile_backend(choice: str, device: torch.device) -> tuple[str | None, str]:
    """(backend or None for eager, the reason when `auto` cannot compile)."""
    if choice != "auto":
        return (None if choice == "eager" else choice), ""
    if device.type == "cpu" and not any(shutil.which(c) for c in ("c++", "g++", "clang++")):
        return None, "there is no C++ compiler on the PATH"
    return "inductor", ""


def compile_now(
    phase: Phase, networks: Networks, inputs: Mapping[Terms, Tensors], world: World
) -> tuple[float, str]:
    """Compile a phase by running each combination of terms; returns (seconds, error or "").

    Phases are pure and gradients are computed without being accumulated, so this changes no state
    and triggers no hook of an engine. If compilation fails on one rank, the phase is eager on all
    ranks. Raises `LostError` if it fails on this rank while others wait for it inside the phase.
    """
    began = time.monotonic()
    why = ""
    try:
        for terms, micro_batch in inputs.items():
            result = phase(networks, micro_batch, terms)
            parameters = [p for p in phase.parameters() if p.requires_grad]
            torch.autograd.grad(result.loss, parameters, allow_unused=True)
    except Exception as error:
        lines = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
    if not all_ranks_compiled(world, why):
        phase._compiled_call_impl = None
        return 0.0, why or "on another process"
    return time.monotonic() - began, ""


def all_ranks_compiled(world: World, why: str) -> bool:
    """Whether `why`, the error of this rank, is empty on all ranks.

    The ranks agree through the key-value store of the launch, not by a collective: other ranks may
    wait for a failed rank in a collective of the phase (BatchNorm's), which would be matched with
    the wrong one.
    """
    if world.size == 1:
        return not why
    store = dist.PrefixStore(
        f"bigan compile {next(_num_agreements)}",
        dist.distributed_c10d._get_default_store(),  # it has no public name
    )
    keys = [str(rank) for rank in range(world.size)]
    store.set(keys[world.rank], why)
    try:
        if why:
            store.wait(keys, timedelta(seconds=OTHERS_SECONDS))
        return not any(store.get(key) for key in keys)
    except RuntimeError as error:
        raise LostError(
            f"rank {world.rank} cannot compile phase ({why or error}) while others can; mend that "
            "node, or use compile=eager"
        ) from None

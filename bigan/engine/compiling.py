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
from bigan.errors import RunError
from bigan.objectives.base import Phase, Tensors, Terms

OTHERS_SECONDS = 120.0  # within which the others fail, too, if they are going to
_num_agreements = itertools.count()  # the same on all ranks: each asks as often as the others


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
    """Compile a phase by running each combination of terms; returns (seconds, why it failed or "").

    Phases are pure and gradients are computed without being accumulated, so this leaves no trace
    and triggers no hook of an engine. If it fails, the phase is eager on all processes. Raises
    `RunError` if it fails on this one while others wait for it inside the phase.
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
    """Whether `why`, what this process failed with, is empty on all.

    Asked through the launch's store, not by a collective: while one process has failed, others may
    wait for it in one of the phase's own (BatchNorm's), and would take the one for the other.
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
        return not any(store.get(key) for key in keys)  # those who compiled wait as for any other
    except RuntimeError as error:
        raise RunError(
            f"rank {world.rank} cannot compile phase ({why or error}) while others can; mend that "
            "node, or use compile=eager"
        ) from None

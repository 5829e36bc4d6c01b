"""Connect the ranks of a launch, and check that they run the same program.

The processes are started by `accelerate launch`, `torchrun`, or `srun` with one task per GPU;
`launch_env.py` reads their environment variables.
"""

from __future__ import annotations

import gc
import os
import re
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from bigan.config import leaves
from bigan.distributed.launch_env import (
    LAUNCHER,
    check_devices,
    check_launch,
    chosen_engine,
    from_slurm,
    launch_remarks,
    set_variables,
)
from bigan.distributed.rendezvous import Place, meet
from bigan.distributed.world import World, broadcast, on_all_ranks
from bigan.errors import JoinError, LaunchError
from bigan.versions import version

__all__ = [
    "check_same_program",
    "chosen_engine",
    "connect",
    "disconnect",
    "launch_remarks",
    "program",
    "set_variables",
]

# Accelerate would create plugins from these variables: FSDP or DeepSpeed (which imports
# transformers and compiles C++), autocast and torch.compile around the networks. The engine is
# responsible for all of that: they are removed before the Accelerator is created.
REMOVED_PREFIXES = (
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_DEEPSPEED_",
    "ACCELERATE_DYNAMO_",
    "ACCELERATE_GRADIENT_",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "FSDP_",
)

# Nodes may use different mount points: the images are compared by content, not by path.
MAY_DIFFER = re.compile(r"run_dir|data\.(\w+\.)?(path|cache)")  # data: one stream or several
PACKAGES = ("bigan", "torch", "accelerate", "deepspeed", "numpy")


def connect(timeout_seconds: float, join_seconds: float | None = None) -> tuple[Accelerator, World]:
    """Connect the ranks of this launch; raises `LaunchError` if that fails.

    timeout_seconds: of a collective, and unless `join_seconds` is given, for all ranks to start.
    Removes the launcher's variables about the engine from `os.environ`; copy it before the call,
    for `chosen_engine` and `launch_remarks`.
    """
    for name in LAUNCHER - set_variables(os.environ).keys():
        os.environ.pop(name, None)  # empty, as by `docker run -e RANK=`
    environment = set_variables(os.environ)
    check_launch(environment)
    joined = from_slurm(environment)
    if joined:
        _require_known(joined["MASTER_ADDR"])
        if torch.cuda.device_count() == 1:  # srun --gpus-per-task=1: a task sees only its GPU
            joined["LOCAL_RANK"] = "0"
        os.environ.update(joined)
    if torch.cuda.is_available():
        check_devices(os.environ, torch.cuda.device_count())
    for name in [name for name in os.environ if name.startswith(REMOVED_PREFIXES)]:
        del os.environ[name]
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        _join(Place.of(os.environ), join_seconds or timeout_seconds, timeout_seconds)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # autocast is part of the phases, so that penalties stay float32
        # Forward passes change no buffer, so none has to be broadcast. static_graph must not be
        # set: it gives silently wrong gradients with penalties.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )
    if accelerator.num_processes != expected:
        raise LaunchError(
            f"launch environment: WORLD_SIZE = {expected}, but {accelerator.num_processes} "
            "processes are connected; start them with `accelerate launch` or `torchrun`"
        )
    world = World(
        rank=accelerator.process_index,
        size=accelerator.num_processes,
        local_rank=accelerator.local_process_index,
        device=accelerator.device,
    )
    return accelerator, world


def disconnect(world: World) -> None:
    """Destroy the process group at a regular end; a collective.

    Do not call it while an exception propagates: other ranks may wait in another collective, and a
    process that fails must exit, so that the launcher ends the others.
    """
    if not dist.is_initialized():
        return
    gc.collect()  # modules in reference cycles that still refer to the process group
    if world.size > 1:
        dist.barrier()
    dist.destroy_process_group()


def program(config: Mapping[str, Any], engine: str) -> dict[str, str]:
    """What must be equal on all ranks: versions, the engine and the leaves of the config."""
    kept = {key: repr(value) for key, value in leaves(config) if not MAY_DIFFER.fullmatch(key)}
    versions = {f"{name} version": version(name) for name in PACKAGES}
    return {**versions, "the engine": engine, **kept}


def check_same_program(world: World, fingerprint: Mapping[str, str]) -> None:
    """Check that all ranks run the same program (see `program`); a collective.

    Raises `LaunchError` on every rank, with the first rank and key that differ from rank 0.
    """
    expected = broadcast(world, dict(fingerprint))

    def compare() -> None:
        for key in sorted({*expected, *fingerprint}):
            here, there = fingerprint.get(key, "nothing"), expected.get(key, "nothing")
            if here != there:
                raise LaunchError(
                    f"rank {world.rank} on {socket.gethostname()} has {key} = {here}, but rank 0 "
                    f"has {there}; start every node with the same packages, launch file and config"
                )

    on_all_ranks(world, compare)


def _join(place: Place, join_seconds: float, timeout_seconds: float) -> None:
    """Create the process group, which accelerate then uses.

    accelerate would create it itself, but drops a timeout that equals its own default.
    """
    store = meet(place, join_seconds)
    try:
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=timeout_seconds),
        )
    except RuntimeError as error:
        problem = JoinError(
            f"launch environment: rank {place.rank} of {place.size} on {socket.gethostname()} "
            f"reached the store at {place.where} but not the other ranks "
            f"({str(error).strip().splitlines()[0][:200]}); the nodes must resolve and reach each "
            "other's host names; with several networks, export GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME"
        )
        raise problem from error


def _require_known(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise LaunchError(
            f"launch environment: the name {host} of the first node does not resolve on "
            f"{socket.gethostname()}; export MASTER_ADDR, the first node's address, before srun"
        ) from None

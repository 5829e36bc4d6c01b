"""Join the processes of a launch, and make sure that they run the same program.

Started by `accelerate launch`, `torchrun`, or `srun` with one task per GPU; what their environment
says is read in `launch_environment.py`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from bigan.config import leaves
from bigan.distributed.launch_env import (
    check_devices,
    check_launch,
    chosen_engine,
    from_slurm,
    launch_remarks,
)
from bigan.distributed.world import World, broadcast, together
from bigan.errors import LaunchError

__all__ = [
    "agree_on_program",
    "chosen_engine",
    "connect",
    "disconnect",
    "launch_remarks",
    "program",
]

# Accelerate would make plugins of its own of these: an FSDP or DeepSpeed one (which imports
# transformers and compiles C++), autocast and torch.compile around the networks. All of it is the
# engine's, so they leave the environment before Accelerate looks.
TAKEN = (
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_DEEPSPEED_",
    "ACCELERATE_DYNAMO_",
    "ACCELERATE_GRADIENT_",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "FSDP_",
)

# Nodes may mount their disks elsewhere: the images are compared by content, not by path.
MAY_DIFFER = ("run_dir", "data.path", "data.cache")
PACKAGES = ("bigan", "torch", "accelerate", "deepspeed", "numpy")


def connect(timeout_seconds: int) -> tuple[Accelerator, World]:
    """Join the processes of this launch; raises `LaunchError` if they do not find each other.

    Takes what the launcher said about the engine out of `os.environ`: copy that before, for
    `chosen_engine` and `launch_remarks`.
    """
    check_launch(os.environ)
    joined = from_slurm(os.environ)
    if joined:
        _require_known(joined["MASTER_ADDR"])
        if torch.cuda.device_count() == 1:  # srun --gpus-per-task=1 shows each task its own
            joined["LOCAL_RANK"] = "0"
        os.environ.update(joined)
    if torch.cuda.is_available():
        check_devices(os.environ, torch.cuda.device_count())
    for name in [name for name in os.environ if name.startswith(TAKEN)]:
        del os.environ[name]
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = _joining(expected, lambda: _accelerator(timeout_seconds))
    if accelerator.num_processes != expected:
        raise LaunchError(
            f"launch environment: {expected} processes were started but {accelerator.num_processes}"
            " found each other; start them with `accelerate launch` or `torchrun`"
        )
    world = World(
        rank=accelerator.process_index,
        size=accelerator.num_processes,
        local_rank=accelerator.local_process_index,
        device=accelerator.device,
    )
    return accelerator, world


def disconnect(world: World) -> None:
    """Leave the process group at a regular end, together with the others.

    Not on the way out of an exception: peers may be waiting in another collective, and the process
    that fails must say why and exit, so that the launcher ends them.
    """
    if not dist.is_initialized():
        return
    if world.size > 1:
        dist.barrier()
    dist.destroy_process_group()


def program(config: Mapping[str, Any], engine: str) -> dict[str, str]:
    """What all ranks must have in common: versions, the engine and the resolved config's leaves."""
    kept = {key: repr(value) for key, value in leaves(config) if key not in MAY_DIFFER}
    versions = {f"{name} version": _version(name) for name in PACKAGES}
    return {**versions, "the engine": engine, **kept}


def agree_on_program(world: World, fingerprint: Mapping[str, str]) -> None:
    """Every rank must run the same program (see `program`); a collective.

    Raises `LaunchError` on every rank, naming the first rank that differs from rank 0.
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

    together(world, compare)


def _accelerator(timeout_seconds: int) -> Accelerator:
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # autocast is part of the phases, so that penalties stay float32
        kwargs_handlers=[
            # Forward passes change no buffer, so there is none to broadcast. static_graph gives
            # silently wrong gradients with penalties: never.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds)),
        ],
    )


def _joining(expected: int, join: Callable[[], Accelerator]) -> Accelerator:
    """`join()`, the network's errors in one readable line."""
    try:
        return join()
    except (dist.DistError, RuntimeError) as error:
        if expected == 1:
            raise
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        problem = LaunchError(
            f"launch environment: rank {os.environ.get('RANK')} of {expected} on "
            f"{socket.gethostname()} could not join the others at {where} "
            f"({str(error).strip().splitlines()[0][:200]}); the nodes must reach each other by the "
            "names they have: if they have several networks, export GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME"
        )
        problem.everywhere = False  # each process has a story of its own
        raise problem from error


def _require_known(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise LaunchError(
            f"launch environment: the name {host} of the first node does not resolve on "
            f"{socket.gethostname()}; export MASTER_ADDR, the first node's address, before srun"
        ) from None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"

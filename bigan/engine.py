"""How a phase is run: on one process or under DDP, eager or compiled.

The trainer sees `Engine.step` only. Accelerate starts the processes and wraps the module; the
process group, the guards against half-started launches, torch.compile and the check that stops a
non-finite step before the optimiser all live here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from bigan.errors import LaunchError
from bigan.recipe import AdamConfig, RunConfig
from bigan.world import World, everyone

Echo = Callable[[str], None]


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuse launches that would train several strangers, or one process instead of several.

    Raises `LaunchError`. `accelerate launch --cpu --num_processes 2` sets MASTER_ADDR, starts one
    process and says nothing; `srun` without a launcher starts n processes that do not know each
    other.
    """
    if "WORLD_SIZE" in environment:
        return
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
        raise LaunchError(
            "launch environment: accelerate was asked for several processes but started one "
            "(its --cpu launcher does that); use `accelerate launch --config_file "
            "launch/cpu.yaml`, or --multi_gpu instead of --cpu"
        )
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise LaunchError(
            f"launch environment: srun started {environment['SLURM_STEP_NUM_TASKS']} tasks that "
            "do not know each other; run one task per node with `accelerate launch` inside it"
        )


def adam(network: nn.Module, config: AdamConfig) -> torch.optim.Adam:
    """Fused Adam; the fused kernel is also what can skip a non-finite step on the device."""
    return torch.optim.Adam(
        network.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def compile_backend(choice: str, device: torch.device) -> tuple[str | None, str]:
    """(backend or None for eager, the reason when `auto` cannot compile)."""
    if choice != "auto":
        return (None if choice == "eager" else choice), ""
    if device.type == "cpu" and not any(shutil.which(c) for c in ("c++", "g++", "clang++")):
        return None, "there is no C++ compiler on the PATH"
    return "inductor", ""


class Prepared:
    """A phase with its optimiser, made ready by `Engine.prepare`."""

    def __init__(self, phase: nn.Module, optimizer: torch.optim.Adam) -> None:
        self.phase = phase
        self.optimizer = optimizer
        self.parameters = list(phase.parameters())
        self.module: nn.Module | None = None  # wrapped at the first step, after compilation
        self.warm: set[object] = set()  # variants that have been compiled


def connect(timeout_seconds: int) -> tuple[Accelerator, World]:
    """Join the processes of this launch; raises `LaunchError` if they do not find each other."""
    check_launch(os.environ)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # autocast is part of the phases, so that penalties stay float32
        kwargs_handlers=[
            # Forward passes change no buffer, so there is none to broadcast. static_graph gives
            # silently wrong gradients with penalties: never.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds)),
        ],
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
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
    if world.size > 1 and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class Engine:
    """Runs phases for one process (`world.size == 1`) or under DDP.

    Raises `LaunchError` when the launch and the recipe's `engine` do not fit together.
    """

    def __init__(self, config: RunConfig, echo: Echo) -> None:
        self._accelerator, self.world = connect(config.train.collective_timeout_seconds)
        size = self.world.size
        if config.engine == "single" and size > 1:
            raise LaunchError(f"engine = single, but {size} processes were started; use engine=ddp")
        if config.engine == "ddp" and size == 1:
            raise LaunchError(
                "engine = ddp needs several processes: start it with `accelerate launch "
                "--config_file launch/cpu.yaml -m bigan.train ...`"
            )
        self.echo: Echo = echo if self.world.is_main else lambda _: None
        self.process_group = dist.group.WORLD if size > 1 else None
        self._backend, reason = compile_backend(config.compile, self.world.device)
        if not everyone(self.world, not reason):  # nodes may differ in their compilers
            self._backend = None
            self.echo(f"eager mode: {reason or 'not every node can compile'}")
        self._halt = torch.zeros((), device=self.world.device)
        self._first_bad = torch.full((), -1.0, dtype=torch.float64, device=self.world.device)

    def prepare(self, phase: nn.Module, optimizer: torch.optim.Adam) -> Prepared:
        """Make a phase ready; compilation and wrapping follow at its first step."""
        if self._backend is not None:
            phase.compile(backend=self._backend, fullgraph=True, dynamic=False)
        return Prepared(phase, optimizer)

    def step(
        self,
        prepared: Prepared,
        other: nn.Module,
        batches: Sequence[tuple[Tensor | None, ...]],
        variant: tuple[bool, ...],
        images_seen: int,
    ) -> dict[str, Tensor]:
        """One optimiser step over micro-batches; returns their mean scalars, on the device.

        The micro-batches' losses are averaged and the processes' gradients are averaged, so the
        result is that of one process on the joined batch. Once a loss or gradient is not finite,
        this and all later updates are skipped on the device; `halted_at` tells the host.
        """
        other.requires_grad_(False)  # or its gradients would be computed, and reduced by ZeRO
        prepared.phase.requires_grad_(True)
        if variant not in prepared.warm:
            self._warm_up(prepared, other, batches[0], variant)
        if prepared.module is None:
            prepared.module = self._accelerator.prepare_model(prepared.phase)
        prepared.optimizer.zero_grad(set_to_none=True)
        total: dict[str, Tensor] = {}
        finite = torch.ones((), dtype=torch.bool, device=self.world.device)
        num = len(batches)
        for index, batch in enumerate(batches):
            last = index == num - 1
            hold = contextlib.nullcontext() if last else self._accelerator.no_sync(prepared.module)
            with hold:
                loss, scalars = prepared.module(other, batch, variant)
                (loss / num).backward()
            finite = torch.isfinite(loss.detach()) & finite
            for name, value in scalars.items():
                total[name] = total[name] + value / num if name in total else value / num
        norm = self._update(prepared, finite, images_seen)
        total[f"grad_norm_{prepared.phase.name}"] = norm
        return total

    def halted_at(self) -> float:
        """images_seen of the first non-finite step, -1 if there is none; waits for the device."""
        return self._first_bad.item()

    def _update(self, prepared: Prepared, finite: Tensor, images_seen: int) -> Tensor:
        """Optimiser step, skipped on the device from the first non-finite loss or gradient on."""
        gradients = [p.grad for p in prepared.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        bad = 1 - (torch.isfinite(norm) & finite).float()
        if self.world.size > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)  # all skip, or none
        first = (bad > 0) & (self._halt == 0)
        self._first_bad = torch.where(first, float(images_seen), self._first_bad)
        self._halt = torch.maximum(self._halt, bad)
        # What GradScaler does for fp16: the fused kernel leaves everything as it is if found_inf.
        prepared.optimizer.grad_scale = None  # type: ignore[attr-defined]
        prepared.optimizer.found_inf = self._halt  # type: ignore[attr-defined]
        prepared.optimizer.step()
        return norm

    def _warm_up(
        self,
        prepared: Prepared,
        other: nn.Module,
        batch: tuple[Tensor | None, ...],
        variant: tuple[bool, ...],
    ) -> None:
        """Compile one variant on real inputs before any wrapper; on failure go on in eager mode.

        Phases are pure, so running one and discarding its gradients leaves no trace.
        """
        prepared.warm.add(variant)
        if prepared.phase._compiled_call_impl is None:
            return
        began = time.monotonic()
        try:
            loss, _ = prepared.phase(other, batch, variant)
            loss.backward()
            why = ""
        except Exception as error:
            lines = str(error).strip().splitlines()
            why = f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
        name = prepared.phase.name
        if everyone(self.world, not why):
            self.echo(f"compiled phase {name} in {time.monotonic() - began:.0f} s")
        else:
            prepared.phase._compiled_call_impl = None
            why = why or "on another process"
            self.echo(f"eager mode for phase {name}: torch.compile failed ({why})")
        prepared.optimizer.zero_grad(set_to_none=True)

"""DeepSpeed ZeRO-1 and ZeRO-2: whole weights everywhere, Adam's state in equal parts.

DeepSpeed lays all weights of a network into one flat tensor; each process keeps the moments of
its part, steps it, and the parts are gathered again. ZeRO-2 also scatters gradients as soon as
they are there, at every micro-batch; ZeRO-1 keeps them whole until the last. Weights and moments
are float32: lower precision is autocast inside the phases and our own loss scale, as everywhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigan.checkpoint import TensorShard
from bigan.distributed.world import World
from bigan.engine.unit import Unit
from bigan.engine.wrapped import MOMENTS, Batch, NewOptimizer, ReadRange
from bigan.errors import LaunchError, RunError
from bigan.objectives.gan import Phase, Scalars

MAX_BUCKET_ENTRIES = 50_000_000  # gradients reduced at once: 200 MB


def load_deepspeed(device: torch.device) -> ModuleType:
    """Import deepspeed (some seconds), told to be quiet and to compile nothing.

    Raises `LaunchError` if it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # or it guesses, and says so
    try:
        import deepspeed
    except ImportError as error:
        raise LaunchError(
            f"engine: ZeRO needs deepspeed ({error}); install it with `pip install "
            "'bigan[deepspeed]'`, or use engine=fsdp"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # Joining a process group, it would build a C++ extension for gloo; a build that is killed
        # leaves a lock behind on which every later run hangs. (The attribute of the package is
        # torch itself, hence sys.modules.)
        import deepspeed.comm.torch

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed


def settings(stage: int, offload: bool, accumulation: int, bucket: int, pin: bool) -> dict:
    """DeepSpeed's configuration; `bucket` in entries, `pin` page-locks the offloaded state."""
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": False,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
    return {
        "train_micro_batch_size_per_gpu": 1,  # serves its own reports only
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000_000,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device in every step
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # the client's torch Adam: nothing is compiled,
        "zero_force_ds_cpu_optimizer": False,  # and its fused kernel can skip a step
    }


class _Span(NamedTuple):
    """Where a parameter's part of the flat partition lies; both in entries."""

    key: str
    shape: tuple[int, ...]
    start: int  # in the flattened parameter
    at: slice  # in the partition; empty if this process steps none of the parameter


class Zero:
    """A phase under a DeepSpeed engine of its own, ZeRO `stage` 1 or 2.

    With `offload` Adam's state and step live in host memory. Weights must be final when this is
    built; they are laid out row by row from then on. Raises `LaunchError` without deepspeed.
    """

    sharded = True

    def __init__(
        self,
        phase: Phase,
        new_optimizer: NewOptimizer,
        world: World,
        accumulation: int,
        stage: int,
        offload: bool = False,
    ) -> None:
        deepspeed = load_deepspeed(world.device)
        self.phase = phase
        phase.requires_grad_(True)  # what is frozen now would never be reduced
        phase.network.to(memory_format=torch.contiguous_format)
        self.optimizer = new_optimizer(phase.network.parameters())
        sizes = [p.numel() for p in phase.network.parameters()]
        bucket = max(min(sum(sizes), MAX_BUCKET_ENTRIES), *sizes)
        bucket += bucket % 2  # it wants an even number
        with _not_broadcast(phase.network):
            self._engine, self._zero, *_ = deepspeed.initialize(
                model=Unit(phase),
                optimizer=self.optimizer,
                config=settings(stage, offload, accumulation, bucket, world.device.type == "cuda"),
                dist_init_required=False,
            )
        # Its own check of the norm waits for the device and drops a non-finite step without a
        # word, before our hook could see it. The setting of this name refuses to go with offload.
        assert hasattr(self._zero, "compute_grad_norm")
        self._zero.compute_grad_norm = False
        (group,) = self.optimizer.param_groups
        (self._partition,) = group["params"]
        self._spans = list(self._own_spans(world))

    def _own_spans(self, world: World) -> Iterator[_Span]:
        """What of each parameter this process steps, told from where DeepSpeed laid it."""
        (flat,) = self._zero.bit16_groups_flat
        size = self._partition.numel()
        base = world.rank * size
        total = 0
        for key, parameter in self.phase.network.named_parameters():
            if parameter.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
                raise RuntimeError(f"deepspeed did not lay {key} into its flat tensor")
            offset = parameter.storage_offset() - flat.storage_offset()
            low = min(max(offset, base), base + size)
            high = max(min(offset + parameter.numel(), base + size), low)
            yield _Span(key, tuple(parameter.shape), low - offset, slice(low - base, high - base))
            total += parameter.numel()
        if not total <= size * world.size == flat.numel():
            raise RuntimeError("deepspeed's flat tensor is not cut into one part per process")

    def __call__(self, other: nn.Module, batch: Batch, terms: tuple) -> tuple[Tensor, Scalars]:
        return self._engine(other, batch, terms)

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)  # it is divided already

    def zero_grad(self) -> None:
        self._zero.zero_grad(set_to_none=True)

    def step(self) -> None:
        self._engine.step()

    def whole(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def freeze(self, frozen: bool) -> None:
        self.phase.network.requires_grad_(not frozen)

    def shards(self, name: str) -> Iterator[TensorShard]:
        for key, parameter in self.phase.network.named_parameters():
            yield TensorShard(
                f"networks/{name}.{key}",
                tuple(parameter.shape),
                0,
                parameter.detach().reshape(-1),
                replicated=True,
            )
        state = self.optimizer.state.get(self._partition, {})
        for span in self._spans if state else []:
            stem = f"optimizers/{name}.{span.key}"
            yield TensorShard(f"{stem}.step", (), 0, state["step"], replicated=True)
            for moment in MOMENTS if span.at.start < span.at.stop else ():
                part = state[moment][span.at]
                yield TensorShard(
                    f"{stem}.{moment}", span.shape, span.start, part, replicated=False
                )

    def load_moments(self, name: str, read: ReadRange) -> None:
        """Raises `RunError` if the parameters took different numbers of steps."""
        device = self._partition.device
        # Entries between and behind the parameters are padding: zero, and zero they stay.
        state: dict[str, Tensor] = {m: torch.zeros_like(self._partition.detach()) for m in MOMENTS}
        steps = {}
        for span in self._spans:
            stem = f"optimizers/{name}.{span.key}"
            steps[span.key] = read(f"{stem}.step", 0, 1).item()
            length = span.at.stop - span.at.start
            for moment in MOMENTS if length else ():
                state[moment][span.at] = read(
                    f"{stem}.{moment}", span.start, span.start + length
                ).to(device)
        if len(set(steps.values())) != 1:
            raise RunError(
                f"optimizers/{name}: its parameters have taken different numbers of Adam steps "
                f"({min(steps.values()):g} to {max(steps.values()):g}), which ZeRO cannot keep; "
                "go on with the engine that wrote this checkpoint"
            )
        state["step"] = torch.tensor(next(iter(steps.values())), device=device)
        self.optimizer.state[self._partition] = state

    def close(self) -> None:
        """Without it, processes now and then died at exit ("terminate called ...")."""
        self._engine.destroy()


@contextlib.contextmanager
def _not_broadcast(network: nn.Module) -> Iterator[None]:
    """Inside, DeepSpeed leaves the parameters alone that it would broadcast from rank 0.

    They are equal already, and its way of doing it fails on scalars. The mark is its own, for
    parameters that differ between processes on purpose.
    """
    for parameter in network.parameters():
        parameter.ds_optim_param = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in network.parameters():
            del parameter.ds_optim_param  # type: ignore[attr-defined]

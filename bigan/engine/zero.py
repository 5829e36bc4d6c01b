"""DeepSpeed ZeRO-1 and ZeRO-2: unsharded weights, the optimizer's state in equal partitions.

DeepSpeed flattens the trainable weights of a phase into one tensor; each rank keeps the optimizer
state of its partition and updates it, and the partitions are gathered again. ZeRO-2 also
reduce-scatters gradients at every micro-batch; ZeRO-1 keeps them unsharded until the last one.
Weights and state are float32: lower precision is autocast inside the phases and our own loss scale,
as under all engines.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigan.checkpoint import TensorShard
from bigan.distributed.world import World
from bigan.engine.unit import Unit
from bigan.engine.wrapped import Networks, NewOptimizer, ReadRange, StateShapes
from bigan.errors import LaunchError, RunError
from bigan.objectives.base import Phase, Result, Tensors, Terms

MAX_BUCKET_ENTRIES = 50_000_000  # gradients reduced at once: 200 MB


def load_deepspeed(device: torch.device) -> ModuleType:
    """Import deepspeed (takes seconds), configured to log errors only and to compile nothing.

    Raises `LaunchError` if it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # otherwise detected, with a log line
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
        "train_micro_batch_size_per_gpu": 1,  # required; used in DeepSpeed's reports only
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000_000,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device in every step
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # the client's torch optimizer: nothing is compiled,
        "zero_force_ds_cpu_optimizer": False,  # and fused kernels can skip a step
    }


class _Span(NamedTuple):
    """The range of a parameter that is in this rank's flat partition, in entries."""

    key: str
    shape: tuple[int, ...]
    start: int  # in the flattened parameter
    at: slice  # in the partition; empty if none of the parameter is in it


class Zero:
    """A phase under a DeepSpeed engine of its own, ZeRO `stage` 1 or 2.

    With `offload` the optimizer's state and step are on the host. Weights must be final when this
    is built; they are row-major from then on. Raises `LaunchError` without deepspeed.
    """

    sharded = True

    def __init__(
        self,
        phase: Phase,
        trainable: tuple[str, ...],
        new_optimizer: NewOptimizer,
        world: World,
        accumulation: int,
        stage: int,
        offload: bool = False,
    ) -> None:
        deepspeed = load_deepspeed(world.device)
        self.phase, self.trainable = phase, trainable
        phase.to(memory_format=torch.contiguous_format)
        named = dict(phase.named_parameters())
        self._parameters = {name: named[name] for name in trainable}
        self.freeze(False)  # DeepSpeed never reduces parameters that are frozen now
        self.optimizer = new_optimizer(self._parameters.values())
        sizes = [p.numel() for p in self._parameters.values()]
        bucket = max(min(sum(sizes), MAX_BUCKET_ENTRIES), *sizes)
        bucket += bucket % 2  # DeepSpeed requires an even number
        with _not_broadcast(phase):
            self._engine, self._zero, *_ = deepspeed.initialize(
                model=Unit(phase),
                optimizer=self.optimizer,
                config=settings(stage, offload, accumulation, bucket, world.device.type == "cuda"),
                dist_init_required=False,
            )
        # DeepSpeed's own check of the norm waits for the device and silently drops a non-finite
        # step before our hook runs. The setting of this name cannot be combined with offload.
        assert hasattr(self._zero, "compute_grad_norm")
        self._zero.compute_grad_norm = False
        (group,) = self.optimizer.param_groups
        (self._partition,) = group["params"]
        self._spans = list(self._own_spans(world))

    def _own_spans(self, world: World) -> Iterator[_Span]:
        """The range of each parameter that this rank updates, from DeepSpeed's flat layout."""
        (flat,) = self._zero.bit16_groups_flat
        size = self._partition.numel()
        base = world.rank * size
        total = 0
        for key, parameter in self._parameters.items():
            if parameter.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
                raise RuntimeError(f"deepspeed did not lay {key} into its flat tensor")
            offset = parameter.storage_offset() - flat.storage_offset()
            low = min(max(offset, base), base + size)
            high = max(min(offset + parameter.numel(), base + size), low)
            yield _Span(key, tuple(parameter.shape), low - offset, slice(low - base, high - base))
            total += parameter.numel()
        if not total <= size * world.size == flat.numel():
            raise RuntimeError("deepspeed's flat tensor is not cut into one part per process")

    def __call__(self, networks: Networks, inputs: Tensors, terms: Terms) -> Result:
        result: Result = self._engine(networks, inputs, terms)
        return result

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

    def unsharded(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def freeze(self, frozen: bool) -> None:
        for parameter in self._parameters.values():
            parameter.requires_grad_(not frozen)

    def shards(self) -> Iterator[TensorShard]:
        for name, parameter in self._parameters.items():
            data = parameter.detach().reshape(-1)
            yield TensorShard(f"networks/{name}", tuple(parameter.shape), 0, data, replicated=True)
        state = self.optimizer.state.get(self._partition, {})
        for span in self._spans:
            for key, value in state.items():
                name = f"optimizers/{span.key}.{key}"
                if not isinstance(value, Tensor):
                    continue
                if value.ndim == 0:  # a number of steps
                    yield TensorShard(name, (), 0, value, replicated=True)
                elif span.at.start < span.at.stop:
                    yield TensorShard(
                        name, span.shape, span.start, value[span.at], replicated=False
                    )

    def load_state(self, shapes: Mapping[str, StateShapes], read: ReadRange) -> None:
        """Raises `RunError` if the parameters took different numbers of steps."""
        device = self._partition.device
        # Elements between and after the parameters are padding, which is always zero.
        state = {
            key: torch.zeros_like(self._partition.detach())
            for name in self.trainable
            for key, shape in shapes[name].items()
            if shape != ()
        }
        numbers: dict[str, set[float]] = {}
        for span in self._spans:
            length = span.at.stop - span.at.start
            for key in shapes[span.key]:
                name = f"optimizers/{span.key}.{key}"
                if key not in state:
                    numbers.setdefault(key, set()).add(read(name, 0, 1).item())
                elif length:
                    part = read(name, span.start, span.start + length)
                    state[key][span.at] = part.to(device)
        for key, found in numbers.items():
            if len(found) != 1:
                raise RunError(
                    f"optimizers/{self.trainable[0].partition('.')[0]}: its parameters differ in "
                    f"{key} ({min(found):g} to {max(found):g}), which ZeRO cannot keep; continue "
                    "with the engine that wrote this checkpoint"
                )
            state[key] = torch.tensor(found.pop(), device=device)
        self.optimizer.state[self._partition] = state

    def close(self) -> None:
        """Destroy the engine; without this, some processes aborted at exit ("terminate called")."""
        self._engine.destroy()


@contextlib.contextmanager
def _not_broadcast(phase: nn.Module) -> Iterator[None]:
    """Context in which DeepSpeed does not broadcast the parameters of `phase` from rank 0.

    They are equal already, and its broadcast fails on scalars. `ds_optim_param` is DeepSpeed's
    mark of parameters that differ between ranks on purpose.
    """
    for parameter in phase.parameters():
        parameter.ds_optim_param = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in phase.parameters():
            del parameter.ds_optim_param  # type: ignore[attr-defined]

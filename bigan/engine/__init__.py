"""Execution of phases: one process, DDP, FSDP2 or DeepSpeed; eager or compiled; precision.

The trainer uses `Engine` and `Prepared` only, whatever the launcher started:

    wrapped.py     the interface of all engines    fsdp.py       torch's fully_shard
    replicated.py  one process, DDP                zero.py       DeepSpeed ZeRO-1 and ZeRO-2
    compiling.py   torch.compile                   loss_scale.py float16
    guard.py       clipping, and skipping of non-finite steps

A hook right before the optimizer's step guards against non-finite losses and gradients, once for
all engines and without host synchronization: fused kernels skip the step on the device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bigan.distributed.launch import (
    check_same_program,
    chosen_engine,
    connect,
    launch_remarks,
    program,
    set_variables,
)
from bigan.distributed.wait_times import WaitTimer
from bigan.distributed.world import all_ranks_agree, on_all_ranks, sum_over_ranks
from bigan.engine.compiling import compile_backend, compile_now
from bigan.engine.guard import apply_flags, clip
from bigan.engine.loss_scale import SMALLEST, LossScale
from bigan.engine.replicated import Replicated
from bigan.engine.wrapped import Networks, NewOptimizer, Wrapped, trainable_names
from bigan.errors import LaunchError
from bigan.objectives.base import Phase, Step, StepResult, Tensors, Terms
from bigan.optimizers import OptimizerConfig
from bigan.run_config import RunConfig

Echo = Callable[[str], None]


class Prepared:
    """A phase under an engine, made by `Engine.prepare`."""

    def __init__(
        self, name: str, wrapped: Wrapped, clip: float | None, scale: LossScale | None
    ) -> None:
        self.name = name
        self.wrapped = wrapped
        self.phase = wrapped.phase
        self.optimizer = wrapped.optimizer
        self.clip = clip  # global norm that gradients are scaled down to
        self.scale = scale
        self.norm = torch.zeros(())  # of the last step's gradients, on the device
        self.finite = torch.ones((), dtype=torch.bool)  # all losses of this step
        self.at = 0  # images_seen of this step
        self.hooks: list[RemovableHandle] = []  # of the optimizer

    def close(self) -> None:
        """Release the wrapped phase. The hooks would keep DDP alive beyond its process group."""
        for hook in self.hooks:
            hook.remove()
        self.wrapped.close()


def require_supported(name: str) -> None:
    """Raises `LaunchError` for an engine that is known but not supported."""
    if name == "zero3":
        raise LaunchError(
            "engine = zero3 is not supported: it releases weights that the double backward of a "
            "gradient penalty needs; use engine=fsdp, which shards weights, gradients and "
            "optimizer state alike, or engine=zero2"
        )


def set_float32(precision: str) -> None:
    """Full float32 products on CUDA, unless the config sets TF32.

    torch uses TF32 in convolutions by default: penalties would lose 13 bits of the mantissa, and
    the engines would give different results.
    """
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


class Engine:
    """Runs phases as the launcher and the config's `engine` specify.

    Raises `LaunchError` if the two do not fit together.
    """

    def __init__(self, config: RunConfig, echo: Echo) -> None:
        require_supported(config.engine)
        environment = set_variables(os.environ)
        self._accelerator, self.world = connect(config.train.collective_timeout_seconds)
        set_float32(config.precision)
        size = self.world.size
        self.echo: Echo = echo if self.world.is_rank_0 else lambda _: None
        self.name = on_all_ranks(
            self.world, lambda: chosen_engine(config.engine, environment, self.world.size)
        )
        require_supported(self.name)
        check_same_program(self.world, program(config.model_dump(mode="json"), self.name))
        for remark in launch_remarks(environment, config.precision, config.compile):
            self.echo(remark)
        shares = size > 1 and config.train.batchnorm == "global"
        self.batchnorm_group = dist.group.WORLD if shares else None
        # The sharding engines flatten weights, so they need row-major ones.
        replicated = self.name in {"single", "ddp"}
        self.memory_format = torch.channels_last if replicated else torch.contiguous_format
        self._backend, reason = compile_backend(config.compile, self.world.device)
        if not all_ranks_agree(self.world, not reason):  # a node may lack a compiler
            self._backend = None
            self.echo(f"eager mode: {reason or 'not every node can compile'}")
        self._halt = torch.zeros((), device=self.world.device)
        self._first_bad = torch.full((), -1.0, dtype=torch.float64, device=self.world.device)
        self.waiting = WaitTimer(self.world)
        self.compile_seconds = 0.0  # of the phases prepared last
        self.reduces_gradients = True  # False: DDP does not all-reduce, to time the exchange

    def prepare(
        self,
        name: str,
        phase: Phase,
        config: OptimizerConfig,
        *,
        accumulation: int,
        scale: LossScale | None,
        is_trainable: Callable[[str], bool] = lambda _: True,
    ) -> Prepared:
        """Wrap a phase whose weights are final; `warm_up` follows once all phases are wrapped."""
        if self._backend is not None:
            phase.compile(backend=self._backend, fullgraph=True, dynamic=False)
        trainable = trainable_names(phase, is_trainable)
        wrapped = self._wrap(phase, trainable, config.build, accumulation)
        prepared = Prepared(name, wrapped, config.clip_grad_norm, scale)
        prepared.hooks = [
            wrapped.optimizer.register_step_pre_hook(lambda *_: self._guard(prepared)),
            wrapped.optimizer.register_step_post_hook(lambda *_: constrain(prepared)),
        ]
        return prepared

    def _wrap(
        self,
        phase: Phase,
        trainable: tuple[str, ...],
        new_optimizer: NewOptimizer,
        accumulation: int,
    ) -> Wrapped:
        if self.name == "fsdp":
            from bigan.engine.fsdp import FullySharded

            return FullySharded(phase, trainable, new_optimizer, self.world)
        if self.name.startswith("zero"):
            from bigan.engine.zero import Zero

            return Zero(
                phase,
                trainable,
                new_optimizer,
                self.world,
                accumulation,
                stage=int(self.name[4]),
                offload=self.name.endswith("_offload"),
            )
        return Replicated(phase, trainable, new_optimizer, self._accelerator)

    def warm_up(
        self,
        prepared: Prepared,
        others: Sequence[Prepared],
        networks: Networks,
        inputs: Mapping[Terms, Tensors],
    ) -> None:
        """Before the first step: compile each combination of terms, and run a backward for DDP.

        DDP rebuilds its gradient buckets after the first backward. Three or more processes then add
        gradients in another order, so a resumed run would differ in the last bits. Therefore the
        first backward of each attempt is a warm-up pass with all terms, whose gradients are
        dropped. `inputs`: terms -> a micro-batch.
        """
        with self._on_stage(prepared, others):
            if prepared.phase._compiled_call_impl is not None:
                seconds, why = compile_now(prepared.phase, networks, inputs, self.world)
                if why:
                    self.echo(f"eager mode for phase {prepared.name}: torch.compile failed ({why})")
                else:
                    self.echo(f"compiled phase {prepared.name} in {seconds:.0f} s")
                self.compile_seconds += seconds
            if self.name == "ddp":
                terms = max(inputs, key=len)
                result = prepared.wrapped(networks, inputs[terms], terms)
                prepared.wrapped.backward(result.loss)
                prepared.wrapped.zero_grad()

    @contextlib.contextmanager
    def _on_stage(self, prepared: Prepared, others: Sequence[Prepared]) -> Iterator[None]:
        """Context in which the networks of other phases are frozen, and all are unsharded."""
        with contextlib.ExitStack() as stack:
            for each in (prepared, *others):
                stack.enter_context(each.wrapped.unsharded())
            for other in others:
                # Without freezing, their gradients would be computed, and reduced by ZeRO.
                other.wrapped.freeze(True)
            prepared.wrapped.freeze(False)
            yield

    def step(
        self,
        prepared: Prepared,
        others: Sequence[Prepared],
        networks: Networks,
        inputs: list[Tensors],
        step: Step,
    ) -> StepResult:
        """One optimizer step over micro-batches; its scalars are their means, on the device.

        `others` are the phases that train the `networks` which this one reads. The losses of the
        micro-batches and the gradients of the ranks are averaged, so the result is that of one
        process on the global batch. Once a loss or gradient is not finite, this and all later
        updates are skipped on the device; the host reads that from `halted_at`.
        """
        wrapped, scale, num = prepared.wrapped, prepared.scale, len(inputs)
        total: Tensors = {}
        outputs: list[Tensors] = []
        finite = torch.ones((), dtype=torch.bool, device=self.world.device)
        self.waiting.wait_for_all()
        with self._on_stage(prepared, others), contextlib.ExitStack() as exchange:
            wrapped.zero_grad()
            for index, micro_batch in enumerate(inputs):
                last = index == num - 1
                with wrapped.micro_step(last=last and self.reduces_gradients):
                    result = wrapped(networks, micro_batch, step.terms)
                    finite = torch.isfinite(result.loss.detach()) & finite
                    if last:
                        self.waiting.wait_for_all()
                        exchange.enter_context(self.waiting.exchange())
                    scaled = result.loss if scale is None else result.loss * scale.scale
                    wrapped.backward(scaled / num)
                for name, value in result.scalars.items():
                    total[name] = total[name] + value / num if name in total else value / num
                outputs.append(result.outputs)
            prepared.finite, prepared.at = finite, step.at
            wrapped.step()
        total["grad_norm"] = prepared.norm
        if scale is not None:
            total["loss_scale"] = scale.scale.clone()
        return StepResult(total, inputs, outputs)

    def forget_compiled(self) -> None:
        """Drop all compiled graphs, which belong to phases that are not used any more.

        torch.compile counts recompilations per function, over all modules, and stops compiling
        after eight: a growing run would reach this limit at 32 px.
        """
        if self._backend is not None:
            torch.compiler.reset()

    def halted_at(self) -> float:
        """images_seen of the first non-finite step, -1 if there is none; waits for the device."""
        return self._first_bad.item()

    def clear_halt(self) -> None:
        """Make updates again after a non-finite step, when a sound state has been restored."""
        self._halt.zero_()
        self._first_bad.fill_(-1.0)

    def _guard(self, prepared: Prepared) -> None:
        """Before the optimizer: clip; skip every update from the first non-finite value on.

        In float16, steps whose gradients overflow are skipped, too, but they end the run only if
        the loss itself is not finite or the loss scale is at its minimum.
        """
        gradients = [
            _local(p.grad)
            for group in prepared.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm(gradients).to(self.world.device)
        if prepared.wrapped.sharded:
            square = norm.square()
            sum_over_ranks(self.world, square)
            norm = square.sqrt()
        scale = prepared.scale
        halt = 1 - prepared.finite.float()
        overflow = 1 - torch.isfinite(norm).float()
        if scale is None:
            halt = torch.maximum(halt, overflow)
        else:
            norm = norm / scale.scale
            halt = torch.maximum(halt, overflow * (scale.scale <= SMALLEST))
        flags = torch.stack([halt, overflow])
        if self.world.size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)  # all skip, or none
        halt, overflow = flags.unbind()
        first = (halt > 0) & (self._halt == 0)
        self._first_bad = torch.where(first, float(prepared.at), self._first_bad)
        self._halt = torch.maximum(self._halt, halt)
        skip = torch.maximum(self._halt, overflow)
        if prepared.clip is not None:
            clip(gradients, norm, prepared.clip)
        # An offloaded optimizer needs the flags on the host.
        place = gradients[0].device if gradients else self.world.device
        loss_scale = None if scale is None else scale.scale.to(place, copy=True)
        apply_flags(prepared.optimizer, gradients, skip.to(place), loss_scale)
        if scale is not None:
            scale.update(overflow)
            norm = torch.where(overflow > 0, 0.0, norm)
        prepared.norm = norm


@torch.no_grad()
def constrain(prepared: Prepared) -> None:
    """After the optimizer step: project what the optimizer holds (`Phase.constrain`)."""
    prepared.phase.constrain(
        p for group in prepared.optimizer.param_groups for p in group["params"]
    )


def _local(gradient: Tensor) -> Tensor:
    """This rank's shard of a gradient that may be sharded (a DTensor)."""
    return getattr(gradient, "_local_tensor", gradient)

"""How a phase is run: one process, DDP, FSDP2 or DeepSpeed; eager or compiled; in what precision.

The trainer sees `Engine` and `Prepared` only, whatever the launcher started:

    wrapped.py     what every engine makes of a phase
    replicated.py  one process, DDP               zero.py  DeepSpeed ZeRO-1 and ZeRO-2
    fsdp.py        torch's fully_shard            compiling.py, loss_scale.py, waiting.py

The check that stops a non-finite step before the optimiser lives here, once for all engines: a
hook right before the real Adam step, which makes the fused kernel skip it on the device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from bigan.distributed.launch import (
    check_same_program,
    chosen_engine,
    connect,
    launch_remarks,
    program,
)
from bigan.distributed.wait_times import WaitTimer
from bigan.distributed.world import all_ranks_agree, on_all_ranks, sum_over_ranks
from bigan.engine.compiling import compile_backend, compile_now
from bigan.engine.loss_scale import SMALLEST, LossScale
from bigan.engine.replicated import Replicated
from bigan.engine.wrapped import Batch, NewOptimizer, Wrapped
from bigan.errors import LaunchError
from bigan.objectives.gan import Phase, Terms
from bigan.run_config import AdamConfig, RunConfig

Echo = Callable[[str], None]


class Prepared:
    """A phase under an engine, made by `Engine.prepare`."""

    def __init__(self, wrapped: Wrapped, scale: LossScale | None) -> None:
        self.wrapped = wrapped
        self.phase = wrapped.phase
        self.optimizer = wrapped.optimizer
        self.scale = scale
        self.norm = torch.zeros(())  # of the last step's gradients, on the device
        self.finite = torch.ones((), dtype=torch.bool)  # all losses of this step
        self.images_seen = 0


def adam(parameters: object, config: AdamConfig) -> torch.optim.Adam:
    """Fused Adam; the fused kernel is also what can skip a non-finite step on the device."""
    return torch.optim.Adam(
        parameters,  # type: ignore[arg-type]
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def require_able(name: str, config: RunConfig) -> None:
    """Refuse an engine that cannot do what the recipe asks for; raises `LaunchError`."""
    if name != "zero3":
        return
    if config.penalties:
        raise LaunchError(
            "engine = zero3 cannot differentiate twice (double backward), which the penalty "
            f"{config.penalties[0].name} needs: it has released the weights by then; use "
            "engine=fsdp, which divides the weights too, or engine=zero2"
        )
    raise LaunchError(
        "engine = zero3 is not supported; use engine=fsdp, which divides weights, gradients and "
        "Adam's moments alike, or engine=zero2"
    )


def set_float32(precision: str) -> None:
    """Float32 products of CUDA as they are named, unless the recipe allows TF32.

    Convolutions use TF32 by default: penalties would lose 13 bits, and engines would disagree.
    """
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


class Engine:
    """Runs phases in the way that the launch and the recipe's `engine` ask for.

    Raises `LaunchError` if the two do not fit together, or not with the recipe's penalties.
    """

    def __init__(self, config: RunConfig, echo: Echo) -> None:
        require_able(config.engine, config)
        environment = dict(os.environ)
        self._accelerator, self.world = connect(config.train.collective_timeout_seconds)
        set_float32(config.precision)
        size = self.world.size
        self.echo: Echo = echo if self.world.is_rank_0 else lambda _: None
        self.name = on_all_ranks(
            self.world, lambda: chosen_engine(config.engine, environment, self.world.size)
        )
        require_able(self.name, config)
        check_same_program(self.world, program(config.model_dump(mode="json"), self.name))
        for remark in launch_remarks(environment, config.precision, config.compile):
            self.echo(remark)
        self.process_group = dist.group.WORLD if size > 1 else None
        # The sharding engines lay weights out row by row whatever they were.
        replicated = self.name in {"single", "ddp"}
        self.memory_format = torch.channels_last if replicated else torch.contiguous_format
        self._backend, reason = compile_backend(config.compile, self.world.device)
        if not all_ranks_agree(self.world, not reason):  # nodes may differ in their compilers
            self._backend = None
            self.echo(f"eager mode: {reason or 'not every node can compile'}")
        self._halt = torch.zeros((), device=self.world.device)
        self._first_bad = torch.full((), -1.0, dtype=torch.float64, device=self.world.device)
        self.waiting = WaitTimer(self.world)
        self.compile_seconds = 0.0  # of the phases prepared last

    def prepare(
        self, phase: Phase, config: AdamConfig, *, accumulation: int, scale: LossScale | None
    ) -> Prepared:
        """Wrap a phase whose weights are final; `rehearse` follows once all phases are wrapped."""
        if self._backend is not None:
            phase.compile(backend=self._backend, fullgraph=True, dynamic=False)
        wrapped = self._wrap(phase, partial(adam, config=config), accumulation)
        prepared = Prepared(wrapped, scale)
        wrapped.optimizer.register_step_pre_hook(lambda *_: self._judge(prepared))
        return prepared

    def _wrap(self, phase: Phase, new_optimizer: NewOptimizer, accumulation: int) -> Wrapped:
        if self.name == "fsdp":
            from bigan.engine.fsdp import FullySharded

            return FullySharded(phase, new_optimizer, self.world)
        if self.name.startswith("zero"):
            from bigan.engine.zero import Zero

            return Zero(
                phase,
                new_optimizer,
                self.world,
                accumulation,
                stage=int(self.name[4]),
                offload=self.name.endswith("_offload"),
            )
        return Replicated(phase, new_optimizer, self._accelerator)

    def rehearse(self, prepared: Prepared, other: Prepared, batches: dict[tuple, Batch]) -> None:
        """Before the first step: compile each combination of terms, and let DDP settle buckets.

        DDP sorts its gradients into buckets anew after the first backward. Three and more
        processes add up in another order then, so a resumed run would differ in the last bits: the
        first backward of each life is this one, with all penalties, and counts for nothing.
        """
        with self._on_stage(prepared, other):
            if prepared.phase._compiled_call_impl is not None:
                seconds, why = compile_now(prepared.phase, other.phase.network, batches, self.world)
                name = prepared.phase.name
                if why:
                    self.echo(f"eager mode for phase {name}: torch.compile failed ({why})")
                else:
                    self.echo(f"compiled phase {name} in {seconds:.0f} s")
                self.compile_seconds += seconds
            if self.name == "ddp":
                terms = max(batches, key=len)
                loss, _ = prepared.wrapped(other.phase.network, batches[terms], terms)
                prepared.wrapped.backward(loss)
                prepared.wrapped.zero_grad()

    @contextlib.contextmanager
    def _on_stage(self, prepared: Prepared, other: Prepared) -> Iterator[None]:
        """One network learns, the other only looks on; both are whole."""
        with prepared.wrapped.whole(), other.wrapped.whole():
            other.wrapped.freeze(True)  # or its gradients would be computed, and reduced by ZeRO
            prepared.wrapped.freeze(False)
            yield

    def step(
        self,
        prepared: Prepared,
        other: Prepared,
        batches: Sequence[Batch],
        terms: Terms,
        images_seen: int,
    ) -> dict[str, Tensor]:
        """One optimiser step over micro-batches; returns their mean scalars, on the device.

        The micro-batches' losses are averaged and the processes' gradients are averaged, so the
        result is that of one process on the joined batch. Once a loss or gradient is not finite,
        this and all later updates are skipped on the device; `halted_at` tells the host.
        """
        wrapped, num = prepared.wrapped, len(batches)
        total: dict[str, Tensor] = {}
        finite = torch.ones((), dtype=torch.bool, device=self.world.device)
        self.waiting.wait_for_all()
        with self._on_stage(prepared, other), contextlib.ExitStack() as exchange:
            wrapped.zero_grad()
            for index, batch in enumerate(batches):
                with wrapped.micro_step(last=index == num - 1):
                    loss, scalars = wrapped(other.phase.network, batch, terms)
                    finite = torch.isfinite(loss.detach()) & finite
                    if index == num - 1:
                        self.waiting.wait_for_all()
                        exchange.enter_context(self.waiting.exchange())
                    scaled = loss if prepared.scale is None else loss * prepared.scale.scale
                    wrapped.backward(scaled / num)
                for name, value in scalars.items():
                    total[name] = total[name] + value / num if name in total else value / num
            prepared.finite, prepared.images_seen = finite, images_seen
            wrapped.step()
        total[f"grad_norm_{prepared.phase.name}"] = prepared.norm
        if prepared.scale is not None:
            total[f"loss_scale_{prepared.phase.name}"] = prepared.scale.scale.clone()
        return total

    def forget_compiled(self) -> None:
        """Drop all compiled graphs: those of phases that are not used any more.

        torch.compile keeps the graphs of a function together, whatever module it belongs to, and
        gives up after eight: a run that grows would reach that at 32 px.
        """
        if self._backend is not None:
            torch.compiler.reset()

    def halted_at(self) -> float:
        """images_seen of the first non-finite step, -1 if there is none; waits for the device."""
        return self._first_bad.item()

    def _judge(self, prepared: Prepared) -> None:
        """The last word before Adam: from the first non-finite loss or gradient on, no update.

        In float16 gradients that overflow are skipped too, but end the run only if the loss itself
        is not finite or the loss scale cannot be lowered any more.
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
        verdict = torch.stack([halt, overflow])
        if self.world.size > 1:
            dist.all_reduce(verdict, op=dist.ReduceOp.MAX)  # all skip, or none
        halt, overflow = verdict.unbind()
        first = (halt > 0) & (self._halt == 0)
        self._first_bad = torch.where(first, float(prepared.images_seen), self._first_bad)
        self._halt = torch.maximum(self._halt, halt)
        # What GradScaler does for fp16: the fused kernel leaves everything as it is if found_inf.
        # Where Adam is offloaded, both belong on the host.
        place = gradients[0].device if gradients else self.world.device
        optimizer = prepared.optimizer
        found_inf = torch.maximum(self._halt, overflow).to(place)
        optimizer.grad_scale = None if scale is None else scale.scale.to(place, copy=True)  # type: ignore[attr-defined]
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        if scale is not None:
            scale.update(overflow)
            norm = torch.where(overflow > 0, 0.0, norm)
        prepared.norm = norm


def _local(gradient: Tensor) -> Tensor:
    """This process's part of a gradient that may be spread over all (a DTensor)."""
    return getattr(gradient, "_local_tensor", gradient)

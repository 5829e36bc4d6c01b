"""What a training method consists of: an objective, its phases, steps and samplers.

    Objective   owns named networks, the phases that train them and the order of their steps
    Phase       the networks that share one optimizer, and one pure forward
    Step        one optimizer step of one phase
    Sampler     how images are made from the networks of a snapshot (samplers.py)

The trainer executes the steps of `Objective.steps` and contains no code for any method. The inputs
of a forward are a dict of tensors with these keys:

    "images.pixels"   uint8 [m, H, W, C], of the data stream "images"; "images.labels" int64 [m];
                      "images.mirror" bool [m] where the stream is mirrored at random
    "z", "mix", ...   random inputs, one per image, from `Phase.draws`
    "strength", ...   inputs shared by all images, from `Phase.values`
    "generator.fake"  output "fake" of an earlier phase of the same training step (`Phase.takes`)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bigan.augment import AugmentConfig
from bigan.config import ConfigError, Frozen
from bigan.distributed.world import World, mean_over_ranks
from bigan.models import AnyModel
from bigan.objectives.samplers import Sampler

Tensors = dict[str, Tensor]
Terms = tuple[str, ...]  # names of the loss terms of a step


class Step(NamedTuple):
    """One optimizer step of one phase."""

    phase: str
    terms: Terms
    at: int  # images_seen that draws, schedules and the learning rate depend on
    num_images: int  # over all processes and micro-batches
    fresh: bool = False  # reads the next batch of each stream of the phase; images_seen advances


class Result(NamedTuple):
    """What the forward of a phase returns."""

    loss: Tensor  # mean over the micro-batch, 0-d
    scalars: Tensors  # detached, 0-d: logged as train/<phase>/<name>
    outputs: Tensors  # detached; inputs of later phases of the same training step


class StepResult(NamedTuple):
    """The results of an optimizer step, for `Phase.after_step`."""

    scalars: Tensors  # means over the micro-batches, 0-d, on the device
    inputs: list[Tensors]  # of each micro-batch of this rank
    outputs: list[Tensors]


class Phase(nn.Module):
    """The networks that share one optimizer, registered under their names, and one pure forward.

    `forward` draws no random numbers, changes no buffer, never synchronizes with the host and does
    not depend on the rank. It is the unit that is compiled (one full graph for each combination of
    terms) and wrapped by DDP, FSDP2 or DeepSpeed. The other hooks run outside of compiled code.
    """

    reads: tuple[str, ...] = ()  # networks of other phases that the forward uses, passed in frozen
    streams: tuple[str, ...] = ()  # data streams that the forward uses
    takes: tuple[str, ...] = ()  # outputs of earlier phases, as "<phase>.<name>"
    after_step_uses_networks = False  # True: the networks are unsharded for `after_step`

    @property
    def trains(self) -> tuple[str, ...]:
        """Names of the networks that the phase trains."""
        return tuple(name for name, _ in self.named_children())

    def draws(self, at: int, num: int, terms: Terms) -> Tensors:
        """Random inputs of the `num` images of the global batch, on the CPU, first axis `num`."""
        return {}

    def values(self, at: int) -> Tensors:
        """Inputs shared by all images: annealed weights, the strength of an augmentation."""
        return {}

    def forward(self, networks: Mapping[str, nn.Module], inputs: Tensors, terms: Terms) -> Result:
        """Loss of one micro-batch; `networks` are those of `reads`."""
        raise NotImplementedError

    def constrain(self, parameters: Iterable[Tensor]) -> None:
        """Elementwise in-place projection after each update (weight clipping of WGAN).

        `parameters` are the tensors that the optimizer holds: slices or flat partitions under the
        sharding engines.
        """

    def after_step(self, step: Step, result: StepResult, world: World) -> Tensors:
        """Update the objective's `state` (running means, ADA); returns further scalars to log.

        A collective.
        """
        return {}


class ObjectiveConfig(Frozen):
    """Base of the config section of every objective."""

    phases: ClassVar[tuple[str, ...]]  # keys of the `optimizer` section
    networks: ClassVar[tuple[str, ...]]  # names of the networks that `model` must build
    streams: ClassVar[tuple[str, ...]] = ("images",)
    supports_growth: ClassVar[bool] = False
    supports_augment: ClassVar[bool] = False

    name: str

    def build(self, setup: Setup) -> Objective:
        """The objective with these settings; raises `ConfigError` for an invalid combination."""
        raise NotImplementedError

    def images_per_step(self, batch: int) -> int:
        """Images of each stream that one training step reads."""
        return batch

    @property
    def needs_anneal_images(self) -> list[str]:
        """Keys of this section whose annealing is over `anneal_images` of the config."""
        return []

    @property
    def micro_batch_divisor(self) -> int:
        """The number of images in a micro-batch must be a multiple of this."""
        return 1

    def check(self, model: AnyModel, settings: AugmentConfig) -> None:
        """Raises ValueError unless model and augmentation are supported by this objective."""
        missing = [name for name in self.networks if name not in model.networks]
        if missing:
            raise ValueError(
                f"model.name = {model.name} builds {' and '.join(model.networks)}; objective.name "
                f"= {self.name} needs {' and '.join(self.networks)}"
            )
        if settings.name != "none" and not self.supports_augment:
            raise ValueError(f"augment: objective.name = {self.name} has no discriminator inputs")


@dataclass(frozen=True)
class Setup:
    """The arguments of `ObjectiveConfig.build`: other config sections and facts about the data."""

    model: AnyModel
    augment: AugmentConfig
    batch: int  # images per optimizer step over all processes
    seed: int
    precision: str  # fp32, tf32, bf16, fp16
    anneal_images: int | None
    class_counts: tuple[int, ...]  # training images of each class
    fade: tuple[int, int] | None = None  # images_seen at the begin and at the end of a fade-in

    def alpha(self, images_seen: int) -> float:
        """Weight of the newest resolution in the step that begins at `images_seen`, 0 to 1."""
        if self.fade is None:
            return 1.0
        start, end = self.fade
        return min(1.0, (images_seen - start) / (end - start))


class Objective(Protocol):
    """A training method. Networks are built on the meta device; the trainer initializes them."""

    networks: dict[str, nn.Module]  # trained; each belongs to exactly one phase
    frozen: dict[str, nn.Module]  # pretrained constants, not in checkpoints
    state: dict[str, nn.Module]  # buffers of the run, in checkpoints
    phases: dict[str, Phase]
    averaged: tuple[str, ...]  # networks with an EMA
    samplers: dict[str, Sampler]  # the first one is evaluated and shown by default

    @property
    def period(self) -> int:
        """`steps` repeats after this many training steps."""

    @property
    def separate_steps(self) -> dict[str, int]:
        """Phase -> k: a separate regularization step follows every k-th step of the phase."""

    def begin(self, images_seen: int) -> None:
        """Set the buffers that depend on `images_seen` alone; called before each training step."""

    def remarks(self) -> list[str]:
        """Lines to print at the start of a run, such as values that are derived from others."""

    def steps(self, images_seen: int) -> tuple[Step, ...]:
        """The optimizer steps of the training step that begins at `images_seen`, in order."""


def variants(objective: Objective, images_per_step: int) -> list[Step]:
    """One step for each combination of phase and terms that occurs, in order of occurrence."""
    starts = range(0, objective.period * images_per_step, images_per_step)
    found: dict[tuple[str, Terms], Step] = {}
    for step in itertools.chain.from_iterable(objective.steps(start) for start in starts):
        found.setdefault((step.phase, step.terms), step)
    return list(found.values())


def check_samplers(objective: Objective, chosen: str | None) -> None:
    """Raises `ConfigError` if there is no sampler `chosen` (evaluation.sampler).

    And ValueError for a sampler of a network that is neither averaged nor frozen: sample grids and
    snapshots are made on rank 0, where other networks may be sharded or in training mode.
    """
    if chosen is not None and chosen not in objective.samplers:
        raise ConfigError(
            f"evaluation.sampler = {chosen!r}: the objective has {', '.join(objective.samplers)}"
        )
    kept = {*objective.averaged, *objective.frozen}
    for name, sampler in objective.samplers.items():
        if not set(sampler.networks) <= kept:
            raise ValueError(f"sampler {name}: add {sampler.networks} to `averaged`")


def init_stream(network: str) -> str:
    """Name of the random stream that initializes a network."""
    # Fixed names, so that a seed gives the same initial weights in every version.
    known = {"generator": "init/g", "discriminator": "init/d"}
    return known.get(network, f"init/{network}")


class RunningMean(nn.Module):
    """An exponential moving average of a scalar over steps, in the state of a run; initially 0."""

    mean: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay  # weight of each new value
        self.register_buffer("mean", torch.zeros(()))

    @torch.no_grad()
    def update(self, value: Tensor, world: World) -> None:
        """Add the mean of `value` (0-d) over ranks. A collective; never waits for the device."""
        self.mean.lerp_(mean_over_ranks(world, value), self.decay)

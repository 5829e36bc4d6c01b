"""The whole recipe of a run: every setting, its default and its meaning, in one frozen tree.

Networks bring their own section (`models/<family>.py`); everything else is here. Units are in
the names; progress is always counted in images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from bigan.augment import AugmentConfig, NoAugment
from bigan.config import ConfigError, Frozen
from bigan.data.format.manifest import Manifest
from bigan.data.settings import DataConfig
from bigan.models import ModelConfig
from bigan.run.collapse import CollapseConfig

Positive = Annotated[int, Field(gt=0)]
EngineName = Literal[
    "auto", "single", "ddp", "fsdp", "zero1", "zero2", "zero1_offload", "zero2_offload", "zero3"
]
NonNegative = Annotated[float, Field(ge=0)]


class PenaltyConfig(Frozen):
    """One gradient penalty of the discriminator, always computed in float32."""

    name: Literal["r1", "r2", "wgan_gp"]
    # r1, r2: gamma (the loss holds gamma/2); wgan_gp: lambda. None: `penalty_weight` says
    weight: NonNegative | None = None
    weight_end: NonNegative | None = None  # reached along a cosine after `anneal_images`
    every: Positive = 1  # lazy regularisation: at every k-th discriminator step, times k
    own_step: bool = False  # lazy, in an optimiser step of its own after the main one (StyleGAN2)
    target: Annotated[float, Field(gt=0)] = 1.0  # wgan_gp: the norm asked for (ProGAN, CIFAR: 750)


class PathLengthConfig(Frozen):
    """StyleGAN2's path length regularisation: every k-th generator step, in a step of its own."""

    weight: NonNegative = 2.0
    every: Positive = 4
    decay: Annotated[float, Field(gt=0, le=1)] = 0.01  # of the mean length, per regularised step
    batch_shrink: Positive = 2  # it sees this part of a batch: it takes much memory


class AdamConfig(Frozen):
    lr: Annotated[float, Field(gt=0)]
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    warmup_images: Annotated[int, Field(ge=0)] = 0  # linear, from nothing to lr
    lr_end: Annotated[float, Field(gt=0)] | None = None  # along a cosine after `anneal_images`
    beta2_end: Annotated[float, Field(ge=0, lt=1)] | None = None


class OptimizerConfig(Frozen):
    g: AdamConfig
    d: AdamConfig


class EmaConfig(Frozen):
    """Averaged generator: half-life in images, optional ramp-up, hard copy until `start_images`."""

    halflife_images: Annotated[float, Field(gt=0)]
    rampup: Annotated[float, Field(gt=0)] | None = None  # half-life <= rampup * images_seen
    start_images: Annotated[int, Field(ge=0)] = 0  # BigGAN: a plain copy until here
    halflife_end_images: Annotated[float, Field(gt=0)] | None = None  # after `anneal_images`


class LevelConfig(Frozen):
    """What is different at one resolution of a growing model; None: as in `train`, `optimizer`.

    With a `batch` of its own and no `micro_batch`, a process's share is not divided further.
    """

    resolution: Positive
    batch: Positive | None = None
    micro_batch: Positive | None = None
    lr: Annotated[float, Field(gt=0)] | None = None  # of both networks


class GrowthConfig(Frozen):
    """Progressive growing (Karras et al. 2018): the resolution doubles up to the model's.

    Lengths are in real images. A resolution fades in over `fade_images`, then stays for
    `stable_images`; the last one until `train.total_images`.
    """

    start_resolution: Positive = 4
    stable_images: Positive = 600_000
    fade_images: Positive = 600_000
    levels: tuple[LevelConfig, ...] = ()


class TrainConfig(Frozen):
    total_images: Positive
    batch: Positive  # images per optimiser step over all processes: the hyperparameter
    # Images per process and forward; bounds memory. BatchNorm sees micro_batch * processes images.
    micro_batch: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    num_d_steps: Positive = 1  # discriminator steps, each on new images, per generator step
    orthogonal_weight: NonNegative = 0.0  # BigGAN's orthogonal regularisation of the generator
    tick_images: Positive = 1_000  # statistics leave the device, progress is shown
    checkpoint_images: Positive = 10_000  # complete state, for resuming
    checkpoint_keep: Positive = 2  # newest checkpoints kept
    checkpoint_milestone_images: Positive | None = None  # one per so many is kept for good
    snapshot_images: Positive = 10_000  # averaged generator, for evaluation and use
    standing_batches: Positive = 16  # batches behind a snapshot's BatchNorm statistics
    replica_check_images: Positive = 50_000  # whether all processes still hold the same weights
    lost_after_seconds: Positive = 60  # a process that has not been heard of is lost: the run stops
    collective_timeout_seconds: Positive = 600  # of one exchange between living processes


class EvaluationConfig(Frozen):
    """What `bigan evaluate` measures at each snapshot."""

    extractor: Literal["digits8-cnn-v1", "inception-v3-compat"] = "inception-v3-compat"
    weights_path: Path | None = None  # local Inception weights; the digits network is shipped
    num_samples: Annotated[int, Field(ge=2)] = 50_000
    batch: Positive = 64
    split: str = "train"  # reference images
    splits: Positive = 10  # of the inception/classifier score
    seed: Annotated[int, Field(ge=0)] = 0
    # Values of z beyond it are drawn again; for a generator with a mean latent it is psi.
    truncation: Annotated[float, Field(ge=0.02)] | None = None
    # Images in each of the train.standing_batches behind the BatchNorm statistics of truncated
    # latents; None: train.micro_batch, or train.batch without one.
    standing_batch: Positive | None = None


class TrackingConfig(Frozen):
    mlflow: bool = True
    experiment: str = "bigan"


class RunConfig(Frozen):
    """A complete run. `run_dir` is where everything it makes is found again."""

    run_dir: Path
    # auto: what the launch file says. zero3 is known in order to be refused.
    engine: EngineName = "auto"
    compile: Literal["auto", "inductor", "aot_eager", "eager"] = "auto"
    # Of the forwards; weights and penalties are float32. tf32: float32 whose products NVIDIA's GPUs
    # round to 10 bits; several times faster than fp32 on them, nothing elsewhere.
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    data: DataConfig
    model: ModelConfig
    augment: AugmentConfig = NoAugment()  # of what the discriminator sees, real and fake alike
    growth: GrowthConfig | None = None  # of a model that can grow
    loss: Literal["hinge", "non_saturating", "least_squares", "wasserstein", "relativistic"] = (
        "hinge"
    )
    penalties: tuple[PenaltyConfig, ...] = ()
    path_length: PathLengthConfig | None = None  # of a generator with intermediate latents
    drift_weight: NonNegative = 0.0  # of E[D(x)^2] on real images, ProGAN's 0.001
    anneal_images: Positive | None = None  # until the values named `..._end` are reached
    optimizer: OptimizerConfig
    ema: EmaConfig
    train: TrainConfig
    collapse: CollapseConfig = CollapseConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("compile", mode="before")
    @classmethod
    def _compile_as_switch(cls, value: object) -> object:
        return {True: "auto", False: "eager"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _combinations(self) -> RunConfig:
        names = [penalty.name for penalty in self.penalties]
        if len(set(names)) != len(names):
            raise ValueError("penalties: each penalty may be given once")
        own_steps = {penalty.every for penalty in self.penalties if penalty.own_step}
        if len(own_steps) > 1:
            raise ValueError(
                "penalties: those with own_step share one optimiser step, give them the same every"
            )
        ends = {
            "augment.fixed_end": getattr(self.augment, "fixed_end", None),
            "optimizer.g.lr_end": self.optimizer.g.lr_end,
            "optimizer.d.lr_end": self.optimizer.d.lr_end,
            "optimizer.g.beta2_end": self.optimizer.g.beta2_end,
            "optimizer.d.beta2_end": self.optimizer.d.beta2_end,
            "ema.halflife_end_images": self.ema.halflife_end_images,
            **{f"penalties: {p.name}.weight_end": p.weight_end for p in self.penalties},
        }
        given = [name for name, value in ends.items() if value is not None]
        if given and self.anneal_images is None:
            raise ValueError(f"{given[0]} needs anneal_images, the images until it is reached")
        if self.path_length and not hasattr(self.model, "mapping_layers"):
            raise ValueError(
                f"path_length: model.name = {self.model.name} has no intermediate latents to take "
                "paths from; use model.name=stylegan2, or leave path_length out"
            )
        self._growth()
        return self

    def _growth(self) -> None:
        model, growth = self.model, self.growth
        if growth is None:
            return
        if not hasattr(model, "fading"):
            raise ValueError(
                f"growth: model.name = {model.name} has a fixed resolution; use model.name=progan, "
                "or leave growth out"
            )
        if model.fading:
            raise ValueError("growth: it decides what fades in; leave model.fading out")
        possible = [4 * 2**i for i in range(9) if 4 * 2**i <= model.resolution]
        if growth.start_resolution not in possible[:-1]:
            raise ValueError(
                f"growth.start_resolution = {growth.start_resolution}: use a power of two from 4 "
                f"to {model.resolution // 2}, below model.resolution = {model.resolution}"
            )
        named = [level.resolution for level in growth.levels]
        for resolution in named:
            if resolution not in possible or resolution < growth.start_resolution:
                raise ValueError(
                    f"growth.levels: {resolution} px is no resolution on the way from "
                    f"{growth.start_resolution} to {model.resolution} px"
                )
        if len(set(named)) != len(named):
            raise ValueError("growth.levels: each resolution may be given once")


def misfits(model: ModelConfig, manifest: Manifest) -> list[tuple[str, str, int, int]]:
    """(what, key below `model`, wanted by the model, found in the images) where they disagree."""
    facts = (
        ("resolution", "resolution", model.resolution, manifest.resolution),
        ("channels", "image_channels", model.image_channels, manifest.channels),
        ("classes", "num_classes", model.num_classes, manifest.num_classes),
    )
    return [fact for fact in facts if fact[2] != fact[3]]


def fades(config: RunConfig) -> bool:
    """Whether the networks' resolution fades in. To be asked before compiling, not inside."""
    return getattr(config.model, "fading", False)


def penalty_weight(penalty: PenaltyConfig, config: RunConfig) -> float:
    """The weight of a penalty that the recipe leaves open, or the one it gives.

    r1 and r2: gamma = 0.0002 * resolution^2 / batch (Karras et al. 2020, arXiv:2006.06676, appendix
    C: the heuristic of its "auto" configuration); wgan_gp: 10 (Gulrajani et al. 2017).
    """
    if penalty.weight is not None:
        return penalty.weight
    if penalty.name == "wgan_gp":
        return 10.0
    return 0.0002 * config.model.resolution**2 / config.train.batch


def corrected(settings: AdamConfig, every: int | None) -> AdamConfig:
    """Adam of a network that takes an extra optimiser step for regularisation after each k-th one.

    k main steps and one more should move it as far, and forget as much, as k steps did:
    c = k / (k + 1), lr * c and beta ** c (Karras et al. 2020, arXiv:1912.04958, appendix B).
    """
    if every is None:
        return settings
    c = every / (every + 1)
    changes: dict[str, float | None] = {
        "lr": settings.lr * c,
        "lr_end": None if settings.lr_end is None else settings.lr_end * c,
        "beta1": settings.beta1**c,
        "beta2": settings.beta2**c,
        "beta2_end": None if settings.beta2_end is None else settings.beta2_end**c,
    }
    return settings.model_copy(update=changes)


def own_step_every(config: RunConfig, name: str) -> int | None:
    """After how many steps of network "g" or "d" it takes one to be regularised; None: never."""
    if name == "g":
        return config.path_length.every if config.path_length else None
    return next((p.every for p in config.penalties if p.own_step), None)


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Micro-batches per optimiser step; batch = steps * world_size * micro_batch or ConfigError."""
    if train.batch % world_size:
        raise ConfigError(
            f"train.batch = {train.batch} cannot be divided evenly among {world_size} processes; "
            f"use a multiple of {world_size}"
        )
    share = train.batch // world_size
    micro = train.micro_batch or share
    if share % micro:
        fitting = [m for m in range(1, share + 1) if share % m == 0]
        nearest = min(fitting, key=lambda m: abs(m - micro))
        raise ConfigError(
            f"train.micro_batch = {micro} does not divide the {share} images each of {world_size} "
            f"process(es) gets of train.batch = {train.batch}; try train.micro_batch={nearest}"
        )
    return share // micro


def check_groups(config: RunConfig, world_size: int) -> None:
    """A discriminator that compares the images of a group must get whole groups; `ConfigError`.

    Else what it sees of an image would depend on the number of processes.
    """
    group: int = getattr(config.model, "minibatch_group", 1)
    train = config.train
    steps = accumulation_steps(train, world_size)
    micro = train.batch // (world_size * steps)
    if micro % group:
        raise ConfigError(
            f"model.minibatch_group = {group} (minibatch standard deviation) does not divide the "
            f"{micro} images that a process sees at a time ({config.model.resolution} px: "
            f"train.batch = {train.batch} over {world_size} process(es) and {steps} micro-batch(es)"
            f"); use a multiple of {group * world_size * steps} as batch, or another "
            "model.minibatch_group"
        )
    if config.path_length and micro % config.path_length.batch_shrink:
        raise ConfigError(
            f"path_length.batch_shrink = {config.path_length.batch_shrink} does not divide the "
            f"{micro} images that a process sees at a time; change it or train.batch"
        )

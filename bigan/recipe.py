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
from bigan.data.settings import DataConfig
from bigan.data.shards import Manifest
from bigan.models import ModelConfig

Positive = Annotated[int, Field(gt=0)]
EngineName = Literal[
    "auto", "single", "ddp", "fsdp", "zero1", "zero2", "zero1_offload", "zero2_offload", "zero3"
]
NonNegative = Annotated[float, Field(ge=0)]


class PenaltyConfig(Frozen):
    """One gradient penalty of the discriminator, always computed in float32."""

    name: Literal["r1", "r2", "wgan_gp"]
    weight: NonNegative  # r1, r2: gamma (the loss holds gamma/2); wgan_gp: lambda
    every: Positive = 1  # lazy regularisation: at every k-th discriminator step, times k


class AdamConfig(Frozen):
    lr: Annotated[float, Field(gt=0)]
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    warmup_images: Annotated[int, Field(ge=0)] = 0  # linear, from nothing to lr


class OptimizerConfig(Frozen):
    g: AdamConfig
    d: AdamConfig


class EmaConfig(Frozen):
    """Averaged generator: half-life in images, optional ramp-up, hard copy until `start_images`."""

    halflife_images: Annotated[float, Field(gt=0)]
    rampup: Annotated[float, Field(gt=0)] | None = None  # half-life <= rampup * images_seen
    start_images: Annotated[int, Field(ge=0)] = 0  # BigGAN: a plain copy until here


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
    truncation: Annotated[float, Field(ge=0.02)] | None = None  # resample |z| > truncation


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
    loss: Literal["hinge", "non_saturating", "least_squares", "wasserstein"] = "hinge"
    penalties: tuple[PenaltyConfig, ...] = ()
    optimizer: OptimizerConfig
    ema: EmaConfig
    train: TrainConfig
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
        return self


def misfits(model: ModelConfig, manifest: Manifest) -> list[tuple[str, str, int, int]]:
    """(what, key below `model`, wanted by the model, found in the images) where they disagree."""
    facts = (
        ("resolution", "resolution", model.resolution, manifest.resolution),
        ("channels", "image_channels", model.image_channels, manifest.channels),
        ("classes", "num_classes", model.num_classes, manifest.num_classes),
    )
    return [fact for fact in facts if fact[2] != fact[3]]


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

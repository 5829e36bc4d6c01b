"""The config of a run: every setting, its default and its meaning, in one frozen tree.

Models, data, augmentations, optimizers and objectives define their sections; this file composes
them. Units are in the names; progress is counted in images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from bigan import config as configs
from bigan.augment import AugmentConfig, NoAugment, needs_anneal_images
from bigan.config import ConfigError, Frozen, Positive
from bigan.data.format.manifest import Manifest
from bigan.data.settings import DataConfig
from bigan.data.streaming.dataset import open_level
from bigan.errors import UserError
from bigan.image_size import plain, shown
from bigan.models import AnyModel
from bigan.objectives import AnyObjective, gan
from bigan.objectives.base import Setup
from bigan.objectives.ema import EmaConfig
from bigan.objectives.growth import GrowthConfig
from bigan.optimizers import OptimizerConfig
from bigan.urls import is_remote

EngineName = Literal[
    "auto", "single", "ddp", "fsdp", "zero1", "zero2", "zero1_offload", "zero2_offload", "zero3"
]
IMAGES = "images"  # name of the data stream where `data` is a single one


class TrainConfig(Frozen):
    total_images: Positive
    batch: Positive  # images per optimizer step over all processes: the hyperparameter
    micro_batch: Positive | None = None  # images per process and forward; bounds memory
    # Images that share BatchNorm statistics in training: the micro-batches of all processes
    # (global), or one micro-batch (local), which needs `micro_batch`: the same at any world size.
    batchnorm: Literal["global", "local"] = "global"
    # Of spectral normalization, before each optimizer step. Published code has one per forward:
    # as many as there are micro-batches.
    power_iterations: Positive = 1
    seed: Annotated[int, Field(ge=0)] = 0
    tick_images: Positive = 1_000  # metrics are read from the device, progress is shown
    checkpoint_images: Positive = 10_000  # complete state, for resuming
    checkpoint_keep: Positive = 2  # newest checkpoints kept
    # One checkpoint per this many images is kept permanently.
    checkpoint_milestone_images: Positive | None = None
    snapshot_images: Positive = 10_000  # networks of the samplers, for evaluation and use
    standing_batches: Positive = 16  # for the BatchNorm statistics of a snapshot
    replica_check_images: Positive = 50_000  # interval of comparing the weights of all ranks
    lost_after_seconds: Positive = 60  # without a heartbeat: the rank is lost, the run stops
    collective_timeout_seconds: Positive = 600  # of one collective, and for all ranks to start

    @model_validator(mode="after")
    def _local_statistics(self) -> TrainConfig:
        if self.batchnorm == "local" and self.micro_batch is None:
            raise ValueError(
                "batchnorm = local needs micro_batch, the number of images that share statistics; "
                "without it they would depend on the number of processes"
            )
        return self


class CollapseConfig(Frozen):
    """When training is considered collapsed (run/collapse.py), and the action taken then.

    A value has exploded when its median exceeds `ratio * max(earlier median, floor)`. The gap has
    vanished when all its values in a window are below the earlier median / `vanished_ratio`. In
    healthy runs on the digits the gap stays within a factor of 3.5 of its earlier median, and
    singular values below 1.7 times `max(earlier median, floor)`.
    """

    # stop: end the run. rollback: continue from the last checkpoint before it, with lower learning
    # rates, or stop if there is none
    action: Literal["warn", "stop", "rollback"] = "warn"
    window_images: Positive | None = None  # None: 50 batches, and at least 4 ticks
    baseline_images: Positive | None = None  # length of the earlier median; None: 10 windows
    # Without detection at the start of a run and of a growth stage; None: 10 windows.
    min_images: Positive | None = None
    gap_ratio: Annotated[float, Field(gt=1)] = 4.0
    gap_floor: Annotated[float, Field(ge=0)] = 2.0  # the hinge loss is 0 from a gap of 2 on
    vanished_ratio: Annotated[float, Field(gt=1)] = 20.0
    singular_ratio: Annotated[float, Field(gt=1)] = 4.0
    singular_floor: Annotated[float, Field(ge=0)] = 1.0  # about that of an initialized layer
    lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.5  # of all phases, at every rollback
    max_rollbacks: Annotated[int, Field(ge=0)] = 3  # the run stops at the next collapse


class EvaluationConfig(Frozen):
    """What `bigan evaluate` measures at each snapshot."""

    extractor: Literal["digits8-cnn-v1", "inception-v3-compat"] = "inception-v3-compat"
    weights_path: Path | None = None  # file of the Inception weights; digits8-cnn-v1 needs none
    sampler: str | None = None  # of the objective; None: its first one
    num_samples: Annotated[int, Field(ge=2)] = 50_000
    batch: Positive = 64
    split: str = "train"  # reference images
    splits: Positive = 10  # of the inception/classifier score
    seed: Annotated[int, Field(ge=0)] = 0
    # Bound on |z| (values beyond it are resampled), or psi for a generator with a mean latent.
    truncation: Annotated[float, Field(ge=0.02)] | None = None
    # Size of each of the train.standing_batches for the BatchNorm statistics of truncated latents;
    # None: train.micro_batch, or train.batch if that is None.
    standing_batch: Positive | None = None


class TrackingConfig(Frozen):
    mlflow: bool = True
    experiment: str = "bigan"
    # Folder of the sweep that the run is a trial of, relative to run_dir: its MLflow run is the
    # parent of this one, and the local store is next to it.
    parent: Path | None = None


def _stream_kind(value: Any) -> str:
    """Whether `data` is one stream or a mapping from names to streams."""
    if isinstance(value, DataConfig):
        return "one"
    nested = (
        isinstance(value, Mapping)
        and value
        and all(isinstance(entry, Mapping | DataConfig) for entry in value.values())
    )
    return "several" if nested else "one"


class RunConfig(Frozen):
    """The config of a run."""

    run_dir: Path  # folder of everything that the run writes
    # auto: that of the launch file. zero3 is accepted here and refused later, with the reason.
    engine: EngineName = "auto"
    # auto: inductor, or eager with a message if compilation is impossible.
    compile: Literal["auto", "inductor", "aot_eager", "eager"] = "auto"
    # Of the forwards; weights and penalties are float32. tf32: float32, but NVIDIA GPUs round the
    # inputs of products to a 10-bit mantissa, several times faster; no effect on other devices.
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    # One stream, named "images", or a mapping from names to streams.
    data: Annotated[
        Annotated[DataConfig, Tag("one")] | Annotated[dict[str, DataConfig], Tag("several")],
        Discriminator(_stream_kind),
    ]
    model: AnyModel
    objective: AnyObjective = gan.Config()
    augment: AugmentConfig = NoAugment()  # of discriminator inputs, real and fake alike
    growth: GrowthConfig | None = None  # of a model that can grow
    anneal_images: Positive | None = None  # length of the annealing to the values named `..._end`
    optimizer: dict[str, OptimizerConfig]  # one entry per phase of the objective
    # Patterns ("generator.blocks.*") of the parameters that are trained; None: all.
    trainable: tuple[str, ...] | None = None
    ema: EmaConfig
    train: TrainConfig
    collapse: CollapseConfig = CollapseConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def streams(self) -> dict[str, DataConfig]:
        """The data streams by name."""
        return self.data if isinstance(self.data, dict) else {IMAGES: self.data}

    @property
    def images_per_step(self) -> int:
        """Images of each stream that one training step reads."""
        return self.objective.images_per_step(self.train.batch)

    @field_validator("compile", mode="before")
    @classmethod
    def _compile_as_switch(cls, value: object) -> object:
        return {True: "auto", False: "eager"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _combinations(self) -> RunConfig:
        self.objective.check(self.model, self.augment)
        wanted = self.objective.phases
        if set(self.optimizer) != set(wanted):
            raise ValueError(
                f"optimizer: has entries for {' and '.join(self.optimizer) or 'nothing'}; "
                f"objective.name = {self.objective.name} trains {' and '.join(wanted)}"
            )
        lacking = [name for name in self.objective.streams if name not in self.streams]
        if lacking:
            raise ValueError(
                f"data: has the stream(s) {' and '.join(self.streams)}; objective.name = "
                f"{self.objective.name} reads {' and '.join(self.objective.streams)}"
            )
        ends = [
            *(f"augment.{key}" for key in needs_anneal_images(self.augment)),
            *(
                f"optimizer.{name}.{key}"
                for name, settings in self.optimizer.items()
                for key in settings.needs_anneal_images
            ),
            *(["ema.halflife_end_images"] if self.ema.halflife_end_images is not None else []),
            *(f"objective.{key}" for key in self.objective.needs_anneal_images),
        ]
        if ends and self.anneal_images is None:
            raise ValueError(f"{ends[0]} needs anneal_images, the images until it is reached")
        stores = [data for data in self.streams.values() if is_remote(data.path)]
        longest = max([data.patience_seconds for data in stores], default=0)
        if longest >= self.train.collective_timeout_seconds:
            raise ValueError(
                f"data.patience_seconds = {longest}: must be less than "
                f"train.collective_timeout_seconds = {self.train.collective_timeout_seconds}; the "
                "other ranks wait for that long"
            )
        self._check_growth()
        return self

    def _check_growth(self) -> None:
        model, growth = self.model, self.growth
        if growth is None:
            return
        if not model.can_grow:
            raise ValueError(
                f"growth: model.name = {model.name} has a fixed resolution; use model.name=progan, "
                "or leave growth out"
            )
        if not self.objective.supports_growth:
            raise ValueError(f"growth: objective.name = {self.objective.name} does not support it")
        if model.is_fading:
            raise ValueError("growth: sets model.fading itself; leave model.fading out")
        growth.check(model.resolution)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config, apply `overrides` ("a.b=value") and validate it.

    `model.resolution`, `model.image_channels` and `model.num_classes` default to the values in the
    manifest of the data. Raises `ConfigError`, one line, for an unreadable file, an unknown key or
    an invalid value.
    """
    return configs.load(RunConfig, path, overrides, complete=_with_data_defaults)


FROM_DATA = {"resolution": "resolution", "image_channels": "channels", "num_classes": "num_classes"}


def _with_data_defaults(content: dict[str, Any], where: str) -> dict[str, Any]:
    """`content` with the keys of `FROM_DATA` that `model` leaves out, read from the manifest."""
    model, data = content.get("model"), content.get("data")
    if not isinstance(model, dict) or not isinstance(data, dict):
        return content
    lacking = [key for key in FROM_DATA if key not in model]
    stream = data.get(IMAGES, data) if _stream_kind(data) == "several" else data
    path = stream.get("path") if isinstance(stream, dict) else None
    if not lacking or not isinstance(path, str):
        return content
    if stream.get("mode") == "resampled":  # no manifest
        unlabelled = stream.get("labels") == "none"
        return {**content, "model": {"num_classes": 1, **model}} if unlabelled else content
    try:
        section = configs.validate(DataConfig, stream, where)
        manifest = open_level(section.path, model.get("resolution"), section)
    except ConfigError:
        return content  # the section itself is invalid: its validation reports the key
    except UserError as error:
        required = [f"model.{key}" for key in lacking if key != "image_channels"]
        if not required:  # the model's default number of channels may be correct
            return content
        raise ConfigError(
            f"{where}: {' and '.join(required)} not set, and the data cannot be read ({error}); "
            f"pack the data first, or set {' and '.join(required)}"
        ) from None
    known = manifest.model_dump(mode="json", include=set(FROM_DATA.values()))
    known["num_classes"] = manifest.num_classes
    found = {key: known[FROM_DATA[key]] for key in lacking}
    return {**content, "model": {**model, **found}}


def setup_of(
    config: RunConfig, class_counts: tuple[int, ...], fade: tuple[int, int] | None = None
) -> Setup:
    """The arguments that the objective of a config is built from.

    `class_counts`: number of training images of each class. `fade`: the values of images_seen at
    which the fade-in of the model's resolution begins and ends.
    """
    return Setup(
        model=config.model,
        augment=config.augment,
        batch=config.train.batch,
        seed=config.train.seed,
        precision=config.precision,
        anneal_images=config.anneal_images,
        class_counts=class_counts,
        fade=fade,
    )


def misfits(model: AnyModel, manifest: Manifest) -> list[tuple[str, str, object, object]]:
    """(property, key in `model`, value of the model, value of the data) where the two differ."""
    facts: tuple[tuple[str, str, object, object], ...] = (
        ("resolution", "resolution", plain(model.resolution), plain(manifest.resolution)),
        ("channels", "image_channels", model.image_channels, manifest.channels),
        ("classes", "num_classes", model.num_classes, manifest.num_classes),
    )
    return [fact for fact in facts if fact[2] != fact[3]]


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Micro-batches per optimizer step: batch / (world_size * micro_batch).

    Raises `ConfigError` if that is not an integer.
    """
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
            f"train.micro_batch = {micro} does not divide the {share} images per process of "
            f"train.batch = {train.batch} on {world_size} process(es); try "
            f"train.micro_batch={nearest}"
        )
    return share // micro


def batchnorm_images(train: TrainConfig, world_size: int) -> int:
    """Images that share BatchNorm statistics in training; raises as `accumulation_steps` does."""
    joined = train.batch // accumulation_steps(train, world_size)
    return joined if train.batchnorm == "global" else joined // world_size


def check_groups(config: RunConfig, world_size: int) -> None:
    """Raises `ConfigError` unless micro-batches consist of complete groups.

    The groups of minibatch standard deviation would otherwise depend on the world size.
    """
    group, train = config.model.group, config.train
    steps = accumulation_steps(train, world_size)
    micro = train.batch // (world_size * steps)
    if micro % group:
        raise ConfigError(
            f"model.minibatch_group = {group} (minibatch standard deviation) does not divide the "
            f"{micro} images of a micro-batch ({shown(config.model.resolution)} px: train.batch = "
            f"{train.batch} over {world_size} process(es) and {steps} micro-batch(es)); use a "
            f"multiple of {group * world_size * steps} as batch, or another model.minibatch_group"
        )
    divisor = config.objective.micro_batch_divisor
    if micro % divisor:
        raise ConfigError(
            f"objective.path_length.batch_shrink = {divisor} does not divide the {micro} images "
            "of a micro-batch; change it or train.batch"
        )

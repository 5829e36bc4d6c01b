"""The stages of a run: one for a model of fixed resolution, several for a growing model.

The config of a stage is complete: networks of its resolution, its batch and its learning rates. A
run enters one stage after the other (objectives/growth.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bigan.image_size import ImageSize, shown
from bigan.objectives.base import Setup
from bigan.objectives.growth import GrowthConfig, spans
from bigan.run_config import RunConfig, setup_of


@dataclass(frozen=True)
class Stage:
    """From `start` to before `end`, in real images; both are step boundaries."""

    index: int
    start: int
    end: float  # infinity: until the run ends
    config: RunConfig
    born: int = 0  # images_seen at which its newest layers were added

    @property
    def resolution(self) -> ImageSize:
        return self.config.model.resolution

    @property
    def size(self) -> str:
        """The resolution as text."""
        return shown(self.resolution)

    @property
    def fading(self) -> bool:
        """Whether the newest resolution fades in during this stage."""
        return self.config.model.is_fading

    def setup(self, class_counts: tuple[int, ...]) -> Setup:
        """The arguments from which the objective of this stage is built."""
        fade = (self.start, int(self.end)) if self.fading else None
        return setup_of(self.config, class_counts, fade)

    def __str__(self) -> str:
        return f"{self.size} px{', fading in' if self.fading else ''}"


def stages(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run, in order; the last one has no end."""
    growth = config.growth
    if growth is None:
        return (Stage(0, 0, math.inf, config),)
    resolutions = growth.sizes(config.model.resolution)
    configs = {size: _at(config, growth, size, fading=False) for size in resolutions}
    images = {size: level.images_per_step for size, level in configs.items()}
    return tuple(
        Stage(
            index,
            span.start,
            span.end,
            _at(config, growth, span.resolution, span.fading),
            span.born,
        )
        for index, span in enumerate(spans(growth, config.model.resolution, images))
    )


def final_config(config: RunConfig) -> RunConfig:
    """The config of the last stage, which does not grow."""
    return stages(config)[-1].config


def stage_at(stages: tuple[Stage, ...], images_seen: int) -> Stage:
    """The stage of the step that begins at `images_seen`."""
    return next(stage for stage in stages if images_seen < stage.end)


def _at(config: RunConfig, growth: GrowthConfig, resolution: ImageSize, fading: bool) -> RunConfig:
    """The config of one stage."""
    level = growth.level(resolution)
    train, optimizer = {}, dict(config.optimizer)
    if level.batch is not None:
        train = {"batch": level.batch, "micro_batch": level.micro_batch}
    elif level.micro_batch is not None:
        train = {"micro_batch": level.micro_batch}
    if level.lr is not None:
        lr = {"lr": level.lr}
        optimizer = {name: entry.model_copy(update=lr) for name, entry in optimizer.items()}
    return config.model_copy(
        update={
            "growth": None,
            "model": config.model.model_copy(update={"resolution": resolution, "fading": fading}),
            "train": config.train.model_copy(update=train),
            "optimizer": optimizer,
        }
    )

"""The trainer's parts without its loop."""

from __future__ import annotations

from commands import TEN_CLASSES

from bigan.data.stream import ShardStream
from bigan.engine import Engine
from bigan.recipe import RunConfig
from bigan.training import Training


def make(config: RunConfig) -> tuple[Training, ShardStream]:
    """A prepared training of `config` on the digits' classes, and its stream from the start."""
    training = Training(config, Engine(config, print), TEN_CLASSES)
    training.prepare()
    stream = ShardStream(
        config.data.path,
        seed=config.train.seed,
        world=training.world,
        batch=config.train.batch,
        accumulation=training.accumulation,
    )
    return training, stream

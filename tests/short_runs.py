"""Some training steps in this process, saved and resumed as the trainer does it."""

from __future__ import annotations

from pathlib import Path

from commands import TEN_CLASSES
from torch import Tensor

from bigan.checkpoint import Reader, Saver
from bigan.engine import Engine
from bigan.run.state import TrainState
from bigan.run.streams import OpenStreams, open_streams
from bigan.run_config import RunConfig

TINY = (
    "model={name: r3gan, resolution: 16, num_classes: 10, conditional: true, image_channels: 1, "
    "z_dim: 8, widths: [8, 8, 8], blocks_per_stage: 1, group_size: 8, embedding_dim: 4}",
    "train.batch=8",
)


def advance(state: TrainState, streams: OpenStreams, num_steps: int) -> TrainState:
    """Training steps; closes the streams."""
    with streams:
        for _ in range(num_steps):
            state.advance(streams)
    return state


def save(state: TrainState) -> Path:
    """Save a checkpoint; returns its folder."""
    saver = Saver(state.config.run_dir, state.world)
    saver.save(state.progress, state.shards())
    saver.finish()
    error = saver.final_error()
    assert error is None, error
    return state.config.run_dir / "checkpoints" / str(state.progress.images_seen)


def resume(config: RunConfig, folder: Path) -> tuple[TrainState, OpenStreams]:
    """A prepared state that continues a checkpoint, and its streams."""
    state = TrainState(config, Engine(config, print), TEN_CLASSES)
    state.resume(folder)
    state.prepare()
    return state, open_streams(state)


def tensors(state: TrainState) -> dict[str, Tensor]:
    """Copies of everything that a checkpoint of the state contains, by name."""
    return {shard.name: shard.data.detach().clone() for shard in state.shards()}


def stored(folder: Path) -> dict[str, Tensor]:
    """Everything that a checkpoint contains, by name."""
    reader = Reader(folder)
    return {name: reader.read(name) for name in reader.shapes()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bitwise equal; both must have the same names."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return [name for name in a if not a[name].equal(b[name])]

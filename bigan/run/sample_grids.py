"""Sample grids: samples of the same latents, or of the same input images, at every snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bigan.augment.discriminator_inputs import as_images
from bigan.data.streaming.dataset import open_level
from bigan.data.streaming.stream import sequential
from bigan.distributed.world import World
from bigan.layers.resampling import repeated
from bigan.models import to_uint8
from bigan.objectives.samplers import Sampler
from bigan.reporting import image_grids
from bigan.run.state import TrainState

COLUMNS = 10
ROWS = 16  # classes shown, at most
INPUT_ROWS = 4  # rows of input images, each above the row of their outputs


def save(path: Path, state: TrainState, sampler: Sampler) -> None:
    """Write the grid of a sampler as PNG; on one rank. Raises OSError."""
    if sampler.inputs is None:
        labels = _row_labels(state)
        images = _from_latents(state, sampler, labels)
        names = [state.class_names[label] for label in labels] if sampler.labeled else []
    else:
        images = _from_images(state, sampler, sampler.inputs)
        names = [sampler.inputs, ""] * INPUT_ROWS
    # Images of early stages of a growing model are smaller.
    images = repeated(images, state.run_config.model.resolution)
    image_grids.save_grid(path, images, columns=COLUMNS, row_labels=names)


def _row_labels(state: TrainState) -> list[int]:
    """The class of each row, at most `ROWS` of them, evenly chosen."""
    num = state.config.model.num_classes
    return [round(i) for i in torch.linspace(0, num - 1, min(num, ROWS)).tolist()]


def _from_latents(state: TrainState, sampler: Sampler, labels: list[int]) -> Tensor:
    """uint8 [rows * columns, C, R, R]: one row per class."""
    draws = sampler.draws(state.config.train.seed, "grid", 0, len(labels) * COLUMNS, None)
    draws["labels"] = torch.tensor(labels).repeat_interleave(COLUMNS)
    return _sample(state, sampler, draws)


def _from_images(state: TrainState, sampler: Sampler, stream: str) -> Tensor:
    """uint8 [2 * rows * columns, C, R, R]: each row of inputs above the row of their outputs."""
    data, num = state.config.streams[stream], INPUT_ROWS * COLUMNS
    manifest = open_level(data.path, state.config.model.resolution, data)
    batch = next(iter(sequential(manifest, data.split, World(), num, data)))
    draws = sampler.draws(state.config.train.seed, "grid", 0, num, None)
    inputs = {f"{stream}.pixels": batch.pixels[:num], f"{stream}.labels": batch.labels[:num]}
    originals = to_uint8(as_images(batch.pixels[:num]))
    made = _sample(state, sampler, draws | inputs)
    rows = [originals.unflatten(0, (INPUT_ROWS, COLUMNS)), made.unflatten(0, (INPUT_ROWS, COLUMNS))]
    return torch.stack(rows, 1).flatten(0, 2)


@torch.no_grad()
def _sample(state: TrainState, sampler: Sampler, inputs: Mapping[str, Tensor]) -> Tensor:
    networks: dict[str, nn.Module] = state.sampling_networks(sampler)
    chunk = state.config.train.micro_batch or state.config.train.batch
    num, parts = len(next(iter(inputs.values()))), []
    for start in range(0, num, chunk):
        shard = {k: t[start : start + chunk].to(state.world.device) for k, t in inputs.items()}
        parts.append(to_uint8(sampler(networks, shard)).cpu())
    return torch.cat(parts)

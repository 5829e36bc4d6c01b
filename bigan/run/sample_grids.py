"""Sample grids: samples of the same latents, or of the same input images, at every snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bigan.augment.discriminator_inputs import as_images
from bigan.data.streaming.dataset import open_level
from bigan.data.streaming.stream import Batch, sequential
from bigan.distributed.world import World
from bigan.layers.resampling import repeated
from bigan.models import to_uint8
from bigan.objectives.samplers import Sampler
from bigan.reporting import image_grids
from bigan.run.state import TrainState

COLUMNS = 10
ROWS = 16  # classes shown, at most
INPUT_ROWS = 4  # of images of the data, each above a row of the sampler's
Inputs = dict[str, Batch]  # stream -> its first images


def save(path: Path, state: TrainState, sampler: Sampler, inputs: Inputs) -> None:
    """Write the grid of a sampler as PNG; on one rank. Raises OSError.

    `inputs` keeps the images of the data from call to call. Writes no file for a sampler whose
    input stream has no first images (data.mode=resampled).
    """
    columns = COLUMNS
    if sampler.inputs is None:
        labels = _row_labels(state)
        images = _from_latents(state, sampler, labels)
        names = [state.class_names[label] for label in labels] if sampler.labeled else []
    else:
        if sampler.inputs not in inputs:
            if state.config.streams[sampler.inputs].mode == "resampled":
                return
            inputs[sampler.inputs] = _first_images(state, sampler.inputs)
        columns = min(COLUMNS, len(inputs[sampler.inputs].labels))
        images = _from_images(state, sampler, sampler.inputs, inputs[sampler.inputs], columns)
        names = [sampler.inputs, ""] * (len(images) // (2 * columns))
    # Images of a growing model are smaller at first.
    images = repeated(images, state.run_config.model.resolution)
    image_grids.save_grid(path, images, columns=columns, row_labels=names)


def _row_labels(state: TrainState) -> list[int]:
    """The class of each row, at most `ROWS` of them, evenly chosen."""
    num = state.config.model.num_classes
    return [round(i) for i in torch.linspace(0, num - 1, min(num, ROWS)).tolist()]


def _from_latents(state: TrainState, sampler: Sampler, labels: list[int]) -> Tensor:
    """uint8 [rows * columns, C, H, W]: one row per class."""
    draws = sampler.draws(state.config.train.seed, "grid", 0, len(labels) * COLUMNS, None)
    draws["labels"] = torch.tensor(labels).repeat_interleave(COLUMNS)
    return _sample(state, sampler, draws)


def _first_images(state: TrainState, stream: str) -> Batch:
    """The first images of a stream's split."""
    data = state.config.streams[stream]
    manifest = open_level(data.path, state.config.model.resolution, data)
    return next(iter(sequential(manifest, data.split, World(), INPUT_ROWS * COLUMNS, data)))


def _from_images(
    state: TrainState, sampler: Sampler, stream: str, batch: Batch, columns: int
) -> Tensor:
    """uint8 [2 * rows * columns, C, H, W]: each row of inputs above the row of their outputs."""
    rows = len(batch.labels) // columns
    num = rows * columns
    draws = sampler.draws(state.config.train.seed, "grid", 0, num, None)
    inputs = {f"{stream}.pixels": batch.pixels[:num], f"{stream}.labels": batch.labels[:num]}
    outputs = _sample(state, sampler, draws | inputs)
    pairs = [to_uint8(as_images(batch.pixels[:num])), outputs]
    return torch.stack([images.unflatten(0, (rows, columns)) for images in pairs], 1).flatten(0, 2)


@torch.no_grad()
def _sample(state: TrainState, sampler: Sampler, inputs: Mapping[str, Tensor]) -> Tensor:
    networks: dict[str, nn.Module] = state.sampling_networks(sampler)
    chunk = state.config.train.micro_batch or state.config.train.batch
    num, parts = len(next(iter(inputs.values()))), []
    for start in range(0, num, chunk):
        shard = {k: t[start : start + chunk].to(state.world.device) for k, t in inputs.items()}
        parts.append(to_uint8(sampler(networks, shard)).cpu())
    return torch.cat(parts)

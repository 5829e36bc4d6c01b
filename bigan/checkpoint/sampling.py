"""Images from a snapshot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigan.checkpoint.snapshots import Snapshot
from bigan.errors import UserError
from bigan.models import to_uint8
from bigan.objectives.samplers import truncation_problem


@torch.no_grad()
def sample(
    snapshot: Snapshot,
    num: int,
    *,
    sampler: str | None = None,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    truncation: float | None = None,
    images: Tensor | None = None,
    batch: int = 64,
) -> Tensor:
    """uint8 images [num, C, H, W] on the CPU, made by a sampler of `snapshot`.

    `sampler`: name of the sampler, the first one of the objective by default. Without a truncation
    image i depends on (seed, i) alone. `labels`: the class of each image, drawn by the class
    frequencies of the data by default. `truncation`: bound on |z|, or psi for a generator with a
    mean latent. `images` uint8 [num, C, H, W]: what a sampler with an input stream encodes or
    translates. `batch` images go through the networks at a time. Raises `UserError` for a sampler
    that does not exist, labels out of range, a truncation that the sampler does not support, and
    `images` that are missing, not needed, or of the wrong type or shape.
    """
    name = sampler or next(iter(snapshot.samplers))
    if name not in snapshot.samplers:
        raise UserError(f"sampler {name!r}: the snapshot has {', '.join(snapshot.samplers)}")
    chosen = snapshot.samplers[name]
    problem = truncation_problem(chosen, truncation)
    if problem:
        raise UserError(f"truncation {truncation:g}: {problem}")
    if num < 1:
        raise UserError(f"num = {num}: use 1 or more")
    inputs = chosen.draws(seed, "sample", 0, num, truncation)
    if labels is not None:
        inputs["labels"] = _labels(labels, num, len(snapshot.classes))
    if chosen.inputs is None and images is not None:
        raise UserError(f"sampler {name!r} takes no images; leave `images` out")
    if chosen.inputs is not None:
        inputs[f"{chosen.inputs}.pixels"] = _pixels(snapshot, name, num, images)
        inputs[f"{chosen.inputs}.labels"] = _input_labels(
            snapshot, name, inputs.pop("labels", None), num
        )
    device = next(next(iter(snapshot.networks.values())).parameters()).device
    parts = []
    for start in range(0, num, batch):
        part = {key: tensor[start : start + batch].to(device) for key, tensor in inputs.items()}
        parts.append(to_uint8(chosen(snapshot.networks, part)).cpu())
    return torch.cat(parts)


def _labels(labels: Sequence[int], num: int, num_classes: int) -> Tensor:
    found = torch.as_tensor(labels, dtype=torch.int64)
    if found.shape != (num,):
        raise UserError(f"labels: {found.numel()} given for {num} images; give one for each")
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < num_classes:
        raise UserError(f"labels: must be in [0, {num_classes}), the classes of the snapshot")
    return found


def _pixels(snapshot: Snapshot, sampler: str, num: int, images: Tensor | None) -> Tensor:
    """uint8 [num, H, W, C] of the images that a sampler encodes or translates."""
    model = snapshot.config.model
    expected = (num, model.image_channels, model.height, model.width)
    if images is None or tuple(images.shape) != expected or images.dtype != torch.uint8:
        found = "none" if images is None else f"{images.dtype} {list(images.shape)}"
        raise UserError(f"sampler {sampler!r} takes `images` uint8 {list(expected)}, {found} given")
    return images.permute(0, 2, 3, 1)


def _input_labels(snapshot: Snapshot, sampler: str, labels: Tensor | None, num: int) -> Tensor:
    """int64 [num]: the class of each of those images."""
    if labels is None and snapshot.config.model.is_conditional:
        raise UserError(f"sampler {sampler!r} needs `labels`, the class of each image")
    return torch.zeros(num, dtype=torch.int64) if labels is None else labels

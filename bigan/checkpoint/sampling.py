"""Images from a snapshot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigan.checkpoint.snapshots import Snapshot
from bigan.errors import UserError
from bigan.models import to_uint8


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
    that does not exist, labels out of range, missing `images`, or wrong numbers of either.
    """
    name = sampler or next(iter(snapshot.samplers))
    if name not in snapshot.samplers:
        raise UserError(f"sampler {name!r}: the snapshot has {', '.join(snapshot.samplers)}")
    chosen = snapshot.samplers[name]
    if truncation is not None and not chosen.truncates:
        raise UserError(f"truncation {truncation:g}: sampler {name!r} takes none; leave it out")
    inputs = chosen.draws(seed, "sample", 0, num, truncation)
    if labels is not None:
        inputs["labels"] = _labels(labels, num, len(snapshot.classes))
    if chosen.inputs is not None:
        if images is None or len(images) != num:
            found = "none" if images is None else str(len(images))
            raise UserError(f"sampler {name!r} takes {num} images, {found} given (`images`)")
        inputs[f"{chosen.inputs}.pixels"] = images.permute(0, 2, 3, 1)
        inputs.setdefault("labels", torch.zeros(num, dtype=torch.int64))
        inputs[f"{chosen.inputs}.labels"] = inputs.pop("labels")
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

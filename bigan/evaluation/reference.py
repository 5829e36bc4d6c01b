"""Moments of the real images, computed once over all ranks and kept in the run folder.

    <run_dir>/evaluation/reference-<fingerprint>.safetensors   num, mean, scatter (float64)

The fingerprint covers everything the numbers depend on: extractor, its weights, preprocessing,
the data's content and the split. Anything else computed before is left alone, never reused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from bigan import atomic_files
from bigan.data.settings import Fetch
from bigan.data.shards import Manifest
from bigan.data.stream import sequential
from bigan.distributed.world import World, on_all_ranks, on_rank_0
from bigan.errors import UserError
from bigan.evaluation import moments
from bigan.evaluation.features import Extractor
from bigan.evaluation.moments import Moments


def fingerprint(content: Mapping[str, object]) -> str:
    """32 hexadecimal digits of the sha256 of plain data; equal content, equal fingerprint."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def describe(extractor: Extractor, manifest: Manifest, split: str) -> dict[str, object]:
    """What the reference moments are a function of; `DataError` if there is no such split."""
    return {
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "preprocessing": extractor.preprocessing,
        "data_fingerprint": manifest.fingerprint,
        "data_transform": manifest.transform,
        "resolution": manifest.resolution,
        "reference_split": split,
        "num_reference": manifest.num_samples(split),
    }


def load_or_compute(
    extractor: Extractor,
    manifest: Manifest,
    split: str,
    world: World,
    batch: int,
    cache: Path,
    fetch: Fetch | None = None,
) -> Moments:
    """The moments of every image of `split`, on every rank.

    Read from the folder `cache` if they are there under the same fingerprint, else computed by
    all ranks in batches of `batch` and written by rank 0. Raises `UserError` for a damaged data
    folder or fewer than two images.
    """
    content = describe(extractor, manifest, split)
    if manifest.num_samples(split) < 2:
        raise UserError(f"{manifest.folder}: split {split!r} has fewer than 2 images to compare to")
    path = cache / f"reference-{fingerprint(content)}.safetensors"
    cached = on_rank_0(world, lambda: _read(path, extractor.dim))
    if cached is not None:
        return cached
    total = compute(extractor, manifest, split, world, batch, fetch)

    def write() -> None:
        tensors = {
            "num": torch.tensor(total.num),
            "mean": total.mean.cpu(),
            "scatter": total.scatter.cpu().contiguous(),
        }
        metadata = {key: str(value) for key, value in content.items()}
        cache.mkdir(parents=True, exist_ok=True)
        atomic_files.write_atomic(path, safetensors.torch.save(tensors, metadata))

    on_rank_0(world, write)
    return total


def compute(
    extractor: Extractor,
    manifest: Manifest,
    split: str,
    world: World,
    batch: int,
    fetch: Fetch | None = None,
) -> Moments:
    """The moments of every image of `split`, each taken once over all ranks."""

    def own_part() -> Moments:
        total = moments.empty(extractor.dim, moments.home(extractor.device))
        for part in sequential(manifest, split, world, batch, fetch):
            features, _ = extractor(part.real.permute(0, 3, 1, 2))
            total = moments.merge(total, moments.of(features))
        return total

    total = moments.all_reduce(world, on_all_ranks(world, own_part))
    expected = manifest.num_samples(split)
    if total.num != expected:
        raise RuntimeError(f"{total.num} reference images were read, there are {expected}")
    return total


def _read(path: Path, dim: int) -> Moments | None:
    """The cached moments on the CPU, or None if there are none or the file is damaged."""
    try:
        tensors = safetensors.torch.load_file(path)
        num, mean, scatter = (tensors[name] for name in ("num", "mean", "scatter"))
    except (OSError, safetensors.SafetensorError, KeyError):
        return None
    if mean.shape != (dim,) or scatter.shape != (dim, dim):
        return None
    return Moments(int(num), mean, scatter)

"""Moments of the reference images, computed once over all ranks and cached in the run folder.

    <run_dir>/evaluation/reference-<fingerprint>.safetensors   num, mean, scatter (float64)

The fingerprint covers everything that the moments depend on: the extractor, its weights, the
preprocessing, the content of the data and the split. Files with other fingerprints are not used
and not deleted.
"""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch

from bigan import atomic_files
from bigan.data.format.manifest import Manifest
from bigan.data.settings import Fetch
from bigan.data.streaming.stream import sequential
from bigan.distributed.world import World, on_all_ranks, on_rank_0
from bigan.errors import UserError, writing
from bigan.evaluation import moments
from bigan.evaluation.extractors import Extractor
from bigan.evaluation.moments import Moments
from bigan.hashes import fingerprint


def describe(extractor: Extractor, manifest: Manifest, split: str) -> dict[str, object]:
    """Everything that the reference moments depend on; `DataError` for an unknown split."""
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
    """The moments of all images of `split`, on every rank.

    Read from the folder `cache` if it has them under the same fingerprint, else computed by all
    ranks in batches of `batch` images and written by rank 0. Raises `UserError` for a damaged data
    folder, for fewer than two images and for a full disk.
    """
    content = describe(extractor, manifest, split)
    if manifest.num_samples(split) < 2:
        raise UserError(
            f"{manifest.folder}: split {split!r} has fewer than 2 images, too few for a reference"
        )
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
        with writing(path):
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
    """The moments of all images of `split`; each image is read by one rank."""

    def local_moments() -> Moments:
        total = moments.empty(extractor.dim, moments.accumulation_device(extractor.device))
        for images in sequential(manifest, split, world, batch, fetch):
            features, _ = extractor(images.pixels.permute(0, 3, 1, 2))
            total = moments.merge(total, moments.from_features(features))
        return total

    total = moments.all_reduce(world, on_all_ranks(world, local_moments))
    expected = manifest.num_samples(split)
    if total.num != expected:
        raise RuntimeError(f"{total.num} reference images were read, expected {expected}")
    return total


def _read(path: Path, dim: int) -> Moments | None:
    """The cached moments on the CPU; None if the file is missing or damaged."""
    try:
        tensors = safetensors.torch.load_file(path)
        num, mean, scatter = (tensors[name] for name in ("num", "mean", "scatter"))
    except (OSError, safetensors.SafetensorError, KeyError):
        return None
    if mean.shape != (dim,) or scatter.shape != (dim, dim):
        return None
    return Moments(int(num), mean, scatter)

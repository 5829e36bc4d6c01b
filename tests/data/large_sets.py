"""Data folders with large indices: manifest, index files and sparse files instead of tars."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from bigan.data.format.manifest import COLUMNS, Manifest, Shard, index_name

IMAGE_BYTES = 110_000  # the mean of ImageNet


def large_set(
    folder: Path, num_samples: int, num_classes: int, num_shards: int, *, with_shards: bool = True
) -> Path:
    """A folder with one split whose manifest and index are consistent."""
    (folder / "index").mkdir(parents=True)
    edges = np.linspace(0, num_samples, num_shards + 1).astype(np.int64)
    sizes = np.diff(edges)
    within = np.arange(num_samples) - np.repeat(edges[:-1], sizes)
    label = np.random.default_rng(0).integers(0, num_classes, num_samples)
    columns = {
        "offset": within * (IMAGE_BYTES + 2048) + 512,
        "size": np.full(num_samples, IMAGE_BYTES),
        "label": label,
        "crc32": np.arange(num_samples),
    }
    index = {}
    for column, dtype in COLUMNS.items():
        file = folder / index_name("train", column)
        np.save(file, columns[column].astype(dtype))
        with file.open("rb") as stream:
            index[index_name("train", column)] = hashlib.file_digest(stream, "sha256").hexdigest()
    shards = []
    for number, size in enumerate(sizes.tolist()):
        name, num_bytes = f"train-{number:06d}.tar", size * (IMAGE_BYTES + 2048) + 1024
        if with_shards:
            with (folder / name).open("wb") as stream:
                stream.truncate(num_bytes)  # sparse
        digest = hashlib.sha256(name.encode()).hexdigest()
        shards.append(
            Shard(url=name, nsamples=size, filesize=num_bytes, sha256=digest, split="train")
        )
    manifest = Manifest(
        folder=folder,
        name="large",
        resolution=256,
        channels=3,
        classes=tuple(f"n{number:08d}" for number in range(num_classes)),
        encoder="jpg",
        transform="none",
        plan="0" * 32,
        fingerprint="",
        index=index,
        class_counts={"train": tuple(np.bincount(label, minlength=num_classes).tolist())},
        shardlist=tuple(shards),
    )
    (folder / "manifest.json").write_text(manifest.sealed().dump())
    return folder

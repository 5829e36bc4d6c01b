"""Random sources, and readers of packed folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bigan.data.format.codec import BadImageError, decode_into
from bigan.data.format.manifest import Manifest
from bigan.data.packing import sources
from bigan.data.packing.pack import Packed
from bigan.data.packing.pack_shard import Record


def drawn(num: int, resolution: int = 8, bad: tuple[int, ...] = ()) -> sources.Source:
    """`num` random images of two classes, every tenth for test; those in `bad` cannot be read."""
    shape = (num, resolution, resolution, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def read(i: int) -> np.ndarray:
        if i in bad:
            raise BadImageError("does not\tdecode")
        return images[i]

    return sources.Source(
        name="drawn",
        transform="none",
        identity="drawn by the test",
        resolution=resolution,
        channels=3,
        classes=("a", "b"),
        keys=tuple(f"{i:04d}.jpg" for i in range(num)),
        labels=tuple(i % 2 for i in range(num)),
        splits=tuple("test" if i % 10 == 9 else "train" for i in range(num)),
        read=read,
    )


def only(packed: Packed) -> Manifest:
    (manifest,) = packed.manifests
    assert packed.complete
    return manifest


def record(folder: Path, shard: str) -> Record:
    return Record.model_validate_json((folder / "index" / f"{shard}.json").read_bytes())


def unpacked(folder: Path) -> dict[str, np.ndarray]:
    """The pixels of every sample by the name of its original, found through the records."""
    manifest = Manifest.load(folder)
    shape = (manifest.resolution, manifest.resolution, manifest.channels)
    found = {}
    for shard in manifest.shardlist:
        data = (folder / shard.url).read_bytes()
        noted = record(folder, shard.url.removesuffix(".tar"))
        for key, offset, size in zip(noted.keys, noted.offsets, noted.sizes, strict=True):
            found[key] = np.empty(shape, np.uint8)
            decode_into(found[key], data[offset : offset + size], manifest.encoder)
    return found

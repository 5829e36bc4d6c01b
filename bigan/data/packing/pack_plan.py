"""What `bigan pack` is going to write, decided before the first image is read: pure.

A `Plan` is a source plus one global permutation per split, cut into shards, for one resolution or
for all levels of a pyramid. Everything that decides a byte of the shards is in its description.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
import simplejpeg
from PIL import features

from bigan.data import DataError
from bigan.data.format.codec import ENCODINGS, JPEG_QUALITY, Encoding
from bigan.data.format.manifest import SCHEMA, level_name
from bigan.data.packing.sources import Source
from bigan.data.streaming.order import permutation

SPLITS = ("train", "val", "test")
NPY_RESOLUTION = 128  # up to here raw pixels; above, PNG is worth its decoding time
SHARD_BYTES = 2**27  # of raw pixels, about what one shard holds at most ...
MIN_SHARDS = 8  # ... while even a small split has several, for readers that split by shard


@dataclass(frozen=True)
class Level:
    """One resolution: `folder` is its place below the destination ("" if it is the only one)."""

    folder: str
    resolution: int
    encoder: Encoding


@dataclass(frozen=True)
class Plan:
    """What goes where: shard n holds the samples `members[n]` of the source, in that order."""

    source: Source
    levels: tuple[Level, ...]  # smallest first
    quality: int | None  # of a lossy encoder
    seed: int
    shard_size: int  # samples per shard; the last of a split may hold fewer
    names: tuple[str, ...]  # of the shards, without .tar
    members: tuple[tuple[int, ...], ...]
    first_key: tuple[int, ...]  # keys count through the shards of all splits

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What plan.json holds; two packs are the same if and only if these are equal."""
        source = self.source
        listing = hashlib.sha256()
        for column in (source.classes, source.labels, source.splits):
            listing.update(repr(column).encode("utf-8", "surrogateescape") + b"\0")
        pyramid = [[level.resolution, level.encoder] for level in self.levels if level.folder]
        return {
            "schema_version": SCHEMA,
            "source": source.name,
            "identity": source.identity,
            "listing": listing.hexdigest(),
            "transform": source.transform,
            "resolution": source.resolution,
            "channels": source.channels,
            "encoder": self.levels[-1].encoder,
            "quality": self.quality,
            "seed": self.seed,
            "shard_size": self.shard_size,
            "pyramid": pyramid or None,
            "software": software({level.encoder for level in self.levels}),
        }

    @functools.cached_property
    def id(self) -> str:
        text = json.dumps(self.description, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def make_plan(
    source: Source,
    seed: int = 0,
    shard_size: int | None = None,
    *,
    encoding: Encoding | None = None,
    quality: int | None = None,
    pyramid: int | None = None,
) -> Plan:
    """Shuffle each split globally and cut it into shards of `shard_size` (None: a good size)."""
    splits = np.asarray(source.splits)
    num_train = int((splits == "train").sum())
    if shard_size is None:
        at_most = max(1, SHARD_BYTES // (source.resolution**2 * source.channels))
        shard_size = min(at_most, max(64, -(-num_train // MIN_SHARDS)))
    if shard_size <= 0:
        raise DataError(f"shard size {shard_size}: must be a positive number of images")
    if not num_train:
        raise DataError(f"{source.name}: no image falls into the training split; give more images")
    levels = _levels(source.resolution, encoding, pyramid)
    names: list[str] = []
    members: list[tuple[int, ...]] = []
    for split in SPLITS:
        found = np.flatnonzero(splits == split)
        order = found[permutation(len(found), seed, f"pack/{split}")].tolist()
        for number, start in enumerate(range(0, len(order), shard_size)):
            names.append(f"{split}-{number:06d}")
            members.append(tuple(order[start : start + shard_size]))
    sizes = np.asarray([len(m) for m in members])
    return Plan(
        source=source,
        levels=levels,
        quality=_quality(levels[-1].encoder, quality),
        seed=seed,
        shard_size=shard_size,
        names=tuple(names),
        members=tuple(members),
        first_key=tuple((np.cumsum(sizes) - sizes).tolist()),
    )


def _levels(resolution: int, encoding: Encoding | None, pyramid: int | None) -> tuple[Level, ...]:
    if encoding is not None and encoding not in ENCODINGS:
        raise DataError(f"encoding {encoding!r}: is not known; use one of {', '.join(ENCODINGS)}")
    sizes = [resolution]
    if pyramid is not None:
        while sizes[0] > pyramid and sizes[0] % 2 == 0:
            sizes.insert(0, sizes[0] // 2)
        if sizes[0] != pyramid:
            raise DataError(
                f"pyramid from {pyramid} px: doubling does not lead to {resolution} px; "
                "use a power of two for both"
            )
    return tuple(
        Level(
            folder="" if pyramid is None else level_name(size),
            resolution=size,
            encoder=encoding or ("npy" if size <= NPY_RESOLUTION else "png"),
        )
        for size in sizes
    )


def _quality(encoder: Encoding, quality: int | None) -> int | None:
    if quality is None:
        return JPEG_QUALITY if encoder == "jpg" else None
    if encoder not in ("jpg", "webp"):
        raise DataError(f"quality {quality}: {encoder} is lossless; use it with jpg or webp")
    if not 1 <= quality <= 100:
        raise DataError(f"quality {quality}: must be between 1 and 100")
    return quality


def software(encoders: Iterable[Encoding]) -> dict[str, str]:
    """Versions of what decides the bytes: reading and resizing originals, then each encoder.

    NumPy is not among them: the arithmetic on pixels is in integers.
    """
    found = {
        "pillow": PIL.__version__,
        "libjpeg-turbo": features.version_feature("libjpeg_turbo"),
        "libwebp": features.version_module("webp"),
        "simplejpeg": simplejpeg.__version__,
    }
    if "png" in encoders:
        found["zlib"] = features.version_feature("zlib_ng") or features.version_codec("zlib")
    return {name: version for name, version in found.items() if version}

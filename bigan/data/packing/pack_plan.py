"""The plan of `bigan pack`: which sample is written to which shard. Pure; reads no image.

A `Plan` is a source, one global permutation per split, cut into shards, for one resolution or for
all levels of a pyramid. Its description holds everything that the bytes of the shards depend on.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
import simplejpeg
from PIL import features

from bigan.data import DataError
from bigan.data.format.codec import JPEG_QUALITY, Encoding
from bigan.data.format.manifest import SCHEMA, level_name
from bigan.data.packing.options import PackOptions, with_changes
from bigan.data.packing.sources import Source
from bigan.data.permutation import permutation
from bigan.hashes import fingerprint
from bigan.image_size import ImageSize, num_pixels, plain, shown, shrunk, sides
from bigan.transparency import has_alpha

SPLITS = ("train", "val", "test")
NPY_PIXELS = 128 * 128  # of the largest images that are stored as raw pixels by default
SHARD_BYTES = 2**27  # of raw pixels in one shard, about, by default
MIN_SHARDS = 8  # of the training split by default, for readers that divide shards among workers


@dataclass(frozen=True)
class Level:
    """One resolution; `folder` is relative to the destination, "" without a pyramid."""

    folder: str
    resolution: ImageSize
    encoder: Encoding


@dataclass(frozen=True)
class Plan:
    """Shard n holds the samples `members[n]` of the source, in that order."""

    source: Source
    levels: tuple[Level, ...]  # smallest first
    quality: int | None  # of a lossy encoder
    seed: int
    shard_size: int  # samples per shard; the last of a split may hold fewer
    names: tuple[str, ...]  # of the shards, without .tar
    members: tuple[tuple[int, ...], ...]
    first_key: tuple[int, ...]  # of each shard; keys are numbered through all splits

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """The content of plan.json; equal descriptions give equal shards."""
        source = self.source
        listing = hashlib.sha256()
        for column in (source.classes, source.labels, source.splits):
            listing.update(repr(column).encode("utf-8", "surrogateescape") + b"\0")
        pyramid = [
            [plain(level.resolution), level.encoder] for level in self.levels if level.folder
        ]
        return {
            "schema_version": SCHEMA,
            "source": source.name,
            "identity": source.identity,
            "listing": listing.hexdigest(),
            "transform": source.transform,
            "resolution": plain(source.resolution),
            "channels": source.channels,
            "encoder": self.levels[-1].encoder,
            "quality": self.quality,
            "seed": self.seed,
            "shard_size": self.shard_size,
            "pyramid": pyramid or None,
            "software": software({level.encoder for level in self.levels}),
        }

    def num_images(self, numbers: Iterable[int]) -> int:
        """Images in the shards `numbers`, unusable ones included."""
        return sum(len(self.members[number]) for number in numbers)

    @functools.cached_property
    def id(self) -> str:
        """Hash of `description`."""
        return fingerprint(self.description)


def make_plan(source: Source, options: PackOptions | None = None, **changes: Any) -> Plan:
    """Shuffle each split globally and cut it into shards.

    Raises `DataError` for a source without training images, a pyramid that does not reach the
    source's resolution, alpha in an encoding without it and a quality for a lossless encoding.
    """
    options = with_changes(options, changes)
    shard_size, seed = options.shard_size, options.seed
    splits = np.asarray(source.splits)
    num_train = int((splits == "train").sum())
    if shard_size is None:
        at_most = max(1, SHARD_BYTES // (num_pixels(source.resolution) * source.channels))
        shard_size = min(at_most, max(64, -(-num_train // MIN_SHARDS)))
    if not num_train:
        raise DataError(
            f"{source.name}: has no training image; give more images or smaller fractions"
        )
    levels = _levels(source.resolution, options.encoding, options.pyramid)
    if has_alpha(source.channels) and any(level.encoder == "jpg" for level in levels):
        raise DataError(
            f"encoding jpg: has no alpha, and the images have {source.channels} channels; use png, "
            "webp or npy, or 1 or 3 channels"
        )
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
        quality=_quality(levels[-1].encoder, options.quality),
        seed=seed,
        shard_size=shard_size,
        names=tuple(names),
        members=tuple(members),
        first_key=tuple((np.cumsum(sizes) - sizes).tolist()),
    )


def _levels(
    resolution: ImageSize, encoding: Encoding | None, pyramid: int | None
) -> tuple[Level, ...]:
    """Raises `DataError` if halving stops at twice the smallest resolution or more."""
    sizes = [resolution]
    if pyramid is not None:
        while min(sides(sizes[0])) >= 2 * pyramid and all(n % 2 == 0 for n in sides(sizes[0])):
            sizes.insert(0, shrunk(sizes[0], 2))
        if not pyramid <= min(sides(sizes[0])) < 2 * pyramid:
            raise DataError(
                f"pyramid from {pyramid} px: doubling does not reach {shown(resolution)} px, only "
                f"from {shown(sizes[0])} px; use sides that are a small number times a power of two"
            )
    return tuple(
        Level(
            folder="" if pyramid is None else level_name(size),
            resolution=size,
            encoder=encoding or ("npy" if num_pixels(size) <= NPY_PIXELS else "png"),
        )
        for size in sizes
    )


def _quality(encoder: Encoding, quality: int | None) -> int | None:
    if quality is None:
        return JPEG_QUALITY if encoder == "jpg" else None
    if encoder not in ("jpg", "webp"):
        raise DataError(f"quality {quality}: {encoder} is lossless; use it with jpg or webp")
    return quality


def software(encoders: Iterable[Encoding]) -> dict[str, str]:
    """Versions of the libraries that the bytes depend on: decoding, resizing and encoding.

    NumPy is not listed: arithmetic on pixels uses integers only.
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

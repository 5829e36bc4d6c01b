"""The options of `bigan pack`, in one place for the command, the Python function and the plan."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from bigan.data import DataError
from bigan.data.format.codec import ENCODINGS, Encoding
from bigan.data.format.convert import MAX_PIXELS, MODES, Fit, Resize
from bigan.data.packing.image_trees import Labels
from bigan.image_size import ImageSize, num_pixels, parsed, shown


@dataclass(frozen=True)
class PackOptions:
    """How images are converted, split and stored. Raises `DataError` for an impossible value.

    resolution: side of a square, or (height, width), in pixels. None: that of digits (16), CIFAR
        (32), MNIST (28), a packed folder or square Python images; other sources need a value.
    channels: 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA). None: 1 for digits and MNIST, that
        of a packed folder, else 3.
    fit: "crop" keeps the centre, "pad" all of the image within a black or transparent border,
        "stretch" all of it in another shape.
    resize: filter that resizes what `fit` keeps.
    allow_upscale: enlarge images below `resolution` instead of treating them as unusable (crop,
        stretch) or of adding a wider border (pad).
    max_pixels: larger originals are unusable (decompression bombs).
    labels: "auto": from label files if there are any, else from class folders; "folders": not from
        label files; "none": one class. For other sources only "none" counts.
    exclude: shell patterns of files and folders that are left out ("masks", "*_small.png").
    val_fraction, test_fraction: shares of the images in these splits, by the hash of their keys.
        Splits that the source defines are kept.
    encoding: None is npy up to 128 px and png above.
    quality: 1 to 100, of jpg (None: 95) and webp (None: lossless).
    seed: of the global shuffle.
    shard_size: images per shard. None: at most 128 MiB of pixels, and at least eight shards.
    max_bad: number of unusable originals that are left out; more of them are an error.
    pyramid: smallest resolution, of the shorter side, of a set of folders r0004, r0008, ..., one
        for each doubling up to `resolution`, with the same samples in the same order. None: one
        folder.
    part: (i, n) writes only the shards with number % n == i % n; n calls with different i, in any
        order or at once, on one machine or several, write the data set.
    jobs: threads. None: one per core, at most 16.
    """

    resolution: ImageSize | None = None
    channels: Literal[1, 2, 3, 4] | None = None
    fit: Fit = "crop"
    resize: Resize = "lanczos"
    allow_upscale: bool = False
    labels: Labels = "auto"
    exclude: tuple[str, ...] = ()
    max_pixels: int = MAX_PIXELS
    val_fraction: float = 0.0
    test_fraction: float = 0.1
    encoding: Encoding | None = None
    quality: int | None = None
    seed: int = 0
    shard_size: int | None = None
    max_bad: int = 0
    pyramid: int | None = None
    part: tuple[int, int] | None = None
    jobs: int | None = None

    def __post_init__(self) -> None:
        self._check_images()
        self._check_fractions()
        self._check_work()

    def _check_images(self) -> None:
        if self.resolution is not None:
            try:
                size = parsed(self.resolution)
            except ValueError as error:
                raise DataError(f"resolution {self.resolution!r}: {error}") from None
            object.__setattr__(self, "resolution", size)
            if num_pixels(size) > self.max_pixels:
                raise DataError(
                    f"resolution {shown(size)}: is more than {self.max_pixels:,} pixels per image; "
                    "use a smaller one, or --max-pixels"
                )
        if self.max_pixels <= 0:
            raise DataError(f"max_pixels {self.max_pixels}: must be a positive number of pixels")
        if self.channels is not None and self.channels not in MODES:
            raise DataError(
                f"channels {self.channels}: must be 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 "
                "(RGBA)"
            )
        if self.fit not in typing.get_args(Fit):
            raise DataError(f"fit {self.fit!r}: is unknown; use crop, pad or stretch")
        if self.encoding is not None and self.encoding not in ENCODINGS:
            raise DataError(
                f"encoding {self.encoding!r}: is unknown; use one of {', '.join(ENCODINGS)}"
            )
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise DataError(f"quality {self.quality}: must be between 1 and 100")

    def _check_fractions(self) -> None:
        for name, value in (("val", self.val_fraction), ("test", self.test_fraction)):
            if not 0 <= value < 1:
                raise DataError(f"{name}_fraction {value}: must be at least 0 and below 1")
        if self.val_fraction + self.test_fraction >= 1:
            raise DataError(
                f"val_fraction {self.val_fraction} and test_fraction {self.test_fraction}: leave "
                "no training images; their sum must be below 1"
            )

    def _check_work(self) -> None:
        if self.shard_size is not None and self.shard_size <= 0:
            raise DataError(f"shard_size {self.shard_size}: must be a positive number of images")
        if self.max_bad < 0:
            raise DataError(f"max_bad {self.max_bad}: must not be negative")
        if self.jobs is not None and self.jobs < 1:
            raise DataError(f"jobs {self.jobs}: must be positive")
        if self.part is not None:
            index, count = self.part
            if not 0 <= index <= count or count < 1:
                raise DataError(f"part {index}/{count}: must be 0/n ... n-1/n, or 1/n ... n/n")


def with_changes(options: PackOptions | None, changes: dict[str, Any]) -> PackOptions:
    """`options` (None: the defaults) with the fields `changes`; keyword arguments end up here.

    Raises `TypeError` for a name that is no option, as a function call does.
    """
    return dataclasses.replace(options or PackOptions(), **changes)

"""Where images come from before they are packed: `open_source` tells by what is there.

    digits                         scikit-learn's handwritten digits, nothing to download
    a folder or zip of images      class = subfolder, or labels.csv / dataset.json       (trees)
    CIFAR-10/100, MNIST idx files  as downloaded or extracted                            (archives)
    tars, "shards/{00..31}.tar"    an existing WebDataset, or a folder bigan packed      (foreign)
    any Python iterable            gone through once, spooled to a scratch file          (iterables)

A `Source` is random access (`read(i)`), so that any shard can be packed without the others.
Which split an image belongs to depends on its key alone, not on seed or resolution.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from bigan.data import DataError
from bigan.data.format.codec import BadImageError, Pixels
from bigan.data.format.convert import MAX_PIXELS, TRANSFORMS, Resize, square, to_square
from bigan.data.packing import archives, folders, webdatasets
from bigan.data.packing.digits import digits
from bigan.data.packing.iterables import iterable
from bigan.data.packing.listing import Listing, Source, assign_splits, has_too_many_classes

__all__ = ["Source", "digits", "open_source"]


def open_source(
    spec: str | Path | Iterable[Any],
    *,
    resolution: int | None = None,
    channels: Literal[1, 3] | None = None,
    resize: Resize = "lanczos",
    allow_upscale: bool = False,
    val_fraction: float = 0.0,
    test_fraction: float = 0.1,
    scratch: Path | None = None,
) -> Source:
    """The images that `spec` stands for, as squares of `resolution` pixels.

    `spec` is "digits", a path, a brace pattern of tars, or an iterable (see the module docstring).
    `resolution` may be left out for digits (16), CIFAR (32), MNIST (28), a packed folder and
    square iterables; `channels` defaults to 3, but to 1 for digits and MNIST and to its own for a
    packed folder. Smaller images are refused when read unless `allow_upscale`. About
    `test_fraction` and `val_fraction` of the images become the "test" and "val" splits, by the
    hash of their keys; official splits are kept (`listing.assign_splits`), and from a packed folder
    no test split is cut. An iterable is spooled to the file `scratch`, or to "pixels.raw" in it if
    it is a folder.

    Raises `DataError`, one line, for a source that cannot be used as a whole; single images that
    cannot be are in `Source.bad` or raise `BadImageError` when read.
    """
    _check_options(resolution, channels, val_fraction, test_fraction)
    convert = functools.partial(_convert, resize=resize, allow_upscale=allow_upscale)
    if isinstance(spec, str) and spec == "digits":
        if channels == 3:
            raise DataError("digits: are grey; leave out the number of channels, or give 1")
        source = digits(16 if resolution is None else resolution)
        splits = assign_splits(source.keys, source.splits, val_fraction, test_fraction)
        return dataclasses.replace(source, splits=splits)
    if isinstance(spec, str | Path):
        where = str(spec)
        try:
            listing = _find(where)
        except OSError as error:
            place = error.filename if isinstance(error.filename, str) else where
            raise DataError(f"{place}: cannot be read: {error.strerror or error}") from None
    elif isinstance(spec, Iterable) or hasattr(spec, "__getitem__"):
        where = type(spec).__name__
        if scratch is None:
            raise DataError(f"{where}: give a scratch file for the pixels of the iterable")
        own = channels or 3
        shrink = functools.partial(convert, channels=own)
        listing = iterable(spec, resolution, own, shrink, scratch)
    else:
        raise DataError(f"{spec!r:.60}: is neither a path nor an iterable of images")
    if not listing.keys:
        first = f"; the first problem is {': '.join(listing.bad[0])}" if listing.bad else ""
        raise DataError(f"{where}: holds no usable image{first}")
    _check_classes(listing, where)
    size = resolution or listing.resolution
    if size is None:
        raise DataError(f"{where}: give the size of the images to make, e.g. --resolution 64")
    depth = channels or listing.channels
    transform = TRANSFORMS[resize]
    if listing.transform:  # nothing more is done to images that already are as wanted
        same = (size, depth) == (listing.resolution, listing.channels)
        transform = listing.transform if same else f"{listing.transform}+{transform}"
    original = listing.original
    cut = 0.0 if listing.has_all_splits else test_fraction

    def read(i: int) -> Pixels:
        try:
            return convert(original(i), size, channels=depth)
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error}") from error

    return Source(
        name=listing.name,
        transform=transform,
        identity=listing.identity,
        resolution=size,
        channels=depth,
        classes=listing.classes,
        keys=listing.keys,
        labels=listing.labels,
        splits=assign_splits(listing.keys, listing.official, val_fraction, cut),
        read=read,
        bad=listing.bad,
        stamp=listing.stamp,
        passed_over=listing.passed_over,
    )


def _convert(
    original: Any, resolution: int, *, channels: int, resize: Resize, allow_upscale: bool
) -> Pixels:
    make = square if isinstance(original, bytes) else to_square
    return make(original, resolution, channels, resize, allow_upscale)


def _find(where: str) -> Listing:
    """The listing of what is at a path; raises `DataError` if that is nothing known."""
    path = Path(where)
    if path.is_dir():
        return _find_in_folder(path)
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(512)
        if head.startswith((b"PK\3\4", b"PK\5\6")) or path.suffix.lower() == ".zip":
            return folders.zip_archive(path)
        if head.startswith(b"\x1f\x8b"):
            return archives.cifar_tar(path)
        if head[257:262] == b"ustar" or path.suffix.lower() == ".tar":
            return webdatasets.tars([path], path.stem)
        raise DataError(
            f"{where}: is no kind of file that is known (a .zip, a .tar, CIFAR's .tar.gz); "
            "of single images give the folder"
        )
    if "{" in where or "://" in where or where.startswith("pipe:"):
        return webdatasets.tars(webdatasets.expand(where), path.parent.name or "shards")
    raise DataError(
        f"{where}: no such file or folder; give a folder, zip or tar of images, or `digits`"
    )


def _find_in_folder(path: Path) -> Listing:
    if webdatasets.is_packed(path):
        return webdatasets.packed(path)
    if cifar := archives.find_cifar(path):
        return archives.cifar_folder(*cifar)
    if archives.is_mnist(path):
        return archives.mnist(path)
    shards = webdatasets.tar_files(path)
    if shards and not folders.has_images(path):
        return webdatasets.tars(shards, path.resolve().name)
    return folders.folder(path)


def _check_classes(listing: Listing, where: str) -> None:
    classes, largest = listing.classes, max(listing.labels)
    for name in classes:
        if not name.isprintable():  # control characters, or bytes that are no UTF-8
            raise DataError(f"{where}: class {name!r} has an unreadable name; rename it")
    # Named classes are meant, used or not; numbered ones exist because of the largest label.
    numbered = classes[largest] == str(largest)
    if numbered and has_too_many_classes(len(classes), len(listing.keys)):
        key = listing.keys[listing.labels.index(largest)]
        raise DataError(
            f"{where}: {key} has label {largest}, which makes {len(classes)} classes of "
            f"{len(listing.keys)} images; number the classes 0, 1, 2, ..."
        )


def _check_options(
    resolution: int | None, channels: int | None, val_fraction: float, test_fraction: float
) -> None:
    if resolution is not None and resolution <= 0:
        raise DataError(f"resolution {resolution}: must be a positive number of pixels")
    if resolution is not None and resolution**2 > MAX_PIXELS:
        raise DataError(f"resolution {resolution}: is more than {MAX_PIXELS} pixels; give less")
    if channels not in (None, 1, 3):
        raise DataError(f"channels {channels}: must be 1 (grey) or 3 (RGB)")
    for name, fraction in (("val", val_fraction), ("test", test_fraction)):
        if not 0 <= fraction < 1:
            raise DataError(f"{name} fraction {fraction}: must be at least 0 and below 1")
    if val_fraction + test_fraction >= 1:
        raise DataError(
            f"val and test fractions {val_fraction} and {test_fraction}: leave nothing to train on"
        )

"""Sources of images to pack; `open_source` detects the kind of a source from its content.

    digits                         scikit-learn's handwritten digits, no download
    a folder or zip of images      class = subfolder, or labels.csv / dataset.json    (folders)
    CIFAR-10/100, MNIST idx files  as downloaded or extracted                         (archives)
    tars, "shards/{00..31}.tar"    an existing WebDataset, or a packed folder         (webdatasets)
    any Python iterable            iterated once, spooled to a scratch file           (iterables)

A `Source` offers random access (`read(i)`), so that any shard can be packed without the others.
The split of an image depends on its key alone, not on seed or resolution.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bigan.data import DataError
from bigan.data.format.codec import BadImageError, Pixels
from bigan.data.format.convert import TRANSFORMS, Resize, allow_pixels, square, to_square
from bigan.data.packing import archives, folders, shard_files, webdatasets
from bigan.data.packing.digits import digits
from bigan.data.packing.iterables import iterable
from bigan.data.packing.listing import Listing, Source, assign_splits, has_too_many_classes
from bigan.data.packing.options import PackOptions, with_changes

__all__ = ["Source", "digits", "open_source"]


def open_source(
    source: str | Path | Iterable[Any],
    options: PackOptions | None = None,
    *,
    scratch: Path | None = None,
    **changes: Any,
) -> Source:
    """The images of `source` as squares of `options.resolution` pixels.

    `source` is "digits", a path, a brace pattern of tars, or an iterable (see the module
    docstring). Keyword arguments set single options; used are those for resolution, channels,
    resizing and splits. Of a packed folder no test split is taken. An iterable is spooled to the
    file `scratch`, or to "pixels.raw" in it if it is a folder.

    Raises `DataError`, one line, for an unusable source. Single unusable images are in
    `Source.bad` or raise `BadImageError` when read.
    """
    options = with_changes(options, changes)
    allow_pixels(options.max_pixels)
    if isinstance(source, str) and source == "digits":
        return _digits(options)
    listing, where = _list(source, options, scratch)
    if not listing.keys:
        first = f"; the first problem is {': '.join(listing.bad[0])}" if listing.bad else ""
        raise DataError(f"{where}: holds no usable image{first}")
    _check_classes(listing, where)
    size = options.resolution or listing.resolution
    if size is None:
        raise DataError(f"{where}: needs the resolution of the packed images, e.g. --resolution 64")
    depth = options.channels or listing.channels
    transform = TRANSFORMS[options.resize]
    if listing.transform:  # packed before: images that have the wanted size are not changed
        same = (size, depth) == (listing.resolution, listing.channels)
        transform = listing.transform if same else f"{listing.transform}+{transform}"
    original, convert = listing.original, _converter(options)
    test_fraction = 0.0 if listing.has_all_splits else options.test_fraction

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
        splits=assign_splits(listing.keys, listing.official, options.val_fraction, test_fraction),
        read=read,
        bad=listing.bad,
        stamp=listing.stamp,
        num_ignored=listing.num_ignored,
    )


def _digits(options: PackOptions) -> Source:
    if options.channels == 3:
        raise DataError("digits: are grey; omit the number of channels, or give 1")
    source = digits(16 if options.resolution is None else options.resolution)
    splits = assign_splits(source.keys, source.splits, options.val_fraction, options.test_fraction)
    return dataclasses.replace(source, splits=splits)


def _list(
    source: str | Path | Iterable[Any], options: PackOptions, scratch: Path | None
) -> tuple[Listing, str]:
    """(the listing, the name of the source for error messages)."""
    if isinstance(source, str | Path):
        where = str(source)
        try:
            return _find(where), where
        except OSError as error:
            place = error.filename if isinstance(error.filename, str) else where
            raise DataError(f"{place}: cannot be read: {error.strerror or error}") from None
    if not (isinstance(source, Iterable) or hasattr(source, "__getitem__")):
        raise DataError(f"{source!r:.60}: is neither a path nor an iterable of images")
    where = type(source).__name__
    if scratch is None:
        raise DataError(f"{where}: needs a scratch file for the pixels of the iterable")
    channels = options.channels or 3
    shrink = functools.partial(_converter(options), channels=channels)
    found = iterable(
        source, options.resolution, channels, shrink, scratch, max_pixels=options.max_pixels
    )
    return found, where


def _converter(options: PackOptions) -> Any:
    """`_convert` with the filter of these options."""
    return functools.partial(
        _convert,
        resize=options.resize,
        allow_upscale=options.allow_upscale,
        max_pixels=options.max_pixels,
    )


def _convert(
    original: Any,
    resolution: int,
    *,
    channels: int,
    resize: Resize,
    allow_upscale: bool,
    max_pixels: int,
) -> Pixels:
    make = square if isinstance(original, bytes) else to_square
    return make(original, resolution, channels, resize, allow_upscale, max_pixels=max_pixels)


def _find(where: str) -> Listing:
    """The listing of the source at a path; raises `DataError` for an unknown kind."""
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
            f"{where}: is not a .zip, .tar or CIFAR's .tar.gz; for single images give their folder"
        )
    if "{" in where or "://" in where or where.startswith("pipe:"):
        return webdatasets.tars(shard_files.expand(where), path.parent.name or "shards")
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
    if not folders.has_images(path) and (shards := shard_files.in_folder(path)):
        return webdatasets.tars(shards, path.resolve().name, path)
    return folders.folder(path)


def _check_classes(listing: Listing, where: str) -> None:
    classes, largest = listing.classes, max(listing.labels)
    for name in classes:
        if not name.isprintable():  # control characters, or bytes that are not UTF-8
            raise DataError(f"{where}: class {name!r} has an unprintable name; rename it")
    # Named classes are intended, used or not; numbered ones follow from the largest label.
    numbered = classes[largest].isdecimal()
    if numbered and has_too_many_classes(len(classes), len(listing.keys)):
        key = listing.keys[listing.labels.index(largest)]
        raise DataError(
            f"{where}: {key} has label {classes[largest]}, which makes {len(classes)} classes of "
            f"{len(listing.keys)} images; number the classes 0, 1, 2, ..."
        )

"""Sources of images to pack; `open_source` detects the kind of a source from its content.

    digits                         scikit-learn's handwritten digits, no download
    a folder, zip or tar of images class folders, splits, label files              (image_trees)
    CIFAR-10/100, MNIST idx files  as downloaded or extracted                      (archives)
    tars, "shards/{00..31}.tar"    an existing WebDataset, or a packed folder      (webdatasets)
    any Python iterable            iterated once, spooled to a scratch file        (iterables)

A `Source` offers random access (`read(i)`), so that any shard can be packed without the others.
The split of an image depends on its key alone, not on seed or resolution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bigan.data import DataError
from bigan.data.format import compression
from bigan.data.format.codec import BadImageError, Pixels
from bigan.data.format.convert import (
    TRANSFORMS,
    allow_pixels,
    changes,
    decode_any,
    plain,
    to_size,
)
from bigan.data.format.tar import nested_tar_files
from bigan.data.packing import archives, shard_files, tar_trees, webdatasets
from bigan.data.packing.digits import digits
from bigan.data.packing.folders import folder_tree, has_images
from bigan.data.packing.image_trees import tree_listing
from bigan.data.packing.iterables import iterable
from bigan.data.packing.listing import Listing, Source, assign_splits, has_too_many_classes
from bigan.data.packing.options import PackOptions, with_changes
from bigan.data.packing.trees import Tree, is_label_file
from bigan.data.packing.zips import zip_tree
from bigan.image_size import ImageSize
from bigan.transparency import has_alpha

__all__ = ["Source", "digits", "open_source"]


def open_source(
    source: str | Path | Iterable[Any],
    options: PackOptions | None = None,
    *,
    scratch: Path | None = None,
    **changes: Any,
) -> Source:
    """The images of `source` at `options.resolution`.

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
    listing = _with_labels(listing, options, where)
    _check_classes(listing, where)
    size = options.resolution or listing.resolution
    if size is None:
        raise DataError(f"{where}: needs the resolution of the packed images, e.g. --resolution 64")
    depth = options.channels or listing.channels
    transform = TRANSFORMS[options.fit, options.resize]
    if listing.transform:  # packed before: images that have the wanted size are not changed
        same = (size, depth) == (listing.resolution, listing.channels)
        transform = listing.transform if same else f"{listing.transform}+{transform}"
    original, convert = listing.original, _converter(options)
    test_fraction = 0.0 if listing.has_all_splits else options.test_fraction

    def read(i: int) -> tuple[Pixels, tuple[str, ...]]:
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
        read=lambda i: read(i)[0],
        read_with_changes=read,
        bad=listing.bad,
        stamp=listing.stamp,
        skipped=listing.skipped,
    )


def _with_labels(listing: Listing, options: PackOptions, where: str) -> Listing:
    """`listing` with one class for `labels="none"`; refuses options that are for files only."""
    for name in ("exclude", "labels"):
        value = getattr(options, name)
        if not listing.of_files and value and value not in ("auto", "none"):
            raise DataError(
                f"{where}: --{name} is for folders, zips and tars of images; this source has none"
            )
    if options.labels != "none":
        return listing
    return dataclasses.replace(listing, classes=("all",), labels=(0,) * len(listing.keys))


def _digits(options: PackOptions) -> Source:
    if options.channels not in (None, 1):
        raise DataError("digits: are grey; omit the number of channels, or give 1")
    source = digits(16 if options.resolution is None else options.resolution)
    if options.labels == "none":
        source = dataclasses.replace(source, classes=("all",), labels=(0,) * len(source))
    splits = assign_splits(source.keys, source.splits, options.val_fraction, options.test_fraction)
    return dataclasses.replace(source, splits=splits)


def _list(
    source: str | Path | Iterable[Any], options: PackOptions, scratch: Path | None
) -> tuple[Listing, str]:
    """(the listing, the name of the source for error messages)."""
    if isinstance(source, str | Path):
        where = str(source)
        try:
            return _find(where, options, scratch), where
        except OSError as error:
            place = error.filename if isinstance(error.filename, str) else where
            raise DataError(f"{place}: cannot be read: {error.strerror or error}") from None
    if not (isinstance(source, Iterable) or hasattr(source, "__getitem__")):
        raise DataError(f"{source!r:.60}: is neither a path nor an iterable of images")
    where = type(source).__name__
    if scratch is None:
        raise DataError(f"{where}: needs a scratch file for the pixels of the iterable")
    channels = options.channels or 3
    convert = _converter(options)

    def shrink(image: Any, resolution: ImageSize) -> Pixels:
        return convert(image, resolution, channels=channels)[0]

    found = iterable(
        source,
        options.resolution,
        channels,
        shrink,
        scratch,
        max_pixels=options.max_pixels,
        with_labels=options.labels != "none",
    )
    return found, where


def _converter(options: PackOptions) -> Any:
    """(original, resolution, channels=...) -> (pixels, `changes`), as these options want it."""

    def convert(
        original: Any, resolution: ImageSize, *, channels: int
    ) -> tuple[Pixels, tuple[str, ...]]:
        make = decode_any if isinstance(original, bytes) else plain
        image = make(original, has_alpha(channels), options.max_pixels)
        pixels = to_size(
            image,
            resolution,
            channels,
            options.resize,
            options.allow_upscale,
            options.fit,
            max_pixels=options.max_pixels,
        )
        return pixels, changes(image.size, resolution, options.fit)

    return convert


def _find(where: str, options: PackOptions, scratch: Path | None) -> Listing:
    """The listing of the source at a path; raises `DataError` for an unknown kind."""
    path = Path(where)
    if path.is_dir():
        return _find_in_folder(path, options, scratch)
    if path.is_file():
        return _find_in_file(path, options, scratch)
    if "{" in where or "://" in where or where.startswith("pipe:"):
        files = shard_files.expand(where)
        name = path.parent.name or "shards"
        return webdatasets.tars(files, name, with_labels=options.labels != "none")
    raise DataError(
        f"{where}: no such file or folder; give a folder, zip or tar of images, or `digits`"
    )


def _find_in_folder(path: Path, options: PackOptions, scratch: Path | None) -> Listing:
    if webdatasets.is_packed(path):
        return webdatasets.packed(path, options.labels != "none")
    if cifar := archives.find_cifar(path):
        return archives.cifar_folder(*cifar)
    if archives.is_mnist(path):
        return archives.mnist(path)
    name = path.resolve().name
    if not has_images(path):
        entries = sorted(path.iterdir())
        files = [file for file in entries if _is_archive(file)]
        suffixes = (".tar", *compression.SUFFIXES)
        if len(files) == 1 and {*nested_tar_files(path, suffixes)} <= {*files}:
            if labels := [file.name for file in entries if is_label_file(file.name)]:
                raise DataError(
                    f"{path}: holds {labels[0]} beside {files[0].name}, whose images it may label; "
                    f"extract the archive there, or give {files[0]} to pack it without {labels[0]}"
                )
            return _find_in_file(files[0], options, scratch)
        if shards := shard_files.in_folder(path):
            return webdatasets.tars(shards, name, path, options.labels != "none")
        if files:
            raise DataError(f"{path}: holds several archives and no images; give one of them")
    return _of_tree(folder_tree(path), path, name, options)


def _is_archive(path: Path) -> bool:
    known = path.suffix.lower() in (".zip", ".tar") or compression.by_name(path.name) is not None
    return known and path.is_file()


def _find_in_file(path: Path, options: PackOptions, scratch: Path | None) -> Listing:
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith((b"PK\3\4", b"PK\5\6")) or path.suffix.lower() == ".zip":
        return _of_tree(zip_tree(path), path, path.stem, options)
    name = tar_trees.archive_name(path)
    kind = compression.by_content(head)
    if kind and kind.open:
        if archives.is_cifar_tar(path):
            return archives.cifar_tar(path, kind.open)
        if scratch is None:
            raise DataError(f"{path}: needs a scratch file for the decompressed archive")
        return _find_in_tar(tar_trees.decompressed(path, kind.open, scratch), name, options, path)
    if kind:
        raise DataError(f"{path}: is compressed; decompress it with `{kind.program}`")
    if tar_trees.is_tar(path) or path.suffix.lower() == ".tar":
        return _find_in_tar(path, name, options, path)
    raise DataError(f"{path}: is not a .zip, .tar or .tar.gz; for single images give their folder")


def _find_in_tar(file: Path, name: str, options: PackOptions, where: Path) -> Listing:
    """A shard of a WebDataset, or a tar of images without labels beside them."""
    if tar_trees.is_webdataset(file):
        return webdatasets.tars([file], name, with_labels=options.labels != "none")
    return _of_tree(tar_trees.tar_tree(file), where, name, options)


def _of_tree(tree: Tree, where: Path, name: str, options: PackOptions) -> Listing:
    return tree_listing(tree, str(where), name, options.labels, options.exclude)


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

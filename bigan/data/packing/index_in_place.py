"""Manifest and index for existing WebDataset shards, which stay unchanged.

Reads each tar once, strictly, and writes manifest.json and index/ beside the shards; afterwards the
folder is used like a packed one. All images must have the resolution to train at. For other sizes,
samples to leave out and a global shuffle use `bigan pack` with the same folder as its source.

The pixels are those that `bigan pack` would store. Where the decoder of one format does not give
them (EXIF orientation, transparency, palettes, CMYK, 16 bits, several formats), the manifest has
the encoder "any", and each image is converted when it is read.
"""

from __future__ import annotations

import io
import mmap
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from bigan.data import DataError
from bigan.data.format.codec import PNG_END, StoredEncoding, first_line
from bigan.data.format.convert import FORMATS, orientation_of, read_npy
from bigan.data.format.data_set import write_data_set
from bigan.data.format.manifest import (
    COLUMNS,
    INDEXED_PLAN,
    UNLABELLED,
    UNLABELLED_PLAN,
    Manifest,
    Shard,
)
from bigan.data.format.tar import group_samples, walk_tar
from bigan.data.packing.listing import has_too_many_classes
from bigan.data.packing.shard_files import below, in_folder
from bigan.data.packing.shard_labels import Labelled, label_samples
from bigan.data.packing.tar_samples import (
    NO_IMAGE,
    Sample,
    UnsuitableError,
    ignored,
    list_samples,
)
from bigan.data.places import Folder
from bigan.hashes import sha256
from bigan.image_size import image_size

# Where PIL finds an orientation in a PNG; looking for it would decode the pixels.
_PNG_METADATA = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


class _Tar(NamedTuple):
    """A shard: its name relative to the folder without .tar, hash, size in bytes and samples."""

    name: str
    sha256: str
    size: int
    samples: list[Sample]
    bad: list[tuple[str, str]]


class _Look(NamedTuple):
    """An image by its header: its decoder, and its size once it is upright and without alpha."""

    encoder: StoredEncoding
    height: int
    width: int
    channels: int


def index_in_place(folder: Path, with_labels: bool = True) -> Manifest:
    """Index the tars in and below `folder`; raises `DataError` if they are unsuitable as they are.

    Classes and splits are those of `label_samples`, which `bigan pack` has, too; without
    `with_labels` there is one class. The manifest is a function of the tars, so several processes
    may do this at once.
    """
    try:
        return _index(folder, in_folder(folder), with_labels)
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else folder
        raise DataError(f"{place}: cannot be read: {error.strerror or first_line(error)}") from None


def understood(manifest: Manifest) -> str:
    """One line: the splits and classes of shards that were indexed in place, and what is ignored.

    Suffixes of ignored members are those in the first shard.
    """
    counts = ", ".join(f"{manifest.num_samples(split):,} {split}" for split in manifest.splits)
    names = manifest.classes
    shown = ", ".join(names if len(names) <= 6 else (*names[:3], "...", names[-1]))
    classes = "no labels" if names == UNLABELLED else f"{len(names)} classes ({shown})"
    if all(name.isdecimal() for name in names) and names[0] != "0":
        classes += f"; label {names[0]} is class 0, label {names[-1]} class {len(names) - 1}"
    slow = "; images are converted when they are read, `bigan pack` is faster"
    return (
        f"{manifest.folder}: existing shards with {counts} images, {classes}"
        f"{_untrained(manifest)}{_ignored(manifest)}{slow if manifest.encoder == 'any' else ''}"
    )


def _untrained(manifest: Manifest) -> str:
    """Names of the classes without a training image."""
    if "train" not in manifest.splits:
        return ""
    counts = zip(manifest.classes, manifest.samples_of_class("train"), strict=True)
    names = [name for name, count in counts if not count]
    more = f", ... ({len(names)} classes)" if len(names) > 8 else ""
    return f"; without a training image: {', '.join(names[:8])}{more}" if names else ""


def _ignored(manifest: Manifest) -> str:
    """Suffixes of members of the first shard that are neither images nor labels."""
    file = manifest.folder / manifest.shards(manifest.splits[0])[0].url
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        groups = group_samples(walk_tar(data, str(file)))
        names = ignored(suffix for _, group in groups for suffix, _ in group if suffix)
    return f"; ignored members: {' '.join(f'.{name}' for name in names[:8])}" if names else ""


def _index(folder: Path, files: list[Path], with_labels: bool) -> Manifest:
    found = [
        _read(file, name.removesuffix(".tar"), folder, with_labels)
        for file, name in zip(files, below(files, folder), strict=True)
    ]
    keyed = [(tar.name, sample) for tar in found for sample in tar.samples]
    bad = [each for tar in found for each in tar.bad]
    bad.sort(key=lambda each: each[1].startswith(NO_IMAGE))  # damage is a better explanation
    if bad and not bad[0][1].startswith(NO_IMAGE):
        raise _unsuitable(folder, ": ".join(bad[0]))
    labelled = label_samples(keyed, str(folder), bad, with_labels)
    for tar in found:
        if tar.bad or not tar.samples:
            if not tar.bad:
                raise _to_pack(folder, f"{tar.name}.tar contains no image")
            raise _unsuitable(folder, ": ".join(tar.bad[0]))
    for (name, sample), number in zip(keyed, labelled.numbers, strict=True):
        if isinstance(number, str):
            raise _unsuitable(folder, f"{name}.tar/{sample.key} {number} but others have one")
    if has_too_many_classes(len(labelled.classes), len(keyed)):
        largest = labelled.classes[-1]
        raise DataError(f"{folder}: label {largest} implies too many classes; correct the labels")
    for name in labelled.classes:
        if not name.isprintable():
            raise DataError(f"{folder}: class {name!r} has an unprintable name; rename it")
    looks: dict[_Look, str] = {}
    crcs: list[int] = []
    for file, tar in zip(files, found, strict=True):
        for look, crc, sample in _looks(file, tar.samples, folder):
            looks.setdefault(look, f"{tar.name}.tar/{sample.key}")
            crcs.append(crc)
    return _write(folder, found, labelled, _common(looks, folder), crcs, with_labels)


def _common(looks: dict[_Look, str], folder: Path) -> _Look:
    """The decoder and the size for all images; raises `DataError` if their sizes differ."""
    sizes = {(look.height, look.width): where for look, where in reversed(looks.items())}
    if len(sizes) > 1:
        ((h, w), a), ((height, width), b) = list(sizes.items())[-1:-3:-1]
        raise _to_pack(folder, f"image sizes differ: {a} is {w}x{h}, {b} is {width}x{height}")
    ((height, width),) = sizes
    first = next(iter(looks))
    uniform = len({(look.encoder, look.channels) for look in looks}) == 1
    channels = max(look.channels for look in looks)
    return _Look(first.encoder if uniform else "any", height, width, channels)


def _write(
    folder: Path,
    found: Sequence[_Tar],
    labelled: Labelled,
    look: _Look,
    crcs: Sequence[int],
    with_labels: bool,
) -> Manifest:
    entries: list[Shard] = []
    columns: dict[tuple[str, str], list[np.ndarray]] = {}
    start = 0
    for tar in found:
        rows = slice(start, start + len(tar.samples))
        start = rows.stop
        within = set(labelled.splits[rows]) if labelled.splits else {"train"}
        if len(within) > 1:
            splits = " and ".join(sorted(within))
            raise _to_pack(folder, f"{tar.name}.tar holds images of several splits ({splits})")
        (split,) = within
        labels = [number for number in labelled.numbers[rows] if isinstance(number, int)]
        entries.append(
            Shard(
                url=f"{tar.name}.tar",
                nsamples=len(tar.samples),
                filesize=tar.size,
                sha256=tar.sha256,
                split=split,
            )
        )
        values = {
            "offset": [sample.offset for sample in tar.samples],
            "size": [sample.size for sample in tar.samples],
            "label": labels,
            "crc32": crcs[rows],
        }
        for name, dtype in COLUMNS.items():
            columns.setdefault((split, name), []).append(np.asarray(values[name], dtype))
    try:
        return write_data_set(
            Folder(folder),
            entries,
            columns,
            name=folder.resolve().name,
            resolution=image_size(look.height, look.width),
            channels=look.channels,
            classes=labelled.classes,
            encoder=look.encoder,
            transform="as-found-v1",
            plan=INDEXED_PLAN if with_labels else UNLABELLED_PLAN,
        )
    except OSError as error:
        raise DataError(
            f"{folder}: the index cannot be written beside the shards "
            f"({error.strerror or error}); make the folder writable once, or `bigan pack` it into "
            "another folder"
        ) from None


def _read(file: Path, name: str, folder: Path, with_labels: bool) -> _Tar:
    """Read a tar strictly; raises `DataError`."""
    try:
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            samples, bad = list_samples(data, f"{name}.tar", with_labels)
            return _Tar(name, sha256(data), len(data), samples, bad)
    except UnsuitableError as error:
        raise UnsuitableError(f"{folder}/{error}") from None
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise _unsuitable(folder, f"{name}.tar cannot be read ({_reason(error)})") from None


def _looks(file: Path, samples: list[Sample], folder: Path) -> Iterator[tuple[_Look, int, Sample]]:
    """The header and the crc32 of each image."""
    with file.open("rb") as stream:
        for sample in samples:
            stream.seek(sample.offset)
            try:
                data = stream.read(sample.size)
                yield _look(data), zlib.crc32(data), sample
            except Exception as error:  # decoders raise many kinds for damaged files
                reason = f"{file.name}/{sample.key} is damaged ({_reason(error)})"
                raise _unsuitable(folder, reason) from None


def _look(data: bytes) -> _Look:
    if data.startswith(np.lib.format.MAGIC_PREFIX):
        shape = read_npy(data).shape
        return _Look("npy" if len(shape) == 3 else "any", *(*shape, 1)[:3])
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        kind = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}.get(image.format or "")
        upright = kind == "png" and not any(mark in data for mark in _PNG_METADATA)
        turn = 1 if upright else orientation_of(image)
        height, width = image.size if turn >= 5 else image.size[::-1]
        grey = image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16")
        clear = "transparency" in image.info
        if turn == 1 and not clear:
            if kind == "jpg" and image.mode in ("L", "RGB"):  # its decoder converts grey to RGB
                return _Look("jpg", height, width, 3)
            if kind == "png" and data.endswith(PNG_END) and image.mode in ("L", "RGB"):
                return _Look("png", height, width, 1 if grey else 3)
            if kind == "webp" and image.mode == "RGB":
                return _Look("webp", height, width, 3)
        return _Look("any", height, width, 1 if grey and not clear and kind != "jpg" else 3)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or first_line(error)


def _to_pack(folder: Path, reason: str) -> DataError:
    """The error for intact shards that `bigan pack` accepts."""
    return DataError(
        f"{folder}: these shards cannot be used unchanged: {reason}; pack them with "
        f"`bigan pack {folder} DESTINATION --resolution N`"
    )


def _unsuitable(folder: Path, reason: str) -> DataError:
    """The error for samples that `bigan pack` can only leave out."""
    return DataError(
        f"{folder}: these shards cannot be used unchanged: {reason}; repair or replace them, or "
        f"leave such samples out with `bigan pack {folder} DESTINATION --resolution N --max-bad M`"
    )

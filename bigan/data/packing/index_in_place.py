"""Manifest and index for existing WebDataset shards, which stay unchanged.

Reads each tar once, strictly, and writes manifest.json and index/ beside the shards; afterwards the
folder is used like a packed one. All images must have the resolution to train at. For other sizes,
samples to leave out and a global shuffle use `bigan pack` with the same folder as its source.
"""

from __future__ import annotations

import io
import mmap
import re
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from bigan.data import DataError
from bigan.data.format.codec import ENCODINGS, first_line
from bigan.data.format.convert import MODES, read_npy
from bigan.data.format.manifest import COLUMNS, Manifest, Shard, write_data_set
from bigan.data.format.tar import tar_files
from bigan.data.packing.listing import has_too_many_classes
from bigan.data.packing.webdatasets import INDEXED_PLAN, Sample, list_samples
from bigan.hashes import sha256
from bigan.image_size import ImageSize, image_size

_SUFFIXES = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg"} | {
    encoding: encoding for encoding in ENCODINGS
}


def index_in_place(folder: Path) -> Manifest:
    """Index the tars of `folder`; raises `DataError` if they are unsuitable as they are.

    The split of a shard is the prefix "train-", "val-" or "test-" of its name, otherwise "train".
    Labels are integers (`.cls`, or "label" in `.json`); without any, there is one class. The
    manifest is a function of the tars, so several processes may do this at once.
    """
    try:
        return _index(folder, tar_files(folder))
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else folder
        raise DataError(f"{place}: cannot be read: {error.strerror or first_line(error)}") from None


def _index(folder: Path, files: list[Path]) -> Manifest:
    found = [_read(file, folder) for file in files]
    labelled = {sample.label is not None for _, samples in found for sample in samples}
    if labelled == {True, False}:
        raise _unsuitable(folder, "some samples have a label and some have none")
    suffixes = {_SUFFIXES.get(s.suffix, s.suffix) for _, samples in found for s in samples}
    if len(suffixes) != 1 or not suffixes <= set(ENCODINGS):
        raise _unsuitable(
            folder, f"images have several or unsupported formats: {', '.join(sorted(suffixes))}"
        )
    (encoder,) = suffixes
    shapes: dict[tuple[int, int, int], str] = {}
    for file, samples in zip(files, (s for _, s in found), strict=True):
        for shape, sample in _shapes(file, samples, encoder, folder):
            shapes.setdefault(shape, f"{file.name}/{sample.key}")
    if len(shapes) != 1:
        (first, a), (second, b) = list(shapes.items())[:2]
        raise _unsuitable(
            folder, f"image sizes differ: {a} is {_size(first)}, {b} is {_size(second)}"
        )
    ((height, width, channels),) = shapes
    if not channels:
        raise _unsuitable(folder, "images are neither 8-bit grey nor RGB, with or without alpha")
    num_classes = 1 + max((s.label or 0 for _, samples in found for s in samples), default=0)
    num_images = sum(len(samples) for _, samples in found)
    if has_too_many_classes(num_classes, num_images):
        raise _unsuitable(folder, f"label {num_classes - 1} implies too many classes")
    size = image_size(height, width)
    return _write(folder, files, found, num_classes, size, channels, encoder)


def _write(
    folder: Path,
    files: list[Path],
    found: list[tuple[str, list[Sample]]],
    num_classes: int,
    resolution: ImageSize,
    channels: int,
    encoder: str,
) -> Manifest:
    entries: list[Shard] = []
    columns: dict[tuple[str, str], list[np.ndarray]] = {}
    for file, (digest, samples) in zip(files, found, strict=True):
        match = re.fullmatch(r"(train|val|test)-.*\.tar", file.name)
        split = match[1] if match else "train"
        labels = [sample.label or 0 for sample in samples]
        number = sum(entry.split == split for entry in entries)
        histogram = np.bincount(labels, minlength=num_classes).tolist()
        entries.append(
            Shard(
                url=file.name,
                nsamples=len(samples),
                filesize=file.stat().st_size,
                sha256=digest,
                split=split,
                class_histogram=tuple(histogram),
            )
        )
        values = {
            "offset": [sample.offset for sample in samples],
            "size": [sample.size for sample in samples],
            "label": labels,
            "shard": [number] * len(samples),
        }
        for name, dtype in COLUMNS.items():
            columns.setdefault((split, name), []).append(np.asarray(values[name], dtype))
    try:
        return write_data_set(
            folder,
            entries,
            columns,
            name=folder.resolve().name,
            resolution=resolution,
            channels=channels,
            classes=tuple(str(label) for label in range(num_classes)),
            encoder=encoder,
            transform="as-found-v1",
            plan=INDEXED_PLAN,
        )
    except OSError as error:
        raise DataError(
            f"{folder}: the index cannot be written beside the shards "
            f"({error.strerror or error}); make the folder writable once, or `bigan pack` it into "
            "another folder"
        ) from None


def _read(file: Path, folder: Path) -> tuple[str, list[Sample]]:
    """(sha256, samples) of a tar; raises `DataError`."""
    try:
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            samples, bad = list_samples(data, file.name)
            digest = sha256(data)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise _unsuitable(folder, f"{file.name} cannot be read ({_reason(error)})") from None
    if bad:
        raise _unsuitable(folder, f"{bad[0][0]}: {bad[0][1]}")
    if not samples:
        raise _unsuitable(folder, f"{file.name} contains no image")
    return digest, samples


def _shapes(
    file: Path, samples: list[Sample], encoder: str, folder: Path
) -> list[tuple[tuple[int, int, int], Sample]]:
    """(height, width, channels) of each image, from its header."""
    shapes = []
    with file.open("rb") as stream:
        for sample in samples:
            stream.seek(sample.offset)
            try:
                shapes.append((_shape(stream.read(sample.size), encoder), sample))
            except Exception as error:  # decoders raise many kinds for damaged files
                reason = f"{file.name}/{sample.key} is damaged ({_reason(error)})"
                raise _unsuitable(folder, reason) from None
    return shapes


def _shape(data: bytes, encoder: str) -> tuple[int, int, int]:
    if encoder == "jpg":
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        return height, width, 3  # the decoder converts grey to RGB
    if encoder == "npy":
        shape = read_npy(data).shape
        return shape if len(shape) == 3 else (0, 0, 0)
    with Image.open(io.BytesIO(data), formats=[encoder.upper()]) as image:
        channels = {mode: num for num, mode in MODES.items()}
        return image.height, image.width, channels.get(image.mode, 0)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or first_line(error)


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]}x{shape[0]}x{shape[2]}"


def _unsuitable(folder: Path, reason: str) -> DataError:
    return DataError(
        f"{folder}: these shards cannot be used unchanged: {reason}; pack them with "
        f"`bigan pack {folder} DESTINATION --resolution N`"
    )

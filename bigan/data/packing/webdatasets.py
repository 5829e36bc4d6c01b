"""Existing WebDatasets as a source: any tar shards, and packed folders.

Listing reads names, offsets and labels only; images are read one at a time with pread. Nothing is
extracted, so member names are harmless, but names with ".." or absolute paths are reported.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braceexpand

from bigan.data import DataError
from bigan.data.format import tar
from bigan.data.format.manifest import MANIFEST, PLAN, Manifest
from bigan.data.format.tar import Member, group_samples, walk_tar
from bigan.data.packing.listing import (
    MAX_BYTES,
    MAX_CLASSES,
    Listing,
    listing_hash,
    read_at,
    unsafe,
)

IMAGES = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "npy", "ppm", "pgm", "bmp", "gif", "tif", "tiff",
)  # fmt: skip
INDEXED_PLAN = "indexed-in-place"  # `plan` of a manifest for shards that bigan did not write
JSON_LABELS = ("label", "cls", "class")
MAX_SHARDS = 1_000_000  # of a brace pattern


@dataclass(frozen=True)
class Sample:
    """One image of a tar: key, suffix, offset and size in bytes, label (None without one)."""

    key: str
    suffix: str
    offset: int
    size: int
    label: int | None


def list_samples(
    data: bytes | memoryview | mmap.mmap, where: str
) -> tuple[list[Sample], list[tuple[str, str]]]:
    """The samples of a WebDataset tar in order, and (name, reason) of its unusable members.

    The image of a sample (`tar.group_samples`) is its first member with a suffix in `IMAGES`, its
    label the integer in `.cls`, or in `.json` under "label", "cls" or "class". For a damaged tar
    the samples before the damage are returned and (where, reason) is the last entry of the second
    list.
    """
    samples: list[Sample] = []
    bad: list[tuple[str, str]] = []
    seen: set[str] = set()

    def safe_members() -> Iterator[Member]:
        for member in walk_tar(data, where):
            if unsafe(member.name):
                bad.append((f"{where}/{member.name}", "points outside of the tar"))
            else:
                yield member

    try:
        for key, group in group_samples(safe_members()):
            found = _sample(data, key, group)
            if key in seen:
                bad.append((f"{where}/{key}", "appears twice"))
            elif isinstance(found, str):
                bad.append((f"{where}/{key}", found))
            else:
                samples.append(found)
            seen.add(key)
    except DataError as error:
        bad.append((where, str(error).removeprefix(f"{where}: ")))
    return samples, bad


def _sample(
    data: bytes | memoryview | mmap.mmap, key: str, group: list[tuple[str, Member]]
) -> Sample | str:
    """The sample of these (suffix, member) pairs, or the reason it is unusable."""
    image = next(((suffix, member) for suffix, member in group if suffix in IMAGES), None)
    if image is None:
        return f"has no image ({' '.join(suffix for suffix, _ in group)})"
    if image[1].size > MAX_BYTES:
        return f"is larger than {MAX_BYTES} bytes"
    label = _read_label(data, dict(reversed(group)))
    if isinstance(label, str):
        return label
    return Sample(key, image[0], image[1].offset, image[1].size, label)


def _read_label(
    data: bytes | memoryview | mmap.mmap, members: dict[str, Member]
) -> int | str | None:
    """The label of a sample, None without one, or the reason, as text, that it is unusable."""

    def content(suffix: str) -> bytes:
        member = members[suffix]
        return bytes(data[member.offset : member.offset + min(member.size, 2**20)])

    value: Any = None
    if "cls" in members:
        text = content("cls").strip()
        value = int(text) if text.isdigit() and len(text) < 19 else repr(text[:40])
    elif "json" in members:
        try:
            found = json.loads(content("json"))
        except (ValueError, RecursionError):
            return "its .json cannot be read"
        names = [name for name in JSON_LABELS if isinstance(found, dict) and name in found]
        value = found[names[0]] if names else None
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_CLASSES:
        return f"label {value!s:.40} is not a class number"
    return value


def expand(pattern: str) -> list[Path]:
    """The local files of a brace pattern such as "shards/{00000..00003}.tar", in its order.

    Raises `DataError` for a URL, an invalid pattern and a missing file.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(f"{pattern}: is not a local file; copy the shards here first")
    ranges = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?\d+)?\}", pattern)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > MAX_SHARDS:
        raise DataError(f"{pattern}: expands to more than {MAX_SHARDS} shards; correct the braces")
    try:
        names = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{pattern}: cannot be expanded ({error}); correct the braces") from None
    for name in names:
        if not Path(name).is_file():
            raise DataError(f"{name}: shard is missing (of {pattern}); correct the pattern")
    return [Path(name) for name in names]


def tars(files: Sequence[Path], name: str) -> Listing:
    """The samples of WebDataset tars, with keys "<shard>/<key>".

    If any sample has a label, those without one are unusable; if none has, all are of class "all".
    """
    by_name = {file.name: file for file in files}
    if len(by_name) < len(files):
        twice = next(file for file in files if by_name[file.name] != file)
        raise DataError(f"{twice}: two shards have the same name; rename one")
    found: list[tuple[int, str, Sample]] = []  # (shard, key, sample)
    bad: list[tuple[str, str]] = []
    times: list[tuple[str, int]] = []
    for number, file in enumerate(files):
        shard = file.name.removesuffix(".tar")
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            times.append((shard, status.st_mtime_ns))
            if not status.st_size:
                bad.append((shard, "is empty (0 bytes)"))
                continue
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                samples, problems = list_samples(data, shard)
        found += [(number, f"{shard}/{sample.key}", sample) for sample in samples]
        bad += problems
    labelled = any(sample.label is not None for _, _, sample in found)
    if labelled:
        bad += [(key, "has no label") for _, key, sample in found if sample.label is None]
        found = [item for item in found if item[2].label is not None]
    labels = tuple(sample.label or 0 for _, _, sample in found)
    classes = tuple(str(n) for n in range(max(labels, default=0) + 1)) if labelled else ("all",)

    def original(i: int) -> bytes:
        number, _, sample = found[i]
        return read_at(files[number], sample.offset, sample.size)

    entries = ((key, sample.size, sample.offset, label)
               for (_, key, sample), label in zip(found, labels, strict=True))  # fmt: skip
    return Listing(
        name=name,
        identity=listing_hash(entries),
        classes=classes,
        keys=tuple(key for _, key, _ in found),
        labels=labels,
        original=original,
        bad=tuple(bad),
        stamp=listing_hash(times),
    )


def is_packed(folder: Path) -> bool:
    """Whether this is a complete or unfinished destination of `bigan pack`."""
    started = (folder / MANIFEST).is_file() or (folder / PLAN).is_file()
    return started and bool(tar_files(folder))


def packed(folder: Path) -> Listing:
    """A packed folder, with its splits, class names and, by default, its resolution.

    Shards that were indexed in place are listed as tars: an index changes neither keys nor splits.
    Raises `DataError` for an incomplete pack (`Manifest.load`).
    """
    if Manifest.read(folder).plan == INDEXED_PLAN:
        return tars(tar_files(folder), folder.resolve().name)
    manifest = Manifest.load(folder)
    files: list[Path] = []
    rows: list[tuple[int, int, int]] = []  # (file, offset, size)
    labels: list[int] = []
    official: list[str] = []
    for split in manifest.splits:
        index = manifest.load_index(split)
        columns = (index.shard + len(files), index.offset, index.size)
        rows += zip(*(column.tolist() for column in columns), strict=True)
        labels += index.label.tolist()
        official += [split] * len(index.label)
        files += [folder / shard.url for shard in manifest.shards(split)]

    def original(i: int) -> bytes:
        number, offset, size = rows[i]
        return read_at(files[number], offset, size)

    return Listing(
        name=manifest.name,
        identity=manifest.fingerprint,
        classes=manifest.classes,
        keys=tuple(f"{i:09d}" for i in range(len(rows))),
        labels=tuple(labels),
        original=original,
        official=tuple(official),
        resolution=manifest.resolution,
        channels=manifest.channels,
        transform=manifest.transform,
        has_all_splits=True,
    )


def tar_files(folder: Path) -> list[Path]:
    """The tars directly in `folder` that are regular files, sorted by name."""
    return [path for path in tar.tar_files(folder) if path.is_file()]

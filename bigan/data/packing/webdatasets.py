"""Existing WebDatasets as a source: any tar shards, and folders that bigan packed.

Only names, offsets and labels are read while listing; images are read one by one with pread.
Nothing is unpacked, so member names are only names; those that lead out of the tar are still
reported, since no honest tool writes them.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braceexpand

from bigan.data import DataError
from bigan.data.format import tar
from bigan.data.format.manifest import MANIFEST, PLAN, Manifest
from bigan.data.format.tar import Member, walk_tar
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
ADOPTED = "adopted"  # the manifest's `plan` of tars that were only indexed
JSON_LABELS = ("label", "cls", "class")
MAX_SHARDS = 1_000_000  # of a brace pattern


@dataclass(frozen=True)
class Sample:
    """One image of a tar: its key, suffix, where its bytes are, and its label if it has one."""

    key: str
    suffix: str
    offset: int
    size: int
    label: int | None


def list_samples(
    data: bytes | memoryview | mmap.mmap, where: str
) -> tuple[list[Sample], list[tuple[str, str]]]:
    """The samples of a WebDataset tar in order, and (name, reason) of what is unusable in it.

    A sample is the consecutive members of one key: the path up to the first dot of its last part.
    Its image is the first member with a suffix of `IMAGES`, its label the whole number in `.cls`,
    or in `.json` under "label", "cls" or "class". Of a damaged tar the samples before the damage
    are returned and (where, reason) is the last of the bad.
    """
    samples: list[Sample] = []
    bad: list[tuple[str, str]] = []
    seen: set[str] = set()
    pending: list[tuple[str, Member]] = []  # (suffix, member) of the sample being read
    pending_key = ""

    def finish() -> None:
        if not pending:
            return
        name = f"{where}/{pending_key}"
        if pending_key in seen:
            bad.append((name, "appears twice"))
            return
        seen.add(pending_key)
        image = next((m for m in pending if m[0] in IMAGES), None)
        label = _read_label(data, dict(reversed(pending)))
        if image is None:
            bad.append((name, f"holds no image ({' '.join(suffix for suffix, _ in pending)})"))
        elif image[1].size > MAX_BYTES:
            bad.append((name, f"is larger than {MAX_BYTES} bytes"))
        elif isinstance(label, str):
            bad.append((name, label))
        else:
            samples.append(Sample(pending_key, image[0], image[1].offset, image[1].size, label))

    members = walk_tar(data, where)
    while True:
        try:
            member = next(members, None)
        except DataError as error:
            finish()
            bad.append((where, str(error).removeprefix(f"{where}: ")))
            return samples, bad
        if member is None:
            finish()
            return samples, bad
        if unsafe(member.name):
            bad.append((f"{where}/{member.name}", "leads out of the tar"))
            continue
        name = member.name.removeprefix("./")
        folder, slash, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if not stem:  # a hidden file
            continue
        key = f"{folder}{slash}{stem}"
        if key != pending_key:
            finish()
            pending, pending_key = [], key
        pending.append((suffix.lower(), member))


def _read_label(
    data: bytes | memoryview | mmap.mmap, members: dict[str, Member]
) -> int | str | None:
    """The label of a sample; None if it has none; the reason, as text, if it is no class number."""

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
        return f"label {value!s:.40} is no class number"
    return value


def expand(pattern: str) -> list[Path]:
    """The local files of a brace pattern such as "shards/{00000..00003}.tar", in its order.

    Raises `DataError` for an address, a pattern that cannot be read and a file that is missing.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(f"{pattern}: is not a local file; copy the shards here first")
    ranges = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?\d+)?\}", pattern)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > MAX_SHARDS:
        raise DataError(f"{pattern}: stands for more than {MAX_SHARDS} shards; correct the braces")
    try:
        names = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{pattern}: cannot be expanded ({error}); correct the braces") from None
    for name in names:
        if not Path(name).is_file():
            raise DataError(f"{name}: shard is missing (of {pattern}); correct the pattern")
    return [Path(name) for name in names]


def tars(files: Sequence[Path], name: str) -> Listing:
    """The samples of WebDataset tars; their keys are "<shard>/<key>".

    If any sample has a label, those without are bad; if none has, all are of the one class "all".
    """
    by_name = {file.name: file for file in files}
    if len(by_name) < len(files):
        twice = next(file for file in files if by_name[file.name] != file)
        raise DataError(f"{twice}: two shards have this name; rename one")
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
    """Whether bigan packed, or began to pack, this folder."""
    noted = (folder / MANIFEST).is_file() or (folder / PLAN).is_file()
    return noted and bool(tar_files(folder))


def packed(folder: Path) -> Listing:
    """A folder that bigan packed: its splits and class names, and its size unless asked otherwise.

    Tars that bigan only indexed (`adopt`) are taken as they were before that: the index must not
    change keys and splits. Raises `DataError` if it was not packed to the end (`Manifest.load`).
    """
    if Manifest.read(folder).plan == ADOPTED:
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
    """The tars directly in `folder` that are files, by name."""
    return [path for path in tar.tar_files(folder) if path.is_file()]

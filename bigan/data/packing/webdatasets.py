"""Existing WebDatasets as a source: any tar shards, and packed folders.

Listing reads names, offsets and labels only; images are read one at a time with pread. Nothing is
extracted, so member names are harmless, but names with ".." or absolute paths are reported.
"""

from __future__ import annotations

import collections
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bigan.data import DataError
from bigan.data.format.manifest import MANIFEST, PLAN, Manifest
from bigan.data.format.tar import nested_tar_files
from bigan.data.packing.listing import Listing, listing_hash, read_at
from bigan.data.packing.shard_files import below, in_folder
from bigan.data.packing.shard_labels import label_samples
from bigan.data.packing.tar_samples import Sample, UnsuitableError, list_samples


def tars(
    files: Sequence[Path], name: str, root: Path | None = None, with_labels: bool = True
) -> Listing:
    """The samples of WebDataset tars, with keys "<shard>/<key>".

    `root`: the folder of the shards; None: the one that they have in common. Classes and splits are
    those of `label_samples`; if any sample has a label, those without one are unusable. Raises
    `DataError` for tars that are not a WebDataset (`list_samples`).
    """
    shards = [shard.removesuffix(".tar") for shard in below(files, root)]
    if len(set(shards)) < len(shards):
        twice = next(shard for n, shard in enumerate(shards) if shard in shards[:n])
        raise DataError(f"{name}: {twice}.tar is given twice; give it once")
    found, bad, stamp = _read(files, shards, with_labels)
    where = str(root or files[0].parent)
    labelled = label_samples([(shard, s) for _, shard, s in found], where, bad, with_labels)
    if labelled.splits and "train" not in labelled.splits:
        declared = " and ".join(sorted(set(labelled.splits)))
        raise DataError(
            f"{where}: all images are of split {declared} by the names of shards and folders; add "
            "the training shards, or rename these"
        )
    good = [i for i, number in enumerate(labelled.numbers) if isinstance(number, int)]
    keys = [f"{shard}/{sample.key}" for _, shard, sample in found]
    bad += [(keys[i], reason) for i, reason in enumerate(labelled.numbers)
            if isinstance(reason, str)]  # fmt: skip
    labels = tuple(number for number in labelled.numbers if isinstance(number, int))

    skipped = collections.Counter(f".{name}" for _, _, s in found for name in s.ignored if name)

    def original(i: int) -> bytes:
        number, _, sample = found[good[i]]
        return read_at(files[number], sample.offset, sample.size)

    entries = ((keys[i], found[i][2].size, found[i][2].offset, label)
               for i, label in zip(good, labels, strict=True))  # fmt: skip
    return Listing(
        name=name,
        identity=listing_hash(entries),
        classes=labelled.classes,
        keys=tuple(keys[i] for i in good),
        labels=labels,
        original=original,
        official=None if labelled.splits is None else tuple(labelled.splits[i] for i in good),
        bad=tuple(bad),
        stamp=stamp,
        skipped=tuple(sorted(skipped.items())),
    )


def _read(
    files: Sequence[Path], shards: Sequence[str], with_labels: bool
) -> tuple[list[tuple[int, str, Sample]], list[tuple[str, str]], str]:
    """(number and name of the shard of each sample, unusable members, stamp)."""
    found: list[tuple[int, str, Sample]] = []
    bad: list[tuple[str, str]] = []
    times: list[tuple[str, int]] = []
    for number, (file, shard) in enumerate(zip(files, shards, strict=True)):
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            times.append((shard, status.st_mtime_ns))
            if not status.st_size:
                bad.append((shard, "is empty (0 bytes)"))
                continue
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                try:
                    samples, problems = list_samples(data, shard, with_labels)
                except UnsuitableError as error:
                    raise UnsuitableError(f"{file}{str(error).removeprefix(shard)}") from None
        found += [(number, shard, sample) for sample in samples]
        bad += problems
    return found, bad, listing_hash(times)


def is_packed(folder: Path) -> bool:
    """Whether this is a complete or unfinished destination of `bigan pack`."""
    started = (folder / MANIFEST).is_file() or (folder / PLAN).is_file()
    return started and bool(nested_tar_files(folder))


def packed(folder: Path, with_labels: bool = True) -> Listing:
    """A packed folder, with its splits, class names and, by default, its resolution.

    Shards that were indexed in place are listed as tars: an index changes neither keys nor splits.
    Raises `DataError` for an incomplete pack (`Manifest.load`).
    """
    if Manifest.read(folder).is_indexed:
        return tars(in_folder(folder), folder.resolve().name, folder, with_labels)
    manifest = Manifest.load(folder)
    files: list[Path] = []
    rows: list[tuple[int, int, int]] = []  # (file, offset, size)
    labels: list[int] = []
    official: list[str] = []
    for split in manifest.splits:
        index = manifest.load_index(split)
        shard_of = index.shards_of(np.arange(len(index.label)))
        columns = (shard_of + len(files), index.offset, index.size)
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

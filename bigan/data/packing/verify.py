"""`bigan verify`: a packed folder, local or in a store, compared with its manifest.

One run reports all problems.

It checks the manifest, missing and extra files, sizes and sha256 of shards and index files, every
tar header and end marker, every label and offset against the index, counts, and that every image
decodes to its shape (shard_scan.py, index_check.py). Shards are checked in threads and are
memory-mapped; those in a store are read into memory, one per thread. `--deep` adds statistics of
the images (findings.py).
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bigan import config as configs
from bigan.config import ConfigError
from bigan.data import DataError
from bigan.data.format.manifest import MANIFEST, PLAN, PYRAMID, Manifest, Shard
from bigan.data.format.tar import walk_tar
from bigan.data.packing.findings import Note, findings
from bigan.data.packing.index_check import check_hashes, check_records, read_index
from bigan.data.packing.shard_scan import Problem, Scan, scan_shard
from bigan.data.places import Place, open_place, threads
from bigan.image_size import plain, sides

MAX_LINES = 100  # of problems, and of notes, in as_text(); as_dict() has all
MAX_RESOLUTION = 2**14  # pixels; limits what a damaged manifest can allocate
LEVEL = re.compile(r"r\d+(x\d+)?")  # name of the folder of a level
LEFTOVER_SECONDS = 3600  # a younger temporary file may belong to a running pack
REPAIR = (
    f"delete the damaged files and {MANIFEST} and run the same `bigan pack` again; it writes the "
    f"missing files (if {PLAN} is damaged, pack into a new folder)"
)
COPY_AGAIN = (
    f"copy the damaged shards again, then delete {MANIFEST} and index/; the next use indexes them"
)
UPLOAD_AGAIN = (
    "upload the damaged files again from an undamaged copy; or delete them and "
    f"{MANIFEST} in the store and run the same `bigan pack` again, which writes the missing files"
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Report:
    """The result of `verify`. `num_images` were decoded; `notes` are not errors."""

    folder: str  # path or URL
    num_shards: int
    num_images: int
    problems: tuple[Problem, ...]
    notes: tuple[Note, ...] = ()
    contact_sheet: str | None = None
    advice: str = REPAIR  # how to repair problems

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_text(self) -> str:
        """A summary line, then a line per problem and per note (the first 100 of each)."""
        images, shards = _count(self.num_images, "image"), _count(self.num_shards, "shard")
        verdict = "ok" if self.ok else _count(len(self.problems), "problem")
        lines = [f"{self.folder}: {verdict} ({shards}, {images} decoded)"]
        lines += _first([f"  {problem.where}: {problem.what}" for problem in self.problems])
        lines += [] if self.ok else [self.advice]
        lines += _first([f"note: {note.what}" for note in self.notes])
        lines += [f"contact sheet: {self.contact_sheet}"] if self.contact_sheet else []
        return "\n".join(map(_printable, lines))

    def as_dict(self) -> dict[str, Any]:
        """The full report as JSON values."""
        return {
            "folder": self.folder,
            "ok": self.ok,
            "num_shards": self.num_shards,
            "num_images": self.num_images,
            "problems": [asdict(problem) for problem in self.problems],
            "notes": [asdict(note) for note in self.notes],
            "contact_sheet": self.contact_sheet,
        }


def verify(
    folder: str | Path,
    *,
    deep: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a packed `folder` (a path or URL), or a pyramid of folders, completely.

    `deep` also analyses the pixels (duplicates, constant images, class balance, statistics), for a
    pyramid those of its largest level, and writes <folder>/contact_sheet.png.
    `jobs`: threads (None: one per core, at most 16). Memory: one image per thread, of a store two
    shards, and about 100 bytes per sample.
    `progress(bytes done, total bytes)` is called after each shard.
    Raises `DataError` only if the folder is not a data set or is an incomplete pack, or if a store
    cannot be read.
    """
    with open_place(folder) as place:
        return _verify(place, deep, jobs or min(16, os.cpu_count() or 1), progress)


def _verify(place: Place, deep: bool, jobs: int, progress: Progress | None) -> Report:
    levels, problems = _open(place)
    total = sum(shard.filesize for level in levels for shard in level.shards)
    done = 0
    with threads(jobs) as executor:
        for level in levels:
            problems += level.named(_check_listing(level))
            if level.manifest is None:
                problems += level.named(_walk_all(level.place))
                continue
            in_place = level.is_indexed_in_place
            problems += level.named(check_records(level.place, level.manifest, in_place))
            index, wrong = read_index(level.place, level.manifest, level.shards)
            problems += level.named(wrong)
            deeply = deep and level is levels[-1]
            scan = partial(scan_shard, level.place, level.manifest, in_place, deeply)
            for found in executor.map(scan, level.shards, [index.get(s.url) for s in level.shards]):
                level.scans.append(found)
                problems += level.named(found.problems)
                done += found.shard.filesize
                if progress:
                    progress(done, total)
    problems += _compare_levels(levels)

    notes = [note for level in levels for note in _leftovers(level)]
    if not place.can_list:
        what = f"{place.shown} cannot be listed: files that {MANIFEST} does not list are unknown"
        notes.append(Note("unlisted", what))
    sheet = None
    if deep and levels and levels[-1].manifest:
        looks, sheet = findings(levels[-1].place, levels[-1].manifest, levels[-1].scans, place)
        notes += looks
    return Report(
        folder=place.shown,
        num_shards=sum(len(level.shards) for level in levels),
        num_images=sum(int(s.decoded.sum()) for level in levels for s in level.scans),
        problems=tuple(problems),
        notes=tuple(notes),
        contact_sheet=sheet,
        advice=_advice(place, levels),
    )


def _advice(place: Place, levels: list[_Level]) -> str:
    """How to repair problems."""
    if place.path is None:
        return UPLOAD_AGAIN
    return COPY_AGAIN if any(level.is_indexed_in_place for level in levels) else REPAIR


# --- folders and manifests ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Level:
    """One data folder: one resolution of a pyramid, or the only folder, with the name ""."""

    name: str
    place: Place
    manifest: Manifest | None  # None: unusable
    shards: tuple[Shard, ...]
    scans: list[Scan] = field(default_factory=list)  # of `shards`

    @functools.cached_property
    def is_indexed_in_place(self) -> bool:
        """Whether bigan did not write the shards; `bigan pack` writes plan.json beside them.

        One of two marks is sufficient, since one may be lost in a damaged manifest.
        """
        if self.manifest and self.manifest.is_indexed:
            return True
        found = self.manifest is None or self.manifest.transform == "as-found-v1"
        return found and not self.place.exists(PLAN)

    def named(self, problems: Iterable[Problem]) -> list[Problem]:
        """The problems with paths relative to the folder of the pyramid."""
        start = f"{self.name}/" if self.name else ""
        return [Problem(start + problem.where, problem.what) for problem in problems]


def _open(place: Place) -> tuple[list[_Level], list[Problem]]:
    """The data folders to check, smallest first, with the problems of their manifests."""
    if place.exists(MANIFEST) or not place.exists(PYRAMID):
        level, problems = _open_level("", place)
        return [level], problems
    content, names, problems = _read_pyramid(place)
    levels = []
    for name in names:
        try:
            level, wrong = _open_level(name, place.folder(name))
        except DataError as error:
            problems.append(Problem(name, str(error).removeprefix(f"{place.where(name)}: ")))
        else:
            levels.append(level)
            problems += level.named(wrong)
    return levels, problems + _check_pyramid(place, content, names, levels)


def _level_folders(place: Place) -> list[str]:
    """The folders in a pyramid whose names are those of levels."""
    names = (entry.removesuffix("/") for entry in place.entries() if entry.endswith("/"))
    return sorted(name for name in names if LEVEL.fullmatch(name))


def _read_pyramid(place: Place) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """(content of pyramid.json, names of the levels, problems)."""
    problems = []
    content: dict[str, Any] = {}
    try:
        content = json.loads(place.read(PYRAMID))
        names = content["levels"]
        if not names or not all(isinstance(n, str) and LEVEL.fullmatch(n) for n in names):
            raise ValueError("its levels are not names of folders")
    except (OSError, ValueError, KeyError, TypeError) as error:
        content = {}
        names = [n for n in _level_folders(place) if place.folder(n).exists(MANIFEST)]
        if not names:
            raise DataError(f"{place.where(PYRAMID)}: cannot be read: {error}") from None
        problems.append(Problem(PYRAMID, f"cannot be read: {error}"))
    return content, names, problems


def _check_pyramid(
    place: Place, content: dict[str, Any], names: list[str], levels: list[_Level]
) -> list[Problem]:
    """Compare pyramid.json and plan.json with the levels; report unlisted folders of levels.

    A listed level that is missing has already been reported by `_open`.
    """
    problems = [
        Problem(name, f"is not listed in {PYRAMID}: delete the folder, or pack again")
        for name in _level_folders(place)
        if name not in names
    ]
    manifests = [level.manifest for level in levels if level.manifest]
    if not content or len(manifests) < len(names):
        return problems
    top = manifests[-1]
    resolutions = [plain(manifest.resolution) for manifest in manifests]
    expected = {"plan": top.plan, "name": top.name, "levels": names, "resolutions": resolutions}
    wrong = [key for key in expected | content if content.get(key) != expected.get(key)]
    heights = [sides(manifest.resolution)[0] for manifest in manifests]
    if heights != sorted(set(heights)):
        wrong.append("levels")
    problems += [Problem(PYRAMID, f"its {key!r} differs from the levels") for key in wrong]
    plan = {name: top.records[name] for name in (PLAN,) if name in top.records}
    return problems + check_hashes(place, plan)


def _open_level(name: str, place: Place) -> tuple[_Level, list[Problem]]:
    """Open one folder, with an inconsistent manifest if possible; `DataError` without manifest."""
    problems = []
    manifest: Manifest | None
    try:
        manifest = place.read_manifest()
    except DataError as error:
        if not place.exists(MANIFEST):
            raise
        problems.append(Problem(MANIFEST, str(error).removeprefix(f"{place.where(MANIFEST)}: ")))
        manifest = _read_leniently(place)
    shards = () if manifest is None else manifest.shardlist
    listed = {shard.url: shard for shard in shards if manifest and _is_safe(manifest, shard)}
    return _Level(name, place, manifest, tuple(listed.values())), problems


def _read_leniently(place: Place) -> Manifest | None:
    """A manifest without consistency checks, to continue with; None if it is not a manifest."""
    try:
        content = json.loads(place.read(MANIFEST))
        manifest = configs.validate(Manifest, {**content, "folder": ""}, MANIFEST)
    except (OSError, ValueError, TypeError, ConfigError):
        return None
    possible = max(manifest.image_shape) <= MAX_RESOLUTION and manifest.channels in range(1, 5)
    return manifest if possible else None


def _is_safe(manifest: Manifest, shard: Shard) -> bool:
    """Whether no path of this manifest entry points outside of the folder."""
    plain = manifest.may_contain(shard.url) and Path(shard.split).name == shard.split
    return plain and shard.nsamples >= 0


def _check_listing(level: _Level) -> list[Problem]:
    """Report shards in the folder that the manifest does not list."""
    if level.manifest is None:
        return []
    listed = {shard.url for shard in level.shards}
    what = f"is not listed in {MANIFEST}: "
    what += (
        f"delete {MANIFEST} and index/"
        if level.is_indexed_in_place
        else "remove it from the folder"
    )
    tars = level.place.tars(nested=level.manifest.is_indexed)
    return [Problem(name, what) for name in tars if name not in listed]


def _walk_all(place: Place) -> list[Problem]:
    """Check the tars of a folder without a manifest."""
    problems = []
    for name in place.tars(nested=False):
        try:
            with place.hashed(name) as (data, _):
                for _ in walk_tar(data, name):
                    pass
        except OSError as error:
            problems.append(Problem(name, f"cannot be read: {error.strerror}"))
        except DataError as error:
            problems.append(Problem(name, str(error).removeprefix(f"{name}: ")))
    return problems


def _leftovers(level: _Level) -> list[Note]:
    """Temporary files of killed writers."""
    folder, found = level.place.path, []
    if folder is None:  # a store has complete objects only
        return []
    for file in sorted([*folder.glob(".*.tmp"), *folder.glob("index/.*.tmp")]):
        try:
            age = time.time() - file.lstat().st_mtime
        except OSError:  # its writer is running and has renamed it
            continue
        if age > LEFTOVER_SECONDS:
            name = file.relative_to(folder).as_posix()
            where = f"{level.name}/{name}" if level.name else name
            found.append(
                Note("leftover", f"{where}: temporary file of a killed writer; may be deleted")
            )
    return found


def _compare_levels(levels: list[_Level]) -> list[Problem]:
    """Check that all levels of a pyramid have the same samples with the same labels."""
    problems = []
    usable = [level for level in levels if level.manifest]
    for level in usable[:-1]:
        top = usable[-1]
        if [shard.url for shard in level.shards] != [shard.url for shard in top.shards]:
            problems.append(Problem(level.name, f"lists other shards than {top.name}"))
        labels = {scan.shard.url: scan.label for scan in top.scans if not scan.problems}
        for scan in level.scans:
            name = scan.shard.url
            if name not in labels or scan.problems:  # unknown, or already reported
                continue
            if not np.array_equal(scan.label, labels[name]):
                what = f"samples or labels differ from those in {top.name}"
                problems.append(Problem(f"{level.name}/{name}", what))
    return problems


# --- text ---------------------------------------------------------------------------------------


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - MAX_LINES
    return lines if more <= 0 else [*lines[:MAX_LINES], f"  ... and {more:,} more"]


def _printable(line: str) -> str:
    """Escape line breaks, terminal codes and lone surrogates, which names in tars may contain."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)

"""`bigan verify`: a packed folder compared with its manifest. One run reports all problems.

It checks the manifest, missing and extra files, sizes and sha256 of shards and index files, every
tar header and end marker, every label and offset against the index, counts, and that every image
decodes to its shape (shard_scan.py, index_check.py). Shards are checked in threads and are
memory-mapped, so memory does not depend on their size. `--deep` adds statistics of the images
(findings.py).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bigan import config as configs
from bigan.config import ConfigError
from bigan.data import DataError
from bigan.data.format.manifest import MANIFEST, PLAN, PYRAMID, Manifest, Shard
from bigan.data.format.tar import tar_files, walk_tar
from bigan.data.packing.findings import Note, findings
from bigan.data.packing.index_check import check_hashes, check_records, read_index
from bigan.data.packing.shard_scan import Problem, Scan, is_indexed_in_place, mapped, scan_shard
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

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Report:
    """The result of `verify`. `num_images` were decoded; `notes` are not errors."""

    folder: Path
    num_shards: int
    num_images: int
    problems: tuple[Problem, ...]
    notes: tuple[Note, ...] = ()
    contact_sheet: Path | None = None
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
        sheet = self.contact_sheet
        return {
            "folder": str(self.folder),
            "ok": self.ok,
            "num_shards": self.num_shards,
            "num_images": self.num_images,
            "problems": [asdict(problem) for problem in self.problems],
            "notes": [asdict(note) for note in self.notes],
            "contact_sheet": None if sheet is None else str(sheet),
        }


def verify(
    folder: Path,
    *,
    deep: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a packed `folder`, or a pyramid of folders, completely.

    `deep` also analyses the pixels (duplicates, constant images, class balance, statistics), for a
    pyramid those of its largest level, and writes <folder>/contact_sheet.png.
    `jobs`: threads (None: one per core, at most 16). Memory: one image per thread and about 100
    bytes per sample.
    `progress(images done, total images)` is called after each shard.
    Raises `DataError` only if the folder is not a data set or is an incomplete pack.
    """
    folder = Path(folder)
    levels, problems = _open(folder)
    total = sum(shard.nsamples for level in levels for shard in level.shards)
    done = 0
    executor = ThreadPoolExecutor(jobs or min(16, os.cpu_count() or 1))
    try:
        for level in levels:
            problems += level.named(_check_listing(level))
            if level.manifest is None:
                problems += level.named(_walk_all(level.folder))
                continue
            problems += level.named(check_records(level.manifest))
            index, wrong = read_index(level.manifest, level.shards)
            problems += level.named(wrong)
            scan = partial(scan_shard, level.manifest, deep and level is levels[-1])
            for found in executor.map(scan, level.shards, [index.get(s.url) for s in level.shards]):
                level.scans.append(found)
                problems += level.named(found.problems)
                done += found.shard.nsamples
                if progress:
                    progress(done, total)
    finally:
        executor.shutdown(cancel_futures=True)  # Ctrl-C: finish running tasks only
    problems += _compare_levels(levels)

    notes = [note for level in levels for note in _leftovers(level)]
    sheet = None
    if deep and levels and levels[-1].manifest:
        looks, sheet = findings(levels[-1].manifest, levels[-1].scans, folder)
        notes += looks
    return Report(
        folder=folder,
        num_shards=sum(len(level.shards) for level in levels),
        num_images=sum(int(s.decoded.sum()) for level in levels for s in level.scans),
        problems=tuple(problems),
        notes=tuple(notes),
        contact_sheet=sheet,
        advice=COPY_AGAIN if any(level.is_indexed_in_place for level in levels) else REPAIR,
    )


# --- folders and manifests ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Level:
    """One data folder: one resolution of a pyramid, or the only folder, with the name ""."""

    name: str
    folder: Path
    manifest: Manifest | None  # None: unusable
    shards: tuple[Shard, ...]
    scans: list[Scan] = field(default_factory=list)  # of `shards`

    @property
    def is_indexed_in_place(self) -> bool:
        """Whether bigan did not write the shards; `bigan pack` writes plan.json beside them."""
        if self.manifest is None:
            return not (self.folder / PLAN).is_file()
        return is_indexed_in_place(self.manifest)

    def named(self, problems: Iterable[Problem]) -> list[Problem]:
        """The problems with paths relative to the folder of the pyramid."""
        start = f"{self.name}/" if self.name else ""
        return [Problem(start + problem.where, problem.what) for problem in problems]


def _open(folder: Path) -> tuple[list[_Level], list[Problem]]:
    """The data folders to check, smallest first, with the problems of their manifests."""
    if (folder / MANIFEST).exists() or not (folder / PYRAMID).is_file():
        level, problems = _open_level("", folder)
        return [level], problems
    content, names, problems = _read_pyramid(folder)
    levels = []
    for name in names:
        try:
            level, wrong = _open_level(name, folder / name)
        except DataError as error:
            problems.append(Problem(name, str(error).removeprefix(f"{folder / name}: ")))
        else:
            levels.append(level)
            problems += level.named(wrong)
    return levels, problems + _check_pyramid(folder, content, names, levels)


def _read_pyramid(folder: Path) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """(content of pyramid.json, names of the levels, problems)."""
    problems = []
    content: dict[str, Any] = {}
    try:
        content = json.loads((folder / PYRAMID).read_text(encoding="utf-8"))
        names = content["levels"]
        if not names or not all(isinstance(n, str) and LEVEL.fullmatch(n) for n in names):
            raise ValueError("its levels are not names of folders")
    except (OSError, ValueError, KeyError, TypeError) as error:
        content = {}
        names = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
        if not names:
            raise DataError(f"{folder / PYRAMID}: cannot be read: {error}") from None
        problems.append(Problem(PYRAMID, f"cannot be read: {error}"))
    return content, names, problems


def _check_pyramid(
    folder: Path, content: dict[str, Any], names: list[str], levels: list[_Level]
) -> list[Problem]:
    """Compare pyramid.json and plan.json with the levels; report unlisted folders of levels.

    A listed level that is missing has already been reported by `_open`.
    """
    problems = [
        Problem(path.name, f"is not listed in {PYRAMID}: delete the folder, or pack again")
        for path in sorted(folder.glob("r*"))
        if LEVEL.fullmatch(path.name) and path.is_dir() and path.name not in names
    ]  # fmt: skip
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
    return problems + check_hashes(folder, plan)


def _open_level(name: str, folder: Path) -> tuple[_Level, list[Problem]]:
    """Open one folder, with an inconsistent manifest if possible; `DataError` without manifest."""
    problems = []
    manifest: Manifest | None
    try:
        manifest = Manifest.read(folder)
    except DataError as error:
        if not (folder / MANIFEST).is_file():
            raise
        problems.append(Problem(MANIFEST, str(error).removeprefix(f"{folder / MANIFEST}: ")))
        manifest = _read_leniently(folder)
    shards = () if manifest is None else manifest.shardlist
    listed = {shard.url: shard for shard in shards if manifest and _is_safe(manifest, shard)}
    return _Level(name, folder, manifest, tuple(listed.values())), problems


def _read_leniently(folder: Path) -> Manifest | None:
    """A manifest without consistency checks, to continue with; None if it is not a manifest."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest = configs.validate(Manifest, {**content, "folder": str(folder)}, MANIFEST)
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
    return [Problem(name, what) for name in level.manifest.tar_files() if name not in listed]


def _walk_all(folder: Path) -> list[Problem]:
    """Check the tars of a folder without a manifest."""
    problems = []
    for file in tar_files(folder):
        try:
            with mapped(file) as data:
                for _ in walk_tar(data, file.name):
                    pass
        except OSError as error:
            problems.append(Problem(file.name, f"cannot be read: {error.strerror}"))
        except DataError as error:
            problems.append(Problem(file.name, str(error).removeprefix(f"{file.name}: ")))
    return problems


def _leftovers(level: _Level) -> list[Note]:
    """Temporary files of killed writers."""
    found = []
    for file in sorted([*level.folder.glob(".*.tmp"), *level.folder.glob("index/.*.tmp")]):
        try:
            age = time.time() - file.lstat().st_mtime
        except OSError:  # its writer is running and has renamed it
            continue
        if age > LEFTOVER_SECONDS:
            name = file.relative_to(level.folder).as_posix()
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

"""`bigan pack`: a source of images becomes WebDataset shards, an index and a manifest.

Every shard is a pure function of (plan, shard number). Its tar is written atomically, then its
record (offsets, hash, names, unusable images), which marks it as finished. A pack can therefore be
killed at any time and divided among processes and machines (`PackOptions.part`): the same call
keeps finished shards and writes the others. The process that finds all shards finished writes the
manifest last; its bytes do not depend on which process that is. Nothing outside the destination is
written, except that Python objects for a store are spooled into a temporary folder.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigan import atomic_files
from bigan.data import DataError
from bigan.data.format.manifest import PLAN, PYRAMID, Manifest
from bigan.data.packing import sources
from bigan.data.packing.destination import (
    STAMP,
    claim_destination,
    plan_text,
    refuse_inside_source,
    refuse_unwritable,
)
from bigan.data.packing.listing import Skipped
from bigan.data.packing.options import PackOptions, with_changes
from bigan.data.packing.pack_manifest import Contents, collect, write_manifest
from bigan.data.packing.pack_plan import Plan, make_plan
from bigan.data.packing.pack_shard import (
    Bad,
    Encoded,
    encoded_image,
    finished,
    printable,
    record_name,
    shard,
)
from bigan.data.places import Place, open_place
from bigan.image_size import plain

MAX_JOBS = 16
MAX_EXCESS_BAD = 1000  # unusable images beyond `max_bad` after which a pack stops at once
BAD = "bad.txt"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Packed:
    """The result of `pack`.

    manifests: one for each level of a pyramid, smallest first; else one. Empty unless `complete`.
    bad: (name, reason) of originals that were left out; of this call's shards if not complete.
    complete: False while shards of other parts are missing.
    skipped: (suffix, number) of files in the source that are not images.
    changes: number of images that were cropped, padded, stretched or enlarged; empty if the pack
        was complete before this call.
    """

    manifests: tuple[Manifest, ...]
    bad: tuple[Bad, ...]
    complete: bool
    skipped: Skipped = ()
    changes: Mapping[str, int] = field(default_factory=dict)
    bad_list: str = ""  # path or URL of bad.txt


def pack(
    source: str | Path | Iterable[Any],
    destination: str | Path,
    options: PackOptions | None = None,
    *,
    progress: Progress | None = None,
    **changes: Any,
) -> Packed:
    """Pack `source`, anything that `sources.open_source` takes, into `destination`, a path or URL.

    Keyword arguments set single options: `pack("digits", folder, resolution=16)`. Calling it again
    with the same options writes the missing shards, if any.

    `progress(images done, images of this part)` is called after each image. Raises `DataError`, one
    line, for an unusable source, more unusable images than `max_bad`, a destination with other
    content, or a full disk.
    """
    options = with_changes(options, changes)
    with open_place(destination) as place:
        if place.path and isinstance(source, str | Path) and source != "digits":
            refuse_inside_source(Path(source), place.path)
        refuse_unwritable(place)
        try:
            with _spool(place, isinstance(source, str | Path)) as scratch:
                opened = sources.open_source(source, options, scratch=scratch)
                return pack_source(opened, place, options, progress=progress)
        except OSError as error:
            where = error.filename or place.shown
            raise DataError(f"{where}: cannot be used: {error.strerror or error}") from error


@contextlib.contextmanager
def _spool(place: Place, on_disk: bool) -> Iterator[Path]:
    """A temporary name for a source that is not `on_disk`: it may be readable only once."""
    folder = place.path or Path(tempfile.gettempdir())
    name = "spool" if place.path else "bigan-spool"
    scratch = atomic_files.temporary_name(folder / name)
    existed = folder.exists()
    try:
        if not on_disk:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_files.remove_leftovers(folder, name, shared=True)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            scratch.unlink()
        if not existed:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def pack_source(
    source: sources.Source,
    destination: str | Path | Place,
    options: PackOptions | None = None,
    *,
    progress: Progress | None = None,
    **changes: Any,
) -> Packed:
    """Pack an opened or user-defined `Source` into `destination`.

    Of the options, those for conversion and splits are not used: `source` has them applied.
    Unusable images are listed in `destination`/bad.txt. Otherwise like `pack`.
    """
    options = with_changes(options, changes)
    plan = make_plan(source, options)
    index, count = options.part or (0, 1)
    numbers = range(index % count, len(plan.names), count)
    with open_place(destination) as place:
        try:
            manifests = claim_destination(place, plan)
            if manifests:
                bad = _left_out(place, plan, manifests[0]) if manifests[0].num_bad else []
                _refuse(bad, options.max_bad, plan, place)
                if progress:
                    total = plan.num_images(numbers)
                    progress(total, total)
                return Packed(
                    manifests, tuple(bad), True, source.skipped, bad_list=place.where(BAD)
                )
            bad = _write_shards(place, plan, numbers, options, progress)
            return _complete(place, plan, bad, options.max_bad)
        except OSError as error:
            raise DataError(
                f"{place.shown}: cannot be written: {error.strerror or error}"
            ) from error


# --- shards -------------------------------------------------------------------------------------


def _write_shards(
    place: Place,
    plan: Plan,
    numbers: Sequence[int],
    options: PackOptions,
    progress: Progress | None,
) -> list[Bad]:
    """Write the unfinished ones of the shards `numbers`; returns the unusable images of all.

    Images of the next shard are decoded while a shard is written: memory holds two shards.
    """
    for level in plan.levels:
        folder = place.folder(level.folder)
        folder.make_folder("index")
        if not folder.exists(PLAN):
            folder.write(PLAN, plan_text(plan))
    bad, missing = _finished_shards(place, plan, numbers)
    bad = _listed_bad(plan) + bad
    _refuse(bad, options.max_bad, plan, place, MAX_EXCESS_BAD)
    total = plan.num_images(numbers)
    done = total - plan.num_images(missing)
    if progress:
        progress(done, total)
    executor = ThreadPoolExecutor(options.jobs or _cores(), thread_name_prefix="bigan-pack")
    try:
        images = _encode_ahead(executor, plan, missing)
        for number in missing:
            encoded = []
            for i, image in zip(plan.members[number], images, strict=False):
                encoded.append(image)
                if isinstance(image, str):
                    bad.append((printable(plan.source.keys[i]), image))
                    _refuse(bad, options.max_bad, plan, place, MAX_EXCESS_BAD)
                done += 1
                if progress:
                    progress(done, total)
            _write_shard(place, plan, number, encoded)
    finally:
        executor.shutdown(cancel_futures=True)
    return bad


def _finished_shards(
    place: Place, plan: Plan, numbers: Sequence[int]
) -> tuple[list[Bad], list[int]]:
    """(unusable images of the finished shards, numbers of the unfinished ones)."""
    bad: list[Bad] = []
    missing = []
    names = [plan.names[number] for number in numbers]
    levels = [finished(place.folder(level.folder), names, plan.id) for level in plan.levels]
    for number, *records in zip(numbers, *levels, strict=True):
        if records[0] and all(records):
            bad += records[0][0].bad
        else:
            missing.append(number)
    return bad, missing


def _write_shard(place: Place, plan: Plan, number: int, encoded: Sequence[Encoded | str]) -> None:
    """Write the tar of a shard and then its record, for every level."""
    name = plan.names[number]
    for n, level in enumerate(plan.levels):
        folder = place.folder(level.folder)
        tar, record = shard(plan, number, n, encoded)
        if record.nsamples:
            folder.write(f"{name}.tar", tar)
        folder.write(record_name(name), record.model_dump_json() + "\n")


def _encode_ahead(
    executor: ThreadPoolExecutor, plan: Plan, numbers: Sequence[int]
) -> Iterator[Encoded | str]:
    """The encoded images of these shards in order; as many as one shard holds are in progress."""
    members = itertools.chain.from_iterable(plan.members[number] for number in numbers)
    waiting: collections.deque[Future[Encoded | str]] = collections.deque()
    for i in itertools.islice(members, plan.shard_size):
        waiting.append(executor.submit(encoded_image, plan, i))
    while waiting:
        image = waiting.popleft().result()
        for i in itertools.islice(members, 1):
            waiting.append(executor.submit(encoded_image, plan, i))
        yield image


def _cores() -> int:
    """The cores this process may use (SLURM restricts a job to some), at most `MAX_JOBS`."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    return min(cores, MAX_JOBS)


# --- manifests ----------------------------------------------------------------------------------


def _complete(place: Place, plan: Plan, bad: list[Bad], max_bad: int) -> Packed:
    """Write bad.txt and the manifests if the shards of all parts are finished."""
    levels: list[Contents] = []
    for level in plan.levels:
        contents = collect(place.folder(level.folder), plan)
        if contents is None:
            return Packed((), tuple(bad), False, plan.source.skipped)
        levels.append(contents)
    bad = _listed_bad(plan) + levels[0].bad
    _refuse(bad, max_bad, plan, place)
    if all(entry.split != "train" for entry in levels[0].shards):
        raise DataError(
            f"{plan.source.name}: no usable training image; repair images listed in "
            f"{place.where(BAD)}"
        )
    _write_bad(place, bad)
    for folder in (place, *(place.folder(level.folder) for level in plan.levels)):
        folder.remove_leftovers()
    manifests = tuple(
        write_manifest(place.folder(level.folder), plan, level, contents, len(bad))
        for level, contents in zip(plan.levels, levels, strict=True)
    )
    if plan.levels[0].folder:
        content = {
            "plan": plan.id,
            "name": plan.source.name,
            "levels": [level.folder for level in plan.levels],
            "resolutions": [plain(level.resolution) for level in plan.levels],
        }
        place.write(PYRAMID, json.dumps(content, indent=1) + "\n")
    place.delete(STAMP)
    return Packed(
        manifests, tuple(bad), True, plan.source.skipped, levels[0].changes, place.where(BAD)
    )


# --- unusable originals -------------------------------------------------------------------------


def _listed_bad(plan: Plan) -> list[Bad]:
    """Originals that were found unusable while the source was listed."""
    return [(printable(name), printable(reason)) for name, reason in plan.source.bad]


def _left_out(place: Place, plan: Plan, manifest: Manifest) -> list[Bad]:
    """What a complete data set leaves out; other library versions may have packed it."""
    records = finished(place.folder(plan.levels[0].folder), plan.names, manifest.plan)
    return _listed_bad(plan) + [bad for found in records if found for bad in found[0].bad]


def _write_bad(place: Place, bad: list[Bad]) -> None:
    if bad:
        lines = "".join(f"{name}\t{reason}\n" for name, reason in bad)
        place.write(BAD, lines)
    else:
        place.delete(BAD)


def _refuse(bad: list[Bad], max_bad: int, plan: Plan, place: Place, excess: int = 0) -> None:
    """Write bad.txt and raise `DataError` if there are more than `max_bad + excess`."""
    if len(bad) <= max_bad + excess:
        return
    _write_bad(place, bad)
    first = "; ".join(f"{name}: {reason}" for name, reason in bad[:3])
    total = len(plan.source.keys) + len(plan.source.bad)
    raise DataError(
        f"{'at least ' if excess else ''}{len(bad)} of {total} images cannot be used (at most "
        f"--max-bad {max_bad}): {first}; all are listed in {place.where(BAD)}; repair or remove "
        f"them, delete {place.shown} and pack again, or leave them out with --max-bad {len(bad)}"
    )

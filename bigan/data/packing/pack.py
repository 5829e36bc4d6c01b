"""Source -> shards: `bigan pack`.

Every shard is a pure function of (plan, shard number): its tar is written whole or not at all, then
its record (offsets, hash, names, what was unusable), which says that it is finished. So packing may
be killed at any moment and shared between processes and machines (`part`): the same call keeps what
is finished and writes the rest, and whoever finds every shard finished writes the manifest, last,
with the same bytes. Nothing outside the destination is written.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bigan import atomic_files
from bigan.data import DataError
from bigan.data.format.codec import Encoding
from bigan.data.format.manifest import PLAN, PYRAMID, Manifest
from bigan.data.packing import sources
from bigan.data.packing.pack_lock import claim, keep_apart, plan_text, refuse_file, release
from bigan.data.packing.pack_manifest import collect, write_manifest
from bigan.data.packing.pack_plan import Plan, make_plan
from bigan.data.packing.pack_shard import (
    Bad,
    Encoded,
    encoded_image,
    finished,
    printable,
    record_file,
    shard,
)

MAX_JOBS = 16
HOPELESS = 1000  # unusable images more than allowed: no use in going on to the end
BAD = "bad.txt"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Packed:
    """What a call of `pack` has achieved.

    manifests: one for each level of a pyramid, smallest first; else one. Empty unless `complete`.
    bad: (name, reason) of originals that were left out: of this call's shards, if not complete.
    complete: False while other parts are still missing.
    passed_over: how many files of the source are no images by their suffix.
    """

    manifests: tuple[Manifest, ...]
    bad: tuple[Bad, ...]
    complete: bool
    passed_over: int = 0


def pack(
    spec: str | Path | Iterable[Any],
    destination: Path,
    *,
    resolution: int | None = None,
    channels: Literal[1, 3] | None = None,
    resize: Literal["lanczos", "area"] = "lanczos",
    allow_upscale: bool = False,
    val_fraction: float = 0.0,
    test_fraction: float = 0.1,
    encoding: Encoding | None = None,
    quality: int | None = None,
    seed: int = 0,
    shard_size: int | None = None,
    max_bad: int = 0,
    pyramid: int | None = None,
    part: tuple[int, int] | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Pack `spec`, anything that `sources.open_source` takes, into `destination`.

    The first six options go to `open_source`, the others to `pack_source`. Packing the same again
    finishes what is missing or does nothing. Raises `DataError`, one line, for a bad source, more
    bad images than `max_bad`, a destination that holds something else, or a full disk.
    """
    destination = Path(destination)
    if isinstance(spec, str | Path) and spec != "digits":
        keep_apart(Path(spec), destination)
    refuse_file(destination)
    scratch = atomic_files.temporary_name(destination / "spool")
    try:
        if not isinstance(spec, str | Path):  # is spooled there, as it may not be readable twice
            destination.mkdir(parents=True, exist_ok=True)
        source = sources.open_source(
            spec,
            resolution=resolution,
            channels=channels,
            resize=resize,
            allow_upscale=allow_upscale,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            scratch=scratch,
        )
        return pack_source(
            source,
            destination,
            encoding=encoding,
            quality=quality,
            seed=seed,
            shard_size=shard_size,
            max_bad=max_bad,
            pyramid=pyramid,
            part=part,
            jobs=jobs,
            progress=progress,
        )
    except OSError as error:
        where = error.filename or destination
        raise DataError(f"{where}: cannot be used: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            scratch.unlink()


def pack_source(
    source: sources.Source,
    destination: Path,
    *,
    encoding: Encoding | None = None,
    quality: int | None = None,
    seed: int = 0,
    shard_size: int | None = None,
    max_bad: int = 0,
    pyramid: int | None = None,
    part: tuple[int, int] | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Pack a `Source` of one's own into `destination`.

    `encoding`: None is npy up to 128 px and png above. `quality`: 1..100, of jpg (None: 95) and
    webp (None: lossless). `shard_size`: images per shard (None: at most 128 MiB of pixels, at
    least eight shards). `max_bad`: how many originals may be unusable and are then left out; they
    are listed in `destination`/bad.txt in any case. `pyramid`: the smallest resolution (4, say) of
    a set of folders r0004, r0008, ..., one for each doubling up to the source's, which hold the
    same samples in the same order. `part` = (i, n): write only the shards with number % n ==
    i % n; n calls with different i, in any order or at once, on one machine or many, make the data
    set. `jobs`: threads (None: one per core, at most 16).

    `progress(images done, images of this part)` is called after each image. Raises `DataError`.
    """
    destination = Path(destination)
    plan = make_plan(source, seed, shard_size, encoding=encoding, quality=quality, pyramid=pyramid)
    index, count = (0, 1) if part is None else part
    if not 0 <= index <= count or count < 1:
        raise DataError(f"part {index}/{count}: must be 0/n ... n-1/n, or 1/n ... n/n")
    if jobs is not None and jobs < 1:
        raise DataError(f"jobs {jobs}: must be positive")
    if max_bad < 0:
        raise DataError(f"max_bad {max_bad}: must not be negative")
    numbers = range(index % count, len(plan.names), count)
    try:
        manifests = claim(destination, plan)
        if manifests:
            bad = _left_out(destination, plan, manifests[0]) if manifests[0].num_bad else []
            _refuse(bad, max_bad, plan, destination)
            if progress:
                total = sum(len(plan.members[number]) for number in numbers)
                progress(total, total)
            return Packed(manifests, tuple(bad), True, source.passed_over)
        bad = _write_shards(destination, plan, numbers, max_bad, jobs or _cores(), progress)
        return _finish(destination, plan, bad, max_bad)
    except OSError as error:
        raise DataError(f"{destination}: cannot be written: {error.strerror or error}") from error


# --- shards -------------------------------------------------------------------------------------


def _write_shards(
    destination: Path,
    plan: Plan,
    numbers: Sequence[int],
    max_bad: int,
    jobs: int,
    progress: Progress | None,
) -> list[Bad]:
    """Write those of the shards that are not finished; returns what was unusable in all of them.

    While a shard is written the next one is already being decoded: memory holds two of them.
    """
    for level in plan.levels:
        folder = destination / level.folder
        (folder / "index").mkdir(parents=True, exist_ok=True)
        if not (folder / PLAN).is_file():
            atomic_files.write_atomic(folder / PLAN, plan_text(plan))
    bad, missing = _listed_bad(plan), []
    for number in numbers:
        name = plan.names[number]
        records = [finished(destination / level.folder, name, plan.id) for level in plan.levels]
        if records[0] and all(records):
            bad += records[0].bad
        else:
            missing.append(number)
    _refuse(bad, max_bad, plan, destination, HOPELESS)
    total = sum(len(plan.members[number]) for number in numbers)
    done = total - sum(len(plan.members[number]) for number in missing)
    if progress:
        progress(done, total)
    executor = ThreadPoolExecutor(jobs, thread_name_prefix="bigan-pack")
    try:
        ready = _ahead(executor, plan, missing)
        for number in missing:
            encoded = []
            for i, image in zip(plan.members[number], ready, strict=False):
                encoded.append(image)
                if isinstance(image, str):
                    bad.append((printable(plan.source.keys[i]), image))
                    _refuse(bad, max_bad, plan, destination, HOPELESS)
                done += 1
                if progress:
                    progress(done, total)
            name = plan.names[number]
            for n, level in enumerate(plan.levels):
                folder = destination / level.folder
                tar, record = shard(plan, number, n, encoded)
                if record.nsamples:
                    atomic_files.write_atomic(folder / f"{name}.tar", tar)
                atomic_files.write_atomic(
                    record_file(folder, name), record.model_dump_json() + "\n"
                )
    finally:
        executor.shutdown(cancel_futures=True)
    return bad


def _ahead(executor: ThreadPoolExecutor, plan: Plan, numbers: Sequence[int]) -> Iterator[Encoded]:
    """The images of these shards in order, encoded up to a shard ahead."""
    members = itertools.chain.from_iterable(plan.members[number] for number in numbers)
    waiting: collections.deque[Future[Encoded]] = collections.deque()
    for i in itertools.islice(members, plan.shard_size):
        waiting.append(executor.submit(encoded_image, plan, i))
    while waiting:
        image = waiting.popleft().result()
        for i in itertools.islice(members, 1):
            waiting.append(executor.submit(encoded_image, plan, i))
        yield image


def _cores() -> int:
    """The cores this process may use (SLURM gives a job only some), at most `MAX_JOBS`."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        cores = os.cpu_count() or 1
    return min(cores, MAX_JOBS)


# --- the whole set ------------------------------------------------------------------------------


def _finish(destination: Path, plan: Plan, bad: list[Bad], max_bad: int) -> Packed:
    """Write bad.txt and the manifests, if the shards of all parts are there."""
    levels = []
    for level in plan.levels:
        contents = collect(destination / level.folder, plan)
        if contents is None:
            return Packed((), tuple(bad), False, plan.source.passed_over)
        levels.append(contents)
    bad = _listed_bad(plan) + levels[0].bad
    _refuse(bad, max_bad, plan, destination)
    if all(entry.split != "train" for entry in levels[0].shards):
        raise DataError(f"{plan.source.name}: no image for training is left; repair some in {BAD}")
    _write_bad(destination, bad)
    for level in plan.levels:
        for folder in (
            destination,
            destination / level.folder,
            destination / level.folder / "index",
        ):
            atomic_files.remove_leftovers(folder, shared=True)
    manifests = tuple(
        write_manifest(destination / level.folder, plan, level, contents, len(bad))
        for level, contents in zip(plan.levels, levels, strict=True)
    )
    if plan.levels[0].folder:
        content = {
            "plan": plan.id,
            "name": plan.source.name,
            "levels": [level.folder for level in plan.levels],
            "resolutions": [level.resolution for level in plan.levels],
        }
        atomic_files.write_atomic(destination / PYRAMID, json.dumps(content, indent=1) + "\n")
    release(destination)
    return Packed(manifests, tuple(bad), True, plan.source.passed_over)


# --- unusable originals -------------------------------------------------------------------------


def _listed_bad(plan: Plan) -> list[Bad]:
    """What was unusable before any image was read."""
    return [(printable(name), printable(reason)) for name, reason in plan.source.bad]


def _left_out(destination: Path, plan: Plan, manifest: Manifest) -> list[Bad]:
    """What was left out of a finished data set, which other versions may have packed."""
    records = (finished(manifest.folder, name, manifest.plan) for name in plan.names)
    return _listed_bad(plan) + [bad for record in records if record for bad in record.bad]


def _write_bad(destination: Path, bad: list[Bad]) -> None:
    if bad:
        lines = "".join(f"{name}\t{reason}\n" for name, reason in bad)
        atomic_files.write_atomic(destination / BAD, lines)
    else:
        (destination / BAD).unlink(missing_ok=True)


def _refuse(bad: list[Bad], max_bad: int, plan: Plan, destination: Path, patience: int = 0) -> None:
    """Write bad.txt and raise, if there are more than `max_bad + patience`."""
    if len(bad) <= max_bad + patience:
        return
    _write_bad(destination, bad)
    first = "; ".join(f"{name}: {reason}" for name, reason in bad[:3])
    total = len(plan.source.keys) + len(plan.source.bad)
    raise DataError(
        f"{'at least ' if patience else ''}{len(bad)} of {total} images cannot be used (at most "
        f"--max-bad {max_bad}): {first}; all are listed in {destination / BAD}; repair or remove "
        f"them, delete {destination} and pack again, or leave them out with --max-bad {len(bad)}"
    )

"""Source -> shards: `bigan pack`.

A `Plan` is a source plus one global permutation per split, cut into shards. Every shard is a pure
function of (plan, shard number) and is written whole or not at all, so packing may be killed at
any moment: the same call keeps what is finished, writes the rest and ends with the same bytes.
The manifest is written last. Nothing outside the destination is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigan import files
from bigan.data import DataError, sources, tario
from bigan.data.decode import Encoding, encode
from bigan.data.plan import permutation
from bigan.data.shards import (
    COLUMNS,
    MANIFEST,
    PLAN,
    SCHEMA,
    Manifest,
    Shard,
    content_fingerprint,
    index_name,
)

SPLITS = ("train", "test")
NPY_RESOLUTION = 128  # up to here raw pixels; above, PNG is worth its decoding time
SHARD_BYTES = 2**27  # of raw pixels, about what one shard holds at most ...
MIN_SHARDS = 8  # ... while even a small split has several, for readers that split by shard

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What goes where: shard n holds the samples `members[n]` of the source, in that order."""

    source: sources.Source
    encoder: Encoding
    seed: int
    shard_size: int  # samples per shard; the last of a split may hold fewer
    names: tuple[str, ...]  # file name of each shard
    members: tuple[tuple[int, ...], ...]
    first_key: tuple[int, ...]  # keys count through the shards of all splits

    @property
    def description(self) -> dict[str, str | int]:
        """What plan.json holds; two packs are the same if and only if these are equal."""
        source = self.source
        listing = hashlib.sha256()
        for column in (source.classes, source.labels, source.splits):
            listing.update(repr(column).encode("utf-8", "surrogateescape") + b"\0")
        return {
            "schema_version": SCHEMA,
            "source": source.name,
            "identity": source.identity,
            "listing": listing.hexdigest(),
            "transform": source.transform,
            "resolution": source.resolution,
            "encoder": self.encoder,
            "seed": self.seed,
            "shard_size": self.shard_size,
        }

    @property
    def id(self) -> str:
        text = json.dumps(self.description, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def make_plan(source: sources.Source, seed: int = 0, shard_size: int | None = None) -> Plan:
    """Shuffle each split globally and cut it into shards of `shard_size` (None: a good size)."""
    splits = np.asarray(source.splits)
    num_train = int((splits == "train").sum())
    if shard_size is None:
        at_most = max(1, SHARD_BYTES // (source.resolution**2 * source.channels))
        shard_size = min(at_most, max(64, -(-num_train // MIN_SHARDS)))
    if shard_size <= 0:
        raise DataError(f"shard size {shard_size}: must be a positive number of images")
    if not num_train:
        raise DataError(f"{source.name}: no image falls into the training split; give more images")
    names: list[str] = []
    members: list[tuple[int, ...]] = []
    for split in SPLITS:
        found = np.flatnonzero(splits == split)
        order = found[permutation(len(found), seed, f"pack/{split}")].tolist()
        for number, start in enumerate(range(0, len(order), shard_size)):
            names.append(f"{split}-{number:06d}.tar")
            members.append(tuple(order[start : start + shard_size]))
    sizes = np.asarray([len(m) for m in members])
    return Plan(
        source=source,
        encoder="npy" if source.resolution <= NPY_RESOLUTION else "png",
        seed=seed,
        shard_size=shard_size,
        names=tuple(names),
        members=tuple(members),
        first_key=tuple((np.cumsum(sizes) - sizes).tolist()),
    )


def shard(plan: Plan, number: int, executor: ThreadPoolExecutor) -> bytes:
    """The bytes of shard `number`: a pure function of its arguments."""
    members, source = plan.members[number], plan.source
    images = executor.map(lambda i: encode(source.read(i), plan.encoder), members)
    first = plan.first_key[number]

    def samples() -> Iterator[tuple[str, bytes, int]]:
        for row, (i, image) in enumerate(zip(members, images, strict=True)):
            yield f"{first + row:09d}", image, source.labels[i]

    return tario.shard_bytes(samples(), plan.encoder)


def pack(
    spec: str,
    destination: Path,
    *,
    resolution: int | None = None,
    seed: int = 0,
    shard_size: int | None = None,
    test_fraction: float = 0.1,
    threads: int = 2,
    progress: Progress | None = None,
) -> Manifest:
    """Pack `spec` ("digits" or a folder of images) into `destination`; returns its manifest.

    `resolution` in pixels (digits: 8, 16 or 32, default 16; needed for a folder);
    `shard_size` in images (None: at most 128 MiB of pixels, at least eight shards);
    `progress(images done, images in all)` is called as shards are finished.
    Packing the same again finishes what is missing or does nothing. Raises `DataError`, one
    line, for a bad source, a bad image or a destination that holds something else.
    """
    destination = Path(destination)
    if spec == "digits":
        source = sources.digits(16 if resolution is None else resolution)
    else:
        if resolution is None:
            raise DataError(f"{spec}: give the size of the images to make, e.g. --resolution 64")
        _keep_apart(Path(spec), destination)
        try:
            source = sources.image_folder(Path(spec), resolution, test_fraction)
        except OSError as error:
            raise DataError(f"{spec}: cannot be read: {error.strerror}") from None
    return pack_source(
        source, destination, seed=seed, shard_size=shard_size, threads=threads, progress=progress
    )


def pack_source(
    source: sources.Source,
    destination: Path,
    *,
    seed: int = 0,
    shard_size: int | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> Manifest:
    """`pack` for a `Source` of one's own."""
    plan = make_plan(source, seed, shard_size)
    try:
        _claim(destination, plan)
        with contextlib.suppress(DataError):  # not finished, or a shard was deleted: go on below
            return Manifest.load(destination)
        done = 0
        contents = []
        with ThreadPoolExecutor(threads) as executor:
            for number, name in enumerate(plan.names):
                file = destination / name
                if not file.is_file():
                    files.write_atomic(file, shard(plan, number, executor))
                contents.append(_inspect(plan, number, file))
                done += len(plan.members[number])
                if progress:
                    progress(done, len(source))
        return _finish(destination, plan, contents)
    except OSError as error:
        raise DataError(f"{destination}: cannot be written: {error.strerror or error}") from None


@dataclass(frozen=True)
class _Content:
    """One finished shard as the manifest and the index need it."""

    entry: Shard
    offsets: list[int]
    sizes: list[int]
    labels: list[int]


def _inspect(plan: Plan, number: int, file: Path) -> _Content:
    """Read a finished shard back: what the index says is what is on disk."""
    data = file.read_bytes()
    try:
        offsets, sizes, labels = tario.index_shard(data, plan.encoder, str(file))
    except DataError as error:
        raise DataError(f"{error}; delete the file and pack again") from None
    if labels != [plan.source.labels[i] for i in plan.members[number]]:
        raise DataError(f"{file}: is not what this pack writes; delete it and pack again")
    histogram = np.bincount(labels, minlength=len(plan.source.classes))
    entry = Shard(
        url=file.name,
        nsamples=len(labels),
        filesize=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        split=file.name.rpartition("-")[0],
        class_histogram=tuple(histogram.tolist()),
    )
    return _Content(entry, offsets, sizes, labels)


def _finish(destination: Path, plan: Plan, contents: list[_Content]) -> Manifest:
    """Write the index files, then the manifest."""
    (destination / "index").mkdir(exist_ok=True)
    index: dict[str, str] = {}
    for split in dict.fromkeys(content.entry.split for content in contents):
        parts = [content for content in contents if content.entry.split == split]
        columns: dict[str, list[int]] = {
            "offset": [x for part in parts for x in part.offsets],
            "size": [x for part in parts for x in part.sizes],
            "label": [x for part in parts for x in part.labels],
            "shard": [n for n, part in enumerate(parts) for _ in part.labels],
        }
        for name, dtype in COLUMNS.items():
            buffer = io.BytesIO()
            np.save(buffer, np.asarray(columns[name], dtype), allow_pickle=False)
            files.write_atomic(destination / index_name(split, name), buffer.getvalue())
            index[index_name(split, name)] = hashlib.sha256(buffer.getvalue()).hexdigest()
    source = plan.source
    manifest = Manifest(
        folder=destination,
        name=source.name,
        resolution=source.resolution,
        channels=source.channels,
        classes=source.classes,
        encoder=plan.encoder,
        transform=source.transform,
        plan=plan.id,
        fingerprint="",
        index=index,
        shardlist=tuple(content.entry for content in contents),
    )
    manifest = manifest.model_copy(update={"fingerprint": content_fingerprint(manifest)})
    files.remove_leftovers(destination)
    files.remove_leftovers(destination / "index")
    files.write_atomic(destination / MANIFEST, manifest.dump())
    return Manifest.load(destination)


def _claim(destination: Path, plan: Plan) -> None:
    """Make `destination` and note the plan in it, or check that it was claimed for this plan."""
    if destination.exists() and not destination.is_dir():
        raise DataError(f"{destination}: is a file; give a new folder to pack into")
    note = destination / PLAN
    mine = plan.description
    if note.is_file():
        try:
            theirs = json.loads(note.read_text(encoding="utf-8"))
        except ValueError:
            theirs = None
        if not isinstance(theirs, dict):
            raise DataError(f"{note}: cannot be read; choose another folder or delete this one")
        changed = [key for key in mine if theirs.get(key) != mine[key]]
        if changed:
            key = changed[0]
            raise DataError(
                f"{destination}: already holds another pack ({key} is {theirs.get(key)!r} there, "
                f"{mine[key]!r} here); choose another folder or delete it"
            )
        return
    destination.mkdir(parents=True, exist_ok=True)
    stranger = next((p for p in destination.iterdir() if not p.name.startswith(f".{PLAN}")), None)
    if stranger is not None:
        raise DataError(
            f"{destination}: is not empty ({stranger.name}) and was not packed by bigan; "
            "choose an empty or new folder"
        )
    files.write_atomic(note, json.dumps(mine, indent=1) + "\n")


def _keep_apart(source: Path, destination: Path) -> None:
    """The packed folder must not become a class of its own source."""
    inner, outer = destination.resolve(), source.resolve()
    if inner == outer or outer in inner.parents:
        raise DataError(f"{destination}: lies inside the images of {source}; pack to another place")

"""Statistics of the images of a data set, for `bigan verify --deep`.

Exact duplicates (also across splits and with different labels), constant images, class balance,
mean and standard deviation, and a contact sheet. None of them is an error.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bigan.data import DataError
from bigan.data.format.codec import BadImageError, Pixels, decode_into
from bigan.data.format.manifest import Manifest, Shard
from bigan.data.format.tar import walk_tar
from bigan.data.packing.contact_sheet import COLUMNS, MIN_LINES, ROWS, Row, contact_sheet
from bigan.data.packing.pack_shard import record_name
from bigan.data.packing.shard_scan import Scan
from bigan.data.permutation import permutation
from bigan.data.places import Place, threads

FEW = 10  # images; classes with fewer are reported
NAMED = 10  # samples named in the text of a note; `Note.samples` has all
SHEET = "contact_sheet.png"

Kind = Literal[
    "leftover",
    "unlisted",
    "leak",
    "conflict",
    "duplicate",
    "constant",
    "classes",
    "pixels",
    "sheet",
]


@dataclass(frozen=True)
class Note:
    """A finding in one line, and the names of its samples."""

    kind: Kind
    what: str
    samples: tuple[str, ...] = ()


def findings(
    place: Place, manifest: Manifest, scans: Sequence[Scan], destination: Place
) -> tuple[list[Note], str | None]:
    """(notes, path or URL of the contact sheet in `destination`, None if there is none).

    `place` has the files of `manifest`. `scans` are those of its shards, made with `deep`. Samples
    have their original names if the records of the pack exist, otherwise those of shard and member.
    """
    scans = [scan for scan in scans if scan.statistics is not None]
    if not any(scan.decoded.any() for scan in scans):
        return [], None
    name = _namer(place)
    notes = _duplicates(scans, name) + _constant(scans, name)
    notes += _classes(manifest, scans) + _pixels(scans)
    sheet = contact_sheet(_title(manifest, scans), _rows(place, manifest, scans))
    data = io.BytesIO()
    sheet.save(data, "PNG", optimize=True)
    try:
        destination.write(SHEET, data.getvalue())
    except (OSError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        notes.append(Note("sheet", f"{SHEET} cannot be written: {reason}"))
        return notes, None
    return notes, destination.where(SHEET)


# --- names --------------------------------------------------------------------------------------

_Namer = Callable[[Scan, int], str]  # (scan, row) -> name of the sample


def _namer(place: Place) -> _Namer:
    known: dict[str, dict[int, str]] = {}

    def name(scan: Scan, row: int) -> str:
        shard = scan.shard
        if shard.url not in known:
            known[shard.url] = _recorded(place, shard) or _members(place, shard)
        offset = int(scan.offset[row])
        return known[shard.url].get(offset, f"{shard.url}: image at byte {offset}")

    return name


def _recorded(place: Place, shard: Shard) -> dict[int, str]:
    """Offset -> original name, from the record of `bigan pack`; {} if it is unusable."""
    try:
        record = json.loads(place.read(record_name(shard.url.removesuffix(".tar"))))
        offsets, keys = record["offsets"], record["keys"]
        if record["sha256"] != shard.sha256 or not all(isinstance(key, str) for key in keys):
            return {}
        return dict(zip(offsets, keys, strict=True))
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _members(place: Place, shard: Shard) -> dict[int, str]:
    found = {}
    try:
        with place.hashed(shard.url) as (data, _):
            for member in walk_tar(data, shard.url):
                found[member.offset] = f"{shard.url}: {member.name}"
    except (OSError, DataError):
        pass  # reported elsewhere; names of later samples are their offsets
    return found


def _listing(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _locator(scans: Sequence[Scan]) -> Callable[[int], tuple[Scan, int]]:
    """A function from sample number, counted through all scans, to (scan, row)."""
    ends = np.cumsum([len(scan.label) for scan in scans])

    def locate(sample: int) -> tuple[Scan, int]:
        number = int(np.searchsorted(ends, sample, side="right"))
        return scans[number], sample - int(ends[number]) + len(scans[number].label)

    return locate


# --- notes --------------------------------------------------------------------------------------


def equal_rows(digest: NDArray[np.uint64]) -> list[list[int]]:
    """Groups of at least two equal rows of [n, 2]; rows ascending, groups ordered by first row."""
    order = np.lexsort((digest[:, 1], digest[:, 0]))  # stable
    ordered = digest[order]
    starts = np.flatnonzero((ordered[1:] != ordered[:-1]).any(axis=1)) + 1
    edges = np.concatenate([[0], starts, [len(order)]])
    long = np.flatnonzero(np.diff(edges) > 1)
    return sorted(order[edges[i] : edges[i + 1]].tolist() for i in long)


def _duplicates(scans: Sequence[Scan], name: _Namer) -> list[Note]:
    decoded = np.flatnonzero(np.concatenate([scan.decoded for scan in scans]))
    digest = np.concatenate(
        [scan.statistics.digest[scan.decoded] for scan in scans if scan.statistics]
    )
    locate = _locator(scans)
    notes = []
    for group in equal_rows(digest):
        members = [locate(sample) for sample in decoded[group].tolist()]
        splits = list(dict.fromkeys(scan.shard.split for scan, _ in members))
        labels = {int(scan.label[row]) for scan, row in members}
        names = tuple(f"{name(scan, row)} ({scan.shard.split})" for scan, row in members)
        kind: Kind = "leak" if len(splits) > 1 else "conflict" if len(labels) > 1 else "duplicate"
        what = "same pixels"
        what += f" in {' and '.join(splits)} (leak)" if len(splits) > 1 else ""
        what += " with different labels" if len(labels) > 1 else ""
        notes.append(Note(kind, f"{what}: {_listing(names)}", names))
    rank = {"leak": 0, "conflict": 1, "duplicate": 2}
    notes.sort(key=lambda note: rank[note.kind])  # stable; most serious first
    if notes:
        images = sum(len(note.samples) for note in notes)
        leaks = sum(note.kind == "leak" for note in notes)
        what = f"{images:,} images are exact duplicates of {len(notes):,} distinct ones"
        notes.insert(0, Note("duplicate", f"{what}; {leaks:,} of these are in several splits"))
    return notes


def _constant(scans: Sequence[Scan], name: _Namer) -> list[Note]:
    names = tuple(
        f"{name(scan, row)} ({scan.shard.split})"
        for scan in scans
        if scan.statistics
        for row in np.flatnonzero(scan.statistics.constant).tolist()
    )
    if not names:
        return []
    what = f"constant images (all pixels have one colour), {len(names):,}: {_listing(names)}"
    return [Note("constant", what, names)]


def _classes(manifest: Manifest, scans: Sequence[Scan]) -> list[Note]:
    """Class balance of the training split, or of the first split without one."""
    if manifest.num_classes < 2:
        return []
    split = "train" if any(s.shard.split == "train" for s in scans) else scans[0].shard.split
    labels = np.concatenate([scan.label for scan in scans if scan.shard.split == split])
    counts = np.bincount(labels[labels >= 0], minlength=manifest.num_classes)
    if not counts.sum():
        return []
    names, present = manifest.classes, np.flatnonzero(counts)
    most, least = int(counts.argmax()), int(present[counts[present].argmin()])
    what = (
        f"classes in {split}: {counts[least]:,} ({names[least]}) to {counts[most]:,} "
        f"({names[most]}) images, imbalance {counts[most] / counts[least]:.3g}"
    )
    notes = [Note("classes", what)]
    empty = [names[i] for i in np.flatnonzero(counts == 0)]
    few = [names[i] for i in present if counts[i] < FEW]
    if empty:
        what = f"classes without an image in {split}, {len(empty):,}: {_listing(empty)}"
        notes.append(Note("classes", what))
    if few:
        what = f"classes with fewer than {FEW} images in {split}, {len(few):,}: {_listing(few)}"
        notes.append(Note("classes", what))
    return notes


def _pixels(scans: Sequence[Scan]) -> list[Note]:
    histogram = np.sum(
        [scan.statistics.histogram for scan in scans if scan.statistics], axis=0
    )  # [C, 256]
    share = histogram / histogram.sum(axis=1, keepdims=True)
    values = np.arange(256.0)
    mean = share @ values
    deviation = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    means, deviations = (" ".join(f"{x:.2f}" for x in each) for each in (mean, deviation))
    what = f"pixels (0 to 255, per channel): mean {means}, standard deviation {deviations}"
    return [Note("pixels", what)]


# --- contact sheet ------------------------------------------------------------------------------


def _title(manifest: Manifest, scans: Sequence[Scan]) -> str:
    num = sum(int(scan.decoded.sum()) for scan in scans)
    height, width, _ = manifest.image_shape
    size = f"{width} x {height}"
    return f"{manifest.name}: {num:,} images, {size}, {manifest.encoder}"


def _rows(place: Place, manifest: Manifest, scans: Sequence[Scan]) -> list[Row]:
    """At most 16 evenly spaced classes with 12 random images each, more if there are few classes.

    The choice is deterministic.
    """
    label = np.concatenate([np.where(scan.decoded, scan.label, -1) for scan in scans])
    locate = _locator(scans)
    present = np.unique(label[label >= 0])
    if not len(present):
        return []
    chosen = present[np.unique(np.linspace(0, len(present) - 1, ROWS).round().astype(int))]
    num_images = COLUMNS * max(1, MIN_LINES // len(chosen))
    members = {number: np.flatnonzero(label == number) for number in chosen.tolist()}
    picked = {}
    for number, samples in members.items():
        order = permutation(len(samples), 0, f"contact-sheet/{number}")
        picked[number] = samples[order[:num_images]].tolist()
    images = _read(place, manifest, {n: locate(n) for row in picked.values() for n in row})
    return [
        Row(manifest.classes[number], len(members[number]), [images[n] for n in row if n in images])
        for number, row in picked.items()
    ]


def _read(
    place: Place, manifest: Manifest, samples: Mapping[int, tuple[Scan, int]]
) -> dict[int, Pixels]:
    """The pixels of `samples`, number -> (scan, row); each shard is read once."""
    shards: dict[str, list[int]] = {}
    for number, (scan, _) in samples.items():
        shards.setdefault(scan.shard.url, []).append(number)

    def read(url: str) -> list[bytes]:
        found = [samples[number] for number in shards[url]]
        starts = [(int(scan.offset[row]), int(scan.size[row])) for scan, row in found]
        try:
            return place.read_ranges(url, [(start, start + size) for start, size in starts])
        except (OSError, DataError):  # it was read before: the folder is being changed
            return [b""] * len(found)

    images = {}
    with threads() as executor:
        for numbers, encoded in zip(shards.values(), executor.map(read, shards), strict=True):
            for number, data in zip(numbers, encoded, strict=True):
                pixels = np.empty(manifest.image_shape, np.uint8)
                with contextlib.suppress(BadImageError):
                    decode_into(pixels, data, manifest.encoder)
                    images[number] = pixels
    return images

"""One shard compared with the manifest and its index, including every image; for `bigan verify`.

Damage raises no exception: every error becomes a `Problem` and the scan continues. The images
behind a damaged tar header are found through the index.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigan.data import DataError
from bigan.data.format.codec import BadImageError, Pixels, decode_into
from bigan.data.format.manifest import MANIFEST, UNLABELLED, UNLABELLED_PLAN, Manifest, Shard
from bigan.data.format.tar import Buffer, Member, group_samples, walk_tar
from bigan.data.packing.tar_samples import TEXT, list_samples
from bigan.data.places import Place

MAX_PROBLEMS = 100  # reported per shard; further ones are counted
CHANGED = f"sha256 differs from the one in {MANIFEST}: the file was changed"

Columns = dict[str, NDArray[Any]]  # of the index, of consecutive samples, each [n]


@dataclass(frozen=True)
class Problem:
    """An error: its place (a file of the folder, or "file: member name") and a description."""

    where: str
    what: str


@dataclass
class PixelStatistics:
    """Statistics of the pixels of one shard; `digest` and `constant` have one row per sample."""

    digest: NDArray[np.uint64]  # [n, 2], the first half of the sha256 of the pixels
    constant: NDArray[np.bool_]  # whether all pixels have one colour
    histogram: NDArray[np.int64]  # [C, 256], pixels of each value

    @classmethod
    def empty(cls, num: int, channels: int) -> PixelStatistics:
        histogram = np.zeros((channels, 256), np.int64)
        return cls(np.zeros((num, 2), np.uint64), np.zeros(num, bool), histogram)

    def add(self, row: int, pixels: Pixels) -> None:
        """Add the uint8 [H, W, C] image of sample `row`."""
        self.digest[row] = np.frombuffer(hashlib.sha256(pixels.tobytes()).digest()[:16], np.uint64)
        flat = pixels.reshape(-1, pixels.shape[2])
        counts = np.stack([np.bincount(channel, minlength=256) for channel in flat.T])
        self.constant[row] = bool((counts.max(axis=1) == len(flat)).all())
        self.histogram += counts


@dataclass
class Scan:
    """The result for one shard: its problems, and its samples in tar order, each array [n]."""

    shard: Shard
    problems: list[Problem] = field(default_factory=list)
    offset: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    size: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    label: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # -1: unknown
    decoded: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    statistics: PixelStatistics | None = None


@dataclass(frozen=True)
class _Sample:
    name: str  # of the image's member
    offset: int  # of its bytes in the tar
    size: int
    label: int  # -1: unknown


def scan_shard(
    place: Place,
    manifest: Manifest,
    in_place: bool,
    deep: bool,
    shard: Shard,
    index: Columns | None,
) -> Scan:
    """Check `shard` of `place`; `index` holds its samples (None: the index is damaged).

    `in_place`: bigan has only indexed the shard (index_in_place.py). With `deep` the result has
    `statistics`. Memory: one encoded and decoded image and about 100 bytes per sample, since a
    local shard is memory-mapped; for a store, also the shard.
    """
    scan = Scan(shard)
    try:
        with place.hashed(shard.url, shard.sha256) as (data, sha256):
            _scan(data, sha256, manifest, in_place, deep, scan, index)
    except FileNotFoundError:
        scan.problems.append(Problem(shard.url, "shard is missing"))
    except OSError as error:
        scan.problems.append(Problem(shard.url, f"cannot be read: {error.strerror}"))
    return scan


def _scan(
    data: Buffer,
    sha256: str,
    manifest: Manifest,
    in_place: bool,
    deep: bool,
    scan: Scan,
    index: Columns | None,
) -> None:
    shard = scan.shard
    problems: list[Problem] = []
    if in_place:
        samples, intact = _indexed_samples(data, manifest, shard, index, problems)
    else:
        samples, intact = _samples(data, manifest, shard, problems)
    if intact:
        _check_number(len(samples), shard, problems)
    if index is not None:
        samples += _compare(samples, index, manifest, shard, len(data), intact, problems)
    scan.offset, scan.size, scan.label = np.array(
        [(sample.offset, sample.size, sample.label) for sample in samples], np.int64
    ).reshape(-1, 3).T  # fmt: skip
    _decode(data, manifest, samples, scan, index, deep, problems)
    scan.problems = _check_bytes(len(data), sha256, shard, problems) + problems[:MAX_PROBLEMS]
    if len(problems) > MAX_PROBLEMS:
        more = f"has {len(problems) - MAX_PROBLEMS} more problems"
        scan.problems.append(Problem(shard.url, more))


def _at(shard: Shard, member: str, what: str) -> Problem:
    return Problem(f"{shard.url}: member {member}", what)


def _check_bytes(num_bytes: int, sha256: str, shard: Shard, others: list[Problem]) -> list[Problem]:
    if num_bytes != shard.filesize:
        return [Problem(shard.url, f"has {num_bytes} bytes, expected {shard.filesize}")]
    if sha256 == shard.sha256:
        return []
    what = CHANGED
    if not others:
        what += "; every member is readable, so the changed one is unknown"
    return [Problem(shard.url, what)]


def _samples(
    data: Buffer, manifest: Manifest, shard: Shard, problems: list[Problem]
) -> tuple[list[_Sample], bool]:
    """(samples up to the first damaged header, whether there is none); appends to `problems`."""
    samples: list[_Sample] = []
    seen: set[str] = set()
    last: Member | None = None  # before the damage

    def members() -> Iterator[Member]:
        nonlocal last
        for member in walk_tar(data, shard.url):
            last = member
            yield member

    incomplete: list[tuple[str, str, bool]] = []  # (key, what is missing, whether it is the last)
    intact = True
    try:
        for key, group in group_samples(members()):
            found: dict[str, Member] = {}
            for suffix, member in group:
                if suffix not in (manifest.encoder, "cls"):
                    problems.append(_at(shard, member.name, "is neither an image nor a label"))
                elif key in seen or suffix in found:
                    problems.append(_at(shard, member.name, "appears twice"))
                else:
                    found[suffix] = member
            image, label = found.get(manifest.encoder), found.get("cls")
            if image and label:
                number = _label(data, label, manifest, shard, problems)
                samples.append(_Sample(image.name, image.offset, image.size, number))
            elif found:
                incomplete.append((key, "label" if image else "image", last in found.values()))
            seen.add(key)
    except DataError as error:
        intact = False
        what = str(error).removeprefix(f"{shard.url}: ")
        what += f", after member {last.name}" if last else ""
        problems.append(Problem(shard.url, what))
    for key, lacks, at_end in incomplete:
        if intact or not at_end:  # otherwise the damage behind it is the cause
            problems.append(Problem(shard.url, f"sample {key} lacks its {lacks}"))
    return samples, intact


def _indexed_samples(
    data: Buffer, manifest: Manifest, shard: Shard, index: Columns | None, problems: list[Problem]
) -> tuple[list[_Sample], bool]:
    """`_samples` for a shard that was indexed in place, read in the same way as then.

    Labels from folders, or from the names of all shards, are taken from the index.
    """
    try:
        listed, bad = list_samples(data, shard.url, manifest.plan != UNLABELLED_PLAN)
    except DataError as error:
        problems.append(Problem(shard.url, str(error).removeprefix(f"{shard.url}: ")))
        return [], False
    intact = not (bad and bad[-1][0] == shard.url)
    for name, what in bad:
        key = name.removeprefix(shard.url).removeprefix("/")
        problems.append(_at(shard, key, what) if key else Problem(shard.url, what))
    classes = {name: number for number, name in enumerate(manifest.classes)}
    known: dict[int, int] = {}
    if index is not None:
        known = dict(zip(index["offset"].tolist(), index["label"].tolist(), strict=True))
    written = any(sample.label is not None and sample.place != TEXT for sample in listed)
    samples = []
    for sample in listed:
        name = f"{sample.key}.{sample.suffix}"
        label = 0
        if written and manifest.classes != UNLABELLED:
            label = classes.get(str(sample.label), -1)
            if sample.label is not None and label < 0:
                what = f"has label {sample.label}, but there are {manifest.num_classes} classes"
                problems.append(_at(shard, name, what))
            elif label < 0 and (intact or sample is not listed[-1]):
                problems.append(_at(shard, name, "has no label"))  # not cut off by the damage
        elif manifest.classes != UNLABELLED:
            label = known.get(sample.offset, -1)
        samples.append(_Sample(name, sample.offset, sample.size, label))
    return samples, intact


def _label(
    data: Buffer, member: Member, manifest: Manifest, shard: Shard, problems: list[Problem]
) -> int:
    text = bytes(data[member.offset : member.offset + member.size])
    try:
        number = int(text)
    except ValueError:
        what = f"holds {text[:20]!r}, which is not an integer"
    else:
        if 0 <= number < manifest.num_classes:
            return number
        what = f"holds label {number}, but there are {manifest.num_classes} classes"
    problems.append(_at(shard, member.name, what))
    return -1


def _check_number(found: int, shard: Shard, problems: list[Problem]) -> None:
    if found != shard.nsamples:
        what = f"holds {found} samples, but {MANIFEST} lists {shard.nsamples}"
        problems.append(Problem(shard.url, what))


def _compare(
    samples: list[_Sample],
    index: Columns,
    manifest: Manifest,
    shard: Shard,
    num_bytes: int,
    intact: bool,
    problems: list[Problem],
) -> list[_Sample]:
    """Report differences between tar and index; returns the samples behind a damaged header."""
    offsets, sizes, labels = (index[name].tolist() for name in ("offset", "size", "label"))
    listed = dict(zip(offsets, zip(sizes, labels, strict=True), strict=True))
    if sorted(listed) != offsets:
        problems.append(Problem(shard.url, "has offsets in the index that are not in order"))
    for sample in samples:
        if sample.offset not in listed:
            problems.append(_at(shard, sample.name, "is not in the index"))
            continue
        size, label = listed.pop(sample.offset)
        if size != sample.size:
            what = f"has {sample.size} bytes, but {size} in the index"
            problems.append(_at(shard, sample.name, what))
        if label != sample.label >= 0:
            what = f"has label {sample.label}, but {label} in the index"
            problems.append(_at(shard, sample.name, what))
    end = samples[-1].offset if samples else 0
    rest, lost = [], 0
    for offset, (size, label) in listed.items():
        if intact or offset < end:
            what = f"has no image at byte {offset}, where the index lists one"
            problems.append(Problem(shard.url, what))
        elif offset + size > num_bytes:
            lost += 1
        else:
            known = label if 0 <= label < manifest.num_classes else -1
            rest.append(_Sample(f"at byte {offset}", offset, size, known))
    if lost:
        what = f"{lost} of its {shard.nsamples} images are truncated"
        problems.append(Problem(shard.url, what))
    return rest


def _decode(
    data: Buffer,
    manifest: Manifest,
    samples: list[_Sample],
    scan: Scan,
    index: Columns | None,
    deep: bool,
    problems: list[Problem],
) -> None:
    """Decode every image and compare its crc32; fills `scan.decoded` and, if `deep`, `statistics`.

    An image of another place or size than in the index is reported by `_compare`.
    """
    crcs: dict[tuple[int, int], int] = {}
    if index is not None:
        columns = (index[name].tolist() for name in ("offset", "size", "crc32"))
        crcs = {(offset, size): crc for offset, size, crc in zip(*columns, strict=True)}
    pixels = np.empty(manifest.image_shape, np.uint8)
    scan.decoded = np.zeros(len(samples), bool)
    scan.statistics = PixelStatistics.empty(len(samples), manifest.channels) if deep else None
    for row, sample in enumerate(samples):
        image = bytes(data[sample.offset : sample.offset + sample.size])
        try:
            decode_into(pixels, image, manifest.encoder)
        except BadImageError as error:
            problems.append(_at(scan.shard, sample.name, str(error)))
            continue
        crc = zlib.crc32(image)
        if crcs.get((sample.offset, sample.size), crc) != crc:
            problems.append(_at(scan.shard, sample.name, "its crc32 differs from the index"))
        scan.decoded[row] = True
        if scan.statistics:
            scan.statistics.add(row, pixels)

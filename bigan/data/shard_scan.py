"""One shard against its manifest and index, down to every image; part of `bigan verify`.

Nothing is raised for damage: each thing that is wrong becomes a `Problem`, and the search goes on.
A damaged tar header does not hide what follows it: the index leads to the remaining images.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigan.data import DataError
from bigan.data.decode import BadImageError, Pixels, decode_into
from bigan.data.shards import MANIFEST, Manifest, Shard
from bigan.data.tario import Member, walk_tar

MAX_PROBLEMS = 100  # kept of one shard; the others are counted

Columns = dict[str, NDArray[Any]]  # offset, size and label of consecutive samples, each [n]


@dataclass(frozen=True)
class Problem:
    """Where (a file of the folder, or "file: member name") and what is wrong there."""

    where: str
    what: str


@dataclass
class Look:
    """What the pixels of one shard are like; `digest` and `constant` are per sample, [n, ...]."""

    digest: NDArray[np.uint64]  # [n, 2], the first half of the sha256 of the pixels
    constant: NDArray[np.bool_]  # all pixels have one colour
    histogram: NDArray[np.int64]  # [C, 256], pixels of each value

    @classmethod
    def empty(cls, num: int, channels: int) -> Look:
        histogram = np.zeros((channels, 256), np.int64)
        return cls(np.zeros((num, 2), np.uint64), np.zeros(num, bool), histogram)

    def add(self, row: int, pixels: Pixels) -> None:
        """Note the uint8 [H, W, C] image of sample `row`."""
        self.digest[row] = np.frombuffer(hashlib.sha256(pixels.tobytes()).digest()[:16], np.uint64)
        flat = pixels.reshape(-1, pixels.shape[2])
        counts = np.stack([np.bincount(channel, minlength=256) for channel in flat.T])
        self.constant[row] = bool((counts.max(axis=1) == len(flat)).all())
        self.histogram += counts


@dataclass
class Scan:
    """What was found in one shard: its samples in tar order, each array [n]."""

    shard: Shard
    problems: list[Problem] = field(default_factory=list)
    offset: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    size: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    label: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # -1: none
    decoded: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    look: Look | None = None


@dataclass(frozen=True)
class _Sample:
    name: str  # of the image's member
    offset: int  # of its bytes in the tar
    size: int
    label: int  # -1: cannot be told


def scan_shard(manifest: Manifest, deep: bool, shard: Shard, index: Columns | None) -> Scan:
    """Check `shard` of `manifest.folder`; `index` holds its samples, None if that is damaged.

    With `deep` the result has a `look`. Needs the memory of the shard and of one image.
    """
    scan = Scan(shard)
    file = manifest.folder / shard.url
    if not file.is_file():
        scan.problems.append(Problem(shard.url, "shard is missing"))
        return scan
    try:
        data = file.read_bytes()
    except OSError as error:
        scan.problems.append(Problem(shard.url, f"cannot be read: {error.strerror}"))
        return scan
    problems: list[Problem] = []
    samples, whole = _samples(data, manifest, shard, problems)
    if index is not None:
        samples += _compare(samples, index, shard, len(data), whole, problems)
    scan.offset, scan.size, scan.label = np.array(
        [(sample.offset, sample.size, sample.label) for sample in samples], np.int64
    ).reshape(-1, 3).T  # fmt: skip
    _decode(data, manifest, samples, scan, deep, problems)
    scan.problems = _check_bytes(data, shard, problems) + problems[:MAX_PROBLEMS]
    if len(problems) > MAX_PROBLEMS:
        more = f"has {len(problems) - MAX_PROBLEMS} more problems"
        scan.problems.append(Problem(shard.url, more))
    return scan


def _at(shard: Shard, member: str, what: str) -> Problem:
    return Problem(f"{shard.url}: member {member}", what)


def _check_bytes(data: bytes, shard: Shard, others: list[Problem]) -> list[Problem]:
    if len(data) != shard.filesize:
        return [Problem(shard.url, f"has {len(data)} bytes, expected {shard.filesize}")]
    if hashlib.sha256(data).hexdigest() == shard.sha256:
        return []
    what = f"sha256 differs from the one in {MANIFEST}: its content was changed"
    if not others:
        what += "; every member can be read, so it cannot be told which one is wrong"
    return [Problem(shard.url, what)]


def _samples(
    data: bytes, manifest: Manifest, shard: Shard, problems: list[Problem]
) -> tuple[list[_Sample], bool]:
    """(samples up to the first damaged header, whether there is none); notes problems."""
    groups: dict[str, dict[str, Member]] = {}
    last: Member | None = None
    whole = True
    try:
        for member in walk_tar(data, shard.url):
            last = member
            key, _, suffix = member.name.partition(".")
            if suffix not in (manifest.encoder, "cls"):
                problems.append(_at(shard, member.name, "is neither an image nor a label"))
            elif suffix in groups.setdefault(key, {}):
                problems.append(_at(shard, member.name, "appears twice"))
            else:
                groups[key][suffix] = member
    except DataError as error:
        whole = False
        what = str(error).removeprefix(f"{shard.url}: ")
        what += f", after member {last.name}" if last else ""
        problems.append(Problem(shard.url, what))
    samples = []
    for key, group in groups.items():
        image, label = group.get(manifest.encoder), group.get("cls")
        if image and label:
            number = _label(data, label, manifest, shard, problems)
            samples.append(_Sample(image.name, image.offset, image.size, number))
        elif whole or last not in group.values():  # else the damage behind `last` explains it
            lacks = "label" if image else "image"
            problems.append(Problem(shard.url, f"sample {key} lacks its {lacks}"))
    if whole:
        _check_counts([sample.label for sample in samples], shard, problems)
    return samples, whole


def _label(
    data: bytes, member: Member, manifest: Manifest, shard: Shard, problems: list[Problem]
) -> int:
    text = data[member.offset : member.offset + member.size]
    try:
        number = int(text)
    except ValueError:
        what = f"holds {text[:20]!r}, which is not a whole number"
    else:
        if 0 <= number < manifest.num_classes:
            return number
        what = f"holds label {number}, but there are {manifest.num_classes} classes"
    problems.append(_at(shard, member.name, what))
    return -1


def _check_counts(labels: list[int], shard: Shard, problems: list[Problem]) -> None:
    if len(labels) != shard.nsamples:
        what = f"holds {len(labels)} samples, but {MANIFEST} says {shard.nsamples}"
        problems.append(Problem(shard.url, what))
        return
    if -1 in labels:  # reported already
        return
    counts = np.bincount(labels, minlength=len(shard.class_histogram)).tolist()
    for label, (found, listed) in enumerate(zip(counts, shard.class_histogram, strict=False)):
        if found != listed:
            what = f"holds {found} samples of class {label}, but {MANIFEST} says {listed}"
            problems.append(Problem(shard.url, what))


def _compare(
    samples: list[_Sample],
    index: Columns,
    shard: Shard,
    num_bytes: int,
    whole: bool,
    problems: list[Problem],
) -> list[_Sample]:
    """Notes where tar and index disagree; the samples behind a damaged header by the index."""
    offsets, sizes, labels = (index[name].tolist() for name in ("offset", "size", "label"))
    listed = dict(zip(offsets, zip(sizes, labels, strict=True), strict=True))
    if sorted(listed) != offsets:
        problems.append(Problem(shard.url, "its positions in the index are not in order"))
    for sample in samples:
        if sample.offset not in listed:
            problems.append(_at(shard, sample.name, "is not in the index"))
            continue
        size, label = listed.pop(sample.offset)
        if size != sample.size:
            what = f"has {sample.size} bytes, but the index says {size}"
            problems.append(_at(shard, sample.name, what))
        if label != sample.label >= 0:
            what = f"has label {sample.label}, but the index says {label}"
            problems.append(_at(shard, sample.name, what))
    end = samples[-1].offset if samples else 0
    rest, lost = [], 0
    for offset, (size, label) in listed.items():
        if whole or offset < end:
            what = f"the index lists an image at byte {offset}, where it has none"
            problems.append(Problem(shard.url, what))
        elif offset + size > num_bytes:
            lost += 1
        else:
            known = label if 0 <= label < len(shard.class_histogram) else -1
            rest.append(_Sample(f"at byte {offset}", offset, size, known))
    if lost:
        what = f"{lost} of its {shard.nsamples} images are cut off"
        problems.append(Problem(shard.url, what))
    return rest


def _decode(
    data: bytes,
    manifest: Manifest,
    samples: list[_Sample],
    scan: Scan,
    deep: bool,
    problems: list[Problem],
) -> None:
    """Decode every image; fills `scan.decoded` and, if `deep`, `scan.look`."""
    pixels = np.empty((manifest.resolution, manifest.resolution, manifest.channels), np.uint8)
    scan.decoded = np.zeros(len(samples), bool)
    scan.look = Look.empty(len(samples), manifest.channels) if deep else None
    for row, sample in enumerate(samples):
        image = data[sample.offset : sample.offset + sample.size]
        try:
            decode_into(pixels, image, manifest.encoder)
        except BadImageError as error:
            problems.append(_at(scan.shard, sample.name, str(error)))
            continue
        scan.decoded[row] = True
        if scan.look:
            scan.look.add(row, pixels)

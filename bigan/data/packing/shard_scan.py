"""Index and shards against their manifest, down to every image; part of `bigan verify`.

Nothing is raised for damage: each thing that is wrong becomes a `Problem`, and the search goes on.
A damaged tar header does not hide what follows it: the index leads to the remaining images.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigan.data import DataError
from bigan.data.format.codec import BadImageError, Pixels, decode_into
from bigan.data.format.manifest import COLUMNS, MANIFEST, PLAN, Manifest, Shard, index_name
from bigan.data.format.tar import Buffer, Member, walk_tar
from bigan.data.packing.webdatasets import list_samples

MAX_PROBLEMS = 100  # kept of one shard; the others are counted
CHANGED = f"sha256 differs from the one in {MANIFEST}: its content was changed"

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


def is_adopted(manifest: Manifest) -> bool:
    """Whether the shards are somebody else's, which bigan only indexed (adopt.py).

    Either of two marks is enough, so that a damaged manifest does not hide it.
    """
    packed = (manifest.folder / PLAN).is_file()
    return manifest.plan == "adopted" or (manifest.transform == "as-found-v1" and not packed)


@contextlib.contextmanager
def mapped(file: Path) -> Iterator[Buffer]:
    """The bytes of `file`, mapped, not copied into memory; raises `OSError`.

    Reading behind the end of a file that another process cuts off meanwhile ends this process.
    """
    with file.open("rb") as stream:
        if not os.fstat(stream.fileno()).st_size:  # nothing to map
            yield b""
            return
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def scan_shard(manifest: Manifest, deep: bool, shard: Shard, index: Columns | None) -> Scan:
    """Check `shard` of `manifest.folder`; `index` holds its samples, None if that is damaged.

    With `deep` the result has a `look`. The shard is mapped: its own memory is that of one image,
    encoded and decoded, and some 100 bytes for each sample, whatever the size of the shard.
    """
    scan = Scan(shard)
    file = manifest.folder / shard.url
    if not file.is_file():
        scan.problems.append(Problem(shard.url, "shard is missing"))
        return scan
    try:
        # Read once before it is mapped: a disk that fails gives an error here, but a signal there.
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        with mapped(file) as data:
            _scan(data, sha256, manifest, deep, scan, index)
    except OSError as error:
        scan.problems.append(Problem(shard.url, f"cannot be read: {error.strerror}"))
    return scan


def _scan(
    data: Buffer, sha256: str, manifest: Manifest, deep: bool, scan: Scan, index: Columns | None
) -> None:
    shard = scan.shard
    problems: list[Problem] = []
    listing = _adopted_samples if is_adopted(manifest) else _samples
    samples, whole = listing(data, manifest, shard, problems)
    if whole:
        _check_counts([sample.label for sample in samples], shard, problems)
    if index is not None:
        samples += _compare(samples, index, shard, len(data), whole, problems)
    scan.offset, scan.size, scan.label = np.array(
        [(sample.offset, sample.size, sample.label) for sample in samples], np.int64
    ).reshape(-1, 3).T  # fmt: skip
    _decode(data, manifest, samples, scan, deep, problems)
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
        what += "; every member can be read, so it cannot be told which one is wrong"
    return [Problem(shard.url, what)]


def _samples(
    data: Buffer, manifest: Manifest, shard: Shard, problems: list[Problem]
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
    return samples, whole


def _adopted_samples(
    data: Buffer, manifest: Manifest, shard: Shard, problems: list[Problem]
) -> tuple[list[_Sample], bool]:
    """The same for a shard of somebody else, read as when it was indexed."""
    listed, bad = list_samples(data, shard.url)
    whole = not (bad and bad[-1][0] == shard.url)
    for name, what in bad:
        key = name.removeprefix(shard.url).removeprefix("/")
        problems.append(_at(shard, key, what) if key else Problem(shard.url, what))
    samples = []
    for sample in listed:
        name = f"{sample.key}.{sample.suffix}"
        label = 0 if manifest.num_classes == 1 and sample.label is None else sample.label
        if label is None:
            label = -1
            if whole or sample is not listed[-1]:  # else the damage behind it explains it
                problems.append(_at(shard, name, "has no label"))
        elif label >= manifest.num_classes:
            what = f"has label {label}, but there are {manifest.num_classes} classes"
            problems.append(_at(shard, name, what))
            label = -1
        samples.append(_Sample(name, sample.offset, sample.size, label))
    return samples, whole


def _label(
    data: Buffer, member: Member, manifest: Manifest, shard: Shard, problems: list[Problem]
) -> int:
    text = bytes(data[member.offset : member.offset + member.size])
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
    data: Buffer,
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
        image = bytes(data[sample.offset : sample.offset + sample.size])
        try:
            decode_into(pixels, image, manifest.encoder)
        except BadImageError as error:
            problems.append(_at(scan.shard, sample.name, str(error)))
            continue
        scan.decoded[row] = True
        if scan.look:
            scan.look.add(row, pixels)


# --- the index folder ---------------------------------------------------------------------------


def read_index(
    manifest: Manifest, shards: tuple[Shard, ...]
) -> tuple[dict[str, Columns], list[Problem]]:
    """The index of each of `shards` by its file name (none where damaged), and what is wrong."""
    found: dict[str, Columns] = {}
    problems: list[Problem] = []
    for split in dict.fromkeys(shard.split for shard in shards):
        members = [shard for shard in shards if shard.split == split]
        ends = np.cumsum([shard.nsamples for shard in members]).tolist()
        columns: Columns = {}
        for column, dtype in COLUMNS.items():
            name = index_name(split, column)
            try:
                data = (manifest.folder / name).read_bytes()
                values = np.load(io.BytesIO(data), allow_pickle=False)
            except FileNotFoundError:
                problems.append(Problem(name, "index file is missing"))
                continue
            except Exception as error:  # NumPy raises many kinds; all mean the same here
                problems.append(Problem(name, f"cannot be read: {error}"))
                continue
            if hashlib.sha256(data).hexdigest() != manifest.index.get(name):
                problems.append(Problem(name, CHANGED))
            if values.dtype != dtype or values.shape != (ends[-1],):
                what = f"holds {values.dtype} {list(values.shape)}, expected "
                problems.append(Problem(name, f"{what}{np.dtype(dtype)} [{ends[-1]}]"))
                continue
            columns[column] = values
        if "shard" in columns:
            expected = np.repeat(np.arange(len(members)), [s.nsamples for s in members])
            if not np.array_equal(columns.pop("shard"), expected):
                what = f"assigns samples to other shards than {MANIFEST}"
                problems.append(Problem(index_name(split, "shard"), what))
        if {"offset", "size", "label"} <= columns.keys():
            for shard, end in zip(members, ends, strict=True):
                rows = slice(end - shard.nsamples, end)
                found[shard.url] = {name: values[rows] for name, values in columns.items()}
    return found, problems


def check_hashes(folder: Path, records: dict[str, str]) -> list[Problem]:
    """The files of `folder` against `records`, name -> sha256."""
    problems = []
    for name, expected in sorted(records.items()):
        file = folder / name
        if name != PLAN and name != f"index/{file.name}":
            problems.append(Problem(MANIFEST, f"lists {name!r}, which leads out of the folder"))
            continue
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            problems.append(Problem(name, "is missing"))
            continue
        except OSError as error:
            problems.append(Problem(name, f"cannot be read: {error.strerror}"))
            continue
        if hashlib.sha256(data).hexdigest() != expected:
            problems.append(Problem(name, CHANGED))
    return problems


def check_records(manifest: Manifest) -> list[Problem]:
    """plan.json and the notes of each shard against their hashes, and what else is in index/.

    Sets that were only indexed, and packs of early versions, list no hashes of notes: there none is
    missing. In the folder of somebody else other files are none of our business.
    """
    problems = check_hashes(manifest.folder, manifest.records)
    known = manifest.index.keys() | manifest.records.keys()
    for file in sorted((manifest.folder / "index").glob("*")):
        name = f"index/{file.name}"
        noted = not manifest.records and file.suffix == ".json"
        if not (name in known or noted or file.name.startswith(".") or is_adopted(manifest)):
            problems.append(Problem(name, f"is not listed in {MANIFEST}: remove it"))
    return problems

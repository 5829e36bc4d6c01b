"""The images of a source as they are listed (`Listing`) and as they are packed (`Source`).

    split_of       the split of an image: a function of its key alone
    number_labels  labels as written by users -> class names and class numbers

The modules for single kinds of sources (folders, archives, webdatasets, iterables) return a
`Listing`; `sources.open_source` turns it into a `Source`.
"""

from __future__ import annotations

import hashlib
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigan.data.format.codec import BadImageError, Pixels, first_line
from bigan.image_size import ImageSize

Bad = tuple[tuple[str, str], ...]  # (name, reason) of unusable originals
Skipped = tuple[tuple[str, int], ...]  # (suffix, number) of files that are not images

MAX_CLASSES = 2**20  # a larger label is a mistake (a timestamp, an id)
MAX_BYTES = 2**30  # of an original; larger files are refused

_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.[0-9]{1,18})?")


@dataclass(frozen=True)
class Source:
    """A list of images: image i has keys[i], labels[i], splits[i] and pixels read(i).

    `read(i)` returns uint8 [height, width, channels], may be called from several threads
    and raises `BadImageError`, without the name, for an unusable image. `transform` names the
    conversion from the original to these pixels: reference statistics are comparable only for the
    same one. `identity` is a hash of what is known of the originals without decoding them: a
    different identity is a different data set. `keys` are the unique names of the originals;
    `splits` are "train", "val" or "test"; `bad` holds (name, reason) of originals that were found
    unusable while listing and are not among the images. `stamp` is a hash of the modification times
    of the originals' files ("": unknown, or `identity` covers their content), `skipped` the numbers
    of files that are not images, as (suffix, number). `read_with_changes(i)` also returns
    `convert.changes` of the image (None: they are unknown).
    """

    name: str
    transform: str
    identity: str
    resolution: ImageSize
    channels: int
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    splits: tuple[str, ...]
    read: Callable[[int], Pixels]
    bad: Bad = ()
    stamp: str = ""
    skipped: Skipped = ()
    read_with_changes: Callable[[int], tuple[Pixels, tuple[str, ...]]] | None = field(
        default=None, repr=False
    )

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[tuple[str, int, Pixels]]:
        """(key, label, image uint8 HWC) of every image in order."""
        for i in range(len(self)):
            yield self.keys[i], self.labels[i], self.read(i)


@dataclass(frozen=True)
class Listing:
    """Listed originals: number i has keys[i], labels[i] and content original(i).

    `original(i)` returns a file's bytes or an array (uint8 HW or HWC), is thread-safe and raises
    `BadImageError` or `OSError`. `official` holds the split of each image if the source defines
    splits; with `has_all_splits` no further split is taken from "train". `resolution` is the
    default one (None: the user must set it), `transform` the conversion that the originals have
    already had ("": none). `of_files`: the originals are image files in folders or archives.
    """

    name: str
    identity: str
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    original: Callable[[int], bytes | Pixels]
    official: tuple[str, ...] | None = None
    bad: Bad = ()
    resolution: ImageSize | None = None
    channels: int = 3
    transform: str = ""
    has_all_splits: bool = False
    stamp: str = ""
    skipped: Skipped = ()
    of_files: bool = False


def unit_hash(key: str) -> float:
    """A number in [0, 1) from the hash of `key`, whose non-UTF-8 bytes are surrogate escapes."""
    encoded = key.encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(encoded, digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def split_of(key: str, val_fraction: float, test_fraction: float) -> str:
    """The split of an image: a function of its key, independent of seed and resolution.

    "test" if its hash is below `test_fraction`, "val" if it is within the next `val_fraction`.
    """
    place = unit_hash(key)
    if place < test_fraction:
        return "test"
    return "val" if place < test_fraction + val_fraction else "train"


def assign_splits(
    keys: Sequence[str],
    official: Sequence[str] | None,
    val_fraction: float,
    test_fraction: float,
) -> tuple[str, ...]:
    """The split of every image by `split_of`; official splits are kept.

    With an official "test" or "val" no test split is taken from "train", and a "val" split only if
    there is no official one.
    """
    if official is None or set(official) <= {"train"}:
        return tuple(split_of(key, val_fraction, test_fraction) for key in keys)
    cut = 0.0 if "val" in official else val_fraction
    return tuple(
        split_of(key, cut, 0.0) if split == "train" else split
        for key, split in zip(keys, official, strict=True)
    )


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """The distinct names: numbers by value ("2" before "10"), then the other names."""

    def order(name: str) -> tuple[int, float, str]:
        return (0, float(name), name) if _NUMBER.fullmatch(name) else (1, 0.0, name)

    return tuple(sorted(set(names), key=order))


def number_labels(
    labels: Sequence[Any], names: Sequence[str] = ()
) -> tuple[tuple[str, ...], list[int | str]]:
    """(class names, for every label its class number or, as text, the reason it is unusable).

    Labels are class names (numbered in the order of `class_order`) or integers, also as text.
    Integers 0, ..., K-1 are class numbers: the class names are "0" to "K-1", or `names` if it has
    that many, and unused numbers remain classes. Integers without a 0 are the names of classes, so
    that 1, ..., K are K classes. None means unlabelled; if all labels are None, all images are of
    the class "all".
    """
    if all(label is None for label in labels):
        return ("all",), [0] * len(labels)
    values = [_label(label) for label in labels]
    texts = [value[0] for value in values if isinstance(value, tuple)]
    if not all(_WHOLE_NUMBER.fullmatch(text) for text in texts):
        classes = class_order(texts)
        number = {name: n for n, name in enumerate(classes)}
        return classes, [v if isinstance(v, str) else number[v[0]] for v in values]
    numbers = [value if isinstance(value, str) else _class_number(value[0]) for value in values]
    present = sorted({n for n in numbers if isinstance(n, int)})
    largest = present[-1] if present else -1
    if len(names) > largest:
        return tuple(names), numbers
    if 0 in present or has_too_many_classes(largest + 1, len(labels)):
        return tuple(str(n) for n in range(largest + 1)), numbers
    place = {n: position for position, n in enumerate(present)}
    return tuple(map(str, present)), [place[n] if isinstance(n, int) else n for n in numbers]


def _label(label: Any) -> tuple[str] | str:
    """(the label as text,), or the reason it is unusable."""
    if label is None or label == "":
        return "has no label"
    if isinstance(label, str):
        return (label,)
    try:  # int, NumPy integer, tensor without dimensions
        if isinstance(label, bool):
            raise TypeError
        return (str(operator.index(label)),)
    except TypeError:
        return f"label {first_line(repr(label)):.40} is neither an integer nor a class name"


def _class_number(text: str) -> int | str:
    number = int(text)
    if number < 0:
        return f"label {number} is negative"
    return number if number < MAX_CLASSES else f"label {number} is too large for a class number"


def listing_hash(entries: Iterable[tuple[str | int, ...]], *more: bytes) -> str:
    """The identity of a listing: sha256 of its (key, size, ...) entries and of `more` content."""
    total = hashlib.sha256()
    for entry in entries:
        for value in entry:
            total.update(str(value).encode("utf-8", "surrogateescape") + b"\0")
    for content in more:
        total.update(b"\n%d\n" % len(content) + content)
    return total.hexdigest()


def has_too_many_classes(num_classes: int, num_images: int) -> bool:
    """Whether the largest class number is implausible (an id, a year): most classes are empty."""
    return num_classes > 1000 + 10 * num_images


def is_hidden(part: str) -> bool:
    """Whether a component of a path starts with a single dot."""
    return part.startswith(".") and not part.startswith("..")


def unsafe(name: str) -> bool:
    """Whether a path from an archive or label file can point outside of its root folder."""
    parts = re.split(r"[/\\]", name)
    return parts[0] == "" or ".." in parts or bool(re.match(r"[A-Za-z]:", parts[0])) or "\0" in name


def read_at(file: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file; thread-safe. Raises `BadImageError` if the file is shorter."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        data = os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
    if len(data) != size:
        raise BadImageError("is truncated")
    return data

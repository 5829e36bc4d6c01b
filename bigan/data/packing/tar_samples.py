"""The samples of one WebDataset tar: the image, and the label as it is written.

Consecutive members with one key are a sample: `<key>.jpg`, `<key>.cls`, `<key>.json`. The label is
a class number or name in `.cls` or another suffix of `LABELS`, under one of `_JSON_KEYS` in
`.json`, or in `.txt`, which may as well be a caption: `shard_labels.py` decides that for all
shards together.
"""

from __future__ import annotations

import json
import mmap
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bigan.data import DataError
from bigan.data.format import compression
from bigan.data.format.codec import first_line
from bigan.data.format.convert import SUFFIXES
from bigan.data.format.tar import Member, UnsupportedMemberError, group_samples, walk_tar
from bigan.data.packing.listing import MAX_BYTES, MAX_CLASSES, unsafe
from bigan.data.packing.split_names import Split, split_of

IMAGES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
_NAMES = ("cls", "label", "class", "target", "category", "labels", "classes", "targets", "y")
LABELS = (*_NAMES, *(f"{name}.json" for name in _NAMES))  # suffixes of texts
_JSON_KEYS = (
    "label", "cls", "class", "target", "category", "class_id", "class_name", "label_id",
    "labels", "classes", "targets", "categories",
)  # fmt: skip
SPLITS = ("split", "subset")  # keys in .json
JSON_KEYS = (*_JSON_KEYS, *SPLITS)  # keys in .json that are read
TEXT = ".txt"  # the place of a label that may be a caption
NO_IMAGE = "has no image"
WITHOUT_LABELS = "data.labels=none, or `bigan pack --labels none`, uses the images without labels"
SORT = (
    "extract them and write them again with `tar --sort=name`, which puts the members of a sample "
    "one after the other"
)

_Buffer = bytes | memoryview | mmap.mmap
ARRAYS = {"npy", "npz", "pyd", "pickle", "pkl", "pth", "pt"}
_ARRAY_LABELS = {*LABELS, "labels", "targets", "onehot", "one_hot", "y"}  # before such a suffix
_VECTOR = re.compile(r"\[.*\]|[(]?[-+.\d]+(?:[\s,;]+[-+.\d]+)+[)]?", re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d{1,18}(?:\.\d*)?|[-+]?\.\d+")
_MAX_NAME = 200  # characters


@dataclass(frozen=True)
class Sample:
    """One image of a tar: key, suffix, offset and size in bytes, and its label as it is written.

    label: class number or class name, None without one. place: where the label is, such as ".cls"
    or ".json label", "" without one; for a `.txt` that is no class name, label is None. other: if
    the label is a number, a class name at another place, and the other way round. split: the one
    that the .json declares. ignored: suffixes that are neither images nor read.
    """

    key: str
    suffix: str
    offset: int
    size: int
    label: int | str | None
    place: str = ""
    other: int | str | None = None
    split: Split | None = None
    ignored: tuple[str, ...] = ()


class UnsuitableError(DataError):
    """Intact tars that are no WebDataset of images with one class each."""


def list_samples(
    data: _Buffer, where: str, with_labels: bool = True
) -> tuple[list[Sample], list[tuple[str, str]]]:
    """The samples of a WebDataset tar in order, and (name, reason) of its unusable members.

    The image of a sample (`tar.group_samples`) is its first member with a suffix in `IMAGES`, an
    array only if there is no other. Without `with_labels`, labels may be apart from it. For a
    damaged tar the samples before the damage are returned and (where, reason) is the last entry of
    the second list.

    Raises `UnsuitableError` for a compressed tar, members that are no regular files, samples whose
    members are not adjacent, and labels of several values.
    """
    samples: list[Sample] = []
    bad: list[tuple[str, str]] = []
    seen: dict[str, tuple[str, ...]] = {}  # the suffixes of each key

    def safe_members() -> Iterator[Member]:
        for member in walk_tar(data, where):
            if unsafe(member.name):
                bad.append((f"{where}/{member.name}", "points outside of the tar"))
            else:
                yield member

    check_compression(bytes(data[:6]), where)
    try:
        for key, group in group_samples(safe_members()):
            suffixes = tuple(suffix for suffix, _ in group)
            if not with_labels and only_labels(suffixes):
                continue
            if key not in seen:
                found = _sample(data, key, group, where, with_labels)
                if isinstance(found, str):
                    bad.append((f"{where}/{key}", found))
                else:
                    samples.append(found)
            elif set(suffixes).isdisjoint(seen[key]):
                raise not_adjacent(where, key, seen[key][0], suffixes[0])
            else:
                bad.append((f"{where}/{key}", "appears twice"))
            seen[key] = (*seen.get(key, ()), *suffixes)
    except UnsuitableError:
        raise
    except UnsupportedMemberError as error:
        raise UnsuitableError(str(error)) from None
    except DataError as error:
        bad.append((where, str(error).removeprefix(f"{where}: ")))
    return samples, bad


def check_compression(start: bytes, where: str) -> None:
    """Raise `UnsuitableError` if `start`, the first bytes of a tar, are those of a packed file."""
    kind = compression.by_content(start)
    if kind:
        raise UnsuitableError(f"{where}: is compressed; decompress it with `{kind.program}`")


def not_adjacent(where: str, key: str, first: str, second: str) -> UnsuitableError:
    """The error for a sample whose members with these suffixes are apart."""
    return UnsuitableError(
        f"{where}: {key}.{first} and {key}.{second} are not adjacent in the tar; {SORT}"
    )


def _sample(
    data: _Buffer, key: str, group: list[tuple[str, Member]], where: str, with_labels: bool
) -> Sample | str:
    """The sample of these (suffix, member) pairs, or the reason it is unusable."""
    members = dict(reversed(group))  # of two with one suffix, the first
    suffix = image_suffix([suffix for suffix, _ in group])
    if suffix is None:
        dotted = any(name.rpartition(".")[2] in IMAGES for name, _ in group)
        hint = "; WebDataset divides names at the first dot: use names without" if dotted else ""
        return f"{NO_IMAGE} ({' '.join(suffix for suffix, _ in group)}){hint}"
    image = members.pop(suffix)
    if image.size > MAX_BYTES:
        return f"is larger than {MAX_BYTES} bytes"
    contents = {
        name: bytes(data[member.offset : member.offset + min(member.size, 2**20)])
        if _is_text(name)
        else b""
        for name, member in members.items()
    }
    split = declared_split(contents, f"{where}/{key}")
    written = Written(None, "")
    if with_labels:
        try:
            written = read_label(contents, f"{where}/{key}")
        except ValueError as error:
            return str(error)
    rest = tuple(map(sys.intern, ignored(members)))
    return Sample(key, suffix, image.offset, image.size, *written, split, rest)


def image_suffix(suffixes: Sequence[str]) -> str | None:
    """The suffix of the image: the first one in `IMAGES`, an array only if there is no other."""
    images = [suffix for suffix in suffixes if suffix in IMAGES]
    return next((suffix for suffix in images if suffix != "npy"), images[0] if images else None)


def _is_text(suffix: str) -> bool:
    """Whether `read_label` reads members with this suffix."""
    return suffix in ("json", "txt") or suffix.removesuffix(".txt") in LABELS


def only_labels(suffixes: Iterable[str]) -> bool:
    """Whether a sample has labels and nothing else, such as an image or a split."""
    return all(_is_text(suffix) and suffix != "json" for suffix in suffixes)


def ignored(suffixes: Iterable[str]) -> list[str]:
    """Those of `suffixes` that are neither images nor read."""
    return [s for s in dict.fromkeys(suffixes) if s not in IMAGES and not _is_text(s)]


def declared_split(members: Mapping[str, bytes], where: str) -> Split | None:
    """The split in the .json of a sample; raises `UnsuitableError` for an unknown `split`."""
    try:
        found = json.loads(members.get("json", b"null"))
    except (ValueError, RecursionError):
        return None
    keys = {key.lower(): found[key] for key in found} if isinstance(found, dict) else {}
    for name in SPLITS:
        value = keys.get(name)
        split = split_of(value) if isinstance(value, str) else None
        if split:
            return split
        if name == "split" and value not in (None, ""):
            raise UnsuitableError(
                f"{where}: has the split {value!r:.40} in .json; write train, val or test"
            )
    return None


class Written(NamedTuple):
    """Label, its place, and the other label of a sample, as in `Sample`."""

    label: int | str | None
    place: str
    other: int | str | None = None


def read_label(members: Mapping[str, bytes], where: str) -> Written:
    """The label of a sample from its members besides the image, which are suffixes and contents.

    A class number, or a class name without surrounding space. Raises ValueError with the reason for
    an impossible label and for two of one kind, `UnsuitableError` for several values.
    """
    found: list[tuple[int | str, str]] = []
    for suffix in members:
        if suffix == "json" or (suffix in LABELS and suffix.endswith(".json")):
            found += _in_json(members[suffix], f".{suffix}", where)
        elif suffix.removesuffix(".txt") in LABELS:
            found += _label(_decoded(members[suffix]), f".{suffix}", where)
    if found:
        found.sort(key=lambda each: each[1].startswith(".json"))
        for kind in (int, str):
            same = {label: place for label, place in found if isinstance(label, kind)}
            if len(same) > 1:
                (a, first), (b, second) = list(same.items())[:2]
                raise ValueError(f"has label {a} in {first} and {b} in {second}")
        label, place = found[0]
        return Written(
            label, place, next((b for b, _ in found if type(b) is not type(label)), None)
        )
    for suffix in members:
        parts = suffix.split(".")
        if parts[-1] in ARRAYS and (len(parts) == 1 or parts[0] in _ARRAY_LABELS):
            raise _several(f"an array, {suffix}", where)
    if "txt" in members:
        try:
            found = _label(_decoded(members["txt"]), TEXT, where)
        except (ValueError, UnsuitableError):  # a caption
            found = []
        return Written(found[0][0] if found else None, TEXT)
    return Written(None, "")


def _in_json(content: bytes, place: str, where: str) -> list[tuple[int | str, str]]:
    """(label, place) of the labels in a JSON text; after the first, what is none is ignored."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"its {place} cannot be read") from None
    if not isinstance(found, dict):
        return _label(found, place, where)
    keys = {key.lower(): key for key in reversed(found) if found[key] is not None}
    labels: list[tuple[int | str, str]] = []
    for key in (keys[name] for name in _JSON_KEYS if name in keys):
        try:
            labels += _label(found[key], f"{place} {key}", where)
        except (ValueError, UnsuitableError):
            if not labels:
                raise
    return labels


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"label {content[:20]!r} is not text") from None


def _label(value: Any, place: str, where: str) -> list[tuple[int | str, str]]:
    """[(class number or name, place)] of a label as it is written; [] for an empty one."""
    if value is None or value == "":
        return []
    if isinstance(value, list | dict):
        raise _several(f"{value!r:.40} in {place}", where)
    if isinstance(value, str):
        text = value.strip()
        if _VECTOR.fullmatch(text):
            raise _several(f"{text:.40} in {place}", where)
        if not _NUMBER.fullmatch(text):
            if len(text) > _MAX_NAME or not text.isprintable():
                raise ValueError(f"label {first_line(repr(text)):.40} is not a class name")
            return [(text, place)]
        value = float(text) if "." in text else int(text)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_CLASSES:
        raise ValueError(f"label {value!s:.40} is not a class number")
    return [(value, place)]


def _several(what: str, where: str) -> UnsuitableError:
    return UnsuitableError(
        f"{where}: its label is {what}; one class number or class name for each image is "
        f"supported; {WITHOUT_LABELS}"
    )

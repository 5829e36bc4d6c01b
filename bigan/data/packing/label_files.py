"""Labels and splits from label files (label_tables.py). Pure functions.

A label file may be in any folder and names images relative to it. If there is one anywhere, the
labels are those in label files, and every image needs one.
"""

from __future__ import annotations

import bisect
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigan.data import DataError
from bigan.data.packing.label_tables import Entry, read_label_file
from bigan.data.packing.listing import number_labels, unsafe
from bigan.data.packing.shard_files import common
from bigan.data.packing.split_names import Split, split_of
from bigan.data.packing.trees import LABEL_FILES


@dataclass(frozen=True)
class Labelled:
    """Class names, and for every path its class number or, as text, the reason it has none.

    classes: None if the files declare splits only. bad: (name, reason) of entries without an image.
    splits: of every image, if declared.
    """

    classes: tuple[str, ...] | None
    labels: list[int | str]
    bad: tuple[tuple[str, str], ...] = ()
    splits: list[Split] | None = None


@dataclass
class _Written:
    """What label files say about one image."""

    file: str = ""  # the first label file that lists it
    label: Any = None
    split: str | None = None
    problem: str = ""


def by_label_files(
    paths: Sequence[str], files: Mapping[str, bytes], where: str, with_labels: bool = True
) -> Labelled:
    """The labels of the images `paths`, sorted by parts, in the label `files` of the same tree.

    An entry names an image by its path relative to the label file, or to the folder without
    siblings below it that the images are in; the suffix may be omitted if the image is unambiguous.
    Entries without an image are in `bad`; an image without an entry, or with contradicting ones,
    has a reason instead of a number. `where` is the tree, for messages. Without `with_labels` only
    splits are read.

    Raises `DataError` for an invalid file, two label files in one folder, and splits of some images
    only.
    """
    if with_labels:
        _check_one_per_folder(files, where)
    written = [_Written() for _ in paths]
    bad: list[tuple[str, str]] = []
    unlabelled: list[str] = []  # files that declare that there are no labels
    for file in sorted(files):
        inside = _Inside(file, paths)
        place = f"{where}/{file}"
        entries = read_label_file(file, files[file], place, inside.has, with_labels)
        if entries is None:
            unlabelled.append(file)
        missing = len(bad)
        for entry in entries or ():
            _write(entry, file, inside, written, bad)
        if entries and paths and len(bad) - missing == len(entries):
            example = f"an image is {inside.names[0]!r}" if inside.names else "none is below it"
            raise DataError(
                f"{place}: names no image that is there; its first name is {entries[0].name!r}, "
                f"{example}; write names relative to the label file, or leave out other folders "
                "with --exclude"
            )
    if unlabelled:
        if any(image.file for image in written):
            first = next(image.file for image in written if image.file)
            raise DataError(
                f"{where}: {unlabelled[0]} declares no labels, but {first} has some; remove one"
            )
        return Labelled(("all",), [0] * len(paths))
    splits = _splits(paths, written, where)
    return _labelled(written, files, tuple(bad), splits)


def _labelled(
    written: list[_Written],
    files: Mapping[str, bytes],
    bad: tuple[tuple[str, str], ...],
    splits: list[Split] | None,
) -> Labelled:
    """What the files say about all images."""
    listed = any(image.file for image in written)
    has_labels = any(image.label is not None for image in written)
    classes: tuple[str, ...] | None = None
    labels: list[int | str] = [0] * len(written)
    if has_labels or not splits:
        texts = [_normalized(image.label) for image in written]
        classes, labels = number_labels(texts) if listed else ((), labels)
    names = " or ".join(sorted({file.rpartition("/")[2] for file in files}))
    for i, image in enumerate(written):
        if not image.file:
            labels[i] = f"is not in {names}"
        elif image.problem:
            labels[i] = image.problem
    return Labelled(classes, labels, bad, splits)


def _normalized(label: Any) -> Any:
    return unicodedata.normalize("NFC", label) if isinstance(label, str) else label


def _write(
    entry: Entry, file: str, inside: _Inside, written: list[_Written], bad: list[tuple[str, str]]
) -> None:
    """Store an entry with its image; appends to `bad` if there is none."""
    folder, _, base = file.rpartition("/")
    name = f"{folder}/{entry.name}" if folder else entry.name
    if unsafe(entry.name):
        bad.append((name, f"points outside of the folder (listed in {base})"))
        return
    candidates = inside.find(entry.name)
    if len(candidates) != 1:
        bad.append((name, f"is listed in {base} but missing"))
        return
    image = written[candidates[0]]
    if image.file and (image.label, image.split) != (entry.label, entry.split):
        both = base if image.file == file else f"{image.file} and {file}"
        kind = "labels" if image.label != entry.label else "splits"
        image.problem = f"has several {kind} in {both}"
    image.file = image.file or file
    image.label, image.split = entry.label, entry.split


def _check_one_per_folder(files: Mapping[str, bytes], where: str) -> None:
    seen: dict[str, str] = {}
    for file in sorted(files, key=lambda file: LABEL_FILES.index(file.rpartition("/")[2].lower())):
        folder, _, name = file.rpartition("/")
        if folder in seen:
            place = f"{where}/{folder}" if folder else where
            raise DataError(f"{place}: holds both {seen[folder]} and {name}; remove one of them")
        seen[folder] = name


def _splits(paths: Sequence[str], written: list[_Written], where: str) -> list[Split] | None:
    """The declared split of every image; None if there is none."""
    declared = [image.split for image in written]
    if not any(declared):
        return None
    found: list[Split] = []
    for path, image in zip(paths, written, strict=True):
        split = split_of(image.split or "")
        if image.file and split is None:
            raise DataError(
                f"{where}/{path}: has the split {image.split!r} in {image.file}; write train, val "
                "or test for every image"
            )
        found.append(split or "train")  # an image that is not listed is unusable
    return found


class _Inside:
    """The images below the folder of a label file, found by the names in it."""

    def __init__(self, file: str, paths: Sequence[str]) -> None:
        folder = file[: file.rfind("/") + 1]
        numbers = _below(folder, paths)
        self.names = [paths[i].removeprefix(folder) for i in numbers]
        self.find = _finder(self.names, numbers)

    def has(self, name: str) -> bool:
        """Whether `name` is that of an image here."""
        return bool(self.find(name))


def _below(folder: str, paths: Sequence[str]) -> Sequence[int]:
    """The numbers of the `paths`, which are sorted by their parts, in `folder`."""

    def parts(path: str) -> list[str]:
        return path.split("/")

    if not folder:
        return range(len(paths))
    names = folder.split("/")[:-1]
    first = bisect.bisect_left(paths, names, key=parts)
    behind = bisect.bisect_left(paths, [*names[:-1], f"{names[-1]}\0"], key=parts)
    return range(first, behind)


def _finder(names: Sequence[str], numbers: Sequence[int]) -> Callable[[str], list[int]]:
    """A function from a name in a label file to the `numbers` of the images with that name."""
    exact: dict[str, int] = {}
    by_stem: dict[str, list[int]] = {}
    for name, i in zip(names, numbers, strict=True):
        composed = unicodedata.normalize("NFC", name)  # macOS stores decomposed names
        exact.setdefault(composed, i)
        by_stem.setdefault(composed.rpartition(".")[0], []).append(i)
    parents = [tuple(name.split("/")[:-1]) for name in names]
    wrap = "".join(f"{part}/" for part in parents[0][: common(parents)]) if parents else ""

    def find(name: str) -> list[int]:
        parts = name.replace("\\", "/").split("/")
        path = unicodedata.normalize("NFC", "/".join(p for p in parts if p not in ("", ".")))
        for candidate in (path, wrap + path):
            if candidate in exact:
                return [exact[candidate]]
        return by_stem.get(path) or by_stem.get(wrap + path, [])

    return find

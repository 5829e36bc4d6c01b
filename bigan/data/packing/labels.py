"""Classes and official splits of the images in a folder or zip. Pure functions.

    by_folder      class = top-level folder, or the folders below train/, val/ and test/
    by_label_file  `labels.csv`, or `dataset.json` in the format of StyleGAN's dataset tool

Keys are sorted paths with "/", relative to the folder (or to the inner folder of the zip).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bigan.data import DataError
from bigan.data.format.codec import first_line
from bigan.data.format.convert import SUFFIXES
from bigan.data.packing.listing import SPLIT_FOLDERS, number_labels, unsafe

LABEL_FILES = ("labels.csv", "dataset.json")
FILE_COLUMNS = ("file", "filename", "path", "image", "name", "id")
LABEL_COLUMNS = ("label", "class", "category", "target")

Entries = list[tuple[str, Any]]  # (name of the image, label) as written in a label file


@dataclass(frozen=True)
class Labelled:
    """Class names, and for every key its class number or, as text, the reason it has none.

    `bad`: (name, reason) of entries in a label file without an image.
    """

    classes: tuple[str, ...]
    labels: list[int | str]
    bad: tuple[tuple[str, str], ...] = ()


def is_suffix_known(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def official_splits(keys: Iterable[str], folders: Collection[str]) -> list[str] | None:
    """The split of every key if all top-level `folders` are names of splits; else None."""
    top = {folder.lower() for folder in folders if "/" not in folder}
    if "train" not in top or not top <= SPLIT_FOLDERS.keys():
        return None
    splits = [SPLIT_FOLDERS.get(key.split("/")[0].lower(), "") for key in keys]
    return splits if all(splits) else None  # "": an image beside the folders


def by_folder(keys: Sequence[str], folders: Collection[str], where: str) -> Labelled:
    """Classes from folder names; `folders` lists every folder, empty ones included.

    Raises `DataError` for images beside class folders, a class folder without images, and class
    folders in some splits only.
    """
    splits = official_splits(keys, folders)
    if splits is None:
        classes = _class_folders(keys, [f for f in folders if "/" not in f], where)
        names = [key.split("/")[0] for key in keys]
    else:
        per_split: dict[str, list[str]] = {}
        for top in sorted(folder for folder in folders if "/" not in folder):
            inside = [key.partition("/")[2] for key in keys if key.startswith(f"{top}/")]
            below = [f.partition("/")[2] for f in folders if f.startswith(f"{top}/")]
            found = _class_folders(inside, [f for f in below if "/" not in f], f"{where}/{top}")
            per_split[top] = found
        flat = [top for top, found in per_split.items() if not found]
        if flat and len(flat) < len(per_split):
            raise DataError(
                f"{where}: {flat[0]} has no class folders but other splits have; move its images "
                "into class folders, or remove it"
            )
        classes = sorted(set().union(*per_split.values()))
        trained = {c for top, found in per_split.items() if top.lower() == "train" for c in found}
        if set(classes) - trained:
            missing = min(set(classes) - trained)
            raise DataError(f"{where}: class {missing!r} has no images in train; add or remove it")
        names = [key.split("/")[1] for key in keys]
    if not classes:
        return Labelled(("all",), [0] * len(keys))
    number = {name: n for n, name in enumerate(classes)}
    return Labelled(tuple(classes), [number[name] for name in names])


def _class_folders(keys: Sequence[str], folders: Sequence[str], where: str) -> list[str]:
    """The sorted class folders; [] if all images are directly in this folder."""
    loose = [key for key in keys if "/" not in key]
    classes = sorted(folders)
    if loose and classes:
        raise DataError(
            f"{where}: holds both images ({loose[0]}) and folders ({classes[0]}); move "
            "every image into a class folder, or all of them directly into it"
        )
    filled = {key.split("/")[0] for key in keys}
    empty = [name for name in classes if name not in filled]
    if empty or not keys:
        place = f"{where}/{empty[0]}" if empty else where
        if not place.isprintable():
            raise DataError(f"{where}: folder {empty[0]!r} has an unprintable name; rename it")
        raise DataError(f"{place}: contains no images (known suffixes: {' '.join(SUFFIXES)})")
    return classes


def by_label_file(keys: Sequence[str], entries: Entries | None, file: str) -> Labelled:
    """Classes from the `entries` of label file `file` (None: unlabelled, the one class "all").

    An entry names an image by its path; the extension may be omitted if the image is unambiguous.
    Entries without an image, or with a path outside of the folder, are in `bad`; an image without
    an entry, or with contradicting ones, has a reason instead of a number.
    """
    if entries is None:
        return Labelled(("all",), [0] * len(keys))
    find = _finder(keys)
    written: list[Any] = [None] * len(keys)
    bad: list[tuple[str, str]] = []
    conflicts: set[int] = set()
    for name, label in entries:
        if unsafe(name):
            bad.append((name, f"points outside of the folder (listed in {file})"))
            continue
        candidates = find(name)
        if len(candidates) != 1:
            bad.append((name, f"is listed in {file} but missing"))
            continue
        i = candidates[0]
        if written[i] is not None and written[i] != label:
            conflicts.add(i)
        written[i] = label
    if all(label is None for label in written):
        return Labelled((), [f"is not in {file}"] * len(keys), tuple(bad))
    listed = [label is not None for label in written]
    classes, labels = number_labels(written)
    for i in range(len(keys)):
        if not listed[i]:
            labels[i] = f"is not in {file}"
        elif i in conflicts:
            labels[i] = f"has several labels in {file}"
    return Labelled(classes, labels, tuple(bad))


def _finder(keys: Sequence[str]) -> Callable[[str], list[int]]:
    """A function from a name in a label file to the numbers of the matching keys."""
    position = {key: i for i, key in enumerate(keys)}
    by_stem: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        by_stem.setdefault(key.rpartition(".")[0], []).append(i)

    def find(name: str) -> list[int]:
        parts = name.replace("\\", "/").split("/")
        key = "/".join(part for part in parts if part not in ("", "."))
        return [position[key]] if key in position else by_stem.get(key, [])

    return find


def read_label_file(
    name: str, content: bytes, where: str, keys: Sequence[str] = ()
) -> Entries | None:
    """The entries of labels.csv or dataset.json; None for a file that declares no labels.

    `keys` distinguish a header with unknown words from an entry. Raises `DataError` that names
    `where` for an invalid file.
    """
    try:
        text = content.decode("utf-8-sig")
        return _csv(text, where, keys) if name.endswith(".csv") else _json(text, where)
    except UnicodeDecodeError:
        raise DataError(f"{where}: is not UTF-8 text; save it as UTF-8") from None
    except (csv.Error, ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: is invalid ({first_line(error)}); correct or remove it"
        ) from None


def _csv(text: str, where: str, keys: Sequence[str]) -> Entries:
    """A header with a file and a label column, or two columns with or without a header."""
    rows = csv.reader(io.StringIO(text, newline=""))
    first = next((row for row in rows if any(cell.strip() for cell in row)), None)
    if first is None:
        raise DataError(f"{where}: is empty; write one line `file,label` for every image")
    header = [cell.strip().lower() for cell in first]
    file = next((header.index(name) for name in FILE_COLUMNS if name in header), None)
    label = next((header.index(name) for name in LABEL_COLUMNS if name in header), None)
    entries: Entries = []
    if file is None or label is None:
        separator = next((mark for mark in (";", "\t") if mark in first[0]), None)
        if len(first) == 1 and separator:
            raise DataError(f"{where}: has columns separated by {separator!r}; use commas")
        if len(first) != 2:
            raise DataError(
                f"{where}: has no header with a file column ({', '.join(FILE_COLUMNS)}) and a "
                f"label column ({', '.join(LABEL_COLUMNS)}); add one"
            )
        file, label = 0, 1
        entries.append((first[0].strip(), first[1].strip()))
    start = len(entries)
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) <= max(file, label):
            raise DataError(f"{where}: line {rows.line_num} has too few columns; correct it")
        entries.append((row[file].strip(), row[label].strip()))
    if start and len(entries) > 1:
        find = _finder(keys)
        if not find(entries[0][0]) and find(entries[1][0]):
            del entries[0]  # a header with unknown words: "image_id,breed"
    return entries


def _json(text: str, where: str) -> Entries | None:
    content = json.loads(text)
    if not isinstance(content, dict) or "labels" not in content:
        raise DataError(f'{where}: has no "labels"; write {{"labels": [["file.png", 0], ...]}}')
    labels = content["labels"]
    if labels is None:
        return None
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    if not isinstance(pairs, list):
        raise DataError(f'{where}: "labels" is neither a list nor an object; correct it')
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise DataError(f'{where}: "labels" holds {pair!r:.60}, expected ["file.png", 0]')
    return [(name, label) for name, label in pairs]

"""Labels and splits from label files. Pure functions.

    labels.csv                     file and label; the header is optional with two columns
    metadata.csv, metadata.jsonl   of Hugging Face's `imagefolder`: file_name and label
    dataset.json                   of StyleGAN's dataset tool: {"labels": [["file.png", 0], ...]}

A label file may be in any folder and names images relative to it. If there is one anywhere, the
labels are those in label files, and every image needs one.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bigan.data import DataError
from bigan.data.format.codec import first_line
from bigan.data.packing.listing import number_labels, unsafe
from bigan.data.packing.split_names import Split, split_of
from bigan.data.packing.trees import LABEL_FILES

FILE_COLUMNS = (
    "file", "filename", "file_name", "path", "filepath", "image_path", "image", "img", "name", "id",
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target")
SPLIT_COLUMNS = ("split", "subset", "partition", "set")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description", "url")
SUPPORTED = "supported is one class per image: an integer or a name"


class Entry(NamedTuple):
    """A line of a label file: the name of an image, its label and its split, as written."""

    name: str
    label: Any
    split: str | None = None


@dataclass(frozen=True)
class Labelled:
    """Class names, and for every path its class number or, as text, the reason it has none.

    `bad`: (name, reason) of entries without an image. `splits`: of every image, if declared.
    """

    classes: tuple[str, ...]
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


def by_label_files(paths: Sequence[str], files: Mapping[str, bytes], where: str) -> Labelled:
    """The labels of the images `paths` in the label `files`, by path in the same tree.

    An entry names an image by its path relative to the label file, or to the folder without
    siblings below it that the images are in; the suffix may be omitted if the image is unambiguous.
    Entries without an image are in `bad`; an image without an entry, or with contradicting ones,
    has a reason instead of a number. `where` is the tree, for messages.

    Raises `DataError` for an invalid file, two label files in one folder, and splits of some images
    only.
    """
    _check_one_per_folder(files, where)
    written = [_Written() for _ in paths]
    bad: list[tuple[str, str]] = []
    unlabelled: list[str] = []  # files that declare that there are no labels
    for file in sorted(files):
        inside = _Inside(file, paths)
        entries = read_label_file(file, files[file], f"{where}/{file}", inside.names)
        if entries is None:
            unlabelled.append(file)
        missing = len(bad)
        for entry in entries or ():
            _write(entry, file, inside, written, bad)
        if entries and paths and len(bad) - missing == len(entries):
            raise DataError(
                f"{where}/{file}: names no image that is there; its first name is "
                f"{entries[0].name!r}, an image is {paths[0]!r}; write names relative to the "
                "label file, or leave out other folders with --exclude"
            )
    listed = [bool(image.file) for image in written]
    if unlabelled:
        if any(listed):
            first = next(image.file for image in written if image.file)
            raise DataError(
                f"{where}: {unlabelled[0]} declares no labels, but {first} has some; remove one"
            )
        return Labelled(("all",), [0] * len(paths))
    names = " or ".join(sorted({file.rpartition("/")[2] for file in files}))
    if any(listed):
        classes, labels = number_labels([image.label for image in written])
    else:
        classes, labels = (), [0] * len(paths)
    for i, image in enumerate(written):
        if not image.file:
            labels[i] = f"is not in {names}"
        elif image.problem:
            labels[i] = image.problem
    return Labelled(classes, labels, tuple(bad), _splits(paths, written, where))


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
        numbers = [i for i, path in enumerate(paths) if path.startswith(folder)]
        self.names = [paths[i].removeprefix(folder) for i in numbers]
        self.find = _finder(self.names, numbers)


def _finder(names: Sequence[str], numbers: Sequence[int]) -> Callable[[str], list[int]]:
    """A function from a name in a label file to the `numbers` of the images with that name."""
    exact: dict[str, int] = {}
    by_stem: dict[str, list[int]] = {}
    for name, i in zip(names, numbers, strict=True):
        composed = unicodedata.normalize("NFC", name)  # macOS stores decomposed names
        exact.setdefault(composed, i)
        by_stem.setdefault(composed.rpartition(".")[0], []).append(i)
    wrap = _wrapping(names)

    def find(name: str) -> list[int]:
        parts = name.replace("\\", "/").split("/")
        path = unicodedata.normalize("NFC", "/".join(p for p in parts if p not in ("", ".")))
        for candidate in (path, wrap + path):
            if candidate in exact:
                return [exact[candidate]]
        return by_stem.get(path) or by_stem.get(wrap + path, [])

    return find


def _wrapping(names: Sequence[str]) -> str:
    """The folder, with its "/", that all `names` are in; "" without one."""
    if not names:
        return ""
    first, last = min(names).split("/")[:-1], max(names).split("/")[:-1]
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    return "".join(f"{part}/" for part in first[:same])


def read_label_file(
    file: str, content: bytes, where: str, names: Sequence[str] = ()
) -> list[Entry] | None:
    """The entries of a label file; None for one that declares no labels.

    `names` are those of the images, relative to it: they distinguish a header with unknown words
    from an entry. Raises `DataError` that names `where` for an invalid file, and for labels that
    are lists or other structures.
    """
    try:
        text = content.decode("utf-8-sig")
        name = file.lower()
        if name.endswith(".csv"):
            entries = _csv(text, where, names, is_metadata=name.endswith("metadata.csv"))
        elif name.endswith(".jsonl"):
            entries = _json_lines(text, where)
        else:
            return _checked(_json(text, where), where)
        return _checked(entries, where)
    except UnicodeDecodeError:
        raise DataError(f"{where}: is not UTF-8 text; save it as UTF-8") from None
    except (csv.Error, ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: is invalid ({first_line(error)}); correct or remove it"
        ) from None


def _checked(entries: list[Entry] | None, where: str) -> list[Entry] | None:
    """`entries`, or `DataError` for the first label with several values."""
    for name, label, _ in entries or ():
        if isinstance(label, list | dict | float):
            kind = "a number with a fraction" if isinstance(label, float) else "several values"
            raise DataError(
                f"{where}: the label of {name} is {label!r:.40}, {kind}; {SUPPORTED}; without "
                "labels use --labels none"
            )
    return entries


def _csv(text: str, where: str, names: Sequence[str], is_metadata: bool) -> list[Entry]:
    """A header with a file and a label column, or two columns with or without a header."""
    rows = csv.reader(io.StringIO(text, newline=""))
    first = next((row for row in rows if any(cell.strip() for cell in row)), None)
    if first is None:
        raise DataError(f"{where}: is empty; write one line `file,label` for every image")
    header = [cell.strip().lower() for cell in first]
    file, label, split = (
        next((header.index(name) for name in columns if name in header), None)
        for columns in (FILE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS)
    )
    entries: list[Entry] = []
    file_column = file
    if file is None or (label is None and split is None):
        _check_two_columns(first, file, where, is_metadata)
        file, label, split = 0, 1, None
        entries.append(Entry(first[0].strip(), first[1].strip()))
    start = len(entries)
    last = max(file, label or 0, split or 0)
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) <= last:
            raise DataError(f"{where}: line {rows.line_num} has too few columns; correct it")
        cells = [None if column is None else row[column].strip() for column in (label, split)]
        entries.append(Entry(row[file].strip(), *cells))
    if start and len(entries) > 1:
        find = _finder(names, range(len(names)))
        is_header = file_column is not None or find(entries[1].name)
        if is_header and not find(entries[0].name):
            del entries[0]  # a header with unknown words: "image_id,breed"
    return entries


def _check_two_columns(first: list[str], file: int | None, where: str, is_metadata: bool) -> None:
    """Raise `DataError` unless a file without the known columns consists of names and labels."""
    separator = next((mark for mark in (";", "\t") if mark in first[0]), None)
    if len(first) == 1 and separator:
        raise DataError(f"{where}: has columns separated by {separator!r}; use commas")
    columns = ", ".join(cell.strip() for cell in first)
    captions = any(cell.strip().lower() in CAPTION_COLUMNS for cell in first)
    if file is not None and (is_metadata or captions):
        raise DataError(
            f"{where}: has no column with labels ({', '.join(LABEL_COLUMNS)}) among {columns}; add "
            "one, or use --labels folders or --labels none"
        )
    if len(first) != 2:
        raise DataError(
            f"{where}: has no header with a file column ({', '.join(FILE_COLUMNS)}) and a "
            f"label column ({', '.join(LABEL_COLUMNS)}); add one"
        )


def _json_lines(text: str, where: str) -> list[Entry]:
    """One object in each line, with the keys of the columns of a .csv."""
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        row = json.loads(line)
        if not isinstance(row, dict):
            raise DataError(f"{where}: line {number} is not an object; correct it")
        file, label, split = (
            next((name for name in columns if name in row), None)
            for columns in (FILE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS)
        )
        if not (file and isinstance(row[file], str) and label):
            raise DataError(
                f"{where}: line {number} has no file ({', '.join(FILE_COLUMNS)}) or no label "
                f"({', '.join(LABEL_COLUMNS)}); add them, or use --labels folders or --labels none"
            )
        entries.append(Entry(row[file], row[label], str(row[split]) if split else None))
    return entries


def _json(text: str, where: str) -> list[Entry] | None:
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
    return [Entry(name, label) for name, label in pairs]

"""The content of label files: entries of image name, label and split. Pure functions.

labels.csv                     file and label; the header is optional with two columns
metadata.csv, metadata.jsonl   of Hugging Face's `imagefolder`: file_name and label
dataset.json                   of StyleGAN's dataset tool: {"labels": [["file.png", 0], ...]}
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from bigan.data import DataError
from bigan.data.format.codec import first_line
from bigan.data.packing.split_names import mentions_splits, other_words, split_of

FILE_COLUMNS = (
    "file", "filename", "file_name", "path", "filepath", "filepaths", "image_path", "image", "img",
    "name", "id",
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target")
SPLIT_COLUMNS = ("split", "subset", "partition", "set")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description", "url")
SUPPORTED = "supported is one class per image: an integer or a name"

_VECTOR = re.compile(r"\[.*\]|\(.*\)|[-+.\d]+(?:[\s,;]+[-+.\d]+)+|.*\|.*", re.DOTALL)
_FRACTION = re.compile(r"[-+]?\d*\.\d+")
_FLAGS = {"0", "1", "true", "false", "yes", "no"}


class Entry(NamedTuple):
    """A line of a label file: the name of an image, its label and its split, as written."""

    name: str
    label: Any
    split: str | None = None


class _Table(NamedTuple):
    """Rows of a file with columns; `header` is in lower case."""

    header: list[str]
    rows: list[tuple[int, list[Any]]]  # (number of the line, cells)


def read_label_file(
    file: str,
    content: bytes,
    where: str,
    is_image: Callable[[str], bool] = bool,
    with_labels: bool = True,
) -> list[Entry] | None:
    """The entries of a label file; None for one that declares no labels.

    `is_image`: whether a name is that of an image beside the file; it distinguishes a header with
    unknown words from an entry. Without `with_labels` only splits are read: [] without any. Raises
    `DataError` that names `where` for an invalid file, and for labels of several values and
    fractions.
    """
    name = file.lower()
    try:
        text = content.decode("utf-8-sig")
        if name.endswith(".json"):
            entries = _json(text, where) if with_labels else []
        else:
            table = _lines(text, where) if name.endswith(".jsonl") else _csv(text, where)
            is_metadata = name.rpartition("/")[2].startswith("metadata.")
            entries = _entries(table, where, is_image, is_metadata, with_labels)
    except UnicodeDecodeError:
        raise DataError(f"{where}: is not UTF-8 text; save it as UTF-8") from None
    except (csv.Error, ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: is invalid ({first_line(error)}); correct or remove it"
        ) from None
    if entries is None:
        return None
    return [entry._replace(label=_label(entry, where)) for entry in entries]


def _label(entry: Entry, where: str) -> Any:
    """The label of an entry, a number without fraction as an integer; or `DataError`."""
    label = entry.label
    fraction = isinstance(label, str) and _FRACTION.fullmatch(label)
    if fraction or isinstance(label, float):
        if float(label).is_integer():
            return int(float(label))
        problem = "a number with a fraction"
    elif isinstance(label, list | dict) or (isinstance(label, str) and _VECTOR.fullmatch(label)):
        problem = "several values"
    else:
        return label
    raise DataError(
        f"{where}: the label of {entry.name} is {label!r:.40}, {problem}; {SUPPORTED}; without "
        "labels use --labels none"
    )


def _entries(
    table: _Table,
    where: str,
    is_image: Callable[[str], bool],
    is_metadata: bool,
    with_labels: bool,
) -> list[Entry]:
    """The entries of a table by its header; of two columns without one, if there are labels."""
    header, rows = table
    file, label = (
        next((header.index(name) for name in columns if name in header), None)
        for columns in (FILE_COLUMNS, LABEL_COLUMNS)
    )
    split = None if file is None else _split_column(table, {file, label}, where)
    if not with_labels:
        if file is None or split is None:
            return []
        label, rows = None, rows[1:]
    elif file is None or (label is None and split is None):
        _check_two_columns(header, file, where, is_metadata)
        file_or_first, label = file, 1
        first, second = rows[0][1], rows[1][1] if len(rows) > 1 else []
        is_header = file_or_first is not None or (bool(second) and is_image(str(second[0])))
        if is_header and not is_image(str(first[0])):
            rows = rows[1:]  # a header with unknown words: "image_id,breed"
        file = 0
    else:
        rows = rows[1:]
    entries = []
    for number, cells in rows:
        if len(cells) <= max(file, label or 0, split or 0):
            raise DataError(f"{where}: line {number} has too few columns; correct it")
        if any(cell not in ("", None) for cell in cells[len(header) :]):
            raise DataError(f"{where}: line {number} has more columns than the first; correct it")
        name, value, declared = (None if n is None else cells[n] for n in (file, label, split))
        if not isinstance(name, str) or "\n" in f"{name}{value}":
            raise DataError(f"{where}: line {number} has no name, or a quote that does not end")
        entries.append(Entry(name, value, None if declared is None else str(declared)))
    return entries


def _split_column(table: _Table, others: Iterable[int | None], where: str) -> int | None:
    """The number of the column that declares splits: by its name, or because all values do."""
    header, rows = table
    named = next((header.index(name) for name in SPLIT_COLUMNS if name in header), None)
    if named is not None:
        return named
    for n, name in enumerate(header):
        if n in others or name in CAPTION_COLUMNS:
            continue
        values = {str(cells[n]) for _, cells in rows[1:] if len(cells) > n}
        if values and all(split_of(v) and len(other_words(v)) < 2 for v in values):
            return n
        if values and mentions_splits(name) and {v.lower() for v in values} <= _FLAGS:
            raise DataError(
                f"{where}: the column {name!r} may declare a split; write train, val or test for "
                "every image into a column `split`"
            )
    return None


def _check_two_columns(header: list[str], file: int | None, where: str, is_metadata: bool) -> None:
    """Raise `DataError` unless a file without the known columns consists of names and labels."""
    separator = next((mark for mark in (";", "\t") if mark in header[0]), None)
    if len(header) == 1 and separator:
        raise DataError(f"{where}: has columns separated by {separator!r}; use commas")
    captions = any(name in CAPTION_COLUMNS for name in header)
    if is_metadata or (file is not None and captions):
        raise DataError(
            f"{where}: has no column with labels ({', '.join(LABEL_COLUMNS)}), or none with files "
            f"({', '.join(FILE_COLUMNS)}), among {', '.join(header)}; add one, or use --labels "
            "folders or --labels none"
        )
    if len(header) != 2:
        raise DataError(
            f"{where}: has no header with a file column ({', '.join(FILE_COLUMNS)}) and a "
            f"label column ({', '.join(LABEL_COLUMNS)}); add one"
        )


def _csv(text: str, where: str) -> _Table:
    reader = csv.reader(io.StringIO(text, newline=""))
    rows: list[tuple[int, list[Any]]] = []
    for row in reader:
        cells = [cell.strip() for cell in row]
        if any(cells):
            rows.append((reader.line_num, cells))
    if not rows:
        raise DataError(f"{where}: is empty; write one line `file,label` for every image")
    return _Table([cell.lower() for cell in rows[0][1]], rows)


def _lines(text: str, where: str) -> _Table:
    """One object in each line, with the keys of the columns of a .csv."""
    objects: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), 1):  # captions may hold other line ends
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise DataError(f"{where}: line {number} is not an object; correct it")
            objects.append((number, {str(key).lower(): value for key, value in row.items()}))
    header = list(dict.fromkeys(key for _, row in objects for key in row))
    if not header:
        raise DataError(f"{where}: is empty; write one object for every image")
    rows: list[tuple[int, list[Any]]] = [(0, [*header])]
    rows += [(number, [row.get(key) for key in header]) for number, row in objects]
    return _Table(header, rows)


def _json(text: str, where: str) -> list[Entry] | None:
    content = json.loads(text, object_pairs_hook=_unique)
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


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; ValueError for a key with two values."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise ValueError(f"the key {key!r} has two values")
    return found

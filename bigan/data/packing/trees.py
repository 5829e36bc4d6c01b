"""The files of a folder or archive, as a `Tree`: what `layout` needs, whatever holds the files.

`folders`, `zips` and `tar_trees` make trees. A tree has the paths as they are on disk or in the
archive, with "/"; `layout` finds classes and splits in them, so that a folder and its archives give
the same images, classes and splits.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from bigan.data import DataError
from bigan.data.format.convert import SUFFIXES
from bigan.data.packing.listing import MAX_BYTES, is_hidden
from bigan.data.packing.split_names import mentions_splits
from bigan.data.packing.tar_samples import JSON_KEYS, LABELS

LABEL_FILES = ("labels.csv", "dataset.json", "metadata.csv", "metadata.jsonl")
TEXTS = {".csv", ".tsv", ".json", ".jsonl", ".txt", ".lst", ".mat", ".parquet"}
MAX_JSON = 2**20  # bytes of a .json that is read
NUM_JSON = 8  # .json files that are read
TOO_LARGE = f"is larger than {MAX_BYTES} bytes"

_SKIPPED = ("__MACOSX", "@eaDir")  # written by macOS and by network disks
_MAX_SHOWN = 6  # entries of a folder in a drawing
_MAX_DEPTH = 3


@dataclass
class Tree:
    """The content of a folder or archive, by path relative to it.

    images: size in bytes of each image file; folders and archives have the same.
    folders: all folders, those without files included.
    label_files: content of the files named in `LABEL_FILES`, in any folder.
    bad: (path, reason) of images that cannot be read.
    times: (path, time of modification in nanoseconds), of the archive itself for an archive, and
        (path, checksum) where an archive has one.
    skipped: number of other files by suffix.
    sidecars: path without suffix -> suffix, of files that would label the image of the same name.
    read: the bytes of an image; thread-safe; raises `BadImageError` or `OSError`.
    """

    images: dict[str, int] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    label_files: dict[str, bytes] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)
    times: list[tuple[str, int]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=collections.Counter)
    sidecars: dict[str, str] = field(default_factory=dict)
    read: Callable[[str], bytes] = lambda path: b""

    def add_folders_of(self, path: str) -> None:
        """Add the folders above `path`."""
        parts = path.split("/")
        self.folders |= {"/".join(parts[:depth]) for depth in range(1, len(parts))}

    def skip(self, path: str, read: Callable[[], bytes] | None = None) -> None:
        """Count a file that is neither an image nor a label file.

        By suffix, or by name if it has none, or may be a list of the images of a split. `read`
        returns the content: of the first .json files, to see whether they are labels.
        """
        file = PurePosixPath(path)
        suffix = file.suffix.lower()
        is_label = suffix.removeprefix(".") in LABELS
        if suffix == ".json" and read and self.skipped[suffix] < NUM_JSON:
            is_label = has_json_label(read())
        if is_label:
            self.sidecars[path.rpartition(".")[0]] = suffix
        is_list = suffix in TEXTS and mentions_splits(file.stem)
        self.skipped[file.name if is_list or not suffix else suffix] += 1


def has_json_label(content: bytes) -> bool:
    """Whether a .json beside an image has a label or a split."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and any(name in found for name in JSON_KEYS)


def is_image(path: str) -> bool:
    """Whether the suffix of `path` is that of an image."""
    return path.lower().endswith(SUFFIXES)


def is_label_file(path: str) -> bool:
    return path.rpartition("/")[2].lower() in LABEL_FILES


def is_skipped(path: str) -> bool:
    """Whether a file or folder is hidden, or belongs to the operating system."""
    return any(part in _SKIPPED or is_hidden(part) for part in path.split("/"))


def without(tree: Tree, patterns: Sequence[str]) -> Tree:
    """`tree` without the files and folders that match one of the shell patterns.

    A pattern is compared with the path and with the name: "masks", "*/masks", "*_small.png". "*"
    also matches "/". What is in a matching folder is left out, too. Raises `DataError` for a
    pattern that matches neither an image nor a label file nor a folder.
    """
    if not patterns:
        return tree
    patterns = [pattern.rstrip("/") or pattern for pattern in patterns]
    used: set[str] = set()

    def kept(path: str) -> bool:
        parts = path.split("/")
        prefixes = ("/".join(parts[: n + 1]) for n in range(len(parts)))
        found = {
            pattern
            for prefix in prefixes
            for name in (prefix, prefix.rpartition("/")[2])
            for pattern in patterns
            if fnmatch.fnmatchcase(name, pattern)
        }
        used.update(found)
        return not found

    kept_tree = dataclasses.replace(
        tree,
        images={path: entry for path, entry in tree.images.items() if kept(path)},
        folders={path for path in tree.folders if kept(path)},
        label_files={path: text for path, text in tree.label_files.items() if kept(path)},
        bad=[(path, reason) for path, reason in tree.bad if kept(path)],
    )
    unused = [pattern for pattern in patterns if pattern not in used]
    if unused:
        raise DataError(f"--exclude {unused[0]!r}: matches no folder, image or label file")
    return kept_tree


def drawing(where: str, tree: Tree, focus: str = "") -> str:
    """The upper folders of a tree with their numbers of images, as lines; with the path `focus`."""
    counts: Counter[str] = Counter()
    for path in tree.images:
        parts = path.split("/")
        counts.update("/".join(parts[:depth]) for depth in range(len(parts)))
    children: dict[str, list[str]] = {}
    for folder in sorted(tree.folders):
        children.setdefault(folder.rpartition("/")[0], []).append(folder)
    lines = [f"{where}/  {_images(counts[''])}"]

    def draw(parent: str, depth: int) -> None:
        inside = children.get(parent, [])
        files = sorted(path for path in tree.label_files if path.rpartition("/")[0] == parent)
        indent = "  " * (depth + 1)
        lines.extend(f"{indent}{_printable(file)}" for file in files)
        shown = inside[:_MAX_SHOWN]
        shown += [folder for folder in inside[_MAX_SHOWN:] if f"{focus}/".startswith(f"{folder}/")]
        for folder in shown:
            lines.append(f"{indent}{_printable(folder)}/  {_images(counts[folder])}")
            if depth + 1 < _MAX_DEPTH:
                draw(folder, depth + 1)
        if len(inside) > len(shown):
            lines.append(f"{indent}... and {len(inside) - len(shown):,} more folders")

    draw("", 0)
    return "\n".join(lines)


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _printable(path: str) -> str:
    name = path.rpartition("/")[2]
    return name if name.isprintable() else ascii(name)[1:-1]

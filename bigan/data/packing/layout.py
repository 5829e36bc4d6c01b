"""Classes and splits from the folders that images are in. Pure functions of paths.

    IMAGES                  flat: one class
    CLASS/IMAGES            class = folder; folders below it do not matter
    SPLIT/IMAGES            official splits, one class
    SPLIT/CLASS/IMAGES      official splits and classes
    CLASS/SPLIT/IMAGES      the same, the other way round

Each of them may be in folders without siblings, such as the one that an archive was made of; a
split may contain such a folder, too ("train/train/cat"). Splits are folders with a name of
`split_names`. Any other layout raises `LayoutError`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bigan.data import DataError
from bigan.data.format.convert import SUFFIXES
from bigan.data.packing.split_names import Split, other_words, split_of

LAYOUTS = """supported layouts (folders that are the only entry of their parent are skipped):
  IMAGES                 one class
  CLASS/IMAGES           class = folder
  SPLIT/IMAGES           SPLIT: train, val, test and similar names
  SPLIT/CLASS/IMAGES
  CLASS/SPLIT/IMAGES
  any folders, with labels in labels.csv, metadata.csv, metadata.jsonl or dataset.json
see docs/data.md; --exclude NAME leaves out files and folders, --labels none ignores all labels"""


CONTENT = {  # names of folders for the kind of a file, not for a class, in lower case
    "images", "image", "imgs", "img", "jpegimages", "masks", "mask", "annotations", "labels",
    "label", "gt", "gtfine", "gtcoarse", "leftimg8bit", "groundtruth", "ground_truth", "trimaps",
    "segmentation", "segmentationclass", "segmentationobject", "input", "inputs", "target",
    "targets", "depth", "edges",
}  # fmt: skip
_SPLIT_ADVICE = (
    "leave out one of them with --exclude, rename the folder, or declare the splits in the column "
    "`split` of labels.csv"
)


class LayoutError(DataError):
    """Folders that cannot be understood: `folder`, relative to the tree, and `problem`."""

    def __init__(self, folder: str, problem: str) -> None:
        self.folder, self.problem = folder.rstrip("/"), problem
        super().__init__(f"{self.folder}: {problem}")


@dataclass(frozen=True)
class Layout:
    """What the folders mean.

    root: the folder without siblings that everything is in, with its "/", or "".
    splits: the split of each image; None where no folder declares one.
    classes: the class folder of each image; None for a flat layout.
    """

    root: str
    splits: Sequence[str] | None
    classes: Sequence[str] | None


def content_folder(paths: Sequence[str], folders: Iterable[str]) -> str:
    """The folder, with its "/", below the folders without siblings; "" without any."""
    return _Index(paths, folders).content("")


def class_folders(paths: Sequence[str], folders: Iterable[str]) -> list[str] | None:
    """The class folder of each image, whatever the names of folders are; None for a flat layout.

    Raises `LayoutError` for images beside class folders and class folders without images.
    """
    index = _Index(paths, folders)
    root = index.content("", past_splits=True)
    index.check_classes(root)
    return _all_or_none([_class(path, root) for path in paths])


def understand(paths: Sequence[str], folders: Iterable[str], *, need_classes: bool) -> Layout:
    """The layout of the images `paths`; `folders` lists every folder, empty ones included.

    With `need_classes`, images beside class folders, class folders without images and class folders
    in some splits only are errors; without it (labels from elsewhere, or none), only splits matter
    and `classes` holds class folders where there are any, else None. Raises `LayoutError`.
    """
    index = _Index(paths, folders)
    root = index.content("")
    splits = _split_folders(index, root)
    if splits:
        return _with_split_folders(index, paths, root, splits, need_classes)
    inner = _splits_of_classes(index, root)
    names = _all_or_none([_class(path, root) for path in paths])
    _check_stray(index, {f"{root}{top}/{name}/" for top in index.inside(root) for name in inner})
    if inner:
        official = [inner[path.removeprefix(root).split("/")[1]] for path in paths]
        return Layout(root, official, names)
    if need_classes:
        index.check_classes(root)
    return Layout(root, None, names)


def _with_split_folders(
    index: _Index, paths: Sequence[str], root: str, splits: dict[str, Split], need_classes: bool
) -> Layout:
    tops = {f"{root}{name}/": split for name, split in splits.items()}
    starts = dict(zip(tops, _inside_splits(index, tops), strict=True))
    known = {
        folder
        for top, start in starts.items()
        for folder in _above(start)
        if split_of(folder.split("/")[-2]) in (None, tops[top])
    }
    _check_stray(index, known)
    if need_classes:
        _check_splits(index, list(starts.values()))
    top_of = [f"{root}{path.removeprefix(root).split('/')[0]}/" for path in paths]
    names = [_class(path, starts[top]) for path, top in zip(paths, top_of, strict=True)]
    return Layout(root, [tops[top] for top in top_of], _all_or_none(names))


class _Index:
    """Folders by parent; a folder is "" or ends with "/"."""

    def __init__(self, paths: Iterable[str], folders: Iterable[str]) -> None:
        self.paths = list(paths)
        self.loose: dict[str, str] = {}  # folder -> an image directly in it
        self.filled: set[str] = set()  # folders with images below
        for path in self.paths:
            parent = path[: path.rfind("/") + 1]
            self.loose.setdefault(parent, path.rpartition("/")[2])
            while parent not in self.filled:
                self.filled.add(parent)
                parent = parent[: parent.rfind("/", 0, -1) + 1] if parent else ""
        names: dict[str, list[str]] = collections.defaultdict(list)
        for folder in sorted(folders):
            parent, _, name = folder.rpartition("/")
            names[f"{parent}/" if parent else ""].append(name)
        self.folders = dict(names)  # folder -> the names of the folders in it

    def inside(self, folder: str) -> list[str]:
        return self.folders.get(folder, [])

    def content(self, folder: str, past_splits: bool = False) -> str:
        """`folder`, or the folder below it where the first choice is: siblings, images, splits."""
        while folder not in self.loose and len(self.inside(folder)) == 1:
            name = self.inside(folder)[0]
            if split_of(name) and not past_splits:
                break
            folder = f"{folder}{name}/"
        return folder

    def has_folders(self, folder: str) -> bool:
        """Whether there are folders with images in `folder`."""
        return any(f"{folder}{name}/" in self.filled for name in self.inside(folder))

    def check_classes(self, folder: str) -> list[str]:
        """The class folders in `folder`; [] for a flat one. Raises `LayoutError`."""
        names = self.inside(folder)
        if folder in self.loose and names:
            raise LayoutError(
                folder,
                f"holds both images ({self.loose[folder]}) and folders ({names[0]}); "
                "move every image into a class folder, or all of them directly into it",
            )
        empty = [name for name in names if f"{folder}{name}/" not in self.filled]
        known = f"contains no images (known suffixes: {' '.join(SUFFIXES)})"
        if empty:
            advice = f"remove it, or leave it out with --exclude {empty[0]!r}"
            raise LayoutError(f"{folder}{empty[0]}", f"{known}; {advice}")
        if folder not in self.filled:
            raise LayoutError(folder, known)
        self._check_meaning(folder, names)
        return names

    def _check_meaning(self, folder: str, names: list[str]) -> None:
        """Raise `LayoutError` for sibling folders that are no classes: masks, or a level above."""
        content = [name for name in names if name.lower() in CONTENT]
        if content and len(names) > 1:
            stems: dict[str, set[str]] = {name: set() for name in names}
            for path in self.paths:
                if path.startswith(folder) and "/" in path.removeprefix(folder):
                    name, _, inner = path.removeprefix(folder).partition("/")
                    stems[name].add(inner.rpartition(".")[0])
            same = (n for n in names if n != content[0] and _overlap(stems[n], stems[content[0]]))
            other = content[1] if len(content) == len(names) else next(same, "")
            if other:
                raise LayoutError(
                    folder,
                    f"{content[0]} and {other} look like images and their masks or labels, not "
                    f"like classes; leave one out, for example with --exclude {other!r}",
                )
        below = [self.inside(f"{folder}{name}/") for name in names]
        first = below[0] if below else []
        deep = all(f"{folder}{name}/" not in self.loose for name in names)
        if len(names) > 1 and len(first) > 1 and deep and all(inside == first for inside in below):
            raise LayoutError(
                folder,
                f"{names[0]} and {names[1]} hold the same folders ({first[0]}, {first[1]}), so "
                "either level may be the class; give one of them, leave others out with --exclude, "
                "or write labels.csv",
            )


def _overlap(a: set[str], b: set[str]) -> bool:
    """Whether half of the smaller set is in the other one."""
    return bool(a and b) and 2 * len(a & b) >= min(len(a), len(b))


def _split_folders(index: _Index, folder: str) -> dict[str, Split] | None:
    """The folders in `folder` that are splits, as {name: split}; None if they are classes.

    A class may have the name of a split. Some folders with such names among others are refused
    where they are likely splits: the bare name of one ("test"), two that differ only in it
    ("seg_train", "seg_test"), or one that contains folders.
    """
    named = {name: split_of(name) for name in index.inside(folder)}
    splits = {name: split for name, split in named.items() if split}
    others = [name for name in named if name not in splits]
    if not splits:
        return None
    if not others and folder not in index.loose:
        _check_distinct(splits, folder)
        if "train" not in splits.values():
            only = next(iter(splits))
            raise LayoutError(
                f"{folder}{only}",
                f"is a {splits[only]} split, and there is no training split; give the folder of "
                "all splits, or this folder itself if its images are for training",
            )
        return dict(splits)
    if likely := _likely_split(index, folder, splits):
        beside = f"the folder {others[0]}" if others else f"the image {index.loose[folder]}"
        raise LayoutError(
            f"{folder}{likely}",
            f"has the name of a split, but {beside} beside it is none; {_SPLIT_ADVICE}",
        )
    return None


def _likely_split(index: _Index, folder: str, splits: dict[str, Split]) -> str:
    """The name of a folder that is likely a split and not a class; "" without one."""
    seen: dict[tuple[str, ...], str] = {}  # words beside the split -> split
    for name, split in splits.items():
        words = other_words(name)
        bare = not words and name.lower() != "train"  # trains are a class of vehicles
        if bare or index.has_folders(f"{folder}{name}/") or seen.get(words, split) != split:
            return name
        seen[words] = split
    return ""


def _check_stray(index: _Index, known: set[str]) -> None:
    """Raise `LayoutError` for a folder "test" or "val" that is not among the `known` splits."""
    for folder in sorted(index.filled - known):
        name = folder.rstrip("/").rpartition("/")[2]
        if split_of(name) in ("val", "test") and not other_words(name):
            raise LayoutError(
                folder,
                f"has the name of a split, but is inside folders that are none; {_SPLIT_ADVICE}",
            )


def _check_distinct(splits: dict[str, Split], folder: str) -> None:
    first: dict[str, str] = {}
    for name, split in splits.items():
        if split in first:
            raise LayoutError(
                folder,
                f"{first[split]} and {name} are both {split} splits; join them, or leave one out "
                "with --exclude",
            )
        first[split] = name


def _splits_of_classes(index: _Index, root: str) -> dict[str, Split]:
    """{name: split} of the folders in the class folders, if all of them are splits; else {}."""
    found: dict[str, Split] = {}
    likely, others = "", root in index.loose
    for name in index.inside(root):
        folder = f"{root}{name}/"
        inner = {name: split_of(name) for name in index.inside(folder)}
        known = {name: split for name, split in inner.items() if split}
        if known and len(known) == len(inner) and folder not in index.loose:
            _check_distinct(known, folder)
            found |= known
            likely = likely or f"{folder}{next(iter(known))}"
        else:
            others = True
            if unclear := _likely_split(index, folder, known):
                likely = f"{folder}{unclear}"
    if likely and others:
        raise LayoutError(
            likely,
            "has the name of a split, but not every class folder holds splits and nothing else; "
            + _SPLIT_ADVICE,
        )
    return {} if others else found


def _inside_splits(index: _Index, splits: dict[str, Split]) -> list[str]:
    """For every split folder of {folder: split} the folder that holds its classes or images.

    A folder without siblings in every split is passed if it holds folders or has the name of the
    split again ("train/train"); otherwise it is a class.
    """
    folders = list(splits)
    while all(f not in index.loose and len(index.inside(f)) == 1 for f in folders):
        names = [index.inside(folder)[0] for folder in folders]
        below = [f"{folder}{name}/" for folder, name in zip(folders, names, strict=True)]
        repeated = list(map(split_of, names)) == list(splits.values())
        if not repeated and not any(index.has_folders(folder) for folder in below):
            break
        folders = below
    return folders


def _check_splits(index: _Index, folders: list[str]) -> None:
    """Raise `LayoutError` unless all splits have classes, or none has.

    `folders` hold the classes or images of each split.
    """
    per_split = {folder: index.check_classes(folder) for folder in folders}
    flat = [folder for folder, names in per_split.items() if not names]
    if flat and len(flat) < len(folders):
        raise LayoutError(
            flat[0],
            "has no class folders but other splits have; move its images into class folders, or "
            f"leave it out with --exclude {flat[0].rstrip('/')!r}",
        )


def _above(folder: str) -> list[str]:
    """`folder`, which ends with "/", and the folders that it is in."""
    parts = folder.split("/")[:-1]
    return ["".join(f"{part}/" for part in parts[: n + 1]) for n in range(len(parts))]


def _class(path: str, start: str) -> str:
    """The folder in `start` that `path` is in; "" if it is directly in `start` or elsewhere."""
    inner = path.removeprefix(start)
    return inner.split("/")[0] if "/" in inner and path.startswith(start) else ""


def _all_or_none(names: list[str]) -> list[str] | None:
    return names if names and all(names) else None

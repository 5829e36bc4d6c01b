"""The images of a folder, zip or tar as a `Listing`: labels and splits of a `Tree`."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal

from bigan.data import DataError
from bigan.data.packing import layout
from bigan.data.packing.label_files import Labelled, by_label_files
from bigan.data.packing.listing import Listing, class_order, listing_hash
from bigan.data.packing.trees import Tree, drawing, without

Labels = Literal["auto", "folders", "none"]


def tree_listing(
    tree: Tree, where: str, name: str, labels: Labels = "auto", exclude: Sequence[str] = ()
) -> Listing:
    """The images of `tree`, which is at `where`, with classes and splits.

    labels: "auto" takes label files if there are any, else class folders; "folders" ignores the
        labels in label files; "none" gives all images the one class "all". Declared splits count.
    exclude: shell patterns of files and folders to leave out (`trees.without`).

    Keys are paths below the folders without siblings. Raises `DataError` if there are no images,
    a label file is unreadable, labels contradict each other or the layout is ambiguous; then its
    notes show the folders and the known layouts.
    """
    tree = without(tree, exclude)
    paths = sorted(tree.images, key=lambda path: path.split("/"))
    if not paths and tree.bad:
        return Listing(name, "", (), (), (), lambda i: b"", bad=tuple(tree.bad))
    try:
        return _listing(tree, paths, where, name, labels)
    except layout.LayoutError as error:
        place = f"{where}/{error.folder}" if error.folder else where
        if not place.isprintable():
            raise DataError(f"{where}: folder {error.folder!r} has an unprintable name; "
                            "rename it") from None  # fmt: skip
        clear = DataError(f"{place}: {error.problem}")
        clear.add_note(f"{drawing(where, tree, error.folder)}\n{layout.LAYOUTS}")
        raise clear from None


def _listing(tree: Tree, paths: list[str], where: str, name: str, labels: Labels) -> Listing:
    _check_sidecars(tree, paths, labels)
    label_files = tree.label_files
    declared = by_label_files(paths, label_files, where, with_labels=labels == "auto")
    if labels == "auto" and label_files and declared.classes is not None:
        labelled = declared
        root, splits = _splits_beside_label_files(tree, paths, labelled, where)
    else:
        need_classes = labels != "none"
        classes: Sequence[str] | None
        if declared.splits:
            root, splits = _splits_beside_label_files(tree, paths, declared, where)
            classes = layout.class_folders(paths, tree.folders) if need_classes else None
        else:
            found = layout.understand(paths, tree.folders, need_classes=need_classes)
            root, splits, classes = found.root, found.splits, found.classes
        labelled = _by_folder(classes if need_classes else None, len(paths))
        if declared.splits:  # images that the file does not list stay unusable
            unlisted = {i: why for i, why in enumerate(declared.labels) if isinstance(why, str)}
            every = [unlisted.get(i, label) for i, label in enumerate(labelled.labels)]
            labelled = Labelled(labelled.classes, every, declared.bad)
    _check_trained(labelled, splits)
    good = [i for i, label in enumerate(labelled.labels) if isinstance(label, int)]
    bad = [(paths[i], label) for i, label in enumerate(labelled.labels) if isinstance(label, str)]
    kept = [paths[i] for i in good]
    keys = tuple(path.removeprefix(root) for path in kept)
    entries: list[tuple[str | int, ...]] = [
        (path.removeprefix(root), tree.images[path]) for path in paths
    ]
    return Listing(
        name=name,
        identity=listing_hash(entries, *(label_files[file] for file in sorted(label_files))),
        classes=labelled.classes or (),
        keys=keys,
        labels=tuple(label for label in labelled.labels if isinstance(label, int)),
        original=lambda i: tree.read(kept[i]),
        official=None if splits is None else tuple(splits[i] for i in good),
        bad=tuple((p.removeprefix(root), why) for p, why in (*tree.bad, *labelled.bad, *bad)),
        stamp=listing_hash(sorted(tree.times)),
        skipped=tuple(sorted(tree.skipped.items())),
        of_files=True,
    )


def _by_folder(classes: Sequence[str] | None, num_images: int) -> Labelled:
    if classes is None:
        return Labelled(("all",), [0] * num_images)
    normalized = [unicodedata.normalize("NFC", name) for name in classes]
    names = class_order(normalized)
    number = {name: n for n, name in enumerate(names)}
    return Labelled(names, [number[name] for name in normalized])


def _check_sidecars(tree: Tree, paths: list[str], labels: Labels) -> None:
    """Raise `LayoutError` for files that label the image of the same name, which are not read."""
    stems = {path.rpartition(".")[0] for path in paths}
    if labels == "auto" and (beside := next((s for s in tree.sidecars if s in stems), None)):
        raise layout.LayoutError(
            "",
            f"holds {beside}{tree.sidecars[beside]}, the label of one image, as an extracted "
            "WebDataset does; pack its tars, or write one with `tar --sort=name` (no dots in names "
            "but that of the suffix); --labels folders or --labels none ignores these files",
        )


def _check_trained(labelled: Labelled, splits: Sequence[str] | None) -> None:
    """Raise `LayoutError` for a class with images in other splits only."""
    if splits is None:
        return
    pairs = [(n, s) for n, s in zip(labelled.labels, splits, strict=True) if isinstance(n, int)]
    trained = {label for label, split in pairs if split == "train"}
    missing = sorted({label for label, _ in pairs} - trained)
    if missing and labelled.classes:
        name = labelled.classes[missing[0]]
        problem = f"class {name!r} has no images in train; add or remove it"
        raise layout.LayoutError("", problem)


def _splits_beside_label_files(
    tree: Tree, paths: list[str], labelled: Labelled, where: str
) -> tuple[str, Sequence[str] | None]:
    """(root, splits) of images with labels from files; declared splits come before folders.

    Raises `DataError` for an image whose folder is that of another class or split.
    """
    try:
        found = layout.understand(paths, tree.folders, need_classes=False)
    except layout.LayoutError:
        if labelled.splits is None:
            raise
        return layout.content_folder(paths, tree.folders), labelled.splits
    advice = "correct one of them, remove the label file, or use --labels folders"
    names = set(found.classes or ())
    for path, folder, label in zip(paths, found.classes or (), labelled.labels, strict=False):
        name = folder
        if isinstance(label, int) and labelled.classes:
            name = labelled.classes[label]
        if name != folder and name in names:
            raise DataError(
                f"{where}/{path}: is in the class folder {folder!r} but has the label {name!r}; "
                + advice
            )
    both = zip(paths, found.splits or (), labelled.splits or (), strict=False)
    for path, folder, split in both:
        if folder != split:
            raise DataError(
                f"{where}/{path}: is in a {folder} folder but has the split {split!r}; {advice}"
            )
    return found.root, labelled.splits or found.splits

"""The images of a folder, zip or tar as a `Listing`: labels and splits of a `Tree`."""

from __future__ import annotations

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

    labels: "auto" takes label files if there are any, else class folders; "folders" ignores label
        files; "none" gives all images the one class "all".
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
    label_files = tree.label_files if labels == "auto" else {}
    if tree.skipped[".cls"] and labels == "auto":
        raise layout.LayoutError(
            "",
            "holds .cls files, as an extracted WebDataset does; pack its tars, write one with "
            "`tar --sort=name`, or ignore them with --labels folders or --labels none",
        )
    if label_files:
        labelled = by_label_files(paths, label_files, where)
        root, splits = _splits_beside_label_files(tree, paths, labelled, where)
    else:
        found = layout.understand(paths, tree.folders, need_classes=labels != "none")
        labelled = _by_folder(None if labels == "none" else found.classes, len(paths))
        root, splits = found.root, found.splits
    good = [i for i, label in enumerate(labelled.labels) if isinstance(label, int)]
    bad = [(paths[i], label) for i, label in enumerate(labelled.labels) if isinstance(label, str)]
    kept = [paths[i] for i in good]
    keys = tuple(path.removeprefix(root) for path in kept)
    entries: list[tuple[str | int, ...]] = [
        (path.removeprefix(root), *tree.images[path]) for path in paths
    ]
    return Listing(
        name=name,
        identity=listing_hash(entries, *(label_files[file] for file in sorted(label_files))),
        classes=labelled.classes,
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
    names = class_order(classes)
    number = {name: n for n, name in enumerate(names)}
    return Labelled(names, [number[name] for name in classes])


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
        name = labelled.classes[label] if isinstance(label, int) else folder
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

"""A folder of image files as a `Tree`."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from bigan.data.packing.listing import MAX_BYTES
from bigan.data.packing.trees import MAX_JSON, TOO_LARGE, Tree, is_image, is_label_file, is_skipped


def folder_tree(root: Path, first: bool = False) -> Tree:
    """The content of the folder `root`; with `first`, only up to the first image.

    Symbolic links are followed (a class folder may be one) unless they form a cycle. Raises
    `OSError` for a folder that cannot be read.
    """
    tree = Tree(read=lambda path: (root / path).read_bytes())
    start = root.stat()
    pending = [("", frozenset({(start.st_dev, start.st_ino)}))]
    while pending:
        parent, above = pending.pop()
        with os.scandir(root / parent) as entries:
            for entry in entries:
                if is_skipped(entry.name):
                    continue
                path = f"{parent}/{entry.name}" if parent else entry.name
                try:
                    status = entry.stat()  # of the target of a link
                except OSError as error:
                    if is_image(path):
                        tree.bad.append((path, f"cannot be read: {error.strerror}"))
                    else:
                        tree.skip(path)
                    continue
                if stat.S_ISDIR(status.st_mode):
                    place = (status.st_dev, status.st_ino)
                    if place not in above:  # not a cycle of links
                        tree.folders.add(path)
                        pending.append((path, above | {place}))
                else:
                    _add_file(tree, root, path, status)
                if first and tree.images:
                    return tree
    tree.bad.sort()
    return tree


def _add_file(tree: Tree, root: Path, path: str, status: os.stat_result) -> None:
    regular = stat.S_ISREG(status.st_mode)
    if regular and is_label_file(path):
        tree.label_files[path] = (root / path).read_bytes()
    elif not regular:
        tree.skip(path)
    elif not is_image(path):
        tree.skip(path, (root / path).read_bytes if status.st_size < MAX_JSON else None)
    elif status.st_size > MAX_BYTES:
        tree.bad.append((path, TOO_LARGE))
    else:
        tree.images[path] = status.st_size
        tree.times.append((path, status.st_mtime_ns))


def has_images(root: Path) -> bool:
    """Whether there is an image file below `root`."""
    return bool(folder_tree(root, first=True).images)

"""Files and folders that are either whole or absent, whatever kills the writer.

A file is written under a temporary name in the same folder and renamed. A folder gets the marker
`COMPLETE` last and is renamed into place; readers ignore any folder without the marker.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

COMPLETE = "COMPLETE"


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` at once: a reader sees the old file or the new one."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes `folder`, marked `COMPLETE`.

    An existing `folder` is replaced. On an exception nothing of the new folder remains.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    former = folder.with_name(f".{folder.name}.{os.getpid()}.former.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
        (temporary / COMPLETE).write_text("")
        _sync(temporary)
        if folder.exists():  # an incomplete one, or the same state saved again
            folder.replace(former)  # at once: a folder being deleted must not look complete
        temporary.replace(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether `folder` carries its completion marker."""
    return (folder / COMPLETE).is_file()


def numbered_folders(parent: Path) -> list[Path]:
    """Complete folders below `parent` whose names are counts of images, smallest first."""
    if not parent.is_dir():
        return []
    found = [p for p in parent.iterdir() if p.name.isdigit() and is_complete(p)]
    return sorted(found, key=lambda p: int(p.name))


def remove_leftovers(parent: Path, name: str = "*") -> None:
    """Delete temporary folders and files of `name` that a killed writer left in `parent`."""
    for path in parent.glob(f".{name}.*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

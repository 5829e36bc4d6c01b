"""Folders and zip archives of image files.

Both are listed the same way: the paths of the images, sorted; classes from the top-level folders
or from a label file at the root (see `labels`); hidden entries and other kinds of file are passed
over. Only listed files are ever opened, whatever a label file says.
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path

from bigan.data import DataError
from bigan.data.decode import BadImageError
from bigan.data.labels import (
    LABEL_FILES,
    Labelled,
    by_folder,
    by_label_file,
    is_suffix_known,
    official_splits,
    read_label_file,
)
from bigan.data.listing import MAX_BYTES, Listing, first_line, listing_hash, unsafe

_TOO_LARGE = f"is larger than {MAX_BYTES} bytes"


def folder(root: Path) -> Listing:
    """The image files below `root`.

    Symbolic links are followed (a class folder may be one), but never in circles. Raises
    `DataError` if there are no images, the layout is ambiguous or the label file unreadable.
    """
    sizes, folders, bad = _walk(root)
    present = [name for name in LABEL_FILES if (root / name).is_file()]

    def original(key: str) -> bytes:
        return (root / key).read_bytes()

    return _listing(
        root,
        root.resolve().name,
        {key: (size,) for key, size in sizes.items()},
        folders,
        bad,
        {name: (root / name).read_bytes() for name in present},
        original,
    )


def has_images(root: Path) -> bool:
    """Whether `folder` would find an image."""
    return bool(_walk(root, first=True)[0])


def zip_archive(file: Path) -> Listing:
    """The images in a zip archive, stored or deflated; one common wrapping folder is stripped.

    Raises `DataError` for a damaged archive; a member whose checksum is wrong is a `BadImageError`
    when it is read. Every read opens the archive for itself: any thread or process may read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            wrap = _wrapping([info.filename.replace("\\", "/") for info in infos])
            members, folders, bad = _members(infos, wrap, file.stat().st_size)
            label_files = {n: archive.read(members.pop(n)) for n in LABEL_FILES if n in members}
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError) as error:
        raise DataError(
            f"{file}: is not a whole zip archive ({first_line(error)}); copy it again"
        ) from None
    return _listing(
        file,
        file.stem,
        {key: (info.file_size, info.CRC) for key, info in members.items()},
        folders,
        bad,
        label_files,
        lambda key: _read_member(file, members[key]),
    )


def _listing(
    where: Path,
    name: str,
    found: dict[str, tuple[int, ...]],
    folders: Collection[str],
    bad: list[tuple[str, str]],
    label_files: dict[str, bytes],
    original: Callable[[str], bytes],
) -> Listing:
    """The common part; `found` maps every image's path to its size (and checksum)."""
    keys = sorted(found, key=lambda key: key.split("/"))
    if len(label_files) > 1:
        raise DataError(f"{where}: holds both {' and '.join(label_files)}; remove one of them")
    if label_files:
        (label_file, content), *_ = label_files.items()
        entries = read_label_file(label_file, content, f"{where}/{label_file}")
        labelled = by_label_file(keys, entries, label_file)
    elif not keys and bad:
        labelled = Labelled(("all",), [])
    else:
        labelled = by_folder(keys, folders, str(where))
    official = official_splits(keys, folders)
    good = [i for i, label in enumerate(labelled.labels) if isinstance(label, int)]
    unlabelled = [
        (keys[i], label) for i, label in enumerate(labelled.labels) if isinstance(label, str)
    ]
    kept = tuple(keys[i] for i in good)
    return Listing(
        name=name,
        identity=listing_hash(((key, *found[key]) for key in keys), *label_files.values()),
        classes=labelled.classes,
        keys=kept,
        labels=tuple(label for label in labelled.labels if isinstance(label, int)),
        original=lambda i: original(kept[i]),
        official=None if official is None else tuple(official[i] for i in good),
        bad=(*bad, *labelled.bad, *unlabelled),
    )


def _walk(
    root: Path, first: bool = False
) -> tuple[dict[str, int], list[str], list[tuple[str, str]]]:
    """(size of every image, folders, bad) below `root`, as paths relative to it."""
    sizes: dict[str, int] = {}
    folders: list[str] = []
    bad: list[tuple[str, str]] = []
    start = root.stat()
    pending = [("", frozenset({(start.st_dev, start.st_ino)}))]
    while pending:
        parent, above = pending.pop()
        with os.scandir(root / parent) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                key = f"{parent}/{entry.name}" if parent else entry.name
                try:
                    status = entry.stat()  # of what a link points to
                except OSError as error:
                    if is_suffix_known(key):
                        bad.append((key, f"cannot be read: {error.strerror}"))
                    continue
                if stat.S_ISDIR(status.st_mode):
                    place = (status.st_dev, status.st_ino)
                    if place not in above:  # a link back up would never end
                        folders.append(key)
                        pending.append((key, above | {place}))
                elif stat.S_ISREG(status.st_mode) and is_suffix_known(key):
                    if status.st_size > MAX_BYTES:
                        bad.append((key, _TOO_LARGE))
                        continue
                    sizes[key] = status.st_size
                    if first:
                        return sizes, folders, bad
    return sizes, folders, sorted(bad)


def _wrapping(names: list[str]) -> str:
    """The folder (with its "/") that all folders, images and label files of a zip lie in, or ""."""
    counted = [
        name
        for name in names
        if (name.endswith("/") or is_suffix_known(name) or name.split("/")[-1] in LABEL_FILES)
        and not (_hidden(name) or unsafe(name))
    ]
    tops = {name.split("/")[0] for name in counted}
    return f"{tops.pop()}/" if len(tops) == 1 and all("/" in name for name in counted) else ""


def _hidden(name: str) -> bool:
    parts = name.rstrip("/").split("/")
    return any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in parts)


def _members(
    infos: list[zipfile.ZipInfo], wrap: str, archive_size: int
) -> tuple[dict[str, zipfile.ZipInfo], set[str], list[tuple[str, str]]]:
    """(images and label files by key, folders, bad)."""
    members: dict[str, zipfile.ZipInfo] = {}
    folders: set[str] = set()
    bad: list[tuple[str, str]] = []
    for info in infos:
        name = info.filename.replace("\\", "/")
        if _hidden(name):
            continue
        if unsafe(name):
            bad.append((info.filename, "leads out of the archive"))
            continue
        if not name.startswith(wrap):  # a read-me beside the wrapping folder
            continue
        key = name.removeprefix(wrap)
        parts = key.split("/")
        folders |= {"/".join(parts[:depth]) for depth in range(1, len(parts))}
        if key.endswith("/") or not (is_suffix_known(key) or key in LABEL_FILES):
            continue
        if key in members:
            bad.append((key, "appears twice"))
        elif info.flag_bits & 1:
            bad.append((key, "is encrypted"))
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            bad.append((key, f"is compressed by method {info.compress_type}; use deflate"))
        elif max(info.file_size, info.compress_size) > MAX_BYTES:
            bad.append((key, _TOO_LARGE))
        elif info.compress_size > archive_size:
            bad.append((key, "is cut off"))
        else:
            members[key] = info
    return members, folders - {""}, bad


def _read_member(file: Path, info: zipfile.ZipInfo) -> bytes:
    """A member's content, checked. `zipfile` itself would parse the directory for every reader."""
    with file.open("rb") as archive:
        archive.seek(info.header_offset)
        header = archive.read(30)
        if len(header) < 30 or not header.startswith(b"PK\3\4"):
            raise BadImageError("has a damaged header in the zip archive")
        archive.seek(sum(struct.unpack("<HH", header[26:30])), os.SEEK_CUR)  # name and extra
        data = archive.read(info.compress_size)
    if info.compress_type == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-15).decompress(data, info.file_size + 1)
        except zlib.error as error:
            raise BadImageError(f"is damaged in the zip archive ({error})") from None
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise BadImageError("is damaged in the zip archive (wrong checksum)")
    return data

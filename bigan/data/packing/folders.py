"""Folders and zip archives of image files.

Both are listed in the same way: the sorted paths of the images, with classes from the top-level
folders or from a label file at the root (see `labels`). Hidden entries are ignored; other kinds of
files are ignored and counted. A label file cannot make bigan open a file that is not listed.
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bigan.data import DataError
from bigan.data.format.codec import BadImageError, first_line
from bigan.data.packing.labels import (
    LABEL_FILES,
    Labelled,
    by_folder,
    by_label_file,
    is_suffix_known,
    official_splits,
    read_label_file,
)
from bigan.data.packing.listing import MAX_BYTES, Listing, is_hidden, listing_hash, unsafe

_TOO_LARGE = f"is larger than {MAX_BYTES} bytes"


@dataclass
class _Found:
    """The content of a folder or zip, by path relative to it."""

    images: dict[str, tuple[int, ...]] = field(default_factory=dict)  # size (and checksum)
    folders: set[str] = field(default_factory=set)
    bad: list[tuple[str, str]] = field(default_factory=list)
    times: list[tuple[str, int]] = field(default_factory=list)  # of modification, nanoseconds
    num_ignored: int = 0  # files whose suffix is not that of an image


def folder(root: Path) -> Listing:
    """The image files below `root`.

    Symbolic links are followed (a class folder may be one) unless they form a cycle. Raises
    `DataError` if there are no images, the layout is ambiguous or the label file unreadable.
    """
    found = _walk(root)
    present = [name for name in LABEL_FILES if (root / name).is_file()]

    def original(key: str) -> bytes:
        return (root / key).read_bytes()

    return _listing(
        root,
        root.resolve().name,
        found,
        {name: (root / name).read_bytes() for name in present},
        original,
    )


def has_images(root: Path) -> bool:
    """Whether there is an image file below `root`."""
    return bool(_walk(root, first=True).images)


def zip_archive(file: Path) -> Listing:
    """The images in a zip archive, stored or deflated; one common wrapping folder is stripped.

    Raises `DataError` for a damaged archive. Reading a member with a wrong checksum raises
    `BadImageError`. Every read opens the archive: reads are safe in any thread or process.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            status = file.stat()
            found, members = _members(archive.infolist(), status.st_size)
            found.times.append((file.name, status.st_mtime_ns))
            label_files = {n: archive.read(members.pop(n)) for n in LABEL_FILES if n in members}
    # zipfile raises NotImplementedError for an unknown compression.
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError) as error:
        raise DataError(
            f"{file}: is a damaged zip archive ({first_line(error)}); copy it again"
        ) from None
    found.images = {key: (info.file_size, info.CRC) for key, info in members.items()}
    return _listing(
        file,
        file.stem,
        found,
        label_files,
        lambda key: _read_member(file, members[key]),
    )


def _listing(
    where: Path,
    name: str,
    found: _Found,
    label_files: dict[str, bytes],
    original: Callable[[str], bytes],
) -> Listing:
    """The listing of the content `found` of a folder or zip."""
    keys = sorted(found.images, key=lambda key: key.split("/"))
    if len(label_files) > 1:
        raise DataError(f"{where}: holds both {' and '.join(label_files)}; remove one of them")
    if label_files:
        (label_file, content), *_ = label_files.items()
        entries = read_label_file(label_file, content, f"{where}/{label_file}", keys)
        labelled = by_label_file(keys, entries, label_file)
    elif not keys and found.bad:
        labelled = Labelled(("all",), [])
    else:
        labelled = by_folder(keys, found.folders, str(where))
    official = official_splits(keys, found.folders)
    good = [i for i, label in enumerate(labelled.labels) if isinstance(label, int)]
    unlabelled = [
        (keys[i], label) for i, label in enumerate(labelled.labels) if isinstance(label, str)
    ]
    kept = tuple(keys[i] for i in good)
    return Listing(
        name=name,
        identity=listing_hash(((key, *found.images[key]) for key in keys), *label_files.values()),
        classes=labelled.classes,
        keys=kept,
        labels=tuple(label for label in labelled.labels if isinstance(label, int)),
        original=lambda i: original(kept[i]),
        official=None if official is None else tuple(official[i] for i in good),
        bad=(*found.bad, *labelled.bad, *unlabelled),
        stamp=listing_hash(sorted(found.times)),
        num_ignored=found.num_ignored,
    )


def _walk(root: Path, first: bool = False) -> _Found:
    """The content of `root`; with `first`, only up to the first image."""
    found = _Found()
    start = root.stat()
    pending = [("", frozenset({(start.st_dev, start.st_ino)}))]
    while pending:
        parent, above = pending.pop()
        with os.scandir(root / parent) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                key = f"{parent}/{entry.name}" if parent else entry.name
                try:
                    status = entry.stat()  # of the target of a link
                except OSError as error:
                    if is_suffix_known(key):
                        found.bad.append((key, f"cannot be read: {error.strerror}"))
                    else:
                        found.num_ignored += 1
                    continue
                if stat.S_ISDIR(status.st_mode):
                    place = (status.st_dev, status.st_ino)
                    if place not in above:  # not a cycle of links
                        found.folders.add(key)
                        pending.append((key, above | {place}))
                elif stat.S_ISREG(status.st_mode) and is_suffix_known(key):
                    if status.st_size > MAX_BYTES:
                        found.bad.append((key, _TOO_LARGE))
                        continue
                    found.images[key] = (status.st_size,)
                    found.times.append((key, status.st_mtime_ns))
                    if first:
                        return found
                elif key not in LABEL_FILES:
                    found.num_ignored += 1
    found.bad.sort()
    return found


def _wrapping(names: list[str]) -> str:
    """The single top-level folder of a zip, with its "/"; "" if there are several or none."""
    counted = [
        name
        for name in names
        if (name.endswith("/") or is_suffix_known(name) or name.split("/")[-1] in LABEL_FILES)
        and not (_hidden(name) or unsafe(name))
    ]
    tops = {name.split("/")[0] for name in counted}
    return f"{tops.pop()}/" if len(tops) == 1 and all("/" in name for name in counted) else ""


def _hidden(name: str) -> bool:
    return any(part == "__MACOSX" or is_hidden(part) for part in name.split("/"))


def _name(info: zipfile.ZipInfo) -> str:
    """The path of a member with "/" and without "./"."""
    return "/".join(part for part in info.filename.replace("\\", "/").split("/") if part != ".")


def _members(
    infos: list[zipfile.ZipInfo], archive_size: int
) -> tuple[_Found, dict[str, zipfile.ZipInfo]]:
    """(content of the archive without `images`, its images and label files by key)."""
    wrap = _wrapping([_name(info) for info in infos])
    members: dict[str, zipfile.ZipInfo] = {}
    found = _Found()
    bad = found.bad
    for info in infos:
        name = _name(info)
        if (not name and info.filename) or _hidden(name):  # an empty name is the root, "./"
            continue
        if unsafe(name):
            bad.append((info.filename, "points outside of the archive"))
            continue
        if not name.startswith(wrap):  # a README beside the wrapping folder
            found.num_ignored += not name.endswith("/")
            continue
        key = name.removeprefix(wrap)
        parts = key.split("/")
        found.folders |= {"/".join(parts[:depth]) for depth in range(1, len(parts))}
        if not key or key.endswith("/"):
            continue
        if not (is_suffix_known(key) or key in LABEL_FILES):
            found.num_ignored += 1
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
            bad.append((key, "is truncated"))
        else:
            members[key] = info
    found.folders.discard("")
    return found, members


def _read_member(file: Path, info: zipfile.ZipInfo) -> bytes:
    """A member's verified content. `zipfile` would parse the directory again for every read."""
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

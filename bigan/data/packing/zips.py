"""A zip archive of image files as a `Tree`."""

from __future__ import annotations

import contextlib
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bigan.data import DataError
from bigan.data.format.codec import BadImageError, first_line
from bigan.data.packing.listing import MAX_BYTES, unsafe
from bigan.data.packing.trees import MAX_JSON, TOO_LARGE, Tree, is_image, is_label_file, is_skipped

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def zip_tree(file: Path) -> Tree:
    """The content of a zip archive, stored or deflated.

    Raises `DataError` for a damaged archive. Reading a member with a wrong checksum raises
    `BadImageError`. Every read opens the archive: reads are safe in any thread or process.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    tree = Tree(read=lambda path: _read_member(file, members[path]))
    try:
        with zipfile.ZipFile(file) as archive:
            status = file.stat()
            tree.times.append((file.name, status.st_mtime_ns))
            for info in archive.infolist():
                read = partial(archive.read, info) if info.file_size < MAX_JSON else None
                _add(tree, members, info, status.st_size, read)
            for path in [path for path in members if is_label_file(path)]:
                tree.label_files[path] = archive.read(members.pop(path))
    # zipfile raises NotImplementedError for an unknown compression.
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError) as error:
        raise DataError(
            f"{file}: is a damaged zip archive ({first_line(error)}); copy it again"
        ) from None
    tree.images = {path: info.file_size for path, info in members.items()}
    tree.times += [(path, info.CRC) for path, info in members.items()]
    return tree


def _add(
    tree: Tree,
    members: dict[str, zipfile.ZipInfo],
    info: zipfile.ZipInfo,
    archive_size: int,
    read: Callable[[], bytes] | None,
) -> None:
    """Add a member to `members` if it is an image or label file, else to `tree`."""
    name = _name(info).replace("\\", "/")
    path = "/".join(part for part in name.split("/") if part != ".")
    if not path.strip("/") and info.filename.rstrip("/") in ("", "."):  # the root, "./"
        return
    if is_skipped(path):
        return
    if unsafe(path):
        if not path.endswith("/"):
            tree.bad.append((info.filename, "points outside of the archive"))
        return
    tree.add_folders_of(path)
    if path.endswith("/"):
        return
    if not (is_image(path) or is_label_file(path)):
        tree.skip(path, read if not _unusable(info, False, archive_size) else None)
    elif reason := _unusable(info, path in members, archive_size):
        tree.bad.append((path, reason))
    else:
        members[path] = info


def _name(info: zipfile.ZipInfo) -> str:
    """The name of a member. macOS writes UTF-8 without the flag for it: `zipfile` reads cp437."""
    if not info.flag_bits & 0x800 and not info.filename.isascii():
        with contextlib.suppress(UnicodeError):
            return info.filename.encode("cp437").decode()
    return info.filename


def _unusable(info: zipfile.ZipInfo, seen: bool, archive_size: int) -> str:
    """The reason why a member cannot be used; "" without one."""
    if seen:
        return "appears twice"
    if info.flag_bits & 1:
        return "is encrypted"
    if info.compress_type not in _METHODS:
        return f"is compressed by method {info.compress_type}; use deflate"
    if max(info.file_size, info.compress_size) > MAX_BYTES:
        return TOO_LARGE
    return "is truncated" if info.compress_size > archive_size else ""


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

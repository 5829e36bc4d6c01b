"""Tar archives of image files as a `Tree`: class folders in one archive, or divided among several.

Tars of a WebDataset, whose images have their labels beside them, are for `webdatasets`.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import mmap
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bigan.data import DataError
from bigan.data.format.codec import first_line
from bigan.data.format.tar import BLOCK, Buffer, Member, group_samples, walk_tar
from bigan.data.packing.listing import MAX_BYTES, read_at, unsafe
from bigan.data.packing.trees import TOO_LARGE, Tree, is_image, is_label_file, is_skipped

JSON_LABELS = ("label", "cls", "class")
COMPRESSED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
UNREADABLE = {b"\x28\xb5\x2f\xfd": "zstd -d", b"\x04\x22\x4d\x18": "lz4 -d"}
_JSON_BYTES = 2**20  # larger files are no labels of one image


def tar_tree(files: Sequence[Path]) -> Tree:
    """The content of one tar, or of several as if they were extracted into one folder.

    Raises `DataError` for a damaged tar. Reads are safe in any thread or process.
    """
    places: dict[str, tuple[Path, int, int]] = {}
    tree = Tree(read=lambda path: read_at(*places[path]))
    for file in files:
        status = file.stat()
        tree.times.append((file.name, status.st_mtime_ns))
        if not status.st_size:
            raise DataError(f"{file}: is empty (0 bytes); copy it again")
        with file.open("rb") as stream, _mapped(stream) as data:
            for member in walk_tar(data, str(file), with_folders=True):
                _add(tree, places, file, data, member)
    tree.bad.sort()
    return tree


def _add(
    tree: Tree, places: dict[str, tuple[Path, int, int]], file: Path, data: Buffer, member: Member
) -> None:
    path = "/".join(part for part in member.name.split("/") if part != ".")
    if not path.strip("/") and not member.name.startswith("/"):  # the root, "./"
        return
    if is_skipped(path):
        return
    if unsafe(path):
        if not path.endswith("/"):
            tree.bad.append((member.name, "points outside of the archive"))
        return
    tree.add_folders_of(path)
    if path.endswith("/"):
        return
    if path in tree.images or path in tree.label_files:
        tree.bad.append((path, "appears twice"))
    elif is_label_file(path):
        tree.label_files[path] = bytes(data[member.offset : member.offset + member.size])
    elif not is_image(path):
        tree.skip(path)
    elif member.size > MAX_BYTES:
        tree.bad.append((path, TOO_LARGE))
    else:
        tree.images[path] = (member.size,)
        places[path] = (file, member.offset, member.size)


def _mapped(stream: Any) -> mmap.mmap:
    return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def is_tar(file: Path) -> bool:
    """Whether `file` starts with a tar header."""
    with file.open("rb") as stream:
        return stream.read(BLOCK)[257:262] == b"ustar"


def has_labels(files: Iterable[Path]) -> bool:
    """Whether the samples of a tar have labels: `.cls` members, or `.json` with a label.

    Reads headers only, and one .json of each tar. A damaged tar counts up to the damage.
    """
    return any(_has_labels(file) for file in files)


def has_folders(files: Iterable[Path]) -> bool:
    """Whether images of the tars are in folders; damaged tars count up to the damage."""
    names = (member.name for file in files for member in _members(file))
    return any("/" in name.removeprefix("./") for name in names if is_image(name))


def _has_labels(file: Path) -> bool:
    json_member: Member | None = None
    for _, group in group_samples(_members(file)):
        suffixes = dict(group)
        if "cls" in suffixes:
            return True
        if json_member is None and "json" in suffixes and len(group) > 1:
            json_member = suffixes["json"]
    if json_member is None or json_member.size > _JSON_BYTES:
        return False
    try:
        content = json.loads(read_at(file, json_member.offset, json_member.size))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and any(name in content for name in JSON_LABELS)


def _members(file: Path) -> list[Member]:
    """The members of a tar up to the first damage."""
    members: list[Member] = []
    if not file.stat().st_size:
        return members
    with file.open("rb") as stream, _mapped(stream) as data, contextlib.suppress(DataError):
        members.extend(walk_tar(data, str(file)))
    return members


def decompressed(file: Path, scratch: Path) -> Path:
    """The tar in a .tar.gz, .tar.bz2 or .tar.xz, written to the folder `scratch`.

    Images are read in the order of the shards, which needs random access. Raises `DataError` for a
    damaged file and for one that does not contain a tar.
    """
    with file.open("rb") as stream:
        head = stream.read(8)
    opener = next(opener for magic, opener in COMPRESSED.items() if head.startswith(magic))
    scratch.mkdir(parents=True, exist_ok=True)
    tar = scratch / f"{archive_name(file)}.tar"
    try:
        with opener(file) as source, tar.open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(file, error) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(file, error) from None
    if not is_tar(tar):
        raise DataError(f"{file}: contains no tar; extract it and give the folder")
    shutil.copystat(file, tar)  # the time of modification identifies the source
    return tar


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: is a damaged archive ({first_line(error)}); download it again")


def archive_name(file: Path) -> str:
    """The name of an archive without ".tar", ".tar.gz", ".tgz" and the like."""
    return re.sub(r"(\.tar)?(\.[A-Za-z0-9]+)?$", "", file.name) or file.name

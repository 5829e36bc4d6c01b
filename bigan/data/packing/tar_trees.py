"""A tar archive of image files as a `Tree`.

Tars of a WebDataset, whose images have their labels beside them, are for `webdatasets`.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import mmap
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigan.data import DataError
from bigan.data.format.codec import first_line
from bigan.data.format.tar import BLOCK, Buffer, Member, group_samples, walk_tar
from bigan.data.packing.listing import MAX_BYTES, read_at, unsafe
from bigan.data.packing.tar_samples import ARRAYS, LABELS
from bigan.data.packing.trees import (
    MAX_JSON,
    TOO_LARGE,
    Tree,
    has_json_label,
    is_image,
    is_label_file,
    is_skipped,
)


def tar_tree(file: Path) -> Tree:
    """The content of a tar.

    Raises `DataError` for a damaged tar. Reads are safe in any thread or process.
    """
    places: dict[str, Member] = {}
    tree = Tree(read=lambda path: read_at(file, places[path].offset, places[path].size))
    status = file.stat()
    tree.times.append((file.name, status.st_mtime_ns))
    if not status.st_size:
        raise DataError(f"{file}: is empty (0 bytes); copy it again")
    with file.open("rb") as stream, _mapped(stream) as data:
        for member in walk_tar(data, str(file), with_folders=True):
            _add(tree, places, data, member)
    tree.bad.sort()
    return tree


def _add(tree: Tree, places: dict[str, Member], data: Buffer, member: Member) -> None:
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
        tree.skip(path, lambda: bytes(data[member.offset : member.offset + member.size]))
    elif member.size > MAX_BYTES:
        tree.bad.append((path, TOO_LARGE))
    else:
        tree.images[path] = member.size
        places[path] = member


def _mapped(stream: Any) -> mmap.mmap:
    return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def is_tar(file: Path) -> bool:
    """Whether `file` starts with a tar header."""
    with file.open("rb") as stream:
        return stream.read(BLOCK)[257:262] == b"ustar"


def is_webdataset(file: Path) -> bool:
    """Whether the images of a tar have labels beside them: `1.jpg`, `1.cls`.

    Labels are members with a suffix of `tar_samples.LABELS`, arrays, a `.json` with a label (the
    first one is read) and, if no image is in a folder, `.txt`. Headers after a damaged one do not
    count.
    """
    keys: set[str] = set()  # of images
    json_members: list[tuple[str, Member]] = []
    texts: set[str] = set()
    arrays: set[str] = set()
    for key, group in group_samples(_members(file)):
        for suffix, member in group:
            kind = suffix.rpartition(".")[2]
            if suffix.removesuffix(".txt") in LABELS:
                return True
            if kind in ARRAYS:
                arrays.add(key)
            elif is_image(member.name):
                keys.add(key)
            elif kind == "json" and not is_label_file(member.name):
                json_members.append((key, member))
            elif kind == "txt":
                texts.add(key)
    if arrays & keys or (texts & keys and not any("/" in key for key in keys)):
        return True
    return any(_has_label(file, m) for m in [m for key, m in json_members if key in keys][:1])


def _has_label(file: Path, member: Member) -> bool:
    """Whether a .json has a label."""
    return member.size < MAX_JSON and has_json_label(read_at(file, member.offset, member.size))


def _members(file: Path) -> list[Member]:
    """The members of a tar up to the first damage."""
    members: list[Member] = []
    if not file.stat().st_size:
        return members
    with file.open("rb") as stream, _mapped(stream) as data, contextlib.suppress(DataError):
        members.extend(walk_tar(data, str(file)))
    return members


def decompressed(file: Path, opener: Callable[[Path], Any], scratch: Path) -> Path:
    """The tar in the compressed `file`, which `opener` opens, written to the folder `scratch`.

    Images are read in the order of the shards, which needs random access. Raises `DataError` for a
    damaged file and for one that does not contain a tar.
    """
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

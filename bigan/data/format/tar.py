"""Tar shards, written by WebDataset and read strictly.

Python's `tarfile`, which WebDataset uses, treats a damaged header as the end of the archive and
silently drops the rest; a truncated shard is read without an error. This module verifies every
header's checksum, every size and the end of the archive. It reads tars of GNU tar, `tarfile` and
WebDataset.
"""

from __future__ import annotations

import io
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bigan.data import DataError

Buffer = bytes | memoryview | mmap.mmap

DATA_SET_FILES = frozenset({"manifest.json", "plan.json", "pyramid.json"})
BLOCK = 512  # bytes, the unit of the tar format (POSIX 1003.1-1988, ustar)
KINDS = {
    b"1": "a hard link to no earlier member", b"2": "a symbolic link", b"3": "a device",
    b"4": "a device", b"6": "a named pipe", b"S": "a sparse file", b"V": "a volume label",
}  # fmt: skip


def shard_bytes(samples: Iterable[tuple[str, bytes, int]], encoder: str) -> bytes:
    """A WebDataset tar of (key, image bytes, label) samples; equal samples give equal bytes."""
    import webdataset  # slow to import, and training writes no tar

    file = io.BytesIO()
    with webdataset.TarWriter(file, mtime=0, encoder=False) as writer:
        for key, image, label in samples:
            writer.write({"__key__": key, encoder: image, "cls": str(label).encode()})
    return file.getvalue()


def tar_files(folder: Path) -> list[Path]:
    """The tars directly in `folder`, sorted by name, without hidden (temporary) ones."""
    return sorted(p for p in folder.glob("*.tar") if not p.name.startswith("."))


def nested_tar_files(folder: Path, suffixes: tuple[str, ...] = (".tar",)) -> list[Path]:
    """The tars in `folder` and in the folders below it, sorted by path, without hidden ones.

    Symbolic links are followed. Below `folder`, folders with a data set of their own are left out.
    """
    found: list[Path] = []
    visited: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited or (Path(place) != folder and not DATA_SET_FILES.isdisjoint(files)):
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        named = (name for name in files if name.endswith(suffixes) and not name.startswith("."))
        found += [Path(place, name) for name in named]
    return sorted(found)


class UnsupportedMemberError(DataError):
    """A member of an intact tar that is no regular file: its content is elsewhere, or none."""


@dataclass(frozen=True)
class Member:
    """One file of a tar: its name, and the offset and size of its content in bytes."""

    name: str
    offset: int
    size: int


def walk_tar(data: Buffer, where: str, with_folders: bool = False) -> Iterator[Member]:
    """The regular files of a tar archive; `with_folders` also its folders, with names in "/".

    Verifies the checksum of every header, that all content is inside the archive, and that only
    zeros follow the end marker (two blocks of zeros); otherwise raises `DataError`. Supports the
    long names of GNU tar ("L", "K") and of POSIX 1003.1-2001 ("x" and "g", pax). A hard link to an
    earlier member has its place; raises `UnsupportedMemberError` for other links, devices and
    sparse files. Names may contain "..". `data` may be a memory map: it is never copied as a whole.
    """
    position = 0
    for_all: dict[str, str] = {}  # pax records of all following members
    for_next: dict[str, str] = {}  # pax records of the next member
    places: dict[str, Member] = {}  # targets of hard links
    while True:
        header = bytes(data[position : position + BLOCK])
        if len(header) < BLOCK:
            raise DataError(f"{where}: truncated at byte {position}")
        if not any(header):
            if for_next or len(data) - position < 2 * BLOCK or not _only_zeros(data, position):
                raise DataError(f"{where}: damaged at byte {position} (no end marker)")
            return
        size = _size(header, f"{where}: damaged tar header at byte {position}")
        kind = header[156:157]
        name = member_name(header)
        begin = position + BLOCK
        if kind not in b"LKxg":
            records = for_all | for_next
            for_next = {}
            name = records.get("path", name)
            if kind == b"5" or (kind == b"\0" and name.endswith("/")):  # a folder
                if with_folders:
                    yield Member(f"{name.rstrip('/')}/", begin, 0)
                position = begin
                continue
            if any(key.startswith("GNU.sparse") for key in records):
                kind = b"S"
            target = places.get(records.get("linkpath", _field(header[157:257])))
            if kind == b"1" and target:  # without content of its own
                places[name] = replace(target, name=name)
                yield places[name]
                position = begin
                continue
            if kind not in (b"0", b"\0"):
                raise _unsupported(where, name, kind)
            digits = records.get("size", "")  # of files above the 8 GiB of the header field
            size = int(digits) if digits.isdecimal() and len(digits) < 20 else size
        if begin + size > len(data):
            raise DataError(f"{where}: {name} is truncated")
        if kind in (b"0", b"\0"):
            places[name] = Member(name, begin, size)
            yield places[name]
        else:
            content = bytes(data[begin : begin + size])
            if kind in b"gx":
                records = for_all if kind == b"g" else for_next
                records |= _pax_records(content, f"{where}: damaged at byte {begin}")
            else:
                for_next["path" if kind == b"L" else "linkpath"] = _field(content)
        position = begin + -(-size // BLOCK) * BLOCK


def _size(header: bytes, damaged: str) -> int:
    """The size of a member by its header; raises `DataError` for a wrong checksum."""
    try:
        checksum = int(header[148:156].strip(b" \0"), 8)
        size = int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        raise DataError(damaged) from None
    if sum(header[:148]) + 8 * 32 + sum(header[156:]) != checksum:
        raise DataError(damaged)
    return size


def _unsupported(where: str, name: str, kind: bytes) -> UnsupportedMemberError:
    what = f" but {KINDS[kind]}" if kind in KINDS else ""
    return UnsupportedMemberError(
        f"{where}: {name} is not a regular file{what}; write the tar again with "
        "`tar --dereference --hard-dereference`, of regular files only and without --sparse"
    )


def member_name(header: bytes) -> str:
    """The name in a ustar header block; non-UTF-8 bytes become surrogate escapes."""
    prefix = ""
    if header[257:263] == b"ustar\0":  # GNU tar's "ustar " has other fields there
        prefix = _field(header[345:500])
    name = _field(header[:100])
    return f"{prefix}/{name}" if prefix else name


def _pax_records(content: bytes, damaged: str) -> dict[str, str]:
    """The "length key=value\\n" records of a pax header."""
    records = {}
    while content:
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 12 else 0
        record = content[len(digits) + 1 : length]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if length > len(content) or not record.endswith(b"\n") or not equals:
            raise DataError(f"{damaged} (pax header)")
        records[_text(key)] = _text(value)
        content = content[length:]
    return records


def _only_zeros(data: Buffer, position: int, step: int = 2**20) -> bool:
    return not any(
        bytes(data[start : start + step]).strip(b"\0") for start in range(position, len(data), step)
    )


def _field(content: bytes) -> str:
    """The text before the first zero."""
    return _text(content.split(b"\0", 1)[0])


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def group_samples(members: Iterable[Member]) -> Iterator[tuple[str, list[tuple[str, Member]]]]:
    """(key, [(suffix, member), ...]) of the samples of a WebDataset tar, in order.

    A sample is the consecutive members with one key: the path up to the first dot of its last
    component. The rest of the name is the suffix, in lower case. Hidden files (without a stem) are
    skipped. If `members` raises `DataError`, the members before it are yielded first.
    """
    key = ""
    group: list[tuple[str, Member]] = []
    try:
        for member in members:
            name = member.name.removeprefix("./")
            folder, slash, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if not stem:
                continue
            if group and key != f"{folder}{slash}{stem}":
                yield key, group
                group = []
            key = f"{folder}{slash}{stem}"
            group.append((suffix.lower(), member))
    except DataError:
        if group:
            yield key, group
        raise
    if group:
        yield key, group


def index_shard(data: Buffer, encoder: str, where: str) -> dict[str, list[int]]:
    """The index columns (`manifest.COLUMNS`) of the samples of a packed shard, in order.

    A sample is one image `<key>.<encoder>` and its label `<key>.cls`. Raises `DataError` if one of
    them is missing or there is another member.
    """
    columns: dict[str, list[int]] = {"offset": [], "size": [], "label": [], "crc32": []}
    seen: set[str] = set()
    incomplete = ""  # reported last: damage to the tar is a better explanation
    for key, group in group_samples(walk_tar(data, where)):
        found = dict(group)
        for suffix, member in group:
            if suffix not in (encoder, "cls"):
                raise DataError(f"{where}: unexpected member {member.name}")
            if key in seen or found[suffix] is not member:
                raise DataError(f"{where}: member {member.name} appears twice")
        if len(found) < 2:
            incomplete = incomplete or key
            continue
        label = found["cls"]
        try:
            columns["label"].append(int(bytes(data[label.offset : label.offset + label.size])))
        except ValueError:
            raise DataError(f"{where}: {label.name} is not an integer") from None
        image = found[encoder]
        columns["offset"].append(image.offset)
        columns["size"].append(image.size)
        columns["crc32"].append(zlib.crc32(data[image.offset : image.offset + image.size]))
        seen.add(key)
    if incomplete:
        raise DataError(f"{where}: sample {incomplete} lacks its image or its label")
    return columns

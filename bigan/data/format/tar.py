"""Tar shards, written by WebDataset and read strictly.

Python's `tarfile`, which WebDataset reads with, takes a damaged header for the end of the archive
and silently drops the rest; a shard that was cut off reads without any error. Here every header's
checksum, every size and the end of the archive are verified. Tars of GNU tar, `tarfile` and
WebDataset are read as well as our own.
"""

from __future__ import annotations

import io
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bigan.data import DataError

Buffer = bytes | memoryview | mmap.mmap

BLOCK = 512  # bytes, the unit of the tar format (POSIX 1003.1-1988, ustar)


def shard_bytes(samples: Iterable[tuple[str, bytes, int]], encoder: str) -> bytes:
    """A WebDataset tar of (key, image bytes, label) samples: the same samples, the same bytes."""
    import webdataset  # takes seconds to import, and training never writes a tar

    file = io.BytesIO()
    with webdataset.TarWriter(file, mtime=0, encoder=False) as writer:
        for key, image, label in samples:
            writer.write({"__key__": key, encoder: image, "cls": str(label).encode()})
    return file.getvalue()


def tar_files(folder: Path) -> list[Path]:
    """The tars directly in `folder`, by name; hidden ones are somebody's unfinished work."""
    return sorted(p for p in folder.glob("*.tar") if not p.name.startswith("."))


@dataclass(frozen=True)
class Member:
    """One file of a tar: its name and where its bytes are."""

    name: str
    offset: int
    size: int


def walk_tar(data: Buffer, where: str) -> Iterator[Member]:
    """The regular files of a tar archive; raises `DataError` unless it is whole.

    Every header's checksum is verified, sizes must lie inside the archive, and after the end
    marker (two blocks of zeros) only zeros may follow. Long names are understood as GNU tar ("L")
    and POSIX 1003.1-2001 ("x" and "g", pax) write them; folders are passed over; links, devices
    and sparse files are refused. Names come back as they are, "../x" too.

    `data` may be a memory map: it is only sliced, never copied as a whole.
    """
    position = 0
    everywhere: dict[str, str] = {}  # pax records for all members to come,
    here: dict[str, str] = {}  # ... and for the next one
    while True:
        header = bytes(data[position : position + BLOCK])
        if len(header) < BLOCK:
            raise DataError(f"{where}: cut off at byte {position}")
        if not any(header):
            if here or len(data) - position < 2 * BLOCK or not _only_zeros(data, position):
                raise DataError(f"{where}: damaged at byte {position} (no proper end)")
            return
        try:
            checksum = int(header[148:156].strip(b" \0"), 8)
            size = int(header[124:136].strip(b" \0") or b"0", 8)
        except ValueError:
            raise DataError(f"{where}: damaged tar header at byte {position}") from None
        if sum(header[:148]) + 8 * 32 + sum(header[156:]) != checksum:
            raise DataError(f"{where}: damaged tar header at byte {position}")
        kind = header[156:157]
        name = member_name(header)
        begin = position + BLOCK
        if kind not in b"LKxg":
            records = everywhere | here
            here = {}
            name = records.get("path", name)
            if kind == b"5" or (kind == b"\0" and name.endswith("/")):  # a folder has no data
                position = begin
                continue
            if kind not in (b"0", b"\0") or any(key.startswith("GNU.sparse") for key in records):
                raise DataError(f"{where}: {name} is not a plain file")
            digits = records.get("size", "")  # for more than the header's 8 GiB
            size = int(digits) if digits.isdecimal() and len(digits) < 20 else size
        if begin + size > len(data):
            raise DataError(f"{where}: {name} is cut off")
        if kind in (b"0", b"\0"):
            yield Member(name, begin, size)
        else:
            content = bytes(data[begin : begin + size])
            if kind == b"g":
                everywhere |= _pax_records(content, f"{where}: damaged at byte {begin}")
            elif kind == b"x":
                here |= _pax_records(content, f"{where}: damaged at byte {begin}")
            elif kind == b"L":
                here["path"] = _text(content.split(b"\0", 1)[0])
        position = begin + -(-size // BLOCK) * BLOCK


def member_name(header: bytes) -> str:
    """The name in a ustar header block; bytes that are no UTF-8 become surrogates."""
    prefix = ""
    if header[257:263] == b"ustar\0":  # GNU tar's "ustar " keeps other things there
        prefix = _text(header[345:500].split(b"\0", 1)[0])
    name = _text(header[:100].split(b"\0", 1)[0])
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


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def index_shard(data: Buffer, encoder: str, where: str) -> tuple[list[int], list[int], list[int]]:
    """(offsets, sizes, labels) of a shard's samples in order, read from the tar itself.

    A sample is the consecutive members of one key (the name up to its first dot): one image
    `<key>.<encoder>` and its label `<key>.cls`. Raises `DataError` if one of them is missing.
    """
    offsets: list[int] = []
    sizes: list[int] = []
    labels: list[int] = []
    pending: dict[str, Member] = {}
    pending_key = ""
    seen: set[str] = set()
    for member in walk_tar(data, where):
        key, _, suffix = member.name.partition(".")
        if suffix not in (encoder, "cls"):
            raise DataError(f"{where}: unexpected member {member.name}")
        if key != pending_key and pending:
            raise DataError(f"{where}: sample {pending_key} lacks its image or its label")
        if suffix in pending or key in seen:
            raise DataError(f"{where}: member {member.name} appears twice")
        pending_key = key
        pending[suffix] = member
        if len(pending) < 2:
            continue
        label = pending["cls"]
        try:
            labels.append(int(bytes(data[label.offset : label.offset + label.size])))
        except ValueError:
            raise DataError(f"{where}: {label.name} is not a whole number") from None
        offsets.append(pending[encoder].offset)
        sizes.append(pending[encoder].size)
        seen.add(key)
        pending = {}
    if pending:
        raise DataError(f"{where}: sample {pending_key} lacks its image or its label")
    return offsets, sizes, labels

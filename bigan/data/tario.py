"""Tar shards, written by WebDataset and read strictly.

Python's `tarfile`, which WebDataset reads with, takes a damaged header for the end of the archive
and silently drops the rest; a shard that was cut off reads without any error. Here every header's
checksum, every size and the end of the archive are verified.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bigan.data import DataError

BLOCK = 512  # bytes, the unit of the tar format (POSIX 1003.1-1988, ustar)


def shard_bytes(samples: Iterable[tuple[str, bytes, int]], encoder: str) -> bytes:
    """A WebDataset tar of (key, image bytes, label) samples: the same samples, the same bytes."""
    import webdataset  # takes seconds to import, and training never writes a tar

    file = io.BytesIO()
    with webdataset.TarWriter(file, mtime=0, encoder=False) as writer:
        for key, image, label in samples:
            writer.write({"__key__": key, encoder: image, "cls": str(label).encode()})
    return file.getvalue()


@dataclass(frozen=True)
class Member:
    """One file of a tar: its name and where its bytes are."""

    name: str
    offset: int
    size: int


def walk_tar(data: bytes | memoryview, where: str) -> Iterator[Member]:
    """The regular files of a ustar archive; raises `DataError` unless it is whole.

    Every header's checksum is verified, sizes must lie inside the archive, and after the end
    marker (two blocks of zeros) only zeros may follow.
    """
    position = 0
    while True:
        header = bytes(data[position : position + BLOCK])
        if len(header) < BLOCK:
            raise DataError(f"{where}: cut off at byte {position}")
        if not any(header):
            rest = bytes(data[position:])
            if len(rest) < 2 * BLOCK or rest.strip(b"\0"):
                raise DataError(f"{where}: damaged at byte {position} (no proper end)")
            return
        try:
            checksum = int(header[148:156].strip(b" \0"), 8)
            size = int(header[124:136].strip(b" \0") or b"0", 8)
            name = member_name(header)
        except ValueError:
            raise DataError(f"{where}: damaged tar header at byte {position}") from None
        if sum(header[:148]) + 8 * 32 + sum(header[156:]) != checksum:
            raise DataError(f"{where}: damaged tar header at byte {position}")
        begin = position + BLOCK
        if begin + size > len(data):
            raise DataError(f"{where}: {name} is cut off")
        if header[156:157] not in (b"0", b"\0"):
            raise DataError(f"{where}: {name} is not a plain file")
        yield Member(name, begin, size)
        position = begin + -(-size // BLOCK) * BLOCK


def member_name(header: bytes) -> str:
    """The name in a ustar header block."""
    prefix = header[345:500].rstrip(b"\0").decode() if header[257:262] == b"ustar" else ""
    name = header[:100].split(b"\0", 1)[0].decode()
    return f"{prefix}/{name}" if prefix else name


def index_shard(
    data: bytes | memoryview, encoder: str, where: str
) -> tuple[list[int], list[int], list[int]]:
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

"""Compressed tars: their suffixes and first bytes, and how they are decompressed."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Compression:
    """A kind of compression. `open`: reads a file as what it contains; None if Python cannot."""

    suffixes: tuple[str, ...]
    magic: bytes  # the first bytes of a file
    program: str  # which decompresses it
    open: Callable[[Path], Any] | None


COMPRESSIONS = (
    Compression((".tar.gz", ".tgz"), b"\x1f\x8b", "gunzip", gzip.open),
    Compression((".tar.bz2", ".tbz2"), b"BZh", "bunzip2", bz2.open),
    Compression((".tar.xz", ".txz"), b"\xfd7zXZ\0", "unxz", lzma.open),
    Compression((".tar.zst", ".tzst"), b"\x28\xb5\x2f\xfd", "unzstd --rm", None),
    Compression((".tar.lz4",), b"\x04\x22\x4d\x18", "lz4 -d --rm", None),
)
SUFFIXES = tuple(suffix for kind in COMPRESSIONS for suffix in kind.suffixes)
NUM_MAGIC = max(len(kind.magic) for kind in COMPRESSIONS)  # bytes


def by_content(head: bytes) -> Compression | None:
    """The compression of a file that starts with `head`, at least `NUM_MAGIC` bytes if it can."""
    return next((kind for kind in COMPRESSIONS if head.startswith(kind.magic)), None)


def by_name(name: str) -> Compression | None:
    """The compression that the suffix of `name` declares."""
    return next((kind for kind in COMPRESSIONS if name.lower().endswith(kind.suffixes)), None)

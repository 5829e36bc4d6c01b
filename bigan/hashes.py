"""sha256 of bytes and files, and fingerprints of plain data."""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from typing import Any


def sha256(data: bytes | memoryview | mmap.mmap) -> str:
    """The sha256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file, read in chunks; raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(content: Any) -> str:
    """32 hexadecimal digits that identify plain JSON data, whatever the order of its keys."""
    return sha256(json.dumps(content, sort_keys=True).encode())[:32]

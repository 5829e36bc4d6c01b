"""Where a data set is packed and verified: a local folder, or a folder in an object store.

Both are read and written through the same few operations on named files, so that packing and
verifying exist once. A file is complete or absent (atomic_files.py; a `Store` does the same).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

from bigan import atomic_files, hashes
from bigan.data.format.manifest import Manifest
from bigan.data.format.tar import Buffer, nested_tar_files, tar_files


class Place(ABC):
    """A folder. Names of files are relative to it and have "/" between their parts.

    shown: path or URL without secrets, for messages.
    path: the local folder; None in a store.
    """

    shown: str
    path: Path | None = None
    can_list = True

    def where(self, name: str) -> str:
        """Path or URL of a file, for messages."""
        return f"{self.shown}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self.sizes([name]))

    def read_if_exists(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    @abstractmethod
    def folder(self, name: str) -> Place:
        """The folder `name` in this one; this one for ""."""

    @abstractmethod
    def make_folder(self, name: str = "") -> None:
        """Create the folder `name`, unless it exists."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All bytes of a file; raises `FileNotFoundError`, or another `OSError` or `DataError`."""

    @abstractmethod
    def read_ranges(self, name: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        """The bytes [start, stop) of a file for each of `ranges`; raises like `read`."""

    @abstractmethod
    def hashed(
        self, name: str, expected: str = ""
    ) -> contextlib.AbstractContextManager[tuple[Buffer, str]]:
        """The bytes of a large file, and their sha256, `expected` or not; raises like `read`."""

    @abstractmethod
    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """The size in bytes of those of `names` that exist."""

    @abstractmethod
    def entries(self, name: str = "") -> Iterator[str]:
        """Names of files in the folder `name`, and of folders with "/" at the end."""

    @abstractmethod
    def tars(self, nested: bool) -> list[str]:
        """Names of the tars, sorted, without hidden ones; `nested`: also in folders below."""

    @abstractmethod
    def write(self, name: str, content: bytes | str) -> None:
        """Replace a file, completely or not at all."""

    @abstractmethod
    def create(self, name: str, content: bytes | str) -> None:
        """Like `write`, but keep an existing file: the first of several writers wins."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file if it exists."""

    def remove_leftovers(self) -> None:
        """Delete temporary files that killed writers left here and in index/."""
        return None

    @abstractmethod
    def read_manifest(self) -> Manifest:
        """The manifest after its own checks; `DataError` without one (`Manifest.read`)."""

    @abstractmethod
    def load_manifest(self) -> Manifest:
        """`read_manifest`, and check that the listed files are there (`Manifest.load`)."""


class Folder(Place):
    """A local folder."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self.shown = str(path)

    def folder(self, name: str) -> Folder:
        return Folder(self.path / name)

    def make_folder(self, name: str = "") -> None:
        (self.path / name).mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def read_ranges(self, name: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        with (self.path / name).open("rb") as file:
            return [os.pread(file.fileno(), stop - start, start) for start, stop in ranges]

    @contextlib.contextmanager
    def hashed(self, name: str, expected: str = "") -> Iterator[tuple[Buffer, str]]:
        """The memory-mapped bytes of the file, and their sha256.

        If another process truncates it meanwhile, reading behind its end kills this process.
        """
        # Read it before mapping it: a disk error raises here, but would send SIGBUS there.
        sha256 = hashes.sha256_of_file(self.path / name)
        with (self.path / name).open("rb") as file:
            if not os.fstat(file.fileno()).st_size:  # an empty file cannot be mapped
                yield b"", sha256
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data, sha256

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        files = {name: self.path / name for name in names}
        return {name: file.stat().st_size for name, file in files.items() if file.is_file()}

    def entries(self, name: str = "") -> Iterator[str]:
        if (self.path / name).is_dir():
            for path in (self.path / name).iterdir():
                yield f"{path.name}/" if path.is_dir() else path.name

    def tars(self, nested: bool) -> list[str]:
        found = nested_tar_files(self.path) if nested else tar_files(self.path)
        return [path.relative_to(self.path).as_posix() for path in found]

    def write(self, name: str, content: bytes | str) -> None:
        atomic_files.write_atomic(self.path / name, content)

    def create(self, name: str, content: bytes | str) -> None:
        atomic_files.create_atomic(self.path / name, content)

    def delete(self, name: str) -> None:
        if (self.path / name).is_file():  # unlink would fail on a read-only disk
            (self.path / name).unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        for folder in (self.path, self.path / "index"):
            atomic_files.remove_leftovers(folder, shared=True)

    def read_manifest(self) -> Manifest:
        return Manifest.read(self.path)

    def load_manifest(self) -> Manifest:
        return Manifest.load(self.path)


def shown_place(place: str | Path) -> str:
    """A path or URL for messages, without secrets."""
    return str(Path(place))


@contextlib.contextmanager
def open_place(place: str | Path | Place) -> Iterator[Place]:
    """The folder at a path or URL; transfers that are in progress at the end are cancelled."""
    if isinstance(place, Place):
        yield place
    else:
        yield Folder(Path(place))

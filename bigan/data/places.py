"""Where a data set is packed and verified: a local folder, or a folder in an object store.

Both are read and written through the same few operations on named files, so that packing and
verifying exist once. A file is complete or absent (atomic_files.py; a `Store` does the same).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bigan import atomic_files, hashes
from bigan.data import DataError
from bigan.data.format.manifest import MANIFEST, PLAN, PYRAMID, Manifest
from bigan.data.format.tar import DATA_SET_FILES, Buffer, nested_tar_files, tar_files
from bigan.data.stores.store import MissingFileError, Store
from bigan.data.stores.urls import OBJECT_STORES, join
from bigan.urls import is_remote, redacted, scheme

CONNECTIONS = 16  # requests of a process that are in progress at a time
MAX_REQUESTS = 4  # for sizes of single objects; those of more are listed at once


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


class Objects(Place):
    """A folder in an object store, or at another URL, which can only be read."""

    def __init__(self, store: Store, url: str, start: str = "") -> None:
        self._store = store
        self._url = url  # of this folder
        self._start = start  # of its names in the store: "" or "folder/"
        self.shown = redacted(url)
        self.can_list = scheme(url) in OBJECT_STORES

    def where(self, name: str) -> str:
        return join(self.shown, name)

    def folder(self, name: str) -> Objects:
        if not name:
            return self
        return Objects(self._store, join(self._url, name), f"{self._start}{name}/")

    def make_folder(self, name: str = "") -> None:
        """Folders exist through their files."""

    def read(self, name: str) -> bytes:
        with self._reading(name):
            return self._store.read(self._start + name)

    def read_ranges(self, name: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        with self._reading(name):
            return self._store.read_ranges(self._start + name, ranges)

    @contextlib.contextmanager
    def hashed(self, name: str, expected: str = "") -> Iterator[tuple[Buffer, str]]:
        """The bytes of the object, in memory, and their sha256.

        They are read again if they are not the expected ones: the transfer may be damaged.
        """
        data = self.read(name)
        if expected and hashes.sha256(data) != expected:
            data = self.read(name)
        yield data, hashes.sha256(data)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Raises an `OSError` in place of the `DataError` for an object that cannot be read.

        It is still a `DataError` if the store does not answer, or refuses all access.
        """
        try:
            yield
        except MissingFileError:
            raise FileNotFoundError(errno.ENOENT, "no such object", self.where(name)) from None
        except DataError as error:
            where = self.where(name)
            self._store.size(self._start + name)  # raises if other requests fail, too
            reason = str(error).removeprefix(f"{where}: ")
            raise OSError(errno.EIO, reason, where) from None

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        wanted = set(names)
        if len(wanted) > MAX_REQUESTS and self.can_list:
            return {name: size for name, size in self._listed() if name in wanted}
        found = {name: self._store.size(self._start + name) for name in wanted}
        return {name: size for name, size in found.items() if size is not None}

    def _listed(self, name: str = "") -> Iterator[tuple[str, int]]:
        """(name, size) of all files in this folder and below it."""
        for found, size in self._store.names(f"{self._start}{name}"):
            if found != name.rstrip("/"):  # the empty object that some tools create for a folder
                yield found.removeprefix(self._start), size

    def entries(self, name: str = "") -> Iterator[str]:
        start = f"{name}/" if name else ""
        seen = set()
        for found, _ in self._listed(start) if self.can_list else ():
            head, slash, _ = found.removeprefix(start).partition("/")
            if f"{head}{slash}" not in seen:
                seen.add(f"{head}{slash}")
                yield f"{head}{slash}"

    def tars(self, nested: bool) -> list[str]:
        if not self.can_list:
            return []
        names = {name for name, _ in self._listed()}
        others = {name.rpartition("/")[0] for name in names if _is_data_set_file(name)} - {""}
        return sorted(
            name
            for name in names
            if name.endswith(".tar")
            and not any(part.startswith(".") for part in name.split("/"))
            and (nested or "/" not in name)
            and not any(name.startswith(f"{other}/") for other in others)
        )

    def write(self, name: str, content: bytes | str) -> None:
        with self._writing():
            self._store.write(self._start + name, _bytes(content))

    def create(self, name: str, content: bytes | str) -> None:
        with self._writing():
            self._store.create(self._start + name, _bytes(content))

    def delete(self, name: str) -> None:
        if self.exists(name):  # a user who may write may be forbidden to delete
            with self._writing():
                self._store.delete(self._start + name)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Corrects messages of `Store`, most of which are about reading."""
        try:
            yield
        except DataError as error:
            text = str(error).replace(": cannot be read", ": cannot be written", 1)
            raise DataError(text) from None

    def read_manifest(self) -> Manifest:
        content = self.read_if_exists(MANIFEST)
        if content is None:
            raise DataError(f"{self.shown}: {self._state()}")
        try:
            manifest = Manifest.parse(content, Path())
        except DataError as error:
            reason = str(error).removeprefix(f"{MANIFEST}: ")
            raise DataError(f"{self.where(MANIFEST)}: {reason}") from None
        return manifest.model_copy(update={"remote": self._url})

    def _state(self) -> str:
        if self.exists(PYRAMID):
            return "contains several resolutions; choose one of its folders"
        state = "is an incomplete pack" if self.exists(PLAN) else "is not a data set"
        return f"{state} (no {MANIFEST}); run `bigan pack`"

    def load_manifest(self) -> Manifest:
        manifest = self.read_manifest()
        expected = {shard.url: shard.filesize for shard in manifest.shardlist}
        sizes = self.sizes([*expected, *manifest.index])
        for name in [*expected, *manifest.index]:
            if name not in sizes or sizes[name] != expected.get(name, sizes[name]):
                found = f"has {sizes[name]} bytes" if name in sizes else "is missing"
                raise DataError(f"{self.where(name)}: {found}; pack the data again")
        return manifest


def _is_data_set_file(name: str) -> bool:
    return name.rpartition("/")[2] in DATA_SET_FILES


def _bytes(content: bytes | str) -> bytes:
    return content.encode() if isinstance(content, str) else content


@contextlib.contextmanager
def threads(num: int = CONNECTIONS) -> Iterator[ThreadPoolExecutor]:
    """Threads that read files of a `Place`.

    After an exception the reads in progress are not waited for: `open_place` then cancels them.
    """
    executor = ThreadPoolExecutor(num, thread_name_prefix="bigan-files")
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def shown_place(place: str | Path) -> str:
    """A path or URL for messages, without secrets."""
    return redacted(place) if isinstance(place, str) and is_remote(place) else str(Path(place))


@contextlib.contextmanager
def open_place(place: str | Path | Place) -> Iterator[Place]:
    """The folder at a path or URL; transfers that are in progress at the end are cancelled."""
    if isinstance(place, Place):
        yield place
    elif isinstance(place, str) and is_remote(place):
        with Store(place, connections=CONNECTIONS) as store:
            yield Objects(store, place)
    elif found := re.match(r"(s3|gs|az|https?):/", str(place)):
        raise DataError(
            f"{place}: is not a URL; begin with {found[0]}/ (in Python use a str, not a Path)"
        )
    else:
        yield Folder(Path(place))

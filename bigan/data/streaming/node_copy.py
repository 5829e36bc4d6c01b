"""Manifest and index of a remote data set, copied once to each node and shared by its processes.

    <cache>/manifests/<url>/lock    held by the process that downloads
                            latest  the URL, folder and time of the latest download
                            <manifest>/manifest.json, index/...

<url> is a hash of the URL without user, password and query, which may differ between runs;
<manifest> is a hash of the manifest: a set that is packed again gets another folder, and processes
that use the old one are not disturbed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from bigan import atomic_files, hashes
from bigan.data import DataError
from bigan.data.format.manifest import MANIFEST, Manifest
from bigan.data.settings import Fetch
from bigan.data.stores.store import Store, store_of
from bigan.file_lock import locked
from bigan.urls import redacted

CHUNK_BYTES = 2**20
_STARTED = time.time_ns()
_used: dict[str, int] = {}  # URL -> time of the download that this process used last


def copied(base: str, fetch: Fetch) -> Manifest:
    """The manifest of the data set at the URL `base`, whose index is copied to this node.

    Of the processes that start together one downloads, while the others wait: a process uses a
    download that began after the process itself, and each download once. Therefore a set that was
    packed again is noticed by the next run, and whenever a process opens the set again. Raises
    `DataError`.
    """
    place = _cache(fetch) / "manifests" / hashes.sha256(_bare(base).encode())
    try:
        place.mkdir(parents=True, exist_ok=True)
        with (place / "lock").open("w") as file, locked(file.fileno()):
            folder = _downloaded(place, base)
            if folder is None:
                return _download(place, base, fetch)
    except OSError as error:
        raise DataError(
            f"{place}: cannot store the index of {redacted(base)}: {error.strerror}; set data.cache"
        ) from None
    return _read(folder, base)


def _downloaded(place: Path, base: str) -> Path | None:
    """The folder of a download that this process can use."""
    try:
        latest = json.loads((place / "latest").read_text())
        url, folder, began = latest["url"], place / latest["folder"], int(latest["began"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged
        return None
    key = _key(base)
    if url != key or began <= _used.get(key, _STARTED) or not (folder / MANIFEST).is_file():
        return None
    _used[key] = began
    return folder


def _download(place: Path, base: str, fetch: Fetch) -> Manifest:
    """Download the manifest, and the index files of which no intact copy is here."""
    began = time.time_ns()
    with store_of(base, fetch) as store:
        text = store.read(MANIFEST)
        folder = place / hashes.sha256(text)[:16]
        (folder / "index").mkdir(parents=True, exist_ok=True)
        atomic_files.remove_leftovers(folder / "index", shared=True)  # of killed processes
        atomic_files.write_atomic(folder / MANIFEST, text)
        manifest = _read(folder, base)
        for name, sha256 in manifest.index.items():
            if not _has(folder / name, sha256) and not _linked(folder / name, sha256):
                _fetch(store, name, sha256, folder / name)
    _used[_key(base)] = began
    latest = {"url": _key(base), "folder": folder.name, "began": began}
    atomic_files.write_atomic(place / "latest", json.dumps(latest) + "\n")
    return manifest


def _fetch(store: Store, name: str, sha256: str, file: Path) -> None:
    """Download an index file, which may be large, in chunks."""
    temporary, digest = atomic_files.temporary_name(file), hashlib.sha256()
    try:
        with store.open(name) as stream, temporary.open("wb") as out:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() == sha256:
            temporary.replace(file)
        else:  # read again: with patience, then with an error that names the reason
            atomic_files.write_atomic(file, store.read(name, sha256=sha256))
    finally:
        temporary.unlink(missing_ok=True)


def _read(folder: Path, base: str) -> Manifest:
    try:
        return Manifest.read(folder).model_copy(update={"remote": base})
    except DataError as error:
        raise DataError(f"{redacted(base)}: {error}") from None


def _bare(base: str) -> str:
    """`base` without user, password and query."""
    return redacted(base).replace("://***@", "://").partition("?")[0].rstrip("/")


def _key(base: str) -> str:
    """A hash of `base` with its query, which may select one of several sets."""
    return hashes.sha256(f"{_bare(base)}?{base.partition('?')[2]}".encode())


def _linked(file: Path, sha256: str) -> bool:
    """Link `file` to an equal one that was copied with an earlier manifest of the set, if any."""
    for other in file.parents[2].glob(f"*/index/{file.name}"):
        if other.parent != file.parent and _has(other, sha256):
            with contextlib.suppress(OSError):  # no hard links
                file.unlink(missing_ok=True)
                os.link(other, file)
                return True
    return False


def _has(file: Path, sha256: str) -> bool:
    return file.is_file() and hashes.sha256_of_file(file) == sha256


def _cache(fetch: Fetch) -> Path:
    """`data.cache`, else the user's cache; the same on a machine without the variables of a node.

    A login node describes and submits runs whose cache is in $SLURM_TMPDIR.
    """
    with contextlib.suppress(DataError):
        if folder := fetch.cache_folder():
            return folder
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bigan"

"""From `data.path` to a manifest: a packed folder, its URL, or a folder of existing tars."""

from __future__ import annotations

import os
from pathlib import Path

from bigan import atomic_files, hashes
from bigan.data import DataError
from bigan.data.format.manifest import (
    MANIFEST,
    PLAN,
    PYRAMID,
    UNLABELLED_PLAN,
    Manifest,
    level_folder,
)
from bigan.data.packing.index_in_place import index_in_place
from bigan.data.packing.shard_files import in_folder
from bigan.data.settings import Fetch
from bigan.data.streaming.stores import Store, is_remote, shown, store_of
from bigan.image_size import ImageSize


def open_manifest(data: str | Path | Manifest, fetch: Fetch | None = None) -> Manifest:
    """The manifest of a data set, after checks that do not read the shards.

    A folder of tars that `bigan pack` did not write is indexed at its first use. With
    `fetch.labels` "none" the images are of one class. The manifest and
    the index of a remote data set are copied to the node (into `fetch.cache`, or the user's cache
    folder), its shards are not. Raises `DataError`, one line.
    """
    if isinstance(data, Manifest):
        return data
    fetch = fetch or Fetch()
    path = str(data)
    manifest = _remote(path, fetch) if is_remote(path) else _local(path, fetch)
    if fetch.labels == "none":
        return manifest.without_labels()
    if manifest.plan == UNLABELLED_PLAN:
        raise DataError(f"{shown(path)}: was indexed without its labels; set data.labels=none")
    return manifest


def _local(path: str, fetch: Fetch) -> Manifest:
    """The manifest of a folder, which is written for tars without one."""
    folder = Path(path)
    known = any((folder / name).exists() for name in (MANIFEST, PLAN, PYRAMID))
    if folder.is_dir() and not known and in_folder(folder):
        return index_in_place(folder, fetch.labels == "given")
    if any(character in path for character in "{}") or folder.is_file():
        raise DataError(
            f"{path}: is not a folder; give the folder of the shards, which are indexed at first "
            "use (only data.mode=resampled takes a pattern of shards)"
        )
    manifest = Manifest.load(folder)
    if manifest.plan == UNLABELLED_PLAN and fetch.labels == "given":
        return index_in_place(folder)
    return manifest


def open_level(path: str, resolution: ImageSize | None, fetch: Fetch) -> Manifest:
    """The manifest of one level of a pyramid (`bigan pack --pyramid`), or of a plain data set.

    `resolution` (pixels) selects the level, None the largest one of a local pyramid; a plain data
    set may have another resolution. Raises `DataError` like `open_manifest`.
    """
    if not is_remote(path):
        if not (Path(path) / PYRAMID).is_file():
            return open_manifest(path, fetch)
        levels = sorted(Path(path).glob(f"r*/{MANIFEST}"))
        if resolution is None and levels:
            return open_manifest(levels[-1].parent, fetch)
        return open_manifest(level_folder(path, resolution or 0), fetch)
    try:
        return open_manifest(path, fetch)
    except DataError:  # a pyramid has no manifest of its own
        if resolution is None:
            raise
        return open_manifest(level_folder(path, resolution), fetch)


def _remote(base: str, fetch: Fetch) -> Manifest:
    """Copy manifest and index of the data set at the URL `base` to this node."""
    with store_of(base, fetch) as store:
        return _copied(base, store, fetch)


def _copied(base: str, store: Store, fetch: Fetch) -> Manifest:
    text = store.read(MANIFEST)
    name = hashes.sha256(store.shown.encode())[:16] + hashes.sha256(text)[:16]
    folder = (fetch.cache or _user_cache()) / "manifests" / name
    _write(folder / MANIFEST, text, store.shown)
    try:
        manifest = Manifest.read(folder)
    except DataError as error:
        raise DataError(f"{store.shown}: {error}") from None
    for file, sha256 in manifest.index.items():
        if _has(folder / file, sha256):
            continue
        data = store.read(file, sha256=sha256)
        _write(folder / file, data, store.shown)
    return manifest.model_copy(update={"remote": base})


def _write(file: Path, content: bytes, base: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_atomic(file, content)
    except OSError as error:
        raise DataError(
            f"{file}: cannot store the index of {base}: {error.strerror}; set data.cache"
        ) from None


def _has(file: Path, sha256: str) -> bool:
    return file.is_file() and hashes.sha256_of_file(file) == sha256


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bigan"

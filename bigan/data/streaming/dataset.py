"""From what a recipe calls `data.path` to a manifest: a packed folder, its URL, or foreign tars."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from bigan import atomic_files
from bigan.data import DataError
from bigan.data.format.manifest import MANIFEST, PLAN, PYRAMID, Manifest, level_folder
from bigan.data.settings import Fetch
from bigan.data.streaming import remote


def open_manifest(data: str | Path | Manifest, fetch: Fetch | None = None) -> Manifest:
    """The manifest of a data set, checked as far as that is quick.

    A folder of tars that `bigan pack` did not write is indexed at its first use. Of a remote data
    set the manifest and the index are copied to the node (below `fetch.cache`, or the user's cache
    folder); the shards stay where they are. Raises `DataError`, one line.
    """
    if isinstance(data, Manifest):
        return data
    path = str(data)
    if remote.is_remote(path):
        return _remote(path, fetch or Fetch())
    folder = Path(path)
    known = any((folder / name).exists() for name in (MANIFEST, PLAN, PYRAMID))
    if folder.is_dir() and not known and any(folder.glob("*.tar")):
        from bigan.data.packing.index_in_place import adopt

        return adopt(folder)
    if any(character in path for character in "{}") or folder.is_file():
        raise DataError(
            f"{path}: give the folder that holds the shards; they are indexed at first use "
            "(data.mode=resampled takes a list of shards, with statistical guarantees only)"
        )
    return Manifest.load(folder)


def open_level(path: str, resolution: int, fetch: Fetch) -> Manifest:
    """The manifest at `resolution` of a pyramid (`bigan pack --pyramid`), else of the set itself.

    Which one it is shows in the manifest's resolution. Raises `DataError` as `open_manifest` does.
    """
    if not remote.is_remote(path):
        pyramid = (Path(path) / PYRAMID).is_file()
        return open_manifest(level_folder(path, resolution) if pyramid else path, fetch)
    try:
        return open_manifest(path, fetch)
    except DataError:  # a pyramid has no manifest of its own
        return open_manifest(level_folder(path, resolution), fetch)


def _remote(base: str, fetch: Fetch) -> Manifest:
    """Copy manifest and index of the data set below the URL `base` to this node."""
    text = remote.read(
        remote.join(base, MANIFEST), size=None, sha256=None, allow_pipe=fetch.allow_pipe
    )
    name = hashlib.sha256(base.encode()).hexdigest()[:16] + hashlib.sha256(text).hexdigest()[:16]
    folder = (fetch.cache or _user_cache()) / "manifests" / name
    _keep(folder / MANIFEST, text, base)
    try:
        manifest = Manifest.read(folder)
    except DataError as error:
        raise DataError(f"{base}: {error}") from None
    for file, sha256 in manifest.index.items():
        if _has(folder / file, sha256):
            continue
        data = remote.read(
            remote.join(base, file), size=None, sha256=sha256, allow_pipe=fetch.allow_pipe
        )
        _keep(folder / file, data, base)
    return manifest.model_copy(update={"remote": base})


def _keep(file: Path, content: bytes, base: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_atomic(file, content)
    except OSError as error:
        raise DataError(
            f"{file}: cannot keep the index of {base}: {error.strerror}; set data.cache"
        ) from None


def _has(file: Path, sha256: str) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bigan"

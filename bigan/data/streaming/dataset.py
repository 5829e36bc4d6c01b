"""From `data.path` to a manifest: a packed folder, its URL, or a folder of existing tars."""

from __future__ import annotations

from pathlib import Path

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
from bigan.data.stores.store import MissingFileError
from bigan.data.streaming import node_copy
from bigan.image_size import ImageSize
from bigan.urls import is_remote, redacted


def open_manifest(data: str | Path | Manifest, fetch: Fetch | None = None) -> Manifest:
    """The manifest of a data set, after checks that do not read the shards.

    A folder of tars that `bigan pack` did not write is indexed at its first use. With
    `fetch.labels` "none" the images are of one class. The manifest and the index of a remote data
    set are copied to the node (into `fetch.cache`, or the user's cache folder), its shards are not.
    Raises `DataError`, one line.
    """
    if isinstance(data, Manifest):
        return data
    fetch = fetch or Fetch()
    path = str(data)
    manifest = node_copy.copied(path, fetch) if is_remote(path) else _local(path, fetch)
    if fetch.labels == "none":
        return manifest.without_labels()
    if manifest.plan == UNLABELLED_PLAN:
        raise DataError(f"{redacted(path)}: was indexed without its labels; set data.labels=none")
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
    except MissingFileError:  # a pyramid has no manifest of its own
        if resolution is None:
            raise
        return open_manifest(level_folder(path, resolution), fetch)

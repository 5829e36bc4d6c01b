"""A packed data set on disk: manifest, index and tar shards, and the checks they must pass.

    <folder>/manifest.json                 written last; without it the folder is not a data set
             plan.json                     what is packed here; a resumed `bigan pack` compares it
             train-000000.tar ...          standard WebDataset shards: <key>.npy|png|jpg|webp and
                                           <key>.cls
             index/<split>.<column>.npy    one entry per sample, in shard order:
                                           offset u64 and size u32 of the image's bytes in its tar,
                                           label i32, shard i32 (number within the split)
             index/train-000000.json ...   what `bigan pack` noted of each shard it finished, with
                                           the original name of each sample

The manifest is a superset of `wids-shard-index-v1`, so other WebDataset tools read it too. Index
files are memory-mapped: all processes of a node share them. For a remote data set the folder is a
local copy of manifest and index, and `remote` says where the shards are.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bigan import atomic_files
from bigan import config as configs
from bigan.config import ConfigError, Frozen
from bigan.data import DataError
from bigan.data.format.codec import Encoding
from bigan.data.format.tar import tar_files

MANIFEST = "manifest.json"
PLAN = "plan.json"
PYRAMID = "pyramid.json"  # lists the folders of a set packed at several resolutions
SCHEMA = 1
COLUMNS: dict[str, type[np.generic]] = {
    "offset": np.uint64,
    "size": np.uint32,
    "label": np.int32,
    "shard": np.int32,
}


@dataclass(frozen=True)
class Index:
    """Where every sample of a split is; the columns of the module docstring, each [num_samples]."""

    offset: NDArray[np.uint64]
    size: NDArray[np.uint32]
    label: NDArray[np.int32]
    shard: NDArray[np.int32]


class Shard(Frozen):
    """One tar: its file name, samples, bytes, hash, and how many samples of each class."""

    url: str
    nsamples: int
    filesize: int
    sha256: str
    split: str
    class_histogram: tuple[int, ...]


class Manifest(Frozen):
    """What a packed folder holds. Read it with `Manifest.load`, which also checks the folder."""

    folder: Path = Field(exclude=True)
    remote: str | None = Field(default=None, exclude=True)  # URL of the folder that has the shards
    kind: Literal["wids-shard-index-v1"] = Field(
        default="wids-shard-index-v1",
        validation_alias="__kind__",
        serialization_alias="__kind__",
    )
    wids_version: int = 1
    schema_version: int = SCHEMA
    name: str
    resolution: int  # pixels; images are square
    channels: int  # 1 or 3
    classes: tuple[str, ...]  # class names; label i is classes[i]
    encoder: Encoding
    quality: int | None = None  # of a lossy encoder
    transform: str  # from the original images to these pixels
    software: dict[str, str] = Field(default_factory=dict)  # versions of what made the bytes
    samples_per_shard: int = 0  # planned; the last shard of a split may hold fewer
    num_bad: int = 0  # originals that could not be used and were left out
    plan: str  # hash of what was packed and how
    fingerprint: str  # hash of the content; equal fingerprints mean equal samples
    index: dict[str, str]  # file name -> sha256
    records: dict[str, str] = Field(default_factory=dict)  # plan.json, index/*.json -> sha256
    shardlist: tuple[Shard, ...]
    checksum: str = ""  # hash of all of the above

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of `folder` and check it against itself, without a look at the shards.

        Raises `DataError`, one line, if the folder is missing or was not packed to the end, or if
        the manifest is damaged.
        """
        folder = Path(folder)
        file = folder / MANIFEST
        if not folder.is_dir():
            raise DataError(f"{folder}: no such data folder; make it with `bigan pack`")
        if not file.is_file():
            if (folder / PYRAMID).is_file():
                raise DataError(
                    f"{folder}: holds several resolutions; choose one of its folders, for example "
                    f"{_levels(folder)[-1]}"
                )
            state = "was not packed to the end" if (folder / PLAN).is_file() else "is no data set"
            raise DataError(f"{folder}: {state} (no {MANIFEST}); run `bigan pack`")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: cannot be read: {error}; pack the data again") from None
        if not isinstance(content, dict) or content.get("__kind__") != "wids-shard-index-v1":
            raise DataError(f"{file}: is not a data manifest; pack the data again")
        if content.get("schema_version") != SCHEMA:
            found = content.get("schema_version")
            raise DataError(
                f"{file}: schema_version {found!r} is not {SCHEMA}; pack the data again "
                "with this version of bigan"
            )
        try:
            manifest = configs.validate(cls, {**content, "folder": str(folder)}, str(file))
        except ConfigError as error:
            raise DataError(f"{error}; pack the data again") from None
        manifest._check_names()
        return manifest

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """`read`, and look whether the folder holds what the manifest lists.

        Raises `DataError` if a shard or index file is missing, extra or of another size. Contents
        are checked by `verify_checksums`, and thoroughly by `bigan verify`.
        """
        manifest = cls.read(folder)
        manifest._check_files()
        return manifest

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, each with at least one sample."""
        return tuple(dict.fromkeys(shard.split for shard in self.shardlist))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[H, W, C] of every image."""
        return self.resolution, self.resolution, self.channels

    def location(self, shard: Shard) -> str:
        """Path or URL of a shard."""
        if self.remote is not None:
            return f"{self.remote.rstrip('/')}/{shard.url}"
        return str(self.folder / shard.url)

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of `split` in order; raises `DataError` if there is no such split."""
        found = tuple(shard for shard in self.shardlist if shard.split == split)
        if not found:
            known = ", ".join(self.splits) or "none"
            raise DataError(f"{self.folder}: no split {split!r}; it holds: {known}")
        return found

    def num_samples(self, split: str) -> int:
        return sum(shard.nsamples for shard in self.shards(split))

    def class_counts(self, split: str) -> tuple[int, ...]:
        """Samples of each class in `split`, [num_classes]."""
        histograms = [shard.class_histogram for shard in self.shards(split)]
        return tuple(sum(column) for column in zip(*histograms, strict=True))

    def load_index(self, split: str) -> Index:
        """The memory-mapped index of `split`; raises `DataError` if it contradicts the manifest."""
        shards = self.shards(split)
        columns = {}
        for name, dtype in COLUMNS.items():
            file = self.folder / index_name(split, name)
            try:
                column = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{file}: cannot be read: {error}; pack the data again") from None
            if column.dtype != dtype or column.shape != (self.num_samples(split),):
                raise DataError(
                    f"{file}: holds {column.dtype} {list(column.shape)}, expected "
                    f"{np.dtype(dtype)} [{self.num_samples(split)}]; pack the data again"
                )
            columns[name] = np.asarray(column)  # a plain view of the map is faster to index
        index = Index(**columns)
        expected = np.repeat(np.arange(len(shards)), [shard.nsamples for shard in shards])
        ends = index.offset + index.size
        limits = np.asarray([shard.filesize for shard in shards], np.uint64)[expected]
        counts = np.bincount(index.label.clip(0), minlength=self.num_classes)
        if (
            not np.array_equal(index.shard, expected)
            or bool((ends > limits).any())
            or index.label.min() < 0
            or counts.tolist() != list(self.class_counts(split))
        ):
            raise DataError(
                f"{self.folder}: the index of split {split!r} contradicts {MANIFEST}; "
                "pack the data again"
            )
        return index

    def verify_checksums(
        self, limit_bytes: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> bool:
        """Compare the sha256 of every shard and index file; raises `DataError` at the first wrong.

        With `limit_bytes`, a larger data set is left alone and the result is False.
        `progress(bytes done, bytes in all)` is called after each shard.
        """
        total = sum(shard.filesize for shard in self.shardlist)
        if limit_bytes is not None and total > limit_bytes:
            return False
        done = 0
        self.verify_index()
        for shard in self.shardlist:
            _check_hash(self.folder / shard.url, shard.sha256)
            done += shard.filesize
            if progress:
                progress(done, total)
        return True

    def verify_index(self) -> None:
        """Compare the sha256 of every index file; raises `DataError` at the first wrong one."""
        for name, expected in self.index.items():
            _check_hash(self.folder / name, expected)

    def dump(self) -> str:
        """The JSON text of manifest.json; the same data set gives the same text."""
        content = self.model_dump(mode="json", by_alias=True)
        shards = ",\n".join(f"  {json.dumps(shard)}" for shard in content.pop("shardlist"))
        head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
        return ",\n".join(["{\n" + head[0], *head[1:], ' "shardlist": [\n' + shards + "\n ]\n}\n"])

    def _check_names(self) -> None:
        """No path may lead out of the folder, and every number must be possible."""
        file = self.folder / MANIFEST
        names = [shard.url for shard in self.shardlist]
        for name in names:
            if Path(name).name != name or not name.endswith(".tar"):
                raise DataError(f"{file}: shard {name!r} is not a plain .tar file name")
        if len(set(names)) != len(names):
            raise DataError(f"{file}: a shard is listed twice; pack the data again")
        if not names:
            raise DataError(f"{file}: lists no shard; pack the data again")
        expected = {index_name(split, column) for split in self.splits for column in COLUMNS}
        if set(self.index) != expected or any("/" in split for split in self.splits):
            raise DataError(f"{file}: lists other index files than expected; pack the data again")
        if self.resolution <= 0 or self.channels not in (1, 3) or not self.classes:
            raise DataError(f"{file}: impossible image size or classes; pack the data again")
        for shard in self.shardlist:
            histogram = shard.class_histogram
            consistent = len(histogram) == self.num_classes and min(histogram) >= 0
            if not consistent or sum(histogram) != shard.nsamples or shard.nsamples <= 0:
                raise DataError(f"{file}: impossible counts for {shard.url}; pack the data again")
        if self.checksum and self.checksum != _checksum(self):
            raise DataError(f"{file}: was edited or is damaged (checksum); pack the data again")
        if self.fingerprint != content_fingerprint(self):
            raise DataError(f"{file}: was edited (its fingerprint is wrong); pack the data again")

    def _check_files(self) -> None:
        listed = {shard.url: shard for shard in self.shardlist}
        present = {path.name: path for path in tar_files(self.folder)}
        for name, shard in listed.items():
            if name not in present:
                raise DataError(f"{self.folder / name}: shard is missing; pack the data again")
            try:
                size = present[name].stat().st_size
            except OSError as error:  # a link to a disk that is not mounted, say
                raise DataError(
                    f"{self.folder / name}: shard cannot be read: {error.strerror}"
                ) from None
            if size != shard.filesize:
                raise DataError(
                    f"{self.folder / name}: shard has {size} bytes, expected {shard.filesize}; "
                    "delete it and pack the data again"
                )
        extra = sorted(present.keys() - listed.keys())
        if extra:
            raise DataError(
                f"{self.folder / extra[0]}: shard is not in {MANIFEST}; remove it from the folder"
            )
        for name in self.index:
            if not (self.folder / name).is_file():
                raise DataError(f"{self.folder / name}: index is missing; pack the data again")


def level_name(resolution: int) -> str:
    """The folder of one resolution within a pyramid: r0008 for 8 px."""
    return f"r{resolution:04d}"


def level_folder(path: str, resolution: int) -> str:
    """The place of one resolution of the pyramid at `path`, a folder or a URL."""
    return f"{path.rstrip('/')}/{level_name(resolution)}"


def _levels(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}")) or ["(none)"]


def index_name(split: str, column: str) -> str:
    """Path of an index column, relative to the data folder."""
    return f"index/{split}.{column}.npy"


def write_data_set(
    folder: Path,
    shards: Sequence[Shard],
    columns: Mapping[tuple[str, str], Sequence[NDArray[Any]]],
    **facts: Any,
) -> Manifest:
    """Write the index files and then the manifest of finished shards; returns what `load` reads.

    `columns[split, column]` holds the entries of that split's shards, one array per shard, in the
    order of `shards`; `facts` are the manifest's other fields.
    """
    (folder / "index").mkdir(exist_ok=True)
    index: dict[str, str] = {}
    for (split, column), arrays in columns.items():
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(arrays).astype(COLUMNS[column]), allow_pickle=False)
        name = index_name(split, column)
        atomic_files.write_atomic(folder / name, buffer.getvalue())
        index[name] = hashlib.sha256(buffer.getvalue()).hexdigest()
    manifest = Manifest(
        folder=folder, fingerprint="", index=index, shardlist=tuple(shards), **facts
    )
    manifest = manifest.model_copy(update={"fingerprint": content_fingerprint(manifest)})
    manifest = manifest.model_copy(update={"checksum": _checksum(manifest)})
    atomic_files.write_atomic(folder / MANIFEST, manifest.dump())
    return Manifest.load(folder)


def content_fingerprint(manifest: Manifest) -> str:
    """Hash of everything that decides which pixels and labels a sample number means."""
    content: dict[str, Any] = manifest.model_dump(
        mode="json", include={"resolution", "channels", "classes", "encoder", "index"}
    )
    content["shards"] = [
        (shard.url, shard.split, shard.nsamples, shard.sha256) for shard in manifest.shardlist
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _checksum(manifest: Manifest) -> str:
    content = manifest.model_dump(mode="json", by_alias=True, exclude={"checksum"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _check_hash(file: Path, expected: str) -> None:
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
    if found != expected:
        raise DataError(f"{file}: damaged (sha256 differs); delete it and pack the data again")

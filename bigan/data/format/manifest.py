"""A packed data set on disk: manifest, index and tar shards, and their consistency checks.

    <folder>/manifest.json                 written last; without it the pack is incomplete
             plan.json                     the plan of `bigan pack`, compared when it resumes
             train-000000.tar ...          standard WebDataset shards: <key>.npy|png|jpg|webp and
                                           <key>.cls
             index/<split>.<column>.npy    one entry per sample, in shard order:
                                           offset u64, size u32 and crc32 u32 (zlib's) of the
                                           image's bytes in its tar, label i32
             index/train-000000.json ...   the record of each finished shard, with the original
                                           names of its samples

The manifest is a superset of `wids-shard-index-v1`, which other WebDataset tools read. Index files
are memory-mapped and shared by all processes of a node. For a remote data set the folder is a local
copy of manifest and index, and `remote` is the URL of the folder with the shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bigan import config as configs
from bigan.config import ConfigError, Frozen
from bigan.data import DataError
from bigan.data.format import index_files
from bigan.data.format.codec import StoredEncoding
from bigan.data.format.tar import nested_tar_files, tar_files
from bigan.data.stores import urls
from bigan.hashes import fingerprint
from bigan.image_size import ImageSize, Resolution, sides
from bigan.urls import redacted

MANIFEST = "manifest.json"
PLAN = "plan.json"
PYRAMID = "pyramid.json"  # lists the folders of a set packed at several resolutions
UNLABELLED = ("all",)  # the classes of images without labels
INDEXED_PLAN = "indexed-in-place"  # `plan` of a manifest for shards that bigan did not write
UNLABELLED_PLAN = "indexed-in-place, labels: none"  # the same, and their labels were not read
SCHEMA = 2
HASHED_BYTES = 2**30  # up to this size, the sha256 of the index of a split is compared at use
COLUMNS: dict[str, type[np.generic]] = {
    "offset": np.uint64,
    "size": np.uint32,
    "label": np.int32,
    "crc32": np.uint32,
}


@dataclass(frozen=True)
class Index:
    """The index of a split: the columns of the module docstring, each [num_samples].

    first: number of the first sample of each shard, [num_shards].
    """

    offset: NDArray[np.uint64]
    size: NDArray[np.uint32]
    label: NDArray[np.int32]
    crc32: NDArray[np.uint32]
    first: NDArray[np.int64]

    def shards_of(self, samples: NDArray[np.int64] | int) -> NDArray[np.int64]:
        """The number within the split of the shard of each of `samples`."""
        return np.searchsorted(self.first, samples, side="right") - 1


class Shard(Frozen):
    """One tar: file name, number of samples, size in bytes, hash and split."""

    url: str
    nsamples: int
    filesize: int
    sha256: str
    split: str


class Manifest(Frozen):
    """The content of a packed folder. `Manifest.load` reads it and checks the folder."""

    folder: Path = Field(exclude=True)
    remote: str | None = Field(default=None, exclude=True)  # URL of the folder with the shards
    shard_folder: Path | None = Field(default=None, exclude=True)  # of a copy of the shards
    labelled: bool = Field(default=True, exclude=True)  # False: `without_labels`
    kind: Literal["wids-shard-index-v1"] = Field(
        default="wids-shard-index-v1",
        validation_alias="__kind__",
        serialization_alias="__kind__",
    )
    wids_version: int = 1
    schema_version: int = SCHEMA
    name: str
    resolution: Resolution  # pixels; of images that are not square (height, width)
    channels: int  # 1: grey, 2: grey and alpha, 3: RGB, 4: RGBA
    classes: tuple[str, ...]  # class names; label i is classes[i]
    encoder: StoredEncoding
    quality: int | None = None  # of a lossy encoder
    transform: str  # conversion from the originals to these pixels
    software: dict[str, str] = Field(
        default_factory=dict
    )  # versions of the libraries the bytes depend on
    samples_per_shard: int = 0  # planned; the last shard of a split may hold fewer
    num_bad: int = 0  # unusable originals that were left out
    plan: str  # hash of plan.json
    fingerprint: str  # hash of the content; equal fingerprints, equal samples
    index: dict[str, str]  # file name -> sha256
    records: dict[str, str] = Field(default_factory=dict)  # plan.json, index/*.json -> sha256
    class_counts: dict[str, tuple[int, ...]]  # split -> samples of each class
    shardlist: tuple[Shard, ...]
    checksum: str = ""  # hash of all of the above

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of `folder` and check its consistency, not the shards.

        Raises `DataError`, one line, if the folder is missing, the pack incomplete, or the
        manifest damaged.
        """
        folder = Path(folder)
        file = folder / MANIFEST
        if not folder.is_dir():
            raise DataError(f"{folder}: no such data folder; create it with `bigan pack`")
        if not file.is_file():
            if (folder / PYRAMID).is_file():
                raise DataError(
                    f"{folder}: contains several resolutions; choose one of its folders, e.g. "
                    f"{_levels(folder)[-1]}"
                )
            state = "is an incomplete pack" if (folder / PLAN).is_file() else "is not a data set"
            raise DataError(f"{folder}: {state} (no {MANIFEST}); run `bigan pack`")
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error}; pack the data again") from None
        return cls.parse(data, folder)

    @classmethod
    def parse(cls, data: bytes, folder: Path) -> Manifest:
        """The manifest of `folder` with the text `data`; raises `DataError` like `read`."""
        file = folder / MANIFEST
        try:
            content = json.loads(data)
        except ValueError as error:
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
        """`read`, and check that the folder has the files that the manifest lists.

        Raises `DataError` if a shard or index file is missing, unlisted or has another size.
        Contents are checked by `verify_checksums` and, completely, by `bigan verify`.
        """
        manifest = cls.read(folder)
        manifest._check_files()
        return manifest

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits; each has at least one sample."""
        return tuple(dict.fromkeys(shard.split for shard in self.shardlist))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[H, W, C] of every image."""
        return *sides(self.resolution), self.channels

    def location(self, shard: Shard) -> str:
        """Path or URL of a shard."""
        if self.remote is not None:
            return redacted(urls.join(self.remote, shard.url))
        return str((self.shard_folder or self.folder) / shard.url)

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of `split` in order; raises `DataError` for an unknown split."""
        found = tuple(shard for shard in self.shardlist if shard.split == split)
        if not found:
            known = ", ".join(self.splits) or "none"
            raise DataError(f"{self.folder}: no split {split!r}; its splits are: {known}")
        return found

    def num_samples(self, split: str) -> int:
        return sum(shard.nsamples for shard in self.shards(split))

    def samples_of_class(self, split: str) -> tuple[int, ...]:
        """Samples of each class in `split`, [num_classes]; `DataError` for an unknown split."""
        if split not in self.class_counts:
            self.shards(split)  # raises
        return self.class_counts[split]

    def load_index(self, split: str) -> Index:
        """The memory-mapped index of `split`; reads it once to check it, 0.3 s for 14M samples.

        Raises `DataError` if it is damaged. Of more than `HASHED_BYTES`, only the consistency with
        the manifest is checked; `verify_index` and `bigan verify` compare all hashes.
        """
        shards, num = self.shards(split), self.num_samples(split)
        files = {name: self.folder / index_name(split, name) for name in COLUMNS}
        columns = {name: index_files.mapped(files[name], COLUMNS[name], num) for name in COLUMNS}
        sizes = np.asarray([shard.nsamples for shard in shards], np.int64)
        limits = np.asarray([shard.filesize for shard in shards], np.uint64)
        counts = np.asarray(self.class_counts[split], np.int64) if self.labelled else None
        hashes = {name: self.index[index_name(split, name)] for name in COLUMNS}
        if self.remote or sum(column.nbytes for column in columns.values()) > HASHED_BYTES:
            hashes = {}  # the copy of a remote index was verified once for all processes
        if not index_files.is_consistent(columns, sizes, limits, counts, hashes):
            raise DataError(
                f"{self.folder}: the index of split {split!r} is inconsistent with {MANIFEST}; "
                "pack the data again"
            )
        arrays: dict[str, Any] = {name: np.asarray(columns[name]) for name in COLUMNS}
        if not self.labelled:
            arrays["label"] = np.broadcast_to(np.zeros(1, np.int32), num)
        return Index(**arrays, first=np.cumsum(sizes) - sizes)  # faster to index than memmaps

    def verify_checksums(
        self, limit_bytes: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> bool:
        """Compare the sha256 of every shard and index file; raises `DataError` at the first error.

        Returns False, without reading, for a data set larger than `limit_bytes`.
        `progress(bytes done, total bytes)` is called after each shard.
        """
        total = sum(shard.filesize for shard in self.shardlist)
        if limit_bytes is not None and total > limit_bytes:
            return False
        done = 0
        self.verify_index()
        for shard in self.shardlist:
            index_files.check_hash(Path(self.location(shard)), shard.sha256)
            done += shard.filesize
            if progress:
                progress(done, total)
        return True

    def verify_index(self) -> None:
        """Compare the sha256 of every index file; raises `DataError` at the first error."""
        for name, expected in self.index.items():
            index_files.check_hash(self.folder / name, expected)

    def dump(self) -> str:
        """The JSON text of manifest.json; equal data sets give equal texts."""
        content = self.model_dump(mode="json", by_alias=True)
        shards = ",\n".join(f"  {json.dumps(shard)}" for shard in content.pop("shardlist"))
        head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
        return ",\n".join(["{\n" + head[0], *head[1:], ' "shardlist": [\n' + shards + "\n ]\n}\n"])

    def sealed(self) -> Manifest:
        """A copy with the right `fingerprint` and `checksum`."""
        manifest = self.model_copy(update={"fingerprint": content_fingerprint(self)})
        return manifest.model_copy(update={"checksum": _checksum(manifest)})

    @property
    def is_indexed(self) -> bool:
        """Whether bigan did not write the shards but indexed them in place."""
        return self.plan in (INDEXED_PLAN, UNLABELLED_PLAN)

    def without_labels(self) -> Manifest:
        """The same images as one class, with a fingerprint that does not depend on the labels."""
        content = self.model_dump(mode="json", include={"resolution", "channels", "encoder"})
        images = [
            (shard.url, shard.split, shard.nsamples, shard.sha256) for shard in self.shardlist
        ]
        changes = {
            "labelled": False,
            "classes": UNLABELLED,
            "class_counts": {split: (self.num_samples(split),) for split in self.splits},
            "fingerprint": fingerprint({**content, "labels": "none", "shards": images}),
        }
        return self.model_copy(update=changes)

    def may_contain(self, name: str) -> bool:
        """Whether `name` can be a shard: a tar in the folder or, indexed in place, below it."""
        parts = name.split("/")
        safe = name.endswith(".tar") and not {"", ".", ".."} & set(parts) and "\0" not in name
        return safe and (self.is_indexed or len(parts) == 1)

    def tar_files(self) -> dict[str, Path]:
        """The tars that are present in the folder, by their names in a manifest."""
        found = nested_tar_files(self.folder) if self.is_indexed else tar_files(self.folder)
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    def _check_names(self) -> None:
        """Check that no path points outside of the folder and all numbers are consistent."""
        file = self.folder / MANIFEST
        names = [shard.url for shard in self.shardlist]
        for name in names:
            if not self.may_contain(name):
                raise DataError(f"{file}: shard {name!r} is not a plain .tar file name")
        if len(set(names)) != len(names):
            raise DataError(f"{file}: a shard is listed twice; pack the data again")
        if not names:
            raise DataError(f"{file}: lists no shards; pack the data again")
        expected = {index_name(split, column) for split in self.splits for column in COLUMNS}
        if set(self.index) != expected or any("/" in split for split in self.splits):
            raise DataError(f"{file}: lists unexpected index files; pack the data again")
        if self.channels not in range(1, 5) or not self.classes:
            raise DataError(f"{file}: impossible image size or classes; pack the data again")
        for shard in self.shardlist:
            if shard.nsamples <= 0:
                raise DataError(f"{file}: impossible counts for {shard.url}; pack the data again")
        for split in self.splits:
            counts = self.class_counts.get(split, ())
            possible = len(counts) == self.num_classes and min(counts) >= 0
            if not possible or sum(counts) != self.num_samples(split):
                raise DataError(f"{file}: impossible counts for {split}; pack the data again")
        if self.checksum != _checksum(self):
            raise DataError(f"{file}: was edited or is damaged (checksum); pack the data again")
        if self.fingerprint != content_fingerprint(self):
            raise DataError(f"{file}: was edited (its fingerprint is wrong); pack the data again")

    def _check_files(self) -> None:
        listed = {shard.url: shard for shard in self.shardlist}
        present = self.tar_files()
        again = f"delete {MANIFEST} and index/ to index the shards again"
        if not self.is_indexed:
            again = "pack the data again"
        for name, shard in listed.items():
            if name not in present:
                raise DataError(f"{self.folder / name}: shard is missing; {again}")
            try:
                size = present[name].stat().st_size
            except OSError as error:  # e.g. a link to an unmounted disk
                raise DataError(
                    f"{self.folder / name}: shard cannot be read: {error.strerror}"
                ) from None
            if size != shard.filesize:
                raise DataError(
                    f"{self.folder / name}: shard has {size} bytes, expected {shard.filesize}; "
                    f"{again if self.is_indexed else f'delete it and {again}'}"
                )
        extra = sorted(present.keys() - listed.keys())
        if extra:
            raise DataError(
                f"{self.folder / extra[0]}: shard is not listed in {MANIFEST}; "
                f"{again if self.is_indexed else 'remove it from the folder'}"
            )
        for name in self.index:
            if not (self.folder / name).is_file():
                raise DataError(f"{self.folder / name}: index file is missing; {again}")


def level_name(resolution: ImageSize) -> str:
    """Folder name of one resolution in a pyramid: r0008 for 8 px, r0020x0012 for 20x12 px."""
    height, width = sides(resolution)
    return f"r{width:04d}" if width == height else f"r{width:04d}x{height:04d}"


def level_folder(path: str, resolution: ImageSize) -> str:
    """Path or URL of one resolution of the pyramid at `path`."""
    return urls.join(path, level_name(resolution))


def _levels(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}")) or ["(none)"]


def index_name(split: str, column: str) -> str:
    """Path of an index column, relative to the data folder."""
    return f"index/{split}.{column}.npy"


def content_fingerprint(manifest: Manifest) -> str:
    """Hash of everything that the pixels and label of a sample number depend on."""
    content: dict[str, Any] = manifest.model_dump(
        mode="json", include={"resolution", "channels", "classes", "encoder", "index"}
    )
    content["shards"] = [
        (shard.url, shard.split, shard.nsamples, shard.sha256) for shard in manifest.shardlist
    ]
    return fingerprint(content)


def _checksum(manifest: Manifest) -> str:
    content = manifest.model_dump(mode="json", by_alias=True, exclude={"checksum"})
    return fingerprint(content)

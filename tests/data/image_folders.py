"""Folders and zip archives of random images."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bigan.data.packing.sources import Source, open_source

RNG = np.random.default_rng(0)


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (9, 9, 3), np.uint8)).save(root / name)


def zipped(root: Path, file: Path, prefix: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", method) as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, prefix + path.relative_to(root).as_posix())
    return file


def both(root: Path) -> list[Source]:
    """The folder and a zip of it with a wrapping folder; both are equal."""
    folder = open_source(root, resolution=8)
    archive = open_source(zipped(root, root.with_suffix(".zip"), "wrap/"), resolution=8)
    for field in ("classes", "keys", "labels", "splits", "bad", "identity"):
        assert getattr(folder, field) == getattr(archive, field)
    for i in range(len(folder)):
        assert np.array_equal(folder.read(i), archive.read(i))
    return [folder, archive]


def classes_of(source: Source) -> dict[str, str]:
    return {k: source.classes[n] for k, n in zip(source.keys, source.labels, strict=True)}


def num_skipped(source: Source) -> int:
    return sum(number for _, number in source.skipped)


def tarred(root: Path, file: Path, prefix: str = "") -> Path:
    """A tar of `root`, compressed as the suffix of `file` says."""
    kind = file.suffix.removeprefix(".")
    mode: Any = "w" if kind == "tar" else f"w:{kind}"
    with tarfile.open(file, mode) as archive:
        for path in sorted(root.rglob("*")):
            name = prefix + path.relative_to(root).as_posix()
            archive.add(path, name, recursive=False)
    return file


def every_kind(root: Path, scratch: Path, **options: Any) -> list[Source]:
    """`root` as a folder and in archives, with and without folders around it: all equal."""
    wrapped = scratch / "wrapped" / "one" / "two"
    wrapped.parent.mkdir(parents=True)
    wrapped.symlink_to(root.resolve())
    specs = [
        root,
        scratch / "wrapped",
        zipped(root, scratch / "plain.zip"),
        zipped(root, scratch / "wrapped.zip", "one/two/"),
        tarred(root, scratch / "plain.tar", "./"),
        tarred(root, scratch / "wrapped.tar", "one/"),
        tarred(root, scratch / "plain.tar.gz"),
        tarred(root, scratch / "wrapped.tar.xz", "one/two/"),
    ]
    options = {"resolution": 8, **options}
    sources = [
        open_source(spec, scratch=scratch / f"scratch{n}", **options)
        for n, spec in enumerate(specs)
    ]
    for other in sources[1:]:
        for field in ("classes", "keys", "labels", "splits", "skipped", "bad", "identity"):
            assert getattr(other, field) == getattr(sources[0], field), (other.name, field)
        assert all(np.array_equal(other.read(i), sources[0].read(i)) for i in range(len(other)))
    return sources

"""Folders and zip archives of random images."""

from __future__ import annotations

import zipfile
from pathlib import Path

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
    """The folder and a zip of it with a wrapping folder; equal except for their identity."""
    folder = open_source(root, resolution=8)
    archive = open_source(zipped(root, root.with_suffix(".zip"), "wrap/"), resolution=8)
    for field in ("classes", "keys", "labels", "splits", "bad"):
        assert getattr(folder, field) == getattr(archive, field)
    for i in range(len(folder)):
        assert np.array_equal(folder.read(i), archive.read(i))
    return [folder, archive]


def classes_of(source: Source) -> dict[str, str]:
    return {k: source.classes[n] for k, n in zip(source.keys, source.labels, strict=True)}

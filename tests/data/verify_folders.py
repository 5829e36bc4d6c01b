"""Small data folders to damage, and helpers for reports of `verify`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bigan.data import DataError
from bigan.data.format.codec import Encoding, encode
from bigan.data.format.manifest import COLUMNS, Manifest, Shard, index_name
from bigan.data.format.tar import Member, index_shard, shard_bytes, walk_tar
from bigan.data.packing.verify import Report, verify

CLASSES = ("cat", "dog", "owl")


Sample = tuple[str, bytes, int]  # key, image bytes, label


def picture(number: int, resolution: int = 8, channels: int = 3) -> np.ndarray:
    shape = (resolution, resolution, channels)
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def samples(encoder: Encoding, resolution: int = 8) -> dict[str, list[Sample]]:
    """Two training shards of 7 and 5 samples, one test shard of 4."""
    made = [
        (f"{n:09d}", encode(picture(n, resolution), encoder), n % len(CLASSES)) for n in range(16)
    ]
    return {
        "train-000000.tar": made[:7],
        "train-000001.tar": made[7:12],
        "test-000000.tar": made[12:],
    }


def write(
    folder: Path, shards: dict[str, list[Sample]], encoder: Encoding, resolution: int = 8
) -> Path:
    """A consistent data folder; its images may be invalid."""
    (folder / "index").mkdir(parents=True)
    entries, rows = [], {}
    for name, members in shards.items():
        data = shard_bytes(iter(members), encoder)
        (folder / name).write_bytes(data)
        split = name.rpartition("-")[0]
        entries.append(
            Shard(
                url=name,
                nsamples=len(members),
                filesize=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                split=split,
            )
        )
        columns = rows.setdefault(split, {name: [] for name in COLUMNS})
        for column, values in index_shard(data, encoder, name).items():
            columns[column] += values
    hashes = {}
    counts = {
        split: tuple(np.bincount(columns["label"], minlength=len(CLASSES)).tolist())
        for split, columns in rows.items()
    }
    for split, columns in rows.items():
        for column, dtype in COLUMNS.items():
            file = folder / index_name(split, column)
            np.save(file, np.asarray(columns[column], dtype), allow_pickle=False)
            hashes[index_name(split, column)] = sha256(file)
    manifest = Manifest(
        folder=folder,
        name="animals",
        resolution=resolution,
        channels=3,
        classes=CLASSES,
        encoder=encoder,
        transform="none",
        plan="0" * 32,
        fingerprint="",
        index=hashes,
        class_counts=counts,
        shardlist=tuple(entries),
    )
    seal(manifest)
    Manifest.load(folder)  # does not check the images
    return folder


def seal(manifest: Manifest) -> None:
    (manifest.folder / "manifest.json").write_text(manifest.sealed().dump())


def reseal(folder: Path) -> None:
    """Write a manifest that matches the bytes of the shards and index files."""
    old = Manifest.read(folder)
    shards = []
    for shard in old.shardlist:
        file = folder / shard.url
        now = {"filesize": file.stat().st_size, "sha256": sha256(file)}
        shards.append(shard.model_copy(update=now))
    index = {name: sha256(folder / name) for name in old.index}
    seal(old.model_copy(update={"shardlist": tuple(shards), "index": index}))


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def found(report: Report) -> list[str]:
    return [f"{problem.where}: {problem.what}" for problem in report.problems]


def has(report: Report, *parts: str) -> bool:
    """Whether one problem contains all of `parts`."""
    return any(all(part in line for part in parts) for line in found(report))


def flip(file: Path, position: int, bits: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= bits
    file.write_bytes(data)


def member(file: Path, name: str) -> Member:
    return next(m for m in walk_tar(file.read_bytes(), "") if m.name == name)


def check_flips(folder: Path, files: list[Path], step: int) -> None:
    """Check that every single flipped byte is found."""
    assert verify(folder).ok, verify(folder).as_text()
    for file in files:
        full = file.read_bytes()
        for position in range(0, len(full), step):
            flip(file, position)
            try:
                report = verify(folder, jobs=1)
            except DataError:
                report = None
            where = file.relative_to(folder).as_posix()
            assert report is None or not report.ok, f"byte {position} of {where}"
            file.write_bytes(full)

"""The index and the records of a data folder compared with its manifest; for `bigan verify`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from bigan import hashes
from bigan.data.format.manifest import COLUMNS, MANIFEST, PLAN, Manifest, Shard, index_name
from bigan.data.packing.shard_scan import CHANGED, Columns, Problem, is_indexed_in_place


def read_index(
    manifest: Manifest, shards: tuple[Shard, ...]
) -> tuple[dict[str, Columns], list[Problem]]:
    """(the undamaged index rows of each of `shards` by file name, problems)."""
    found: dict[str, Columns] = {}
    problems: list[Problem] = []
    for split in dict.fromkeys(shard.split for shard in shards):
        members = [shard for shard in shards if shard.split == split]
        ends = np.cumsum([shard.nsamples for shard in members]).tolist()
        columns: Columns = {}
        for column, dtype in COLUMNS.items():
            name = index_name(split, column)
            try:
                data = (manifest.folder / name).read_bytes()
                values = np.load(io.BytesIO(data), allow_pickle=False)
            except FileNotFoundError:
                problems.append(Problem(name, "index file is missing"))
                continue
            except Exception as error:  # NumPy raises many kinds for a damaged file
                problems.append(Problem(name, f"cannot be read: {error}"))
                continue
            if hashes.sha256(data) != manifest.index.get(name):
                problems.append(Problem(name, CHANGED))
            if values.dtype != dtype or values.shape != (ends[-1],):
                what = f"holds {values.dtype} {list(values.shape)}, expected "
                problems.append(Problem(name, f"{what}{np.dtype(dtype)} [{ends[-1]}]"))
                continue
            columns[column] = values
        if "label" in columns:
            num = manifest.num_classes
            counts = np.bincount(columns["label"].clip(-1, num) + 1, minlength=num + 2)[1:-1]
            if counts.tolist() != list(manifest.class_counts.get(split, ())):
                what = f"holds other numbers of samples of each class than {MANIFEST}"
                problems.append(Problem(index_name(split, "label"), what))
        if columns.keys() == COLUMNS.keys():
            for shard, end in zip(members, ends, strict=True):
                rows = slice(end - shard.nsamples, end)
                found[shard.url] = {name: values[rows] for name, values in columns.items()}
    return found, problems


def check_hashes(folder: Path, records: dict[str, str]) -> list[Problem]:
    """Compare the files of `folder` with `records`, name -> sha256."""
    problems = []
    for name, expected in sorted(records.items()):
        file = folder / name
        if name != PLAN and name != f"index/{file.name}":
            problems.append(
                Problem(MANIFEST, f"lists {name!r}, which points outside of the folder")
            )
            continue
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            problems.append(Problem(name, "is missing"))
            continue
        except OSError as error:
            problems.append(Problem(name, f"cannot be read: {error.strerror}"))
            continue
        if hashes.sha256(data) != expected:
            problems.append(Problem(name, CHANGED))
    return problems


def check_records(manifest: Manifest) -> list[Problem]:
    """plan.json and the record of each shard compared with their hashes; unlisted files in index/.

    Shards that were indexed in place have no records, and other files are allowed beside them.
    """
    problems = check_hashes(manifest.folder, manifest.records)
    known = manifest.index.keys() | manifest.records.keys()
    for file in sorted((manifest.folder / "index").glob("*")):
        name = f"index/{file.name}"
        if not (name in known or file.name.startswith(".") or is_indexed_in_place(manifest)):
            problems.append(Problem(name, f"is not listed in {MANIFEST}: remove it"))
    return problems

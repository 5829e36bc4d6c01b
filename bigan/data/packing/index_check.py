"""The index and the records of a data folder compared with its manifest; for `bigan verify`."""

from __future__ import annotations

import io

import numpy as np

from bigan import hashes
from bigan.data import DataError
from bigan.data.format.manifest import COLUMNS, MANIFEST, PLAN, Manifest, Shard, index_name
from bigan.data.packing.shard_scan import CHANGED, Columns, Problem
from bigan.data.places import Place, threads


def read_index(
    place: Place, manifest: Manifest, shards: tuple[Shard, ...]
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
                data = place.read(name)
                values = np.load(io.BytesIO(data), allow_pickle=False)
            except FileNotFoundError:
                problems.append(Problem(name, "index file is missing"))
                continue
            except DataError:  # the store does not answer
                raise
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


def check_hashes(place: Place, records: dict[str, str]) -> list[Problem]:
    """Compare the files of `place` with `records`, name -> sha256."""

    def check(name: str) -> Problem | None:
        if name != PLAN and name != f"index/{name.rpartition('/')[2]}":
            return Problem(MANIFEST, f"lists {name!r}, which points outside of the folder")
        try:
            found = hashes.sha256(place.read(name))
        except FileNotFoundError:
            return Problem(name, "is missing")
        except OSError as error:
            return Problem(name, f"cannot be read: {error.strerror}")
        return None if found == records[name] else Problem(name, CHANGED)

    with threads() as executor:
        return [problem for problem in executor.map(check, sorted(records)) if problem]


def check_records(place: Place, manifest: Manifest, in_place: bool) -> list[Problem]:
    """plan.json and the record of each shard compared with their hashes; unlisted files in index/.

    Shards that were indexed in place have no records, and other files are allowed beside them.
    """
    problems = check_hashes(place, manifest.records)
    known = manifest.index.keys() | manifest.records.keys()
    for entry in sorted(place.entries("index")):
        name = f"index/{entry.rstrip('/')}"
        if not (name in known or entry.startswith(".") or in_place):
            problems.append(Problem(name, f"is not listed in {MANIFEST}: remove it"))
    return problems

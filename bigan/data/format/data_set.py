"""Writing the index files and the manifest of shards."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigan.data.format.manifest import COLUMNS, MANIFEST, Manifest, Shard, index_name
from bigan.data.places import Place
from bigan.hashes import sha256


def write_data_set(
    place: Place,
    shards: Sequence[Shard],
    columns: Mapping[tuple[str, str], Sequence[NDArray[Any]]],
    **fields: Any,
) -> Manifest:
    """Write the index files and then the manifest of existing shards; returns the loaded manifest.

    `columns[split, column]` has one array per shard of that split, in the order of `shards`;
    `fields` are the other fields of the manifest.
    """
    place.make_folder("index")
    index: dict[str, str] = {}
    counts: dict[str, tuple[int, ...]] = {}
    for (split, column), arrays in columns.items():
        buffer = io.BytesIO()
        values = np.concatenate(arrays).astype(COLUMNS[column])
        if column == "label":
            counts[split] = tuple(np.bincount(values, minlength=len(fields["classes"])).tolist())
        np.save(buffer, values, allow_pickle=False)
        name = index_name(split, column)
        place.write(name, buffer.getvalue())
        index[name] = sha256(buffer.getvalue())
    manifest = Manifest(
        folder=Path(),
        fingerprint="",
        index=index,
        class_counts=counts,
        shardlist=tuple(shards),
        **fields,
    )
    place.write(MANIFEST, manifest.sealed().dump())
    return place.load_manifest()

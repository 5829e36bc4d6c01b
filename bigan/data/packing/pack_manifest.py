"""The last step of `bigan pack`: index and manifest from the records of all shards."""

from __future__ import annotations

import collections
from dataclasses import dataclass

import numpy as np

from bigan.data.format.data_set import write_data_set
from bigan.data.format.manifest import COLUMNS, PLAN, Manifest, Shard
from bigan.data.packing.pack_plan import Level, Plan
from bigan.data.packing.pack_shard import Bad, finished, record_name
from bigan.data.places import Place
from bigan.hashes import sha256
from bigan.image_size import ratio


@dataclass(frozen=True)
class Contents:
    """The finished shards of a level: entries of its manifest, columns of its index."""

    shards: list[Shard]
    columns: dict[tuple[str, str], list[np.ndarray]]  # (split, column): shard by shard
    bad: list[Bad]
    changes: collections.Counter[str]
    records: dict[str, str]  # file name -> sha256


def collect(place: Place, plan: Plan) -> Contents | None:
    """Read the records of a level; None if a shard is not finished."""
    contents = Contents([], collections.defaultdict(list), [], collections.Counter(), {})
    contents.records[PLAN] = sha256(place.read(PLAN))
    for name, found in zip(plan.names, finished(place, plan.names, plan.id), strict=True):
        if found is None:
            return None
        record, contents.records[record_name(name)] = found
        contents.bad.extend(record.bad)
        contents.changes.update(record.changes)
        if not record.nsamples:
            continue
        split = name.rpartition("-")[0]
        columns = {
            "offset": record.offsets,
            "size": record.sizes,
            "label": record.labels,
            "crc32": record.crcs,
        }
        for column, dtype in COLUMNS.items():
            contents.columns[split, column].append(np.asarray(columns[column], dtype))
        entry = Shard(
            url=f"{name}.tar",
            nsamples=record.nsamples,
            filesize=record.filesize,
            sha256=record.sha256,
            split=split,
        )
        contents.shards.append(entry)
    return contents


def write_manifest(
    place: Place, plan: Plan, level: Level, contents: Contents, num_bad: int
) -> Manifest:
    """Write the index files of a level, then its manifest."""
    source = plan.source
    factor = ratio(source.resolution, level.resolution)
    return write_data_set(
        place,
        contents.shards,
        contents.columns,
        name=source.name,
        resolution=level.resolution,
        channels=source.channels,
        classes=source.classes,
        encoder=level.encoder,
        quality=plan.quality,
        transform=source.transform + (f"+mean{factor}-v1" if factor > 1 else ""),
        software=plan.description["software"],
        samples_per_shard=plan.shard_size,
        num_bad=num_bad,
        plan=plan.id,
        records=contents.records,
    )

"""The text that `bigan pack` ends with: what it understood of the source."""

from __future__ import annotations

from pathlib import PurePath

from bigan.data.format.manifest import UNLABELLED, Manifest
from bigan.data.packing.pack import Packed
from bigan.data.packing.split_names import mentions_splits
from bigan.data.packing.trees import LABEL_FILES
from bigan.image_size import shown
from bigan.urls import redacted

TABLES = {".csv", ".tsv", ".json", ".jsonl", ".parquet"}  # suffixes of files with labels
NUM_ENDS = 5  # classes at the start and the end of a long list
NUM_NAMES = 8  # of classes without training images


def summary(packed: Packed) -> str:
    """Splits, classes with their numbers of images, changed, skipped and unusable images."""
    lines = [_size(manifest) for manifest in packed.manifests]
    if packed.manifests:
        lines += _classes(packed.manifests[-1])
    if packed.changes:
        counts = (f"{change} {count:,}" for change, count in sorted(packed.changes.items()))
        lines.append(f"  images: {', '.join(counts)}")
    if packed.skipped:
        suffixes = {PurePath(name).suffix or name for name, _ in packed.skipped}
        total = sum(number for _, number in packed.skipped)
        kinds = ", ".join(f"{number:,} {suffix}" for suffix, number in packed.skipped)
        lines.append(f"  skipped {total:,} files that are not images: {kinds}")
        lists = [name for name, _ in packed.skipped if mentions_splits(name)]
        if lists:
            lines.append(
                f"  splits are not read from {', '.join(lists)}: write them into the column "
                "`split` of labels.csv"
            )
        unlabelled = any(manifest.classes == UNLABELLED for manifest in packed.manifests)
        if unlabelled and not TABLES.isdisjoint(suffixes):
            lines.append(
                f"  labels are read from {', '.join(LABEL_FILES)} only: rename a file of them"
            )
    if packed.bad and packed.manifests:
        lines.append(f"  left out {len(packed.bad):,} unusable images: see {packed.bad_list}")
    return "\n".join(lines)


def _size(manifest: Manifest) -> str:
    splits = ", ".join(f"{manifest.num_samples(split):,} {split}" for split in manifest.splits)
    where = redacted(manifest.remote) if manifest.remote else manifest.folder
    return (
        f"{where}: {splits} images, {shown(manifest.resolution)} px, "
        f"{manifest.channels} channel(s), {manifest.num_classes} "
        f"class{'' if manifest.num_classes == 1 else 'es'}"
    )


def _classes(manifest: Manifest) -> list[str]:
    """A table of classes and splits; for many classes its ends only."""
    if manifest.classes == UNLABELLED:
        return ["  no labels: all images are of one class"]
    counts = {split: manifest.samples_of_class(split) for split in manifest.splits}
    names = [name if len(name) <= 40 else f"{name[:37]}..." for name in manifest.classes]
    width = max(len("class"), *(len(name) for name in names))
    header = "".join(f"{split:>10}" for split in counts)
    rows = [
        f"  {n:>6}  {name:<{width}}{''.join(f'{column[n]:>10,}' for column in counts.values())}"
        for n, name in enumerate(names)
    ]
    if len(rows) > 2 * NUM_ENDS + 1:
        rows[NUM_ENDS:-NUM_ENDS] = [f"     ...  {len(rows) - 2 * NUM_ENDS:,} more classes"]
    lines = [f"  number  {'class':<{width}}{header}", *rows]
    empty = [name for name, num in zip(names, counts["train"], strict=True) if not num]
    if empty:
        more = f", ... ({len(empty)} classes)" if len(empty) > NUM_NAMES else ""
        lines.append(f"  without a training image: {', '.join(empty[:NUM_NAMES])}{more}")
    return lines

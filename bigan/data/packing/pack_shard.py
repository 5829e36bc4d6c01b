"""One shard of `bigan pack`, a pure function of (plan, shard number), and its record."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bigan.config import Frozen
from bigan.data import DataError
from bigan.data.format.codec import BadImageError, Pixels, encode, first_line
from bigan.data.format.tar import index_shard, shard_bytes
from bigan.data.packing.pack_plan import Plan
from bigan.data.places import Place, threads
from bigan.hashes import sha256
from bigan.image_size import sides
from bigan.transparency import has_alpha

CHUNK = 256  # records that are read ahead

Bad = tuple[str, str]  # (name of the original, reason)


@dataclass(frozen=True)
class Encoded:
    """A usable image: its bytes at each level, and `convert.changes`."""

    levels: tuple[bytes, ...]
    changes: tuple[str, ...] = ()


def halvings(image: Pixels, num: int) -> list[Pixels]:
    """`image`, uint8 [H, W, C], at `num` resolutions [H, W] / 2**(num - 1), ..., [H, W].

    A pixel is the mean of the f x f pixels of `image`, rounded once (half up). Means of the next
    larger level would accumulate rounding errors. Colors with alpha are weighted by it.
    """
    levels: list[Pixels] = [image]
    weighted = has_alpha(image.shape[2])
    sums: NDArray[Any] = image
    wide: Any = np.uint64 if weighted else np.uint32
    if weighted:
        alpha = image[..., -1:].astype(wide)
        sums = np.concatenate([image[..., :-1].astype(wide) * alpha, alpha], axis=2)
    for n in range(1, num):
        rows = sums[0::2].astype(wide) + sums[1::2]
        sums = rows[:, 0::2] + rows[:, 1::2]
        num_summed = np.full(sums.shape, 4**n, wide)
        if weighted:
            num_summed[..., :-1] = sums[..., -1:].clip(1)
        levels.append(((sums + num_summed // 2) // num_summed).astype(np.uint8))
    return levels[::-1]


class Record(Frozen):
    """Content of a finished shard: index/<shard>.json, written after the tar.

    A shard without usable images has a record but no tar and is not in the manifest.
    """

    plan: str
    nsamples: int
    filesize: int
    sha256: str
    bad: tuple[Bad, ...]
    offsets: tuple[int, ...]  # of the image of each sample in the tar
    sizes: tuple[int, ...]
    labels: tuple[int, ...]
    crcs: tuple[int, ...]
    keys: tuple[str, ...]  # `printable` names of the originals
    changes: Mapping[str, int] = Field(
        default_factory=dict
    )  # number of images that were cropped, enlarged, ...


def printable(name: str) -> str:
    """`name` with escapes for control characters and non-UTF-8 bytes."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def encoded_image(plan: Plan, i: int) -> Encoded | str:
    """Image i of the source, encoded for each level, or the reason it is unusable.

    A read error of the disk raises `DataError`: it is not a property of the image, and a shard
    without the image would differ from that of another attempt.
    """
    source = plan.source
    try:
        read = source.read_with_changes or (lambda i: (source.read(i), ()))
        pixels, changes = read(i)
        shape = (*sides(source.resolution), source.channels)
        if pixels.dtype != np.uint8 or pixels.shape != shape:
            found = f"{pixels.dtype} {list(pixels.shape)}"
            raise BadImageError(f"is {found}, expected uint8 {list(shape)}")
    except (DataError, MemoryError):
        raise
    except BadImageError as error:
        return printable(first_line(error))
    except Exception as error:  # PIL raises many kinds for damaged files
        if isinstance(error, OSError) and error.errno is not None:
            name = printable(source.keys[i])
            raise DataError(f"{source.name}: {name} cannot be read: {error.strerror}") from error
        return f"{type(error).__name__}: {printable(first_line(error))}"
    levels = zip(halvings(pixels, len(plan.levels)), plan.levels, strict=True)
    encoded = (encode(shrunk, level.encoder, plan.quality) for shrunk, level in levels)
    return Encoded(tuple(encoded), changes)


def shard(
    plan: Plan, number: int, level: int, encoded: Sequence[Encoded | str]
) -> tuple[bytes, Record]:
    """(tar, record) of shard `number` at `level`; `encoded` are its members by `encoded_image`."""
    source, encoder = plan.source, plan.levels[level].encoder
    rows = list(zip(plan.members[number], encoded, strict=True))
    good = [i for i, image in rows if not isinstance(image, str)]
    samples = (
        (f"{key:09d}", image.levels[level], source.labels[i])
        for key, (i, image) in enumerate(rows, start=plan.first_key[number])
        if not isinstance(image, str)
    )
    tar = shard_bytes(samples, encoder) if good else b""
    columns = index_shard(tar, encoder, plan.names[number]) if good else {}
    return tar, Record(
        plan=plan.id,
        nsamples=len(good),
        filesize=len(tar),
        sha256=sha256(tar),
        bad=tuple((printable(source.keys[i]), x) for i, x in rows if isinstance(x, str)),
        offsets=tuple(columns.get("offset", ())),
        sizes=tuple(columns.get("size", ())),
        labels=tuple(columns.get("label", ())),
        crcs=tuple(columns.get("crc32", ())),
        keys=tuple(printable(source.keys[i]) for i in good),
        changes=collections.Counter(
            change for image in encoded if isinstance(image, Encoded) for change in image.changes
        ),
    )


def record_name(name: str) -> str:
    """File name of the record of shard `name` (without .tar), relative to its level."""
    return f"index/{name}.json"


def finished(place: Place, names: Sequence[str], plan: str) -> Iterator[tuple[Record, str] | None]:
    """(record, its sha256) of each of these shards of a level, None for an unfinished one.

    A shard is finished if its record belongs to the plan with this id and its tar has the right
    size. The content of the tar is not read, which keeps resuming fast; `bigan verify` reads it.
    """
    sizes = place.sizes(file for name in names for file in (record_name(name), f"{name}.tar"))

    def read(name: str) -> bytes | None:
        if record_name(name) not in sizes:
            return None
        try:
            return place.read(record_name(name))
        except OSError:
            return None

    with threads() as executor:
        for start in range(0, len(names), CHUNK):  # the records of all shards may be large
            chunk = names[start : start + CHUNK]
            for name, data in zip(chunk, executor.map(read, chunk), strict=True):
                try:
                    record = Record.model_validate_json(data or b"")
                except ValueError:  # missing, or damaged
                    yield None
                    continue
                size = sizes.get(f"{name}.tar") if record.nsamples else 0
                whole = record.plan == plan and size == record.filesize
                yield (record, sha256(data or b"")) if whole else None

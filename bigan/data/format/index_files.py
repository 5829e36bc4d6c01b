"""Index files, .npy arrays with one entry per sample: memory-mapped, and checked in chunks.

The pages of a memory map that a process touches count as its memory. The checks therefore read the
files through a buffer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigan.data import DataError
from bigan.hashes import sha256_of_file

CHUNK = 2**17  # samples

Column = np.memmap[Any, np.dtype[Any]]


def mapped(file: Path, dtype: type[np.generic], num: int) -> Column:
    """The array in `file`; raises `DataError` unless it has this dtype and the shape [num]."""
    try:
        column = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds for a damaged header
        raise DataError(f"{file}: cannot be read: {error}; pack the data again") from None
    if column.dtype != dtype or column.shape != (num,):
        raise DataError(
            f"{file}: holds {column.dtype} {list(column.shape)}, expected "
            f"{np.dtype(dtype)} [{num}]; pack the data again"
        )
    return column


def check_hash(file: Path, expected: str) -> None:
    """Raise `DataError` if `file` cannot be read or has another sha256."""
    try:
        found = sha256_of_file(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
    if found != expected:
        raise damaged(file)


def damaged(file: Path) -> DataError:
    return DataError(f"{file}: damaged (sha256 differs); delete it and pack the data again")


def is_consistent(
    columns: Mapping[str, Column],
    sizes: NDArray[np.int64],
    limits: NDArray[np.uint64],
    counts: NDArray[np.int64] | None,
    sha256: Mapping[str, str],
) -> bool:
    """Whether each image lies within its shard and each class has its number of samples.

    `sizes` are the samples and `limits` the bytes of each shard, `counts` the samples of each class
    (None: not compared), `sha256` the hashes of the columns to verify. Every file is read once.
    Raises `DataError` for a damaged or unreadable file.
    """
    digests = {name: hashlib.sha256() for name in sha256}
    chunks = {name: _chunks(column, digests.get(name)) for name, column in columns.items()}
    ends = np.cumsum(sizes)
    found = np.zeros(0 if counts is None else len(counts), np.int64)
    start, consistent = 0, True
    for chunk in zip(*chunks.values(), strict=True):
        values = dict(zip(chunks, chunk, strict=True))
        offset, label = values["offset"], values["label"]
        stop = start + len(offset)
        shards = slice(np.searchsorted(ends, start, "right"), np.searchsorted(ends, stop) + 1)
        last = ends[shards].clip(max=stop)
        limit = np.repeat(limits[shards], last - (ends[shards] - sizes[shards]).clip(min=start))
        consistent &= bool(((offset <= limit) & (values["size"] <= limit - offset)).all())
        if counts is not None:
            consistent &= bool(label.min() >= 0 and label.max() < len(counts))
            if consistent:
                found += np.bincount(label, minlength=len(counts))
        start = stop
    for name, expected in sha256.items():
        if digests[name].hexdigest() != expected:
            raise damaged(Path(str(columns[name].filename)))
    return consistent and (counts is None or np.array_equal(found, counts))


def _chunks(column: Column, digest: Any) -> Iterator[NDArray[Any]]:
    """The values of a memory-mapped file, `CHUNK` at a time; hashes all of it into `digest`."""
    buffer = np.empty(CHUNK, column.dtype)
    file = Path(str(column.filename))
    try:
        with file.open("rb") as stream:
            head = stream.read(column.offset)
            if digest:
                digest.update(head)
            for start in range(0, len(column), CHUNK):
                values = buffer[: len(column) - start]
                if stream.readinto(values.data) != values.nbytes:
                    raise damaged(file)
                if digest:
                    digest.update(values.data)
                yield values
            if digest:
                digest.update(stream.read(1))  # there is nothing, or the file was changed
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None

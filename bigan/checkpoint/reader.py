"""Read any range of any tensor of a checkpoint that was written at any world size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from torch import Tensor

from bigan.checkpoint.part import DTYPES, file_checksum, part_name
from bigan.checkpoint.progress import CheckpointError, DamagedError, read_record, unreadable
from bigan.distributed.world import World, on_all_ranks

T = TypeVar("T")
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class _Stored:
    """A range of a tensor, stored as `key` in the file `path`."""

    path: Path
    key: str
    stored: tuple[int, ...]  # shape in the file
    dtype: str
    shape: tuple[int, ...]  # of the unsharded tensor
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.stored)


class Reader:
    """The tensors of one complete checkpoint. Reads headers when constructed, values on demand.

    `verify`: compare a part with its checksum before the first value is read from it. This reads
    the file once more (mostly from the page cache) at several GB/s, the rate of CRC-32. With
    `verify_across_ranks` each rank does that for a share of the parts.

    Raises `DamagedError` if a part is missing or damaged, or if the shards do not cover every
    tensor exactly once.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder = folder
        self.progress, checksums = read_record(folder)
        self._checksums = {
            folder / part_name(i, len(checksums)): part for i, part in enumerate(checksums)
        }
        self._handles: dict[Path, Any] = {}
        self._unverified = set(self._checksums) if verify else set()
        self._shards: dict[str, list[_Stored]] = {}
        for path in self._checksums:
            for name, shard in self._guard(path, partial(self._index, path)):
                self._shards.setdefault(name, []).append(shard)
        for name, shards in self._shards.items():
            shards.sort(key=lambda p: (p.start, p.stop))
            self._check(name, shards)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the unsharded tensor."""
        return {name: shards[0].shape for name, shards in self._shards.items()}

    def read(self, name: str) -> Tensor:
        """An unsharded tensor on the CPU; the caller owns its memory."""
        shape = self._find(name)[0].shape
        return self.read_range(name, 0, math.prod(shape)).reshape(shape)

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, [stop - start], on the CPU.

        The caller owns the memory. Raises IndexError if the tensor has no such elements.
        """
        shards = self._find(name)
        if not 0 <= start <= stop <= math.prod(shards[0].shape):
            raise IndexError(f"{name} of shape {shards[0].shape} has no range [{start}, {stop})")
        out = torch.empty(stop - start, dtype=TORCH_DTYPES[shards[0].dtype])
        for shard in shards:
            first, last = max(start, shard.start), min(stop, shard.stop)
            if first < last:
                self._verify(shard.path)
                read = partial(self._values, shard, first - shard.start, last - shard.start)
                out[first - start : last - start] = self._guard(shard.path, read)
        return out

    def verify_across_ranks(self, world: World) -> None:
        """Compare all parts with their checksums, each on one rank. A collective.

        Raises `DamagedError` on all ranks if one of them finds a damaged part.
        """

        def mine() -> None:
            for path in sorted(self._unverified)[world.rank :: world.size]:
                self._verify(path)

        on_all_ranks(world, mine)
        self._unverified.clear()

    def _find(self, name: str) -> list[_Stored]:
        if name not in self._shards:
            raise CheckpointError(f"{self.folder}: contains no {name}; use another run_dir")
        return self._shards[name]

    def _index(self, path: Path) -> list[tuple[str, _Stored]]:
        num_bytes = path.stat().st_size
        if num_bytes != self._checksums[path].bytes:
            raise ValueError(f"{num_bytes} bytes instead of {self._checksums[path].bytes}")
        handle = self._handles[path] = safetensors.safe_open(path, framework="pt")
        ranges = json.loads((handle.metadata() or {}).get("ranges", "{}"))
        found = []
        for key in handle.keys():  # noqa: SIM118  (not a mapping)
            view = handle.get_slice(key)
            stored, dtype = tuple(view.get_shape()), view.get_dtype()
            if dtype not in TORCH_DTYPES:
                raise ValueError(f"{key} has the unsupported type {dtype}")
            if key in ranges:
                name, _, start = key.rpartition("@")
                shape = tuple(int(size) for size in ranges[key])
                found.append((name, _Stored(path, key, stored, dtype, shape, int(start))))
            else:
                found.append((key, _Stored(path, key, stored, dtype, stored, 0)))
        return found

    def _check(self, name: str, shards: list[_Stored]) -> None:
        first, reached = shards[0], 0
        for shard in shards:
            if (shard.shape, shard.dtype) != (first.shape, first.dtype):
                raise self._misfit(f"the parts differ in the shape or type of {name}")
            if shard.start != reached:
                raise self._misfit(f"{name} has a gap or an overlap at element {reached}")
            reached = shard.stop
        if reached != math.prod(first.shape):
            raise self._misfit(f"{name} ends at element {reached} of {math.prod(first.shape)}")

    def _misfit(self, what: str) -> CheckpointError:
        return DamagedError(f"{self.folder}: {what}")

    def _values(self, shard: _Stored, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a stored tensor; reads only the rows that contain them."""
        if not shard.stored:
            return self._handles[shard.path].get_tensor(shard.key).reshape(1)
        row = math.prod(shard.stored[1:])
        first, last = start // row, -(-stop // row)
        rows = self._handles[shard.path].get_slice(shard.key)[first:last]
        return rows.reshape(-1)[start - first * row : stop - first * row]

    def _verify(self, path: Path) -> None:
        if path in self._unverified:
            if self._guard(path, partial(file_checksum, path)) != self._checksums[path]:
                raise DamagedError(f"{path}: damaged (its checksum differs from the recorded one)")
            self._unverified.discard(path)

    def _guard(self, path: Path, read: Callable[[], T]) -> T:
        try:
            return read()
        except (OSError, ValueError, TypeError, AttributeError, safetensors.SafetensorError) as e:
            raise unreadable(path, "damaged or missing", e) from None

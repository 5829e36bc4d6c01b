"""Read any range of any tensor of a checkpoint, however many processes wrote it."""

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

from bigan.checkpoint.part import DTYPES, file_sum, part_name
from bigan.checkpoint.progress import CheckpointError, PartSum, go_back, read_record
from bigan.distributed.world import World, together

T = TypeVar("T")
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
FORMAT_1 = {"networks.safetensors": "networks/", "optimizers.safetensors": "optimizers/"}


@dataclass(frozen=True)
class _Stored:
    """Where a range of a tensor lies: the whole of `key` in the file `path`."""

    path: Path
    key: str
    stored: tuple[int, ...]  # shape in the file
    dtype: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.stored)


class Reader:
    """The tensors of one complete checkpoint; reads headers at first, numbers when asked.

    `verify`: compare a part with its checksum before the first number is read from it, which
    reads the file once more (from memory, mostly) at the speed of a CRC-32, several GB/s. Many
    processes share that work with `verify_together`.

    Raises `CheckpointError`, in one line with the way out, if a part is missing or damaged, or if
    the pieces are not exactly those of every tensor.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder = folder
        self.progress, sums = read_record(folder)
        self._sums: dict[Path, PartSum] = {}
        self._handles: dict[Path, Any] = {}
        if sums is None:
            prefixes = {folder / name: prefix for name, prefix in FORMAT_1.items()}
        else:
            names = [part_name(index, len(sums)) for index in range(len(sums))]
            prefixes = {folder / name: "" for name in names}
            self._sums = dict(zip(prefixes, sums, strict=True))
        self._unverified = set(self._sums) if verify else set()
        self._pieces: dict[str, list[_Stored]] = {}
        for path, prefix in prefixes.items():
            for name, piece in self._guard(path, partial(self._index, path)):
                self._pieces.setdefault(prefix + name, []).append(piece)
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda p: (p.start, p.stop))
            self._check(name, pieces)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the whole tensor."""
        return {name: pieces[0].shape for name, pieces in self._pieces.items()}

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU, in memory of its own."""
        shape = self._find(name)[0].shape
        return self.read_range(name, 0, math.prod(shape)).reshape(shape)

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start], elements of the flattened tensor, on the CPU, in memory of its own.

        Raises IndexError if the tensor has no such elements.
        """
        pieces = self._find(name)
        if not 0 <= start <= stop <= math.prod(pieces[0].shape):
            raise IndexError(f"{name} of shape {pieces[0].shape} has no range [{start}, {stop})")
        out = torch.empty(stop - start, dtype=TORCH_DTYPES[pieces[0].dtype])
        for piece in pieces:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                self._verify(piece.path)
                read = partial(self._values, piece, first - piece.start, last - piece.start)
                out[first - start : last - start] = self._guard(piece.path, read)
        return out

    def verify_together(self, world: World) -> None:
        """Compare all parts with their checksums, each on one of the processes; all must call it.

        Raises `CheckpointError` on all of them if one finds damage.
        """

        def mine() -> None:
            for path in sorted(self._unverified)[world.rank :: world.size]:
                self._verify(path)

        together(world, mine)
        self._unverified.clear()

    def _find(self, name: str) -> list[_Stored]:
        if name not in self._pieces:
            raise CheckpointError(f"{self.folder}: has no {name}; {go_back(self.folder)}")
        return self._pieces[name]

    def _index(self, path: Path) -> list[tuple[str, _Stored]]:
        expected = self._sums.get(path)
        if expected is not None and path.stat().st_size != expected.bytes:
            raise ValueError(f"{path.stat().st_size} bytes instead of {expected.bytes}")
        handle = self._handles[path] = safetensors.safe_open(path, framework="pt")
        ranges = json.loads((handle.metadata() or {}).get("ranges", "{}"))
        found = []
        for key in handle.keys():  # noqa: SIM118  (not a mapping)
            view = handle.get_slice(key)
            stored, dtype = tuple(view.get_shape()), view.get_dtype()
            if dtype not in TORCH_DTYPES:
                raise ValueError(f"{key} is of type {dtype}")
            if key in ranges:
                name, _, start = key.rpartition("@")
                shape = tuple(int(size) for size in ranges[key])
                found.append((name, _Stored(path, key, stored, dtype, shape, int(start))))
            else:
                found.append((key, _Stored(path, key, stored, dtype, stored, 0)))
        return found

    def _check(self, name: str, pieces: list[_Stored]) -> None:
        first, reached = pieces[0], 0
        for piece in pieces:
            if (piece.shape, piece.dtype) != (first.shape, first.dtype):
                raise self._misfit(f"the parts differ in the shape of {name}")
            if piece.start != reached:
                raise self._misfit(f"{name} has a gap or an overlap at element {reached}")
            reached = piece.stop
        if reached != math.prod(first.shape):
            raise self._misfit(f"{name} ends at element {reached} of {math.prod(first.shape)}")

    def _misfit(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: {what}; {go_back(self.folder)}")

    def _values(self, piece: _Stored, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a stored tensor; reads no more than the rows they lie in."""
        if not piece.stored:
            return self._handles[piece.path].get_tensor(piece.key).reshape(1)
        row = math.prod(piece.stored[1:])
        first, last = start // row, -(-stop // row)
        rows = self._handles[piece.path].get_slice(piece.key)[first:last]
        return rows.reshape(-1)[start - first * row : stop - first * row]

    def _verify(self, path: Path) -> None:
        if path in self._unverified:
            if self._guard(path, partial(file_sum, path)) != self._sums[path]:
                raise CheckpointError(
                    f"{path}: damaged (its checksum is not the one it was written with); "
                    f"{go_back(self.folder)}"
                )
            self._unverified.discard(path)

    def _guard(self, path: Path, read: Callable[[], T]) -> T:
        try:
            return read()
        except (OSError, ValueError, TypeError, AttributeError, safetensors.SafetensorError) as e:
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise CheckpointError(
                f"{path}: damaged or missing ({reason}); {go_back(self.folder)}"
            ) from None

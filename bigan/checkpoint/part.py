"""The file of one rank in a checkpoint, written from a copy of its shards in host memory.

The file is a safetensors file, written from one block of memory instead of by the safetensors
package: the block is the content of the file, its CRC-32 is computed during the write (several
GB/s, faster than a disk), a full disk is an OSError with its errno, and `write` releases the GIL,
so that the training thread continues.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from bigan import atomic_files
from bigan.checkpoint.progress import PartChecksum
from bigan.checkpoint.tensor_shards import TensorShard

CHUNK_BYTES = 16 * 2**20
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def part_name(index: int, num_parts: int) -> str:
    """File name of the part of rank `index`."""
    return f"part-{index:05}-of-{num_parts:05}.safetensors"


class HostBuffer:
    """Host memory for one part, reused by every save; pinned if a shard is on a GPU."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._num_bytes = 0
        self._header = b""
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def fill(self, shards: Sequence[TensorShard]) -> None:
        """Copy the shards; on CUDA only enqueues the copies, on the current stream.

        Work enqueued later on that stream (the next step) runs after the copies. Raises ValueError
        if two shards have the same key.
        """
        # Wide types first: every tensor then begins at a multiple of its element size.
        shards = sorted(shards, key=lambda p: (-p.data.element_size(), p.name, p.start))
        self._header = _header(shards)
        self._num_bytes = sum(shard.num_bytes for shard in shards)
        gpu = next((shard.data.device for shard in shards if shard.data.is_cuda), None)
        if self._block.numel() < self._num_bytes:
            self._block = torch.empty(0, dtype=torch.uint8)  # free it before allocating more
            self._block = torch.empty(
                self._num_bytes, dtype=torch.uint8, pin_memory=gpu is not None
            )
        at = 0
        for shard in shards:
            place = self._block[at : at + shard.num_bytes].view(shard.data.dtype)
            place.view(shard.data.shape).copy_(shard.data.detach(), non_blocking=True)
            at += shard.num_bytes
        self._copied = None
        if gpu is not None:
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record(torch.cuda.current_stream(gpu))

    def write(self, path: Path) -> PartChecksum:
        """Write and sync the part; may run in any thread.

        Raises OSError; the incomplete file is deleted together with the staging folder.
        """
        if self._copied is not None:
            self._copied.synchronize()
        content = self._block.numpy()[: self._num_bytes].data
        crc32 = zlib.crc32(self._header)
        temporary = atomic_files.temporary_name(path)
        with temporary.open("wb") as file:
            file.write(self._header)
            for at in range(0, self._num_bytes, CHUNK_BYTES):
                chunk = content[at : at + CHUNK_BYTES]
                crc32 = zlib.crc32(chunk, crc32)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        return PartChecksum(len(self._header) + self._num_bytes, crc32)


def file_checksum(path: Path) -> PartChecksum:
    """Size and CRC-32 of a file; raises OSError."""
    num_bytes = crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            num_bytes += len(chunk)
            crc32 = zlib.crc32(chunk, crc32)
    return PartChecksum(num_bytes, crc32)


def _header(shards: Sequence[TensorShard]) -> bytes:
    """The header of a safetensors file: uint64 length, then JSON of that length."""
    ranges: dict[str, list[int]] = {}
    tensors: dict[str, object] = {}
    at = 0
    for shard in shards:
        key = shard.name if shard.is_unsharded else f"{shard.name}@{shard.start}"
        if key in tensors:
            raise ValueError(f"duplicate key {key}")
        if not shard.is_unsharded:
            ranges[key] = list(shard.shape)
        tensors[key] = {
            "dtype": DTYPES[shard.data.dtype],
            "shape": list(shard.data.shape),
            "data_offsets": [at, at + shard.num_bytes],
        }
        at += shard.num_bytes
    metadata = {"format": "pt", "ranges": json.dumps(ranges)}
    text = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

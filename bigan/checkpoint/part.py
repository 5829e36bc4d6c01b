"""One process's file of a checkpoint, written from a copy of its pieces in host memory.

The file is a safetensors file, written here from one block of memory: the copy is the file's
content already, its CRC-32 is made on the way (several GB/s, more than a disk takes), a full disk
is an OSError with its number, and the interpreter is free for the training thread meanwhile.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from bigan import atomic_files
from bigan.checkpoint.pieces import Piece
from bigan.checkpoint.progress import PartSum

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
    """File name of the part of process `index`."""
    return f"part-{index:05}-of-{num_parts:05}.safetensors"


class Staging:
    """Host memory that holds one part; kept from save to save."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._num_bytes = 0
        self._header = b""
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def fill(self, pieces: Sequence[Piece]) -> None:
        """Copy the pieces as they are now; on CUDA the copies are queued, not waited for.

        Whatever the current stream is given afterwards (the next step) runs after the copies.
        Raises ValueError if two pieces have the same key.
        """
        # Wide numbers first: every tensor then begins at a multiple of its element's size.
        pieces = sorted(pieces, key=lambda p: (-p.data.element_size(), p.name, p.start))
        self._header = _header(pieces)
        self._num_bytes = sum(piece.num_bytes for piece in pieces)
        gpu = next((piece.data.device for piece in pieces if piece.data.is_cuda), None)
        if self._block.numel() < self._num_bytes:
            self._block = torch.empty(0, dtype=torch.uint8)  # give back before taking more
            self._block = torch.empty(
                self._num_bytes, dtype=torch.uint8, pin_memory=gpu is not None
            )
        at = 0
        for piece in pieces:
            place = self._block[at : at + piece.num_bytes].view(piece.data.dtype)
            place.view(piece.data.shape).copy_(piece.data.detach(), non_blocking=True)
            at += piece.num_bytes
        self._copied = None
        if gpu is not None:
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record(torch.cuda.current_stream(gpu))

    def write(self, path: Path) -> PartSum:
        """Write the part, safely on disk when this returns; may run in any thread.

        Raises OSError; what is left then goes with the folder, a draft.
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
        return PartSum(len(self._header) + self._num_bytes, crc32)


def file_sum(path: Path) -> PartSum:
    """Size and CRC-32 of a file; raises OSError."""
    num_bytes = crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            num_bytes += len(chunk)
            crc32 = zlib.crc32(chunk, crc32)
    return PartSum(num_bytes, crc32)


def _header(pieces: Sequence[Piece]) -> bytes:
    """What comes before the numbers in a safetensors file: a length, and JSON of that length."""
    ranges: dict[str, list[int]] = {}
    tensors: dict[str, object] = {}
    at = 0
    for piece in pieces:
        key = piece.name if piece.is_whole else f"{piece.name}@{piece.start}"
        if key in tensors:
            raise ValueError(f"{key} is there twice")
        if not piece.is_whole:
            ranges[key] = list(piece.shape)
        tensors[key] = {
            "dtype": DTYPES[piece.data.dtype],
            "shape": list(piece.data.shape),
            "data_offsets": [at, at + piece.num_bytes],
        }
        at += piece.num_bytes
    metadata = {"format": "pt", "ranges": json.dumps(ranges)}
    text = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

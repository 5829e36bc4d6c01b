"""Host buffers of batches and their copies to the device, on a side stream.

A pinned buffer is written by decoding threads, copied to the device by DMA, and reused only after
the event recorded behind its copy has completed; until then the copy engine may read it.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigan.data.streaming.fetchers import BadSample


@dataclass(frozen=True)
class HostBatch:
    """pixels: uint8 [m, H, W, C]. labels: int64 [m]. Both in host memory."""

    pixels: Tensor
    labels: Tensor


MAX_FREE = 8  # unused buffers kept on a CPU; further ones are freed

# Filled buffers in order: (positions int64 [m], batch, replaced images).
Reading = Generator[tuple[NDArray[np.int64], HostBatch, Sequence[BadSample]], None, None]


class Sent(Protocol):
    """A batch that is being copied."""

    def arrive(self) -> tuple[Tensor, Tensor]:
        """(pixels, labels), usable on the current CUDA stream."""
        ...


class Transfer(Protocol):
    """Buffers in host memory and their copies to the device."""

    depth: int  # batches kept on the device, including the one in use

    def take(self, num: int) -> HostBatch:
        """A buffer for `num` images, to be filled."""
        ...

    def send(self, batch: HostBatch) -> Sent:
        """Start the copy of a filled buffer, which the transfer owns from now on."""
        ...


def transfer_to(device: torch.device, shape: tuple[int, int, int], prefetch: int) -> Transfer:
    """The transfer to `device` for images of `shape` [H, W, C]."""
    return ToCuda(device, shape, prefetch) if device.type == "cuda" else ToCpu(shape)


class ToCpu:
    """No copy: the consumer gets the buffer itself.

    A buffer is reused when its batch and all views of it are garbage: new memory costs a page fault
    per 4 KiB, as much as a copy of the pixels.
    """

    depth = 1

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._shape = shape
        self._free: list[NDArray[np.uint8]] = []

    def take(self, num: int) -> HostBatch:
        kept = next((k for k, b in enumerate(self._free) if len(b) == num), None)
        buffer = np.empty((num, *self._shape), np.uint8) if kept is None else self._free.pop(kept)
        # The tensor and all its views keep this array alive; the last of them releases it.
        view = buffer[:]
        weakref.finalize(view, self._give_back, buffer).atexit = False
        return HostBatch(torch.from_numpy(view), torch.empty(num, dtype=torch.int64))

    def _give_back(self, buffer: NDArray[np.uint8]) -> None:
        if len(self._free) < MAX_FREE:
            self._free.append(buffer)

    def send(self, batch: HostBatch) -> Sent:
        return _NoCopy(batch)


@dataclass(frozen=True)
class _NoCopy:
    batch: HostBatch

    def arrive(self) -> tuple[Tensor, Tensor]:
        return self.batch.pixels, self.batch.labels


class ToCuda:
    """A ring of pinned buffers, copied on a side stream, one batch ahead of the consumer.

    Memory: prefetch + 4 micro-batches on the host, 2 on the device.
    """

    depth = 2

    def __init__(self, device: torch.device, shape: tuple[int, int, int], prefetch: int) -> None:
        self._device = device
        self._shape = shape
        self._stream = torch.cuda.Stream(device)
        self._free: list[HostBatch] = []
        self._copying: collections.deque[tuple[torch.cuda.Event, HostBatch]] = collections.deque()
        self._limit = prefetch + 4
        self._made = 0

    def take(self, num: int) -> HostBatch:
        while self._copying and self._copying[0][0].query():
            self._free.append(self._copying.popleft()[1])
        if not self._free and self._made >= self._limit and self._copying:
            event, batch = self._copying.popleft()
            event.synchronize()  # the copies lag behind; waiting here does not delay the step
            self._free.append(batch)
        for index, batch in enumerate(self._free):
            if len(batch.labels) == num:
                return self._free.pop(index)
        self._made += 1
        with torch.cuda.device(self._device):
            pixels = torch.empty((num, *self._shape), dtype=torch.uint8, pin_memory=True)
            return HostBatch(pixels, torch.empty(num, dtype=torch.int64, pin_memory=True))

    def send(self, batch: HostBatch) -> Sent:
        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            pixels = batch.pixels.to(self._device, non_blocking=True)
            labels = batch.labels.to(self._device, non_blocking=True)
            event.record(self._stream)
        self._copying.append((event, batch))
        return _CudaCopy(pixels, labels, event)


@dataclass(frozen=True)
class _CudaCopy:
    pixels: Tensor
    labels: Tensor
    event: torch.cuda.Event

    def arrive(self) -> tuple[Tensor, Tensor]:
        current = torch.cuda.current_stream(self.pixels.device)
        current.wait_event(self.event)
        for tensor in (self.pixels, self.labels):
            tensor.record_stream(current)  # it was allocated on the side stream
        return self.pixels, self.labels

"""Batches on their way to the device: pinned buffers that are reused, copies on a side stream.

A buffer is written by decoding threads, copied to the device by DMA, and taken again only after
the event behind its copy has completed; until then the copy engine may still be reading it.
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


MAX_FREE = 8  # buffers that wait for their next use on a CPU; others are freed

# Filled buffers in order: (positions int64 [m], images, which of them were replaced).
Reading = Generator[tuple[NDArray[np.int64], HostBatch, Sequence[BadSample]], None, None]


class Sent(Protocol):
    """A batch that is being copied."""

    def arrive(self) -> tuple[Tensor, Tensor]:
        """(pixels, labels), ready for the stream that is current now."""
        ...


class Transfer(Protocol):
    """Buffers in host memory and the way from there to the device."""

    depth: int  # batches to keep on the device, the one in use included

    def take(self, num: int) -> HostBatch:
        """A buffer for `num` images, to be filled."""
        ...

    def send(self, batch: HostBatch) -> Sent:
        """Start bringing a filled buffer to the device; the buffer belongs to the transfer."""
        ...


def transfer_to(device: torch.device, shape: tuple[int, int, int], prefetch: int) -> Transfer:
    """The way from host memory to `device` for images of `shape` [H, W, C]."""
    return ToCuda(device, shape, prefetch) if device.type == "cuda" else ToCpu(shape)


class ToCpu:
    """Nothing to copy: the consumer gets the buffer itself.

    A buffer is used again when nobody holds its batch, nor any view of it, any more: fresh memory
    costs a page fault per 4 KiB, as much as copying the pixels.
    """

    depth = 1

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._shape = shape
        self._free: list[NDArray[np.uint8]] = []

    def take(self, num: int) -> HostBatch:
        kept = next((k for k, b in enumerate(self._free) if len(b) == num), None)
        buffer = np.empty((num, *self._shape), np.uint8) if kept is None else self._free.pop(kept)
        # The tensor and all its views keep this array alive, so it goes with the last of them.
        view = buffer[:]
        weakref.finalize(view, self._give_back, buffer).atexit = False
        return HostBatch(torch.from_numpy(view), torch.empty(num, dtype=torch.int64))

    def _give_back(self, buffer: NDArray[np.uint8]) -> None:
        if len(self._free) < MAX_FREE:
            self._free.append(buffer)

    def send(self, batch: HostBatch) -> Sent:
        return _Here(batch)


@dataclass(frozen=True)
class _Here:
    batch: HostBatch

    def arrive(self) -> tuple[Tensor, Tensor]:
        return self.batch.pixels, self.batch.labels


class ToCuda:
    """Pinned buffers in a ring, copied on a stream of their own, one batch ahead of the consumer.

    Memory: prefetch + 4 buffers of one micro-batch in the host, 2 on the device.
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
            event.synchronize()  # the copy engine is behind: waiting here costs the step nothing
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
        return _OnItsWay(pixels, labels, event)


@dataclass(frozen=True)
class _OnItsWay:
    pixels: Tensor
    labels: Tensor
    event: torch.cuda.Event

    def arrive(self) -> tuple[Tensor, Tensor]:
        current = torch.cuda.current_stream(self.pixels.device)
        current.wait_event(self.event)
        for tensor in (self.pixels, self.labels):
            tensor.record_stream(current)  # its memory was taken on the side stream
        return self.pixels, self.labels

"""Decoding in worker processes, for launch-bound steps that threads of the same process slow down.

The order is that of the threads: the main process says which samples come next. Workers are those
of PyTorch's DataLoader, which end with their parent however it dies; they are spawned, not forked,
because the parent holds CUDA and threads. Stop signals, which a scheduler sends to every process of
a job, are for the parent alone: it says when its workers end.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from bigan.data import DataError
from bigan.data.format.manifest import Index, Manifest
from bigan.data.settings import Fetch
from bigan.data.streaming.cache import NodeCache
from bigan.data.streaming.device import Reading, Transfer
from bigan.data.streaming.fetchers import BadSample, Decoder, fill_labels
from bigan.data.streaming.local_shards import LocalShards
from bigan.distributed.signals import SIGNALS

Indices = NDArray[np.int64]

# Blocked in the workers. Without sigtimedwait (macOS) they could not tell a parent that ends them.
NOT_FOR_WORKERS = set(SIGNALS if hasattr(signal, "sigtimedwait") else ())
PARENT_CHECK_SECONDS = 1.0


class _Rows(Dataset[object]):
    """(positions, samples) -> (pixels uint8 [m, H, W, C], replaced samples), or an error."""

    def __init__(self, manifest: Manifest, split: str, fetch: Fetch) -> None:
        self._manifest = manifest
        self._split = split
        self._fetch = fetch
        self._decoder: Decoder | None = None  # opened in the worker

    def __getitem__(
        self, place: tuple[Indices, Indices]
    ) -> tuple[torch.Tensor, list[BadSample]] | DataError:
        positions, samples = place
        pixels = torch.empty((len(samples), *self._manifest.image_shape), dtype=torch.uint8)
        try:
            if self._decoder is None:
                self._decoder = self._open()
            return pixels, self._decoder.read(positions, samples, pixels.numpy())
        except DataError as error:  # raised, it would come back with a traceback in its message
            return error

    def _open(self) -> Decoder:
        manifest, fetch = self._manifest, self._fetch
        cache = None
        if manifest.remote is not None and fetch.cache is not None:
            cache = NodeCache(fetch.cache, manifest.remote, fetch.cache_bytes, fetch.allow_pipe)
        shards = LocalShards(manifest, self._split, cache)
        return Decoder(shards, threading.Event(), fetch.on_bad)


class _Places:
    """The sampler: hands out (positions, samples), and notes the positions for the consumer."""

    def __init__(self, micro_batches: Iterator[tuple[Indices, Indices]]) -> None:
        self._micro_batches = micro_batches
        self.handed_out: collections.deque[tuple[Indices, Indices]] = collections.deque()

    def __iter__(self) -> Iterator[tuple[Indices, Indices]]:
        for place in self._micro_batches:
            self.handed_out.append(place)
            yield place


def in_processes(
    manifest: Manifest,
    split: str,
    index: Index,
    micro_batches: Iterator[tuple[Indices, Indices]],
    fetch: Fetch,
    transfer: Transfer,
) -> Reading:
    """Fill host buffers in order from `fetch.num_threads` worker processes."""
    places = _Places(micro_batches)
    num_workers = fetch.num_threads(manifest.resolution)
    loader: DataLoader[object] = DataLoader(
        _Rows(manifest, split, fetch),
        batch_size=None,
        sampler=places,
        num_workers=num_workers,
        prefetch_factor=-(-fetch.prefetch // num_workers),
        collate_fn=_as_it_is,
        multiprocessing_context="spawn",
        worker_init_fn=functools.partial(_listen_to, os.getpid()),
    )
    with _signals_blocked():  # the workers inherit it, and so miss none while they start
        answers = iter(loader)
    for answer in answers:
        positions, samples = places.handed_out.popleft()
        if isinstance(answer, DataError):
            raise answer
        pixels, bad = answer
        host = transfer.take(len(samples))
        host.real.copy_(pixels)
        fill_labels(host.labels.numpy(), index, positions, samples, bad)
        yield positions, host, bad


def _as_it_is(answer: object) -> object:
    return answer


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    former = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_WORKERS)
    try:
        resource_tracker.ensure_running()  # when first started it unblocks some of them
        signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_WORKERS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _listen_to(parent: int, _: int) -> None:
    """In a worker: end with the parent, or at its SIGTERM, even in the middle of a read."""
    threading.Thread(target=_follow, args=(parent,), name="parent", daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        if not NOT_FOR_WORKERS:
            time.sleep(PARENT_CHECK_SECONDS)
            continue
        info = signal.sigtimedwait(NOT_FOR_WORKERS, PARENT_CHECK_SECONDS)
        if info is not None and (info.si_signo, info.si_pid) == (signal.SIGTERM, parent):
            break
    os._exit(1)

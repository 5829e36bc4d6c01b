"""Time that a rank waits for other ranks, which distinguishes a straggler from those it delays."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from bigan.distributed.world import World


class WaitTimes(NamedTuple):
    """Seconds that are not a rank's own work."""

    waited: float  # for the slowest rank, in `wait_for_all`
    exchanged: float  # in backward passes that exchange gradients, including the optimizer step


class WaitTimer:
    """Measures the time that a rank waits for the slowest rank and exchanges gradients.

    In synchronous training every step takes as long on each rank as on the slowest. The rest of the
    step is the rank's own work: images, draws, forward passes, the previous optimizer step. No host
    synchronisation: on CUDA the time between two events on the stream is read in `collect`.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._token = torch.zeros((), device=world.device)
        self._seconds = [0.0, 0.0]
        self._events: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []

    def wait_for_all(self) -> None:
        """Wait for all ranks: an all-reduce of one number."""
        if self._world.size > 1:
            with self._timed(0):
                dist.all_reduce(self._token, op=dist.ReduceOp.MAX)

    def exchange(self) -> contextlib.AbstractContextManager[None]:
        """A context for backward passes that exchange gradients."""
        return self._timed(1)

    @contextlib.contextmanager
    def _timed(self, kind: int) -> Iterator[None]:
        if self._world.size == 1:
            yield
        elif self._token.is_cuda:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._events.append((kind, began, ended))
        else:
            start = time.perf_counter()
            yield
            self._seconds[kind] += time.perf_counter() - start

    def collect(self) -> WaitTimes:
        """The times since the last call. Synchronises with the device on CUDA."""
        if self._events:
            self._events[-1][2].synchronize()
        for kind, began, ended in self._events:
            self._seconds[kind] += began.elapsed_time(ended) / 1000
        times = WaitTimes(*self._seconds)
        self._seconds = [0.0, 0.0]
        self._events.clear()
        return times

"""How long a process waits for the others: what tells a slow one from those it holds up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from bigan.distributed.world import World


class Shared(NamedTuple):
    """Seconds that are not a process's own work."""

    waited: float  # for the last process, at the points made for it
    exchanged: float  # in backwards that exchange gradients, up to and with the optimiser's step


class Waiting:
    """The time that all processes spend alike: waiting for the last one, and exchanging.

    In synchronous training every process takes as long as the slowest. What a process does besides
    is its own work: images, draws, forwards, the optimiser of the step before. Who works longest
    there holds up the others. No host synchronisation: on CUDA the time is that between two events
    on the stream, read at `collect`.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._token = torch.zeros((), device=world.device)
        self._seconds = [0.0, 0.0]
        self._events: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []

    def here(self) -> None:
        """Wait for all the others: one collective of a single number."""
        if self._world.size > 1:
            with self._timed(0):
                dist.all_reduce(self._token, op=dist.ReduceOp.MAX)

    def exchange(self) -> contextlib.AbstractContextManager[None]:
        """Inside, processes wait for each other time and again: it is as long for all of them."""
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

    def collect(self) -> Shared:
        """Seconds spent so since the last call; on CUDA it waits for the device."""
        if self._events:
            self._events[-1][2].synchronize()
        for kind, began, ended in self._events:
            self._seconds[kind] += began.elapsed_time(ended) / 1000
        shared = Shared(*self._seconds)
        self._seconds = [0.0, 0.0]
        self._events.clear()
        return shared

"""How long a process waits for the others: what tells a slow one from those it holds up."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from bigan.world import World


class Waiting:
    """Points at which all processes wait for the last one, and the time spent there.

    In synchronous training every process takes as long as the slowest. What a process does between
    two such points is its own work; the slow one is who works longest and waits least. A point
    costs one collective of a single number. No host synchronisation: on CUDA the time is that
    between two events on the stream, read at `collect`.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._token = torch.zeros((), device=world.device)
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def here(self) -> None:
        """Wait for all the others and take the time."""
        if self._world.size > 1:
            self.reduce(self._token)

    def reduce(self, value: torch.Tensor) -> None:
        """The largest `value` over the processes, in place, taken as such a point."""
        if self._world.size == 1:
            return
        if value.is_cuda:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
            ended.record()
            self._events.append((began, ended))
        else:
            start = time.perf_counter()
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
            self._seconds += time.perf_counter() - start

    def collect(self) -> float:
        """Seconds waited since the last call; on CUDA it waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds = self._seconds + sum(a.elapsed_time(b) for a, b in self._events) / 1000
        self._seconds = 0.0
        self._events.clear()
        return seconds

"""Scalars of many steps, kept on the device and fetched once per tick with one all-reduce."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from bigan.distributed.world import World


class Statistics:
    """Running means of named scalars; `collect` is the only place that waits for the device."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add one step's detached scalars (0-d tensors on the device); never synchronizes."""
        for name, value in scalars.items():
            value = value.detach().to(self._world.device, torch.float64)
            if name in self._sums:
                self._sums[name] += value
                self._counts[name] += 1
            else:
                self._sums[name] = value
                self._counts[name] = 1

    def collect(self, **maxima: float) -> tuple[dict[str, float], dict[str, float]]:
        """(means over all steps and ranks, `maxima` over all ranks); resets the sums.

        A collective: all ranks pass the same names, and must have added the same number of steps.
        Costs two small collectives and one copy to the host.
        """
        names = sorted(self._sums)
        device = self._world.device
        means = torch.stack([self._sums[n] / self._counts[n] for n in names]) if names else None
        largest = torch.tensor(list(maxima.values()), dtype=torch.float64, device=device)
        if self._world.size > 1:
            if means is not None:
                dist.all_reduce(means)
                means /= self._world.size
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        values = torch.cat([*([means] if means is not None else []), largest]).tolist()
        self._sums.clear()
        self._counts.clear()
        return (
            dict(zip(names, values, strict=False)),
            dict(zip(maxima, values[len(names) :], strict=True)),
        )

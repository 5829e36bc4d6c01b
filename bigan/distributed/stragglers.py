"""Detection of a straggler: a rank whose own work per step is clearly longer than the others'.

In synchronous training one slow rank slows down all ranks, and the step time is equal on all of
them; the time of its own work (`wait_times`) shows which one it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bigan.distributed.world import World, gather_numbers

NUM_LOGGED = 64  # ranks with a metric of their own
SLOW_RATIO = 1.25  # own work per step, relative to the median of the other ranks
WAITING_SHARE = 0.1  # of its own work, above which waiting for images is reported
PATIENCE_TICKS = 3  # consecutive ticks before a rank is reported


def slowest(seconds: Sequence[float]) -> tuple[int, float]:
    """(rank, ratio): the rank with the largest `seconds`, relative to the median of the others."""
    rank = max(range(len(seconds)), key=lambda r: seconds[r])
    others = [s for r, s in enumerate(seconds) if r != rank]
    return rank, seconds[rank] / max(statistics.median(others), 1e-9)


class SlowRanks:
    """Reports a rank that is slower than `SLOW_RATIO` for `PATIENCE_TICKS` consecutive ticks."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._suspect = -1  # none
        self._ticks = 0  # consecutive

    def report(self, step_seconds: float, data_seconds: float) -> tuple[dict[str, float], str]:
        """Compare the ranks at a tick; a collective.

        step_seconds: this rank's own work per step, without waiting for other ranks.
        data_seconds: the part of it spent waiting for images.
        Returns (metrics, a line to print or ""), the same on all ranks.
        """
        if self._world.size == 1:
            return {}, ""
        rows = gather_numbers(self._world, [step_seconds, data_seconds])
        own, data = ([row[i] for row in rows] for i in (0, 1))
        rank, ratio = slowest(own)
        report = {f"rank/step_ms/{r}": 1000 * s for r, s in enumerate(own[:NUM_LOGGED])}
        report |= {"rank/slowest": rank, "rank/slowest_ratio": ratio}
        suspect = rank if ratio > SLOW_RATIO else -1
        self._ticks = self._ticks + 1 if suspect == self._suspect else 1
        self._suspect = suspect
        if suspect < 0 or self._ticks != PATIENCE_TICKS:
            return report, ""
        starved = data[rank] > WAITING_SHARE * own[rank]
        waits = f", {1000 * data[rank]:.0f} ms of them waiting for images" if starved else ""
        typical = statistics.median(s for r, s in enumerate(own) if r != rank)
        return report, (
            f"rank {rank} is slow: {1000 * own[rank]:.0f} ms of its own work per step{waits}, the "
            f"other ranks {1000 * typical:.0f} ms (median)"
        )

"""Do all processes still hold the same weights, and does one of them hold up the others?

Replicated training is silent about both: a replica that has drifted (a faulty memory, a process
that missed an update) goes on contributing gradients, and one slow process slows all.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bigan.distributed.world import World, gather, gather_numbers, once
from bigan.errors import RunError

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}  # by size in bytes
NUM_LOGGED = 64  # ranks, each with a metric of its own
SLOW_RATIO = 1.25  # own work per step, against the median of the others
WAITING_SHARE = 0.1  # of its own work, from which on waiting for images is worth a word
PATIENCE_TICKS = 3  # in a row, before a process is named: one tick may have been unlucky


def fingerprint(network: nn.Module) -> Tensor:
    """int64 [] on the device: a sum over the bit patterns of all that this process holds whole.

    Any change of a single number changes it. Reads every tensor once, copies none, and waits for
    nothing.
    """
    total: Tensor | None = None
    for index, tensor in enumerate(network.state_dict().values()):
        if hasattr(tensor, "_local_tensor"):  # a DTensor: each process holds another part
            continue
        bits = tensor.detach().view(INTEGERS[tensor.element_size()])
        part = bits.sum(dtype=torch.int64) * (2 * index + 1)
        total = part if total is None else total + part
    return torch.zeros((), dtype=torch.int64) if total is None else total


def check_replicas(world: World, networks: Mapping[str, nn.Module], images_seen: int) -> None:
    """Compare the networks of all processes; every rank raises the same `RunError` if they differ.

    The processes that agree with most others are taken to be right, rank 0 among equals.
    """
    if world.size == 1:
        return
    prints = [fingerprint(network).to(world.device) for network in networks.values()]
    everyone = [tuple(row) for row in gather(world, torch.stack(prints).tolist())]
    if len(set(everyone)) == 1:
        return
    votes = Counter(everyone)
    right = max(votes, key=lambda row: (votes[row], row == everyone[0]))
    wrong = []
    for rank, row in enumerate(everyone):
        names = [n for n, own, good in zip(networks, row, right, strict=True) if own != good]
        wrong += [f"rank {rank} ({', '.join(names)})"] if names else []
    problem = RunError(
        f"the processes no longer hold the same weights at images_seen = {images_seen}: "
        f"{', '.join(wrong)} {'differs' if len(wrong) == 1 else 'differ'} from the others; nothing "
        "is saved of this state; the same command goes on from the last checkpoint. Suspect the "
        "memory or the device of that process if it happens again"
    )
    raise once(world, problem)


def slowest(seconds: Sequence[float]) -> tuple[int, float]:
    """(rank, its seconds over the median of the others') of who works longest."""
    rank = max(range(len(seconds)), key=lambda r: seconds[r])
    others = [s for r, s in enumerate(seconds) if r != rank]
    return rank, seconds[rank] / max(statistics.median(others), 1e-9)


class SlowRanks:
    """Names a process that takes clearly longer than the others at every tick for a while."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._suspect = -1  # nobody
        self._ticks = 0  # in a row

    def report(self, step_seconds: float, data_seconds: float) -> tuple[dict[str, float], str]:
        """From this rank's own seconds per step (waiting for others left out), those of all.

        Returns (values for the log, a line to show or ""); all ranks take part. `data_seconds` is
        the part of them that this rank waited for images.
        """
        if self._world.size == 1:
            return {}, ""
        everyone = gather_numbers(self._world, [step_seconds, data_seconds])
        own, data = ([row[i] for row in everyone] for i in (0, 1))
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
            f"others {1000 * typical:.0f} ms; all of them wait for it"
        )

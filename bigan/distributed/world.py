"""Who am I among the processes: a plain value, passed in; nothing in bigan keeps a global rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from bigan.errors import PeerError, RunError, UserError

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
TOLD = "raised on rank 0"


@dataclass(frozen=True)
class World:
    """One process's place among all processes of a run.

    `rank` in [0, size) is global over all nodes; `local_rank` counts within the node and serves
    only to pick a device. Data and draws are divided by `rank` and `size`, never by `local_rank`
    (dividing by the local rank shows half of the data to nobody on two nodes).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not in [0, {self.size})")

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and talks to trackers."""
        return self.rank == 0

    def share(self, num: int) -> slice:
        """This rank's slice of `num` items in global order; raises ValueError if uneven."""
        if num % self.size:
            raise ValueError(f"{num} items cannot be divided evenly among {self.size} processes")
        each = num // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    if world.size > 1:
        dist.barrier()


def broadcast(world: World, value: T) -> T:
    """Rank 0's `value` (any picklable object from our own processes), on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def sum_over_ranks(world: World, values: torch.Tensor) -> None:
    """Add up `values` over all ranks, in place."""
    if world.size > 1:
        dist.all_reduce(values)


def mean_over_ranks(world: World, values: torch.Tensor) -> torch.Tensor:
    """The mean of `values` over all ranks; `values` stays as it is."""
    total = values.clone()
    sum_over_ranks(world, total)
    return total / world.size


def gather(world: World, value: T) -> list[T]:
    """Every rank's `value` (any picklable object of our own), in order of rank, on every rank."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def gather_numbers(world: World, values: Sequence[float]) -> list[list[float]]:
    """Every rank's `values` (equally many on each), in order of rank, on every rank."""
    if world.size == 1:
        return [list(values)]
    own = torch.tensor(values, dtype=torch.float64, device=world.device)
    everyone = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(everyone, own)
    return torch.stack(everyone).tolist()


def largest(world: World, value: float) -> float:
    """The largest `value` of all ranks, on every rank."""
    return max(row[0] for row in gather_numbers(world, [value]))


def everyone(world: World, holds: bool) -> bool:
    """Whether `holds` is true on all ranks."""
    return all(gather(world, holds))


def together(world: World, work: Callable[[], T]) -> T:
    """Run `work` (which holds no collective) on this rank, as every rank does, and compare notes.

    Returns this rank's result. If `work` raised anywhere, every rank raises the first failing
    rank's error (`UserError`, `RunError`, else `PeerError`), so that none waits for ever.
    """
    if world.size == 1:
        return work()
    result: T | None = None
    own: Exception | None = None
    try:
        result = work()
    except (UserError, RunError) as error:
        own = error
    except Exception as error:
        own = PeerError(f"rank {world.rank}: {type(error).__name__}: {error}")
    _raise_first(world, gather(world, own))
    return result  # type: ignore[return-value]


def on_main(world: World, decide: Callable[[], T]) -> T:
    """Rank 0 looks and decides, everyone is told.

    Runs `decide` on rank 0 and returns its result on every rank; if it raises a `UserError` or
    `RunError` there, every rank raises the same, so that none is left waiting in a collective.
    """
    result = together(world, decide if world.is_main else lambda: None)
    return broadcast(world, result)  # type: ignore[return-value]


def once(world: World, error: E) -> E:
    """`error`, for every rank to raise alike: noted so that rank 0 alone prints it."""
    if not world.is_main:
        error.add_note(TOLD)
    return error


def _raise_first(world: World, errors: Sequence[Exception | None]) -> None:
    for error in errors:
        if error is not None:
            raise once(world, error)

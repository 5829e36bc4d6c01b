"""Rank and world size as a plain value that is passed in, and collectives on Python objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from bigan.errors import REPORTED_ELSEWHERE, PeerError, RunError, UserError, unusable_file

T = TypeVar("T")
E = TypeVar("E", bound=Exception)


@dataclass(frozen=True)
class World:
    """The rank of this process and the world size.

    `rank` in [0, size) is global over all nodes; `local_rank` is the rank within the node and only
    selects a device. Data and draws are divided by `rank` and `size`, never by `local_rank`: on two
    nodes that would leave half of the data unread.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not in [0, {self.size})")

    @property
    def is_rank_0(self) -> bool:
        """Whether this is the rank that writes files and logs to trackers."""
        return self.rank == 0

    def share(self, num: int) -> slice:
        """This rank's slice of `num` items in global order; ValueError if not divisible."""
        if num % self.size:
            raise ValueError(f"{num} items cannot be divided evenly among {self.size} ranks")
        each = num // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


def barrier(world: World) -> None:
    """Wait until every rank has called this."""
    if world.size > 1:
        dist.barrier()


def broadcast(world: World, value: T) -> T:
    """Rank 0's `value`, any picklable object, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def sum_over_ranks(world: World, values: torch.Tensor) -> None:
    """Sum `values` over all ranks, in place."""
    if world.size > 1:
        dist.all_reduce(values)


def mean_over_ranks(world: World, values: torch.Tensor) -> torch.Tensor:
    """The mean of `values` over all ranks; `values` stays as it is."""
    total = values.clone()
    sum_over_ranks(world, total)
    return total / world.size


def gather(world: World, value: T) -> list[T]:
    """Every rank's `value`, any picklable object, in order of rank, on every rank."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def gather_numbers(world: World, values: Sequence[float]) -> list[list[float]]:
    """Every rank's `values` (the same number on each), in order of rank, on every rank."""
    if world.size == 1:
        return [list(values)]
    own = torch.tensor(values, dtype=torch.float64, device=world.device)
    rows = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(rows, own)
    return torch.stack(rows).tolist()


def max_over_ranks(world: World, value: float) -> float:
    """The maximum of `value` over all ranks, on every rank."""
    return max(row[0] for row in gather_numbers(world, [value]))


def all_ranks_agree(world: World, holds: bool) -> bool:
    """Whether `holds` is true on all ranks; the same on every rank."""
    return all(gather(world, holds))


def on_all_ranks(world: World, work: Callable[[], T]) -> T:
    """Run `work`, which must call no collective, on all ranks; raise on all ranks if one fails.

    Returns this rank's result. If `work` raises on any rank, every rank raises the error of the
    first such rank (`UserError` or `RunError`, `UserError` also for a file that cannot be used,
    else `PeerError`), so that no rank waits forever in the next collective.
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
        unusable = unusable_file(error) if isinstance(error, OSError) else None
        own = unusable or PeerError(f"rank {world.rank}: {type(error).__name__}: {error}")
    _raise_first(world, gather(world, own))
    return result  # type: ignore[return-value]


def on_rank_0(world: World, decide: Callable[[], T]) -> T:
    """Run `decide` on rank 0 and return its result on every rank.

    If it raises, every rank raises: the same `UserError` or `RunError`, else a `PeerError`.
    """
    result = on_all_ranks(world, decide if world.is_rank_0 else lambda: None)
    return broadcast(world, result)  # type: ignore[return-value]


def reported_by_rank_0(world: World, error: E) -> E:
    """`error`, to be raised on every rank and printed on rank 0 only (a note marks the others)."""
    if not world.is_rank_0:
        error.add_note(REPORTED_ELSEWHERE)
    return error


def _raise_first(world: World, errors: Sequence[Exception | None]) -> None:
    for error in errors:
        if error is not None:
            raise reported_by_rank_0(world, error)

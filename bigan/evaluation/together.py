"""Work that all ranks do: if one of them fails, all of them stop, and none waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from bigan.errors import RunError, UserError
from bigan.world import World

T = TypeVar("T")


def together(world: World, work: Callable[[], T]) -> T:
    """Run `work` (which holds no collective) on this rank, as every rank does, and compare notes.

    Returns this rank's result. If `work` raised anywhere, every rank raises: the failing one its
    own error, the others the first one's as the same kind (`UserError`, `RunError`, RuntimeError).
    """
    if world.size == 1:
        return work()
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    own = None if failure is None else (_kind(failure), str(failure))
    notes: list[tuple[type[Exception], str] | None] = [None] * world.size
    dist.all_gather_object(notes, own)
    if failure is not None:
        raise failure
    for rank, note in enumerate(notes):
        if note is not None:
            kind, message = note
            raise kind(message if kind is UserError else f"rank {rank}: {message}")
    return result  # type: ignore[return-value]


def _kind(error: Exception) -> type[Exception]:
    return next((kind for kind in (UserError, RunError) if isinstance(error, kind)), RuntimeError)

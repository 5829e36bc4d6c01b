"""Short streams over the digits, and comparisons of their batches."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import torch

from bigan.data.settings import Fetch
from bigan.data.streaming.stream import Batch, ShardStream
from bigan.distributed.world import World

BLOCK = 400


def take(data: object, num: int = 40, fetch: Fetch | None = None, **changes: object) -> list[Batch]:
    settings: dict = {"seed": 0, "world": World(), "batch": 48, "block": BLOCK, **changes}
    with ShardStream(data, "train", fetch=fetch, **settings) as stream:  # type: ignore[arg-type]
        return list(itertools.islice(stream, num))


def same(left: list[Batch], right: list[Batch]) -> bool:
    pairs = list(zip(left, right, strict=True))
    return all(
        torch.equal(a.pixels, b.pixels)
        and torch.equal(a.labels, b.labels)
        and np.array_equal(a.positions, b.positions)
        for a, b in pairs
    )


def data_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("bigan-") and name != "bigan-transfers"]

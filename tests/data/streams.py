"""Short streams over the digits, and comparisons of their batches."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import torch
from web import Web

from bigan.data.format.manifest import Manifest
from bigan.data.settings import Fetch
from bigan.data.stores.store import Store
from bigan.data.streaming.cache import NodeCache
from bigan.data.streaming.ranges import ShardRanges
from bigan.data.streaming.stream import Batch, ShardStream
from bigan.distributed.world import World

BLOCK = 400


def take(data: object, num: int = 40, fetch: Fetch | None = None, **changes: object) -> list[Batch]:
    settings: dict = {
        "seed": 0,
        "world": World(),
        "batch": 48,
        "block": BLOCK,
        "lanes": 1,
        **changes,
    }
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
    """Threads of open streams; the one for transfers is kept by the process."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("bigan-") and name != "bigan-transfers"]


def flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 0xFF
    file.write_bytes(bytes(content))


def node_cache(data: Path, url: str, folder: Path) -> NodeCache:
    """A cache of the training split of `data` at `url`."""
    manifest = Manifest.load(data)
    ranges = ShardRanges(manifest, "train", manifest.load_index("train"), Store(url), False)
    return NodeCache(folder, ranges)


def num_bytes(web: Web) -> int:
    """The bytes of shards that were served."""
    return sum(num for name, num in web.bytes.items() if name.endswith(".tar"))
